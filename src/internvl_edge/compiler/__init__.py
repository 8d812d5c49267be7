"""The whole way from a checkpoint to a published directory, in reading order.

    options       what is asked for, refused before any work if it cannot be
    estimate      what it will need
    pipeline      export and verify: the steps below, one after the other
    emit          one ONNX graph per component, one weights file for all of them
    calibration   weights quantized block by block, straight into that file
    check         every component beside PyTorch
    search        which layers INT8 cannot afford, and a recipe that spares them
    engines       TensorRT engines, into a directory that is already published
    workload      operations and bytes of a graph;  peaks  what a machine reaches
    roofline      the one beside the other;  speed  plots of what was measured
    bisect        block by block beside PyTorch, when something is wrong

``export`` does all of it; ``build`` and ``verify`` take up a published directory again. Names are
imported when they are used: ``build`` needs a builder, and no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl_edge.compiler.engines import build, profile_from
    from internvl_edge.compiler.estimate import forecast
    from internvl_edge.compiler.options import ExportOptions, Plan, make_plan
    from internvl_edge.compiler.pipeline import export, verify
    from internvl_edge.compiler.progress import Progress
    from internvl_edge.compiler.search import export_auto

__all__ = [
    "ExportOptions",
    "Plan",
    "Progress",
    "build",
    "export",
    "export_auto",
    "forecast",
    "make_plan",
    "profile_from",
    "verify",
]

_HOME = {
    "ExportOptions": "options",
    "Plan": "options",
    "Progress": "progress",
    "build": "engines",
    "export": "pipeline",
    "export_auto": "search",
    "forecast": "estimate",
    "make_plan": "options",
    "profile_from": "engines",
    "verify": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
