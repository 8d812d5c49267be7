"""Rounding done anew, in plain PyTorch: of a layer's weight, its inputs, and of attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from internvl_edge.errors import VerificationError
from internvl_edge.quantize.calibration.attention import SOFTMAX_SCALE, AttentionScales
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.numerics import formats
from internvl_edge.quantize.numerics.gptq import MAX_MOVED
from internvl_edge.quantize.numerics.int4 import block_of, unpack
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

NOISE = 1e-4  # of a weight's largest scale
MOVED_SLACK = 1.1  # of a squared error, folded and rotated once more
SCALE_TOLERANCE = 1e-2  # of a weight's maximum, folded and rotated once more


def require_scales(name: str, weight: Tensor, recipe: Recipe, stored: Mapping[str, Array]) -> None:
    """Hold a weight's stored scales against those that it should have.

    Raises:
        VerificationError: they differ by more than float32 arithmetic does.
    """
    held = stored.get(f"{name}{SCALE_SUFFIX}")
    if held is None:
        return
    expected = _scales(weight, recipe, held).squeeze(-1).numpy().T.reshape(held.shape)
    # what should be nothing is what rotations leave of it
    far = (np.abs(held - expected) / (expected + NOISE * expected.max())).max()
    if not far <= SCALE_TOLERANCE:
        raise VerificationError(
            f"{name}: expected scales of max |W| / {_limit(recipe.weights):g}, found some that are "
            f"off by {far:.1%}"
        )


def rounded_weight(
    name: str,
    weight: Tensor,
    recipe: Recipe,
    held: Callable[[str], Array | None] | None,
    stored: Mapping[str, Array],
) -> Tensor:
    """Give a weight as a graph multiplies by it: rounded anew, or as it is stored."""
    scale = _scales(weight, recipe, stored.get(f"{name}{SCALE_SUFFIX}"))
    nearest = _rounded(weight, recipe, scale)
    if recipe.rounding == "nearest":
        return nearest
    assert held is not None
    values = held(name)
    if values is None:
        return nearest
    outputs, inputs = weight.shape
    if recipe.weights == "int4":
        values = unpack(values, (inputs, outputs))
    # scales are (N, 1) or (N, K / block, 1)
    blocks = torch.from_numpy(values.astype(np.float32).T.copy()).reshape(*scale.shape[:-1], -1)
    kept = (blocks * scale).reshape(weight.shape)
    far, near = (float((w - weight).square().sum()) for w in (kept, nearest))
    least = NOISE**2 * float(weight.square().sum())
    if not far <= MOVED_SLACK * MAX_MOVED * near + least:
        raise VerificationError(
            f"{name}: expected values near those of the weight, their squared error at most "
            f"{MAX_MOVED:g} times that of rounding to nearest, {near:.3g}, found {far:.3g}"
        )
    return kept


def _rounded(weight: Tensor, recipe: Recipe, scale: Tensor) -> Tensor:
    """Round a weight per output channel or block, as a builder sees it; plain torch arithmetic."""
    if recipe.weights == "int4":
        blocks = weight.reshape(*scale.shape[:2], -1)  # (N, K / block, block)
        return ((blocks / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)
    return _round(weight / scale, recipe.weights) * scale


def _scales(weight: Tensor, recipe: Recipe, held: Array | None) -> Tensor:
    """Compute the scales of a weight (N, K): (N, 1), of INT4 (N, K / block, 1).

    Directories of earlier versions ``held`` scales that bfloat16 does not.
    """
    if recipe.weights == "int4":
        block = block_of(weight.shape[1], recipe.block_size)
        peak = weight.reshape(len(weight), -1, block).abs().amax(dim=2, keepdim=True)
    else:
        peak = weight.abs().amax(dim=1, keepdim=True)
        if recipe.granularity == "per-tensor":
            peak = peak.max().expand_as(peak)
    scale = peak / _limit(recipe.weights)
    if held is None or np.array_equal(held, held.astype(ml_dtypes.bfloat16).astype(np.float32)):
        scale = scale.to(torch.bfloat16).float()
    return scale.clamp_min(formats.MIN_SCALE)


def _limit(fmt: str) -> float:
    return formats.as_format(fmt).max_value


def rounding_hook(scale: float, recipe: Recipe) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (_round(inputs[0] / scale, recipe.weights) * scale,)

    return hook


def rounded_attention(scales: AttentionScales) -> Any:
    """Make a hook that computes attention with its operands and probabilities in E4M3."""

    def fp8(x: Tensor, scale: float) -> Tensor:
        return _round(x / scale, "fp8") * scale

    def hook(core: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        heads = core.num_heads
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in inputs)
        q = fp8(q / q.shape[-1] ** 0.5, scales.query)
        p = (q @ fp8(k, scales.key).transpose(-1, -2)).softmax(dim=-1)
        out = fp8(p, SOFTMAX_SCALE) @ fp8(v, scales.value)
        return out.transpose(1, 2).flatten(2)

    return hook


def _round(x: Tensor, fmt: str) -> Tensor:
    if fmt == "int8":
        return x.round().clamp(-128, 127)
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
