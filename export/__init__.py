"""From a checkpoint to verified ONNX components and engines.

    checkpoint  reads the files of a checkpoint; start here
    config      reads its ``config.json``
    models      the PyTorch reference;  components  the parts of it that are compiled
    graph       traces and rewrites ONNX graphs;  weights  writes or links their tensors
    towers      loads one block at a time, for calibration
    compare     compares a compiled component with the reference
    engine      builds TensorRT engines
    synthetic   writes checkpoints of the real shapes with made-up weights

``internvl_edge.compiler`` calls them in turn.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from internvl_edge.errors import MissingDependency

if __name__ != "internvl_edge.export":
    raise ImportError("import internvl_edge.export, not the folder export of the repository")

if TYPE_CHECKING:
    from internvl_edge.export.checkpoint.checkpoint import load_reference, open_checkpoint

__all__ = ["load_reference", "open_checkpoint", "require_packages"]

PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors")


def require_packages() -> None:
    """Check that every package that this package imports is installed.

    Raises:
        MissingDependency: a package is missing; names it and the extra that installs it.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            raise MissingDependency.of(package, "export")


def __getattr__(name: str) -> Any:
    if name in __all__:
        from internvl_edge.export.checkpoint import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
