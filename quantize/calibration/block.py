"""Calibrate and quantize one block: ranges from its activations, 8-bit weights, folded factors.

The block is run once on what the previous block left. While it runs, every activation that enters
a linear layer is seen. What can be done about it depends on what made it (``Site``):

    behind a norm               SmoothQuant's factors s move from the gain into the readers' columns
    attention's output          s and a rotation of each head, from v's rows into the projection's
                                columns: attention only mixes rows of v, so both pass through it
    gate · up                   s, from up's rows into down's columns
    behind GELU                 a shift that makes its range symmetric; its sum with the weights
                                goes into the bias. Factors for outlier channels, where they pay

The first three are spooled, since s is solved from maxima over all samples, and observed as x / s,
rotated. The others go straight into their observers. Then the range is chosen, each weight is
quantized per output channel and stored (K, N), as ``qdq`` needs it, and the mean error that the
rounding of x and W leaves in the output is taken out of the bias.

A layer that runs in several streams (texts, image queries, pairs) has one set of weights and one
smoothing, made from all of them, and one activation range per stream.

In memory are this block's weights, which are changed in place, and whatever of the activations
the spools' budget allows; where weights are rounded by ``gptq``, also K × K products for each
activation with K channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from internvl_edge.files.spool import Spool
from internvl_edge.quantize.calibration.activations import (
    Block,
    Group,
    Inputs,
    NewSpool,
    Stream,
    groups_of,
    head_rotation,
    is_changed,
    watching,
)
from internvl_edge.quantize.calibration.attention import watching_attention
from internvl_edge.quantize.calibration.ranges import Settled, Use, corrected_bias, settle
from internvl_edge.quantize.numerics import formats, int4, output_error, smooth
from internvl_edge.quantize.numerics.gptq import Factor, change_rows
from internvl_edge.quantize.numerics.observers import RangeMethod
from internvl_edge.quantize.numerics.rotation import rotate_heads
from internvl_edge.quantize.numerics.statistics import LayerStatistics
from internvl_edge.quantize.numerics.threads import each
from internvl_edge.quantize.numerics.weights import QuantizedWeight, quantize_weight
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

THREADS = 2  # that hold copies of activations or weights
SMOOTHING_SUFFIX = ".smoothing"  # of the factors in the columns of a site's readers


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedBlock:
    """What a block leaves behind: everything by full parameter name."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    # changed norm gains, biases and shifts; the factors of each site beside its first reader
    folded: dict[str, Array] = field(default_factory=dict)
    # stream → weight → scale; None: the activation stays as it is
    activations: dict[str, dict[str, float | None]] = field(default_factory=dict)
    statistics: list[LayerStatistics] = field(default_factory=list)


def is_quantized(recipe: Recipe, name: str, in_features: int, out_features: int) -> bool:
    """Whether a recipe puts the linear layer called ``name`` into 8 or 4 bits."""
    recipe = recipe.of(name)
    wide = min(in_features, out_features) >= recipe.min_features
    return wide and not recipe.excludes(name)


@torch.inference_mode()
def calibrate_block(
    block: Block,
    streams: Mapping[str, Stream],
    recipe: Recipe,
    behind: Callable[[str], Spool],
    new_spool: NewSpool,
) -> CalibratedBlock:
    """Run a block on every stream, replace the hidden states by its outputs, quantize its weights.

    Args:
        block: its weights are folded in place; it is of no use afterwards.
        streams: the uses of the block.
        recipe: what to quantize, and how.
        behind: a spool for the hidden states of a stream behind the block.
        new_spool: a spool for what is kept while the block runs.

    Raises:
        CalibrationError: an activation or weight is not finite, by name.
    """
    recipe = recipe.of(block.name)
    linears = {
        name: linear
        for name, linear in block.linears().items()
        if is_quantized(recipe, name, linear.in_features, linear.out_features)
    }
    groups = groups_of(block, linears)
    products: dict[str, Array] = {}
    result = CalibratedBlock(activations={stream: {} for stream in streams})
    seen = _run(block, streams, linears, groups, recipe, behind, new_spool, products, result)
    weights = {name: linear.weight.detach().numpy() for name, linear in linears.items()}
    uses: list[Use] = []
    for group in groups:  # in order: what one folds, another reads
        inputs = {stream: found[group.key] for stream, found in seen.items() if group.key in found}
        change = _fold(block, group, weights, inputs, recipe, result)
        is_only = len(inputs) == 1
        uses += [Use(group, stream, one, change, is_only) for stream, one in inputs.items()]
    settled: list[Settled] = []
    if not recipe.is_weight_only:
        settled += each(lambda use: settle(use, weights, recipe), uses, THREADS)
    corrections = {
        reader: found
        for use, found in zip(uses, settled, strict=False)
        for reader in use.group.readers
        if use.is_only
    }
    _fold_products(products, uses, corrections, recipe)
    _round(groups, weights, products, recipe, result)
    _correct_biases(linears, corrections, recipe, result)
    scales: list[float | None] = [found.scale for found in settled]
    for use, scale in zip(uses, scales or [None] * len(uses), strict=True):
        names = (f"{reader}.weight" for reader in use.group.readers)
        result.activations[use.stream] |= dict.fromkeys(names, scale)
    _store_shifts(block, groups, corrections, result)
    result.statistics.extend(_statistics(uses, settled, result.weights, recipe))
    return result


def _run(
    block: Block,
    streams: Mapping[str, Stream],
    linears: Mapping[str, nn.Linear],
    groups: Sequence[Group],
    recipe: Recipe,
    behind: Callable[[str], Spool],
    new_spool: NewSpool,
    products: dict[str, Array],
    result: CalibratedBlock,
) -> dict[str, dict[str, Inputs]]:
    """Run the block on every stream; what its linear layers read, and the ranges of attention."""
    attentions = {
        name: module
        for name, module in block.attentions().items()
        if recipe.attention is not None and not recipe.excludes(name)
    }
    method: RangeMethod = "mse" if recipe.range_method == "auto" else recipe.range_method
    seen: dict[str, dict[str, Inputs]] = {name: {} for name in streams}
    for name, stream in streams.items():
        outputs = behind(name)
        with (
            watching(linears, groups, recipe, seen[name], products, new_spool) as look_at,
            watching_attention(attentions) as operands,
        ):
            for x, context in zip(stream.hidden, stream.contexts, strict=True):
                look_at(getattr(context, "rows", None))
                outputs.append(block.run(torch.from_numpy(x), context).numpy())
        stream.hidden.close()
        stream.hidden = outputs
        result.activations[name] |= {
            operand: observer.scale(method, recipe.weights, recipe.percentile)
            for operand, observer in operands.items()
        }
    return seen


def _statistics(
    uses: Sequence[Use],
    settled: Sequence[Settled],
    weights: Mapping[str, QuantizedWeight],
    recipe: Recipe,
) -> Iterator[LayerStatistics]:
    for use, found in zip(uses, settled, strict=False):
        for name in use.group.readers:
            yield LayerStatistics(
                stream=use.stream,
                weight=f"{name}.weight",
                absmax=found.absmax,
                clip=found.scale * formats.as_format(recipe.weights).max_value,
                scale=found.scale,
                input_sqnr_db=found.sqnr_db,
                weight_sqnr_db=weights[f"{name}.weight"].sqnr_db,
            )


def _fold(
    block: Block,
    group: Group,
    weights: dict[str, Array],
    inputs: Mapping[str, Inputs],
    recipe: Recipe,
    result: CalibratedBlock,
) -> Callable[[Array], Array]:
    """Move factors, and a rotation of each head, from what makes an activation into its readers.

    Returns:
        What becomes of the activation's rows.
    """
    site = group.site
    if site is None or not inputs or not is_changed(group, recipe):
        return lambda x: x
    head = head_rotation(group, recipe)

    def turn(x: Array) -> Array:
        return x if head is None else rotate_heads(x, head)

    readers = [weights[name] for name in group.readers]
    factors = _factors(readers, inputs, turn, recipe)
    if site.norm is not None:
        gain, bias = smooth.fold(*_arrays(block, site.norm), readers, factors)
        result.folded[f"{block.name}.{site.norm}.weight"] = gain
        if bias is not None:
            result.folded[f"{block.name}.{site.norm}.bias"] = bias
    else:
        producer = f"{block.name}.{site.producer}"
        rows = slice(site.first_row, site.first_row + factors.size)
        bias = _arrays(block, str(site.producer))[1]
        smooth.fold_rows(weights[producer][rows], bias, rows, readers, factors)
        if head is not None:
            rotate_heads(weights[producer][rows], head, axis=0, in_place=True)
            for weight in readers:
                rotate_heads(weight, head, in_place=True)
            if bias is not None:
                rotate_heads(bias[rows], head, in_place=True)
        if bias is not None:
            result.folded[f"{producer}.bias"] = bias
    result.folded[f"{group.key}{SMOOTHING_SUFFIX}"] = factors
    return lambda x: turn(x / factors)


def _factors(
    readers: Sequence[Array],
    inputs: Mapping[str, Inputs],
    turn: Callable[[Array], Array],
    recipe: Recipe,
) -> Array:
    if recipe.smooth is None:
        return np.ones(readers[0].shape[1], np.float32)
    samples = [np.array(one.sample.rows) for one in inputs.values()]
    sample = output_error.sample_weights(readers)
    if recipe.is_weight_only:
        block = int4.block_of(sample.shape[1], recipe.block_size)
        return int4.best_factors(samples, sample, turn, recipe.weights, block)
    peaks = np.max([one.peaks for one in inputs.values() if one.peaks is not None], axis=0)
    columns, alpha = smooth.column_absmax(readers), recipe.smooth
    if alpha == "auto":
        return output_error.best_factors(samples, peaks, columns, sample, turn, recipe.weights)
    return smooth.smoothing_factors(peaks, columns, alpha)


def _fold_products(
    products: Mapping[str, Array],
    uses: Sequence[Use],
    settled: Mapping[str, Settled],
    recipe: Recipe,
) -> None:
    """Make Xᵀ X that of each activation as its readers will see it."""
    changes = {use.group.key: use.change for use in uses if is_changed(use.group, recipe)}
    for key, h in products.items():
        if key in changes:
            change_rows(h, changes[key])
        spread = settled[key].spread if key in settled else None
        if spread is not None:
            change_rows(h, partial(np.multiply, spread))


def _round(
    groups: Sequence[Group],
    weights: Mapping[str, Array],
    products: dict[str, Array],
    recipe: Recipe,
    result: CalibratedBlock,
) -> None:
    """Quantize every weight; with GPTQ group by group, so that one factor is there at a time."""

    def rounded(names: Sequence[str], factor: Factor | None) -> dict[str, QuantizedWeight]:
        done = each(
            lambda name: quantize_weight(weights[name], name, recipe, factor), names, THREADS
        )
        return dict(zip(names, done, strict=True))

    found: dict[str, QuantizedWeight] = {}
    if recipe.rounding == "nearest":
        found = rounded(sorted(weights, key=lambda name: -weights[name].size), None)
    else:
        for group in groups:
            h = products.pop(group.key, None)  # None: no stream came here
            found |= rounded(group.readers, None if h is None else Factor(h, group.key))
    result.weights.update((f"{name}.weight", found[name]) for name in weights)


def _arrays(block: Block, path: str) -> tuple[Array, Array | None]:
    """Weight and bias of a submodule."""
    module = block.module.get_submodule(path)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return weight.detach().numpy(), bias.detach().numpy() if isinstance(bias, Tensor) else None


def _correct_biases(
    linears: Mapping[str, nn.Linear],
    settled: Mapping[str, Settled],
    recipe: Recipe,
    result: CalibratedBlock,
) -> None:
    def corrected(name: str) -> Array | None:
        weight = result.weights[f"{name}.weight"]
        return corrected_bias(linears[name], settled[name], weight, recipe)

    for name, bias in zip(settled, each(corrected, [*settled]), strict=True):
        if bias is not None:
            result.folded[f"{name}.bias"] = bias


def _store_shifts(
    block: Block,
    groups: Sequence[Group],
    settled: Mapping[str, Settled],
    result: CalibratedBlock,
) -> None:
    for group in groups:
        if group.site is None or group.site.shift is None or group.key not in settled:
            continue
        found = settled[group.key]
        result.folded[f"{block.name}.{group.site.shift}"] = np.array(found.shift, np.float32)
        if found.spread is not None:
            result.folded[f"{block.name}.{group.site.spread}"] = found.spread
