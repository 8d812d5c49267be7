"""Which graph of a component is opened, and with which options, where it has several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from internvl_edge.artifact import Artifact
from internvl_edge.artifact.components import (
    cpu_graph,
    cuda_graph,
    find_component,
    unsigned_graph,
)
from internvl_edge.errors import HardwareError
from internvl_edge.runtime.feeds import ROWS_UP_TO
from internvl_edge.runtime.generation.fixed_cache import PAST
from internvl_edge.runtime.ort.cpu import products_saturate
from internvl_edge.runtime.ort.opening import ROUNDING
from internvl_edge.runtime.ort.options import CPU, OrtOptions, choose_providers, threads_of
from internvl_edge.types import Array

__all__ = ["Choice", "choose_graph"]

# An unsigned graph shifts its weights from int8 to uint8 by a node of its own. Folded at opening,
# they are copied twice, and products of one row are 8 times as fast; unfolded, they stay in the
# file's pages. So small components fold, and decoders; a tower of billions has to fit.
MAX_FOLDED_NBYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A graph of a compiled directory, and how it is opened."""

    path: Path
    options: OrtOptions
    pads: bool  # see ``DecoderSession.pads``
    # Of inputs with values of their own, other ones for every call
    constants: Mapping[str, Array] = field(default_factory=dict)


def choose_graph(artifact: Artifact, component: str, device: str, options: OrtOptions) -> Choice:
    """Choose the graph of a component for a device.

    Raises:
        UsageError: the directory has no such component.
        HardwareError: the device is not there, or would run the graph slower than another.
    """
    path, unsigned = artifact.onnx_path(component), unsigned_graph(component)
    files, fused = artifact.manifest.files, cuda_graph(component)
    known = find_component(component)
    is_cpu, is_fused = choose_providers(device, options) == [CPU], False
    if not is_cpu and options.gpu_provider == "cuda":
        if not options.allow_slow:
            _require_fast(path, artifact.manifest.precision, component)
        is_fused = options.contrib and fused in files
        path = artifact.file(fused) if is_fused else path
    # ONNX Runtime computes the masks of texts on the host, between kernels, and the shapes of a
    # cache that grows change: CUDA graphs are made of what sees images alone, and of decoders
    # without a mask.
    pads = not (is_fused and known.takes_cache)
    if not known.is_vision and pads:
        options = replace(options, graphs=False)
    constants: dict[str, Array] = {}
    if is_cpu and options.fold is not False and cpu_graph(component) in files:  # joined at opening
        path = artifact.file(cpu_graph(component))
        if threads_of(options) > _key_heads(artifact, component):  # else some would wait
            constants = {ROWS_UP_TO: np.zeros(1, np.int64)}
    if is_cpu and unsigned in files and products_saturate():
        path = artifact.file(unsigned)
        is_large = artifact.manifest.components[component].nbytes > MAX_FOLDED_NBYTES
        if options.fold is None and is_large and not known.takes_cache:
            options = replace(options, fold=False)
    return Choice(path=path, options=options, pads=pads, constants=constants)


def _key_heads(artifact: Artifact, component: str) -> int:
    """Look up how many heads of keys a decoder's cache has, (B, heads, P, d)."""
    inputs = artifact.manifest.components[component].inputs
    shapes = [spec.shape for spec in inputs if spec.name.startswith(PAST)]
    return int(shapes[0][1])


def _require_fast(path: Path, precision: str, component: str) -> None:
    """Refuse 8-bit products, which ONNX Runtime's CUDA provider has not: it dequantizes weights.

    Raises:
        HardwareError: the graph rounds activations.
    """
    if ROUNDING in path.read_bytes():
        raise HardwareError(
            f"{path}: {component} multiplies in 8 bits ({precision}), and ONNX Runtime's CUDA "
            "provider would dequantize all of its weights in every call, slower than bf16; on a "
            "GPU, export at --precision bf16, or build an engine, internvl-edge build, for "
            "8 bits; --allow-slow, OrtOptions(allow_slow=True), runs it all the same"
        )
