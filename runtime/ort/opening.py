"""ONNX Runtime's own session of a graph: opened, with other options where it refuses these."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import onnxruntime

from internvl_edge.artifact.pins import Watch
from internvl_edge.errors import HardwareError, UsageError
from internvl_edge.runtime.feeds import WRITE_INDICES
from internvl_edge.runtime.ort.failures import load_error
from internvl_edge.runtime.ort.options import (
    CPU,
    OrtOptions,
    Provider,
    captures,
    choose_providers,
    load_gpu_libraries,
    native_options,
)
from internvl_edge.runtime.ort.values import is_numpy

__all__ = ["Graph", "open_native"]

# Moving a float16 Q/DQ pair over a Transpose, they make the new one float32, and loading fails.
# The latter pay where graphs are float32, which is wherever they run for their own sake.
QDQ_PROPAGATION = "QDQPropagationTransformer"
TRANSPOSES = ("TransposeOptimizer", "TransposeOptimizer_CPUExecutionProvider")
CONSTANT_FOLDING = "ConstantFolding"
# It joins the pairs of an activation's readers. Kernels take unsigned activations, and ONNX Runtime
# turns only a pair of one reader unsigned: of a decoder of 24 layers it fused 48 products of 168.
COMMON_SUBEXPRESSIONS = "CommonSubexpressionElimination"
# In a graph's bytes: it rounds activations. What only DequantizeLinear writes has a small q.
ROUNDING = b"QuantizeLinear"
FILES_IN_MEMORY = "add_external_initializers_from_files_in_memory"
EXTERNAL_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
# In what it says of a graph with kernels on the host between those on the GPU.
CAPTURE = "graph capture"
# Releases up to 1.31 make INT8 products of FP8 ones, and refuse them; unfused, weights stay FP8.
QDQ_FUSION = "QDQSelectorActionTransformer"
FP8_FUSED = re.compile(r"float8e4m3fn.*MatMulIntegerToFloat", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A graph to be opened."""

    path: Path  # as errors name it
    folder: Path  # where it is opened by its name, and its external data lies
    data: bytes | None  # in place of the file's
    watch: Watch | None  # over its external data


class _Again(Exception):
    """ONNX Runtime refuses a graph that it takes with these options."""

    def __init__(self, options: OrtOptions) -> None:
        self.options = options


def open_native(graph: Graph, device: str, options: OrtOptions) -> tuple[Any, Sequence[Provider]]:
    """Open ONNX Runtime's session, and say which providers were asked for.

    Raises:
        ArtifactError: ONNX Runtime refuses the file.
        HardwareError, MissingDependency: the device is not there, or cannot compute the graph.
        ResourceError: memory ran out.
    """
    while True:
        try:
            return _opened(graph, device, options)
        except _Again as other:  # outside of it, nothing holds what was opened
            options = other.options


def _opened(graph: Graph, device: str, options: OrtOptions) -> tuple[Any, Sequence[Provider]]:
    """Open it; raise _Again where it takes other options."""
    providers = choose_providers(device, options)
    missing = load_gpu_libraries() if providers != [CPU] else ""
    native = native_options(options)
    if graph.data is not None:
        native.add_session_config_entry(EXTERNAL_DATA_FOLDER, str(graph.folder))
    maps = _copy_weights(graph.watch, native) if options.copy else []
    try:
        session = onnxruntime.InferenceSession(
            str(graph.folder / graph.path.name) if graph.data is None else graph.data,
            native,
            providers=providers,
            disabled_optimizers=[
                QDQ_PROPAGATION,
                *(TRANSPOSES if options.exact else ()),
                *((CONSTANT_FOLDING,) if options.fold is False else ()),
                *(() if options.qdq else (QDQ_FUSION,)),
                *((COMMON_SUBEXPRESSIONS,) if providers == [CPU] and _rounds(graph) else ()),
            ],
        )
    except Exception as error:
        if CAPTURE in str(error) and options.graphs:
            raise _Again(replace(options, graphs=False)) from None
        if FP8_FUSED.search(str(error)) and options.qdq:
            raise _Again(replace(options, qdq=False)) from None
        raise load_error(error, graph.path, graph.folder, providers) from error
    del maps  # which ONNX Runtime copies from until the session is there
    if len(session.get_providers()) < len(providers):  # it falls back without an error
        raise HardwareError(
            f"device {device!r}: ONNX Runtime could not start its GPU provider; its CUDA and "
            'cuDNN libraries are missing or do not fit; run: pip install "internvl-edge'
            f"[ort-gpu]\", or use device 'cpu'{missing and f' ({missing})'}"
        )
    names = {value.name for value in session.get_inputs()}
    if captures(providers) and not is_numpy(session) and WRITE_INDICES not in names:
        # bfloat16 is not written to the memory that a graph reads
        raise _Again(replace(options, graphs=False))
    return session, providers


def _rounds(graph: Graph) -> bool:
    """Tell whether a graph rounds activations."""
    if graph.data is not None:
        return ROUNDING in graph.data
    try:
        return ROUNDING in (graph.folder / graph.path.name).read_bytes()
    except OSError:  # which ONNX Runtime says better
        return False


def _copy_weights(watch: Watch | None, native: Any) -> list[mmap]:
    """Have ONNX Runtime copy external data from memory instead of mapping its files."""
    if watch is None or not hasattr(native, FILES_IN_MEMORY):
        raise UsageError(
            "OrtOptions(copy=True): expected a component of a compiled directory, see "
            f"open_session, and ONNX Runtime 1.26 or later, found {onnxruntime.__version__}"
        )
    files = watch.files
    maps = [mmap(file.fileno(), 0, access=ACCESS_READ) for file in files.values()]
    getattr(native, FILES_IN_MEMORY)([*files], maps, [len(one) for one in maps])
    return maps
