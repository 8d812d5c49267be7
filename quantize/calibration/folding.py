"""Factors and rotations that move between an activation's producer and its readers.

Dividing channel j of an activation by s_j and multiplying column j of its readers' weights by s_j
leaves their product unchanged (SmoothQuant, arXiv 2211.10438). Where a norm or a linear layer
produces the activation, the division folds into its gain or rows, and costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from internvl_edge.export.towers.blocks import Block
from internvl_edge.quantize.calibration.activations import (
    Group,
    Inputs,
    head_rotation,
    is_changed,
)
from internvl_edge.quantize.calibration.ranges import Activation, ChosenRange
from internvl_edge.quantize.numerics import int4, output_error, smooth
from internvl_edge.quantize.numerics.gptq import change_rows
from internvl_edge.quantize.numerics.rotation import rotate_heads
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

SMOOTHING_SUFFIX = ".smoothing"  # of the name of the factors in the columns of a site's readers


def fold(
    block: Block,
    group: Group,
    weights: dict[str, Array],
    inputs: Mapping[str, Inputs],
    recipe: Recipe,
    folded: dict[str, Array],
) -> Callable[[Array], Array]:
    """Move factors, and a rotation of each head, between an activation's producer and readers.

    Args:
        block: its norms and weights are changed in place.
        group: the readers of one activation, and its producer.
        weights: of every linear layer that is quantized, by name.
        inputs: the activation as each stream saw it.
        recipe: what to fold.
        folded: takes changed gains and biases, and the factors, by full parameter name.

    Returns:
        The map that this applies to the activation's rows.
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
        folded[f"{block.name}.{site.norm}.weight"] = gain
        if bias is not None:
            folded[f"{block.name}.{site.norm}.bias"] = bias
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
            folded[f"{producer}.bias"] = bias
    folded[f"{group.key}{SMOOTHING_SUFFIX}"] = factors
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


def fold_products(
    products: Mapping[str, Array],
    activations: Sequence[Activation],
    ranges: Mapping[str, ChosenRange],
    recipe: Recipe,
) -> None:
    """Apply to each Xᵀ X what was folded into its activation, as the readers will see it."""
    changes = {one.group.key: one.change for one in activations if is_changed(one.group, recipe)}
    for key, h in products.items():
        if key in changes:
            change_rows(h, changes[key])
        spread = ranges[key].spread if key in ranges else None
        if spread is not None:
            change_rows(h, partial(np.multiply, spread))


def _arrays(block: Block, path: str) -> tuple[Array, Array | None]:
    """Return weight and bias of a submodule."""
    module = block.module.get_submodule(path)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    return weight.detach().numpy(), bias.detach().numpy() if isinstance(bias, Tensor) else None
