"""From a checkpoint to verified ONNX components and engines.

    config      what ``config.json`` says;  checkpoint  the files of a checkpoint; start here
    models      the PyTorch reference;  components  the pieces it is compiled into
    graph       ONNX graphs;  towers  one block in memory at a time;  weights  files of tensors
    compare     a compiled component and the reference, on the same inputs
    engine      TensorRT engines;  synthetic  checkpoints of the real shapes with made-up weights

``internvl_edge.compiler`` calls them in turn.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from internvl_edge.files.packages import EXPORT, require

if __name__ != "internvl_edge.export":
    raise ImportError("import internvl_edge.export, not the folder export of the repository")

if TYPE_CHECKING:
    from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
    from internvl_edge.export.checkpoint.load import load_reference

__all__ = ["load_reference", "open_checkpoint", "require_packages"]

_HOME = {"load_reference": "load", "open_checkpoint": "checkpoint"}


def require_packages() -> None:
    """Check that everything is installed that the rooms of this package import.

    Raises:
        MissingDependency: the first package that is missing, and the extra that brings it.
    """
    require(*EXPORT)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.checkpoint.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
