"""From a checkpoint to verified ONNX components and engines.

    checkpoint  reads the files of a checkpoint; start here;  convert  writes them in another form
    config      reads its ``config.json``
    models      the PyTorch reference;  components  the module of each part that is compiled
    graph       traces and rewrites ONNX graphs;  weights  writes or links their tensors
    towers      loads one block at a time, for calibration
    precision   reads the text of ``--precision``
    compare     compares a compiled component with the reference;  advice  what would help
    engine      builds TensorRT engines
    synthetic   writes checkpoints of the real shapes with made-up weights

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

_MODULES = {"load_reference": "load", "open_checkpoint": "checkpoint"}


def require_packages() -> None:
    """Check that every package that this package imports is installed.

    Raises:
        MissingDependency: a package is missing; names it and the extra that installs it.
    """
    require(*EXPORT)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.checkpoint.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
