"""The step that quantizes weights: those of the towers calibrated, all others as they are."""

from __future__ import annotations

from dataclasses import dataclass

from internvl_edge.compiler.cost import Cost
from internvl_edge.compiler.oracle.simulate import write_scales
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.steps.calibration.blocks import quantize_blocks
from internvl_edge.compiler.steps.calibration.cost import cost_of_calibration
from internvl_edge.compiler.steps.calibration.heads import quantize_heads
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.steps.weights import copy_rest, cost_of_writing, require_as_planned
from internvl_edge.compiler.weights.plan import WeightsPlan
from internvl_edge.export.weights.writer import StoredTensor, WeightsWriter
from internvl_edge.files.disk import link_or_copy
from internvl_edge.quantize.numerics.statistics import write_statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Calibrate the towers and write their quantized weights, and all other weights as they are."""

    weights: WeightsPlan

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        return cost_of_writing(plan, self.weights), cost_of_calibration(plan)

    def run(self, plan: Plan, build: Build) -> None:
        require_as_planned(self.weights, build)
        build.stored, build.scales = quantize_weights(plan, self.weights, build)
        link_or_copy(build.work.weights, build.directory / build.work.weights.name)
        write_scales(build.directory, build.scales)
        rows = [row for entry in build.work.entries for row in entry["statistics"]]
        write_statistics(build.directory, rows)


def quantize_weights(
    plan: Plan, weights: WeightsPlan, build: Build
) -> tuple[dict[str, StoredTensor], dict[str, dict[str, float | None]]]:
    """Calibrate block by block, write each block's weights as they come, and then all others.

    The weights file lies in the workspace, for the next run, should this one not end.

    Returns:
        Where every tensor lies, and the activation scales: stream → weight → scale.

    Raises:
        ResourceError: the memory budget was exceeded.
    """
    layout, work = weights.layout, build.work
    done = {name for entry in work.entries for name in entry["weights"]}
    path = work.weights
    with WeightsWriter(path, layout, align=plan.options.align, done=done) as writer:
        activations = quantize_blocks(plan, writer, build)
        quantize_heads(plan, weights, writer, build, activations)
        rest = {name: layout[name][0] for name in writer.pending}
        copy_rest(plan, writer, rest, build.report)
    return writer.stored, activations
