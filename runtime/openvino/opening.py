"""The components of a compiled directory that OpenVINO runs, and their dtype.

bfloat16 is what the checkpoints of the family were trained and published in, and its rounding, one
part in 512, is finer than INT8's; so it is the default for directories at bf16 and for graphs that
round activations to 8 bits. Others are computed in float32.

Language models stay with ONNX Runtime, whose decoders write a token in less time, and which refuses
ids that are not in the vocabulary, where OpenVINO reads zeros.
"""

from __future__ import annotations

from internvl_edge.artifact import Artifact
from internvl_edge.artifact.components import find_component, unsigned_graph
from internvl_edge.errors import HardwareError, UsageError
from internvl_edge.runtime.openvino.options import FLOAT32, OpenVinoOptions
from internvl_edge.runtime.openvino.session import OpenVinoSession, fastest_dtype
from internvl_edge.runtime.ort import session as ort
from internvl_edge.runtime.ort.cpu import products_saturate
from internvl_edge.runtime.ort.opening import ROUNDING
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.session import Session

__all__ = ["open_component"]


def open_component(
    artifact: Artifact,
    component: str,
    device: str = "auto",
    backend: str = "openvino",
    *,
    options: OpenVinoOptions = OpenVinoOptions(),
) -> Session:
    """Open what sees images alone in OpenVINO, and the rest in ONNX Runtime.

    Raises:
        UsageError: options of another backend.
        HardwareError: a device that is not the CPU, or a CPU whose INT8 products saturate.
    """
    if not isinstance(options, OpenVinoOptions):
        raise UsageError(f"{backend}: expected OpenVinoOptions, found {type(options).__name__}")
    if device not in ("auto", "cpu"):
        raise HardwareError(f"device {device!r}: {backend} computes on the CPU; use device 'cpu'")
    if not find_component(component).is_vision:
        language = options.language or OrtOptions(num_threads=options.num_threads)
        return ort.open_component(artifact, component, "cpu", options=language)
    path, record = artifact.onnx_path(component), artifact.manifest.components[component]
    rounds = ROUNDING in path.read_bytes()
    if rounds and unsigned_graph(component) in artifact.manifest.files and products_saturate():
        raise HardwareError(
            f"{artifact.path}: {component} at int8: expected a CPU with VNNI or AMX, without which "
            f"{backend} sums products of 8 bits in 16; use backend 'onnxruntime'"
        )
    is_rounded = rounds or artifact.manifest.precision == "bf16"
    with artifact.held(path.name) as (folder, watch):
        return OpenVinoSession(
            folder / path.name,
            path,
            record.inputs,
            record.outputs,
            watch=watch,
            dtype=options.dtype or (fastest_dtype() if is_rounded else FLOAT32),
            num_threads=options.num_threads,
        )
