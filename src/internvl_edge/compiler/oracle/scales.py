"""The numbers of a quantized graph themselves, apart from what it computes.

What a graph computes hides small mistakes: a scale of one layer that is doubled costs a bit there
and little after forty layers, and a fused kernel never looks at the axis of a weight's scales. So
a graph is also held against what it was made from, exactly:

    in the graph      each product of a calibrated weight has its pair, with the scale that
                      calibration gave; the weight's scales are its own, along its outputs
    of activations    no range is wider than its choice allows: scale · limit ≤ max |x|, or
                      1.1 max |x| with headroom
    of weights        scale = max |W| / limit of each output or block (``simulate``)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from internvl_edge.errors import VerificationError
from internvl_edge.quantize.calibration.ranges import HEADROOM
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.numerics import formats
from internvl_edge.quantize.numerics.statistics import LayerStatistics
from internvl_edge.quantize.recipe import Recipe

SLACK = 1.02  # clips are edges of histograms


def require_as_calibrated(
    model: ir.Model, where: str, scales: Mapping[str, float | None], recipe: Recipe
) -> None:
    """Hold a graph's pairs against the scales of its calibration.

    Args:
        model: the graph.
        where: what it is called in a message.
        scales: weight → activation scale of its stream; None: the activation is not rounded.
        recipe: the formats.

    Raises:
        VerificationError: a pair is missing, or has another scale or axis; names the weight.
    """
    for name, scale in scales.items():
        weight = model.graph.initializers.get(name)
        if weight is None:  # another component's, or an operand of attention
            continue
        found = _products(weight)
        axis = 0 if recipe.of(name).weights == "int4" else 1
        held = None if scale is None else float(np.float32(scale))
        wanted = axis, f"{name}{SCALE_SUFFIX}", held
        if found != [wanted]:
            raise VerificationError(
                f"{where}: {name}: expected one product with (axis of the weight's scales, their "
                f"name, scale of its input) {wanted}, found {found}"
            )


Around = tuple[int | None, str | None, float | None]


def _products(weight: ir.Value) -> list[Around]:
    """Find what surrounds every product of a weight: axis, name of its scales, input's scale."""
    surroundings: list[Around] = []
    for use in weight.uses():
        node = use.node
        if node.op_type != "DequantizeLinear" or use.idx != 0:
            surroundings.append((None, None, None))
            continue
        axis, of_weight = node.attributes.get_int("axis", 1), node.inputs[1]
        while of_weight is not None and not of_weight.is_initializer():  # cast to 16 bits
            maker = of_weight.producer()
            of_weight = None if maker is None else maker.inputs[0]
        name = None if of_weight is None else of_weight.name
        readers = [reader.node for reader in node.outputs[0].uses()]
        surroundings += [(axis, name, _scale_of(reader.inputs[0])) for reader in readers]
    return surroundings


def _scale_of(activation: ir.Value | None) -> float | None:
    """Find the scale of the pair that an activation went through; None where there is none."""
    dequantize = None if activation is None else activation.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    source = dequantize.inputs[0]
    quantize = None if source is None else source.producer()
    scales = [n.inputs[1] for n in (quantize, dequantize) if n is not None]
    held = [None if scale is None else scale.const_value for scale in scales]
    numbers = {math.nan if value is None else float(value.numpy()) for value in held}
    return numbers.pop() if len(scales) == 2 and len(numbers) == 1 else math.nan


def require_seen_ranges(
    rows: Iterable[LayerStatistics],
    scales: Mapping[str, Mapping[str, float | None]],
    recipe: Recipe,
) -> None:
    """Hold every activation scale against the largest input that calibration saw.

    Raises:
        VerificationError: a range is wider, or not the one that was noted; names the weight.
    """
    for row in rows:
        scale = scales.get(row.stream, {}).get(row.weight)
        if scale is None:
            continue
        own = recipe.of(row.weight)
        limit = formats.as_format(own.weights).max_value
        most = SLACK * (HEADROOM if own.range_method == "auto" else 1.0)
        widest = max(row.absmax * most, formats.MIN_SCALE * limit * most)
        if scale * limit > widest or not np.isclose(scale, row.scale, rtol=1e-6):
            raise VerificationError(
                f"{row.weight}, {row.stream}: expected a range of at most {widest:.6g}, the "
                f"largest input seen being {row.absmax:.6g}, and the scale {row.scale:.6g}, "
                f"found the range {scale * limit:.6g} and the scale {scale:.6g}"
            )
