"""The component that embeds images, as a model of Triton's own ONNX Runtime or TensorRT.

Programs that have pixels send them to it directly, and on a GPU the models in Python do so too.
Which file it opens is decided here, as nobody checks it later: Triton knows nothing of this format.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from internvl_edge.artifact.components import IMAGE_EMBED, unsigned_graph
from internvl_edge.artifact.manifest import TensorSpec
from internvl_edge.artifact.onnx_gate import FLOAT8, OnnxSummary, scan
from internvl_edge.artifact.onnx_wire import MAX_NBYTES
from internvl_edge.artifact.open import Artifact
from internvl_edge.artifact.sidecar import EngineInfo, engine_info
from internvl_edge.errors import UsageError
from internvl_edge.integrations.triton.config import Word, entries
from internvl_edge.integrations.triton.folder import VERSION, ModelFolder, batching, instance_group
from internvl_edge.integrations.triton.options import RepositoryOptions

__all__ = ["COMPONENT", "component_model", "require_computable"]

COMPONENT = IMAGE_EMBED
TENSORRT = "tensorrt"
BFLOAT16 = "bf16"  # the precision whose graphs compute in it
ROUNDING = "QuantizeLinear"  # of activations
TYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "int64": "INT64"}


def component_model(artifact: Artifact, options: RepositoryOptions) -> ModelFolder:
    """Choose the files that Triton's backend opens, and write down how.

    Raises:
        UsageError: the directory has none that the backend can run; which, and what to do.
    """
    if COMPONENT not in artifact.manifest.components:
        has = ", ".join(artifact.manifest.components)
        raise UsageError(
            f"--backend {options.backend} runs {COMPONENT}, and {artifact.path} has {has}; leave "
            f"--backend out, or export with --components {COMPONENT}"
        )
    return _engines(artifact, options) if options.backend == TENSORRT else _graph(artifact, options)


def require_computable(artifact: Artifact, component: str, gpu: int | None) -> None:
    """Refuse a component that ONNX Runtime cannot compute on the device, or only slowly.

    Raises:
        UsageError: says why, and what can be.
    """
    file = artifact.manifest.components[component].file
    if gpu is None and artifact.manifest.precision == BFLOAT16:
        raise UsageError(
            f"{artifact.path / file} computes in bfloat16, which ONNX Runtime does not on a "
            "processor; add --device cuda:0, or export at --precision fp32"
        )
    if gpu is not None and ROUNDING in _summary(artifact, file).op_types:
        raise UsageError(
            f"{artifact.path / file} multiplies in 8 bits, and ONNX Runtime would dequantize its "
            "weights at every call on a GPU; export at --precision bf16 or fp16, or build engines "
            "and take --backend tensorrt"
        )


# --- ONNX Runtime --------------------------------------------------------------------------------


def _graph(artifact: Artifact, options: RepositoryOptions) -> ModelFolder:
    record = artifact.manifest.components[COMPONENT]
    require_computable(artifact, COMPONENT, options.gpu)
    if FLOAT8 in _summary(artifact, record.file).data_types:
        raise UsageError(
            f"{artifact.path / record.file} has FP8 products, which ONNX Runtime fuses into ones "
            "that it has not; this package opens them unfused, and Triton's backend cannot: leave "
            "--backend out, or build engines and take --backend tensorrt"
        )
    name = record.file
    if options.gpu is None and artifact.has(unsigned_graph(COMPONENT)):
        name = unsigned_graph(COMPONENT)  # which no processor rounds otherwise
    threads = {"intra_op_thread_count": {"string_value": str(options.threads)}}
    files = (name, *artifact.weights[name])
    config = _config(options, "onnxruntime", options.max_batch, record.inputs, record.outputs)
    config |= {
        "default_model_filename": name,
        "instance_group": [instance_group(options, gpu=options.gpu)],
        "parameters": entries(threads),
        "model_warmup": [_warmup(record.inputs)],
    }
    return ModelFolder(
        name=COMPONENT,
        config=config,
        linked={f"{VERSION}/{file}": file for file in files},
    )


def _summary(artifact: Artifact, name: str) -> OnnxSummary:
    sizes = {file: record.nbytes for file, record in artifact.manifest.files.items()}
    return scan(artifact.read(name, MAX_NBYTES), files=sizes, where=str(artifact.path / name))


# --- TensorRT ------------------------------------------------------------------------------------


def _engines(artifact: Artifact, options: RepositoryOptions) -> ModelFolder:
    """Take the last engine that was built for each kind of GPU."""
    infos: dict[str, EngineInfo] = {}
    files: dict[str, str] = {}
    for engine in artifact.engines(COMPONENT, TENSORRT):
        info = engine_info(artifact, engine.sidecar)
        for named in info.compute_capabilities:
            infos[_capability(named)] = info
            files[_capability(named)] = engine.file
    if not infos:
        raise UsageError(_no_engine(artifact))
    releases = sorted({info.builder_version for info in infos.values()})
    if len(releases) > 1:
        raise UsageError(
            f"{artifact.path} has engines of TensorRT {' and '.join(releases)}, and a Triton has "
            "one release; build them again with one: internvl-edge build OUT --target tensorrt"
        )
    smallest = max(info.profile.batch[0] for info in infos.values())
    if smallest > 1:
        raise UsageError(
            f"{artifact.path}: an engine of {COMPONENT} takes batches from {smallest}, and Triton "
            "sends single rows too; build it from 1 on: internvl-edge build OUT --target tensorrt"
        )
    max_batch = min(options.max_batch, *(info.profile.batch[2] for info in infos.values()))
    some = next(iter(infos.values()))
    bases = {name: name.rpartition("/")[2] for name in files.values()}
    config = _config(options, TENSORRT, max_batch, some.inputs, some.outputs)
    config |= {
        "cc_model_filenames": entries({cc: bases[name] for cc, name in sorted(files.items())}),
        "instance_group": [instance_group(options, gpu=options.gpu) | {"profile": ["0"]}],
        "optimization": {"cuda": {"graphs": True}},
        "model_warmup": [_warmup(some.inputs)],
    }
    return ModelFolder(
        name=COMPONENT,
        config=config,
        linked={f"{VERSION}/{base}": name for name, base in bases.items()},
        built_by=releases[0],
    )


def _capability(sm: str) -> str:
    """Write ``SM89`` as Triton does: ``8.9``."""
    number = sm.removeprefix("SM")
    return f"{number[:-1]}.{number[-1]}"


def _no_engine(artifact: Artifact) -> str:
    others = sorted({engine.target for engine in artifact.engines(COMPONENT)})
    found = (
        f"only engines of {', '.join(others)}, another runtime, which Triton does not have"
        if others
        else "no engine of it"
    )
    return (
        f"--backend tensorrt: {artifact.path} has {found}; build one on the GPU that will run it, "
        f"with the TensorRT of your Triton: internvl-edge build {artifact.path} --target tensorrt "
        f"--components {COMPONENT}"
    )


# --- parts of a configuration --------------------------------------------------------------------


def _config(
    options: RepositoryOptions,
    backend: str,
    max_batch: int,
    inputs: Iterable[TensorSpec],
    outputs: Iterable[TensorSpec],
) -> dict[str, Any]:
    return {
        "name": COMPONENT,
        "backend": backend,
        "max_batch_size": max_batch,
        "input": [_tensor(spec) for spec in inputs],
        "output": [_tensor(spec) for spec in outputs],
        "dynamic_batching": batching(options),
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": _type(spec), "dims": _dims(spec)}


def _warmup(inputs: Iterable[TensorSpec]) -> dict[str, Any]:
    """Write a first call, of zeros."""
    zeros = {
        spec.name: {"data_type": _type(spec), "dims": _dims(spec), "zero_data": True}
        for spec in inputs
    }
    return {"name": "zeros", "batch_size": 1, "inputs": entries(zeros)}


def _type(spec: TensorSpec) -> Word:
    return Word(f"TYPE_{TYPES[spec.dtype]}")


def _dims(spec: TensorSpec) -> list[int]:
    """Write the dimensions after the batch; one that is decided at run time is −1."""
    return [-1 if isinstance(size, str) else size for size in spec.shape[1:]]
