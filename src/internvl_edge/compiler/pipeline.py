"""The list of steps of an export, and the forecast that adds up what they state."""

from __future__ import annotations

from collections.abc import Sequence

from internvl_edge.artifact.workspace import kept_nbytes
from internvl_edge.compiler.cost import Forecast
from internvl_edge.compiler.plan import ExportOptions, Plan, make_plan
from internvl_edge.compiler.steps.engines import BuildEngines
from internvl_edge.compiler.steps.graphs import WriteGraphs
from internvl_edge.compiler.steps.meta_model import shallow_model
from internvl_edge.compiler.steps.publish import CopyFiles, ListFiles, Publish, WriteClip
from internvl_edge.compiler.steps.quantize import Quantize
from internvl_edge.compiler.steps.step import Step
from internvl_edge.compiler.steps.trace import Trace
from internvl_edge.compiler.steps.verify import Verify, plans_whole
from internvl_edge.compiler.steps.weights import StoreWeights
from internvl_edge.compiler.weights.layout import tower_depths, weights_nbytes
from internvl_edge.compiler.weights.plan import WeightsPlan, plan_weights


def steps(plan: Plan) -> list[Step]:
    """List the steps of an export, in the order they run."""
    model = shallow_model(plan)
    weights = plan_weights(plan, model)
    whole = plans_whole(plan)
    return [
        Trace(model=model),
        StoreWeights(weights=weights) if plan.recipe is None else Quantize(weights=weights),
        WriteGraphs(model=model),
        *([] if plan.options.verify == "none" else [Verify(whole=whole)]),
        CopyFiles(),
        *([WriteClip(whole=whole)] if plan.options.layout == "optimum" else []),
        ListFiles(),
        *([_engines(plan, weights)] if plan.engine_targets else []),
        Publish(),
    ]


def _engines(plan: Plan, weights: WeightsPlan) -> BuildEngines:
    return BuildEngines(
        targets=plan.engine_targets,
        expect_fused=plan.options.expect_fused,
        weights={name: weights_nbytes(plan, read) for name, read in weights.reads.items()},
        depths=tower_depths(plan),
        precision=plan.options.precision,
    )


def forecast(options: ExportOptions) -> Forecast:
    """Check the options as an export would, and say what it would need.

    Sizes of files follow exactly from shapes and dtypes. Memory and time are estimates from what
    the steps were measured to take per byte and per operation on two CPU cores; they scale with
    the model, and are meant to tell minutes from hours and 2 GB from 20.

    Raises:
        UsageError, CheckpointError: as ``export`` would.
    """
    return forecast_plan(make_plan(options))


def forecast_plan(plan: Plan) -> Forecast:
    """Say what a checked plan will need."""
    return total(plan, steps(plan))


def total(plan: Plan, chosen: Sequence[Step]) -> Forecast:
    """Add up what steps state."""
    return Forecast(steps=tuple(cost for step in chosen for cost in step.costs(plan)))


def require_fit(plan: Plan, forecast: Forecast) -> None:
    """Refuse, before any work, what this machine or the memory budget cannot hold.

    Raises:
        ResourceError: the step, what it needs and what there is.
    """
    out = plan.options.out
    forecast.require_fit(out.absolute().parent, plan.options.memory_budget, kept_nbytes(out))
