"""The whole way from a checkpoint to a published directory, in reading order.

    plan        the options, refused before any work if they cannot be met; start here
    precision   the recipe that a precision stands for
    compile     export: the steps run, in a workspace that another run may take up
    pipeline    the list of steps, and their forecast
    steps       each of them, with what it costs
    weights     the weights file: its plan, its layout, the tensors written
    cost        memory, disk and time, added up;  progress  how far an export has come
    oracle      second opinions on what a component computes
    published   a directory that was published, compared again
    source      the checkpoint that a directory was made from
    search      which layers INT8 cannot afford, and a recipe that spares them
    report      the page and the README of a compiled directory

``export`` does all of it; ``build`` and ``verify`` take up a published directory again. Names are
imported when they are used: ``build`` needs a builder, and no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl_edge.compiler.compile import export, rehearse
    from internvl_edge.compiler.pipeline import forecast
    from internvl_edge.compiler.plan import ExportOptions, Hardware, Plan, make_plan
    from internvl_edge.compiler.progress import Progress
    from internvl_edge.compiler.published import verify
    from internvl_edge.compiler.report.elsewhere import openers
    from internvl_edge.compiler.search import export_auto
    from internvl_edge.compiler.steps.engines import build
    from internvl_edge.compiler.steps.profiles import profile_from, ranges_from

__all__ = [
    "ExportOptions",
    "Hardware",
    "Plan",
    "Progress",
    "build",
    "export",
    "export_auto",
    "forecast",
    "make_plan",
    "openers",
    "profile_from",
    "ranges_from",
    "rehearse",
    "verify",
]

_MODULES = {
    "ExportOptions": "plan",
    "Hardware": "plan",
    "Plan": "plan",
    "Progress": "progress",
    "build": "steps.engines",
    "export": "compile",
    "export_auto": "search",
    "forecast": "pipeline",
    "make_plan": "plan",
    "openers": "report.elsewhere",
    "profile_from": "steps.profiles",
    "ranges_from": "steps.profiles",
    "rehearse": "compile",
    "verify": "published",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
