"""The numbers of a quantized graph themselves, apart from what it computes.

What a graph computes hides small mistakes: a scale of one layer that is doubled costs a bit there
and little after forty layers, and a fused kernel never looks at the axis of a weight's scales. So
a graph is also held against what it was made from, exactly:

    in the graph      each product of a calibrated weight has its pair, with the scale that
                      calibration gave, in its format, without zero point; the weight's scales are
                      its own, along its outputs, or for blocks of inputs as the recipe says;
                      both products of a calibrated attention have theirs; there are no other pairs
    of activations    no range is wider than its choice allows: scale · limit ≤ max |x|, or
                      1.1 max |x| with headroom
    of weights        scale = max |W| / limit of each output or block (``simulate``)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from internvl_edge.errors import VerificationError
from internvl_edge.quantize.calibration.attention import (
    SOFTMAX_SCALE,
    AttentionScales,
    scales_by_attention,
)
from internvl_edge.quantize.calibration.ranges import HEADROOM
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX, STORAGE
from internvl_edge.quantize.numerics import formats
from internvl_edge.quantize.numerics.int4 import block_of
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
    seen: set[ir.Node] = set()  # quantizers that a product was found for
    for name, scale in scales.items():
        weight = model.graph.initializers.get(name)
        if weight is None:  # another component's, or an operand of attention
            continue
        own = recipe.of(name)
        pair = None if scale is None else (float(np.float32(scale)), own.activations)
        wanted = _wanted(weight, own, pair)
        found = _products(weight, seen)
        if found != [wanted]:
            raise VerificationError(
                f"{where}: {name}: expected one product, {_words(wanted)}; found "
                f"{'; '.join(map(_words, found)) or 'none'}"
            )
    for attention, operands in scales_by_attention(scales).items():
        _require_attention(model, where, attention, operands, seen)
    others = [n for n in model.graph if n.op_type == "QuantizeLinear" and n not in seen]
    if others:
        raise VerificationError(
            f"{where}: {others[0].name}: expected no pair but those of calibrated products, found "
            f"{len(others)} more"
        )


Pair = tuple[float, str | None]  # scale, format
NO_PAIR: Pair = (math.nan, "a pair that is none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What surrounds a product of a weight."""

    axis: int | None
    block: int | None  # inputs that share a scale; None: all
    format: str | None  # of the stored weight
    scales: str | None  # the name of its scales
    pair: Pair | None  # of its input; None: the input is not rounded


def _wanted(weight: ir.Value, own: Recipe, pair: Pair | None) -> Around:
    assert weight.shape is not None and weight.name is not None
    is_int4 = own.weights == "int4"
    inputs = weight.shape[0]
    assert isinstance(inputs, int)
    return Around(
        axis=0 if is_int4 else 1,
        block=block_of(inputs, own.block_size) if is_int4 else None,
        format=own.weights,
        scales=f"{weight.name}{SCALE_SUFFIX}",
        pair=pair,
    )


def _words(around: Around) -> str:
    block = "" if around.block is None else f" in blocks of {around.block}"
    pair = around.pair
    rounded = "not rounded" if pair is None else f"in {pair[1]} with the scale {pair[0]:.6g}"
    return (
        f"the weight in {around.format} with {around.scales} along axis {around.axis}{block}, "
        f"its input {rounded}"
    )


def _products(weight: ir.Value, seen: set[ir.Node]) -> list[Around]:
    """Find what surrounds every product of a weight."""
    surroundings: list[Around] = []
    for use in weight.uses():
        node = use.node
        if node.op_type != "DequantizeLinear" or use.idx != 0 or _has_zero_point(node):
            none = Around(axis=None, block=None, format=None, scales=None, pair=None)
            surroundings.append(none)
            continue
        of_weight = node.inputs[1]
        while of_weight is not None and not of_weight.is_initializer():  # cast to 16 bits
            maker = of_weight.producer()
            of_weight = None if maker is None else maker.inputs[0]
        surroundings += [
            Around(
                axis=node.attributes.get_int("axis", 1),
                block=node.attributes.get_int("block_size", 0) or None,
                format=_format(weight),
                scales=None if of_weight is None else of_weight.name,
                pair=_pair_of(reader.inputs[0], seen),
            )
            for reader in (reader.node for reader in node.outputs[0].uses())
        ]
    return surroundings


def _format(value: ir.Value | None) -> str | None:
    known = {dtype: name for name, dtype in STORAGE.items()}
    return None if value is None or value.dtype is None else known.get(value.dtype)


def _has_zero_point(node: ir.Node) -> bool:
    """Tell whether a node shifts what it rounds; a zero point of zero only names the type."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None:
        return False
    value = zero.const_value
    return value is None or bool(np.any(value.numpy().astype(np.float32) != 0))


def _pair_of(activation: ir.Value | None, seen: set[ir.Node]) -> Pair | None:
    """Find the scale and format of the pair that an activation went through; None: it has none."""
    dequantize = None if activation is None else activation.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    source = dequantize.inputs[0]
    quantize = None if source is None else source.producer()
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return NO_PAIR
    seen.add(quantize)
    pair = quantize, dequantize
    held = [None if n.inputs[1] is None else n.inputs[1].const_value for n in pair]
    numbers = {math.nan if v is None or v.size != 1 else float(v.numpy().item()) for v in held}
    zeros = [node.inputs[2] if len(node.inputs) > 2 else None for node in pair]
    formats_ = {_format(zero) for zero in zeros}
    is_shifted = any(_has_zero_point(node) for node in pair)
    if len(numbers) != 1 or len(formats_) != 1 or is_shifted:
        return NO_PAIR
    return numbers.pop(), formats_.pop()


def _require_attention(
    model: ir.Model, where: str, name: str, scales: AttentionScales, seen: set[ir.Node]
) -> None:
    """Hold both products of an attention against the scales of its operands."""
    nodes = {str(node.name): node for node in model.graph}
    if f"{name}/Attention" in nodes:
        raise VerificationError(f"{where}: {name}: expected its operands in fp8, found none")
    operands = {
        "scores": (scales.query, scales.key),
        "mixed": (SOFTMAX_SCALE, scales.value),
    }
    for product, values in operands.items():
        node = nodes.get(f"{name}.{product}/MatMul")
        if node is None:  # another component's
            continue
        wanted = [(float(np.float32(value)), "fp8") for value in values]
        found = [_pair_of(value, seen) for value in node.inputs]
        if found != wanted:
            raise VerificationError(
                f"{where}: {node.name}: expected pairs of (scale, format) {wanted}, found {found}"
            )


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
