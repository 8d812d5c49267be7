"""Vocabulary heads in 8 bits: weights alone, so that there is nothing to calibrate."""

from __future__ import annotations

from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.weights.layout import FLOAT32, has_quantized_head, quantized_layers
from internvl_edge.compiler.weights.plan import WeightsPlan
from internvl_edge.compiler.weights.tensors import convert, read_tensor
from internvl_edge.export.weights.writer import WeightsWriter
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.numerics.weights import quantize_weight


def quantize_heads(
    plan: Plan,
    weights: WeightsPlan,
    writer: WeightsWriter,
    build: Build,
    activations: dict[str, dict[str, float | None]],
) -> None:
    """Write the heads that a recipe quantizes, and note in the scales that inputs are not rounded.

    Args:
        plan: of the export.
        weights: what each component reads.
        writer: of the weights file.
        build: is told the progress.
        activations: stream → weight → scale; gets the heads.
    """
    assert plan.recipe is not None
    recipe = plan.recipe
    heads = [name for name in writer.pending if has_quantized_head(recipe, name)]
    for name in quantized_layers(plan.source, recipe, heads):
        build.report(Progress(step="quantize", detail=name, done=0, total=1))
        values = convert(read_tensor(plan, name), FLOAT32)
        quantized = quantize_weight(values, name.removesuffix(".weight"), recipe.of(name))
        writer.write(name, quantized.values)
        writer.write(name + SCALE_SUFFIX, quantized.scales)
        for component, read in weights.reads.items():
            stream = COMPONENTS[component].stream
            if name in read and stream is not None:
                activations[stream][name] = None
