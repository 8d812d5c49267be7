"""What ONNX Runtime says when it fails, as our errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from internvl_edge.errors import (
    ArtifactError,
    FeedError,
    HardwareError,
    InternVLError,
    ResourceError,
)
from internvl_edge.runtime.ort.options import CUDA, Provider, names_of

__all__ = ["load_error", "run_error"]

OUT_OF_MEMORY = re.compile(
    r"alloc.*(fail|memory)|fail.*to allocate|bad_alloc|out of memory|std::length_error",
    re.IGNORECASE,
)
NO_KERNEL = re.compile(r"implementation for (\w+).* node with name '([^']*)'")


def load_error(
    error: Exception, path: Path, folder: Path, providers: Sequence[Provider]
) -> InternVLError:
    """Make the error of a graph that was not opened; what it says of ``folder`` is of ``path``."""
    message = _message(error).replace(f"{folder}/", f"{path.parent}/")
    missing = NO_KERNEL.search(message)
    if missing:
        where = "CUDA" if CUDA in names_of(providers) else "CPU"
        return HardwareError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} has no {where} kernel for "
            f"{missing[1]} of node {missing[2]!r} in its dtype; bfloat16 needs a GPU, "
            "or for images alone backend 'openvino'; export at fp32, fp16, int8 or fp8 to run there"
        )
    if _is_memory(error, message):
        return ResourceError(f"not enough memory to open {path}: {message}")
    return ArtifactError(f"ONNX Runtime cannot open {path}: {message}")


def run_error(error: Exception, path: Path) -> InternVLError:
    """Make the error of a call that failed."""
    message = _message(error)
    if _is_memory(error, message):
        return ResourceError(
            f"not enough memory to run {path.name}: {message}; use a smaller batch"
        )
    if type(error).__name__ == "InvalidArgument":  # such as an id outside the vocabulary
        return FeedError(f"{path.name} cannot run on these values: {message}")
    return InternVLError(f"ONNX Runtime failed to run {path}: {message}")


def _message(error: Exception) -> str:
    """Return ONNX Runtime's own words, on one line and without its prefix."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    return " ".join(text.split()) or type(error).__name__


def _is_memory(error: Exception, message: str) -> bool:
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(message) is not None
