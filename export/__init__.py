"""From a checkpoint to verified ONNX components and engines.

    config      what ``config.json`` says;  checkpoint  the files of a checkpoint; start here
    models      the PyTorch reference;  components  the module of each piece it is compiled into
    graph       ONNX graphs;  towers  one block in memory at a time;  weights  files of tensors
    precision   the text of ``--precision``
    compare     a compiled component and the reference, on the same inputs
    engine      TensorRT engines;  synthetic  checkpoints of the real shapes with made-up weights

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
    """Check that everything is installed that the rooms of this package import.

    Raises:
        MissingDependency: the first package that is missing, and the extra that brings it.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            raise MissingDependency.of(package, "export")


def __getattr__(name: str) -> Any:
    if name in __all__:
        from internvl_edge.export.checkpoint import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
