"""From a checkpoint to verified ONNX components and engines.

Reading order: ``config``, ``checkpoint``, ``models``, ``components``, ``graph``, ``weights``,
``verify``, ``engine``; ``internvl_edge.compiler`` calls them in turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "internvl_edge.export":
    raise ImportError("import internvl_edge.export, not the folder export of the repository")

if TYPE_CHECKING:
    from internvl_edge.export.checkpoint import load_reference, open_checkpoint

__all__ = ["load_reference", "open_checkpoint"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from internvl_edge.export import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
