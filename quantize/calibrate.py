"""Calibrate and quantize one block: ranges from its activations, 8-bit weights, folded norms.

The block is run once on what the previous block left. While it runs, every activation that enters
a linear layer is seen:

- behind a norm, the activations are kept until the block is done. Per-channel maxima of
  activations and weights give SmoothQuant's factors s; they move from the norm's gain into the
  columns of the linear layers that read it (``smooth``), and the range is that of x / s;
- elsewhere the activation goes straight into its range observer and is forgotten.

Then each weight is quantized per output channel and stored (K, N), as ``qdq`` needs it. A layer
that runs in several streams (texts, image queries, pairs) has one set of weights and one smoothing,
made from all of them, and one activation range per stream.

Only this block's weights, its kept activations and the streams' states are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from internvl_edge.errors import CalibrationError
from internvl_edge.quantize import formats, smooth
from internvl_edge.quantize.observers import RangeObserver
from internvl_edge.quantize.recipe import Recipe

Array = np.ndarray[Any, Any]
State = Any


class Block(Protocol):
    """What calibration needs of a block; see ``export.blocks.Block``."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def norms(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def run(self) -> Callable[[State], State]: ...
    def linears(self) -> dict[str, nn.Linear]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A linear layer's weight in 8 bits."""

    values: Array  # (K, N) int8 or float8_e4m3fn
    scales: Array  # (N,) float32


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedBlock:
    """What a block leaves behind: everything by full parameter name."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    folded: dict[str, Array] = field(default_factory=dict)  # changed norm gains and biases
    activations: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # stream → weight → scale


@dataclass(slots=True)
class _Seen:
    """What the hooks collected of one stream."""

    observers: dict[str, RangeObserver] = field(default_factory=dict)  # by linear
    kept: dict[str, list[Array]] = field(default_factory=dict)  # by norm


def is_quantized(recipe: Recipe, name: str, in_features: int, out_features: int) -> bool:
    """Whether a recipe puts the linear layer called ``name`` into 8 bits."""
    wide = min(in_features, out_features) >= recipe.min_features
    return wide and not recipe.excludes(name)


@torch.inference_mode()
def calibrate_block(
    block: Block, states: dict[str, list[State]], recipe: Recipe
) -> CalibratedBlock:
    """Run a block on every stream, replace the states by its outputs, quantize its weights.

    Raises:
        CalibrationError: an activation or weight is not finite, by name.
    """
    linears = {
        name: linear
        for name, linear in block.linears().items()
        if is_quantized(recipe, name, linear.in_features, linear.out_features)
    }
    groups = _groups(block, linears)
    seen: dict[str, _Seen] = {}
    for stream, batch in states.items():
        seen[stream] = _Seen()
        with _watching(block, linears, groups, seen[stream]) as look_at:
            outputs = []
            for state in batch:
                look_at(getattr(state, "rows", None))
                outputs.append(block.run(state))
        states[stream] = outputs

    result = CalibratedBlock(activations={stream: {} for stream in states})
    weights = {name: linear.weight.float().numpy() for name, linear in linears.items()}
    for norm, readers in groups.items():
        _fold_norm(block, norm, readers, weights, seen, recipe, result)
    for stream, watched in seen.items():
        for name, observer in watched.observers.items():
            result.activations[stream][f"{name}.weight"] = _range(observer, name, stream, recipe)
    for name, weight in weights.items():
        result.weights[f"{name}.weight"] = _quantize_weight(weight, name, recipe)
    return result


def _groups(block: Block, linears: Mapping[str, nn.Linear]) -> dict[str, list[str]]:
    """Norm → full names of its readers, where all of them are quantized."""
    groups = {
        norm: [f"{block.name}.{reader}" for reader in readers]
        for norm, readers in block.norms.items()
    }
    return {norm: names for norm, names in groups.items() if all(n in linears for n in names)}


@contextmanager
def _watching(
    block: Block,
    linears: Mapping[str, nn.Linear],
    groups: Mapping[str, list[str]],
    seen: _Seen,
) -> Iterator[Callable[[Tensor | None], None]]:
    """Look at the input of every quantized linear layer while the block runs.

    Yields:
        A function that says which rows (B, T) of the next run are not padding; None: all.
    """
    grouped = {name: norm for norm, names in groups.items() for name in names}
    first = {names[0] for names in groups.values()}

    rows: Tensor | None = None

    def look_at(wanted: Tensor | None) -> None:
        nonlocal rows
        rows = wanted

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            # cross-attention looks at other sequences, which have no padding
            is_masked = rows is not None and x.shape[:2] == rows.shape
            values = (x[rows] if is_masked else x.reshape(-1, x.shape[-1])).numpy()
            if not np.isfinite(values).all():
                raise CalibrationError(
                    f"{name}: calibration met NaN or infinity in its input; is the checkpoint "
                    "sound, and are the images those that it was trained for?"
                )
            if name in grouped:
                seen.kept.setdefault(grouped[name], []).append(values)
            else:
                seen.observers.setdefault(name, RangeObserver()).update(values)

        return hook

    with ExitStack() as stack:
        for name, linear in linears.items():
            if name not in grouped or name in first:  # readers of one norm see one tensor
                stack.callback(linear.register_forward_pre_hook(watch(name)).remove)
        yield look_at


def _fold_norm(
    block: Block,
    norm: str,
    readers: list[str],
    weights: dict[str, Array],
    seen: Mapping[str, _Seen],
    recipe: Recipe,
    result: CalibratedBlock,
) -> None:
    """Smooth one norm and its readers, in ``weights`` and ``result``; observe what is left."""
    batches = {stream: watched.kept.get(norm, []) for stream, watched in seen.items()}
    everything = [values for kept in batches.values() for values in kept]
    if not everything:
        return
    factors = np.ones(everything[0].shape[1], np.float32)
    if recipe.smooth is not None:
        peaks = np.max([np.abs(values).max(axis=0) for values in everything], axis=0)
        columns = smooth.column_absmax([weights[name] for name in readers])
        factors = smooth.smoothing_factors(peaks, columns, recipe.smooth)
        gain, bias, scaled = smooth.fold(
            *_norm_arrays(block, norm), [weights[n] for n in readers], factors
        )
        weights.update(zip(readers, scaled, strict=True))
        result.folded[f"{block.name}.{norm}.weight"] = gain
        if bias is not None:
            result.folded[f"{block.name}.{norm}.bias"] = bias
    for stream, kept in batches.items():
        if kept:
            observer = RangeObserver()
            for values in kept:
                observer.update(values / factors)
            scale = _range(observer, f"{block.name}.{norm}", stream, recipe)
            result.activations[stream].update({f"{name}.weight": scale for name in readers})


def _norm_arrays(block: Block, norm: str) -> tuple[Array, Array | None]:
    module = block.module.get_submodule(norm)
    gain, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    assert isinstance(gain, Tensor)
    return gain.detach().numpy(), bias.detach().numpy() if isinstance(bias, Tensor) else None


def _range(observer: RangeObserver, name: str, stream: str, recipe: Recipe) -> float:
    scale = observer.scale(recipe.range_method, recipe.activations, recipe.percentile)
    if not (np.isfinite(scale) and scale > 0):
        raise CalibrationError(f"{name}: the {stream} stream gave an unusable scale {scale}")
    return scale


def _quantize_weight(weight: Array, name: str, recipe: Recipe) -> QuantizedWeight:
    """(N, K) float → (K, N) in 8 bits and N scales."""
    if not np.isfinite(weight).all():
        raise CalibrationError(f"{name}.weight holds NaN or infinity")
    scales = formats.weight_scale(weight, recipe.weights, axis=0)
    if recipe.granularity == "per-tensor":
        scales[:] = scales.max()
    values = formats.quantize(weight, scales, recipe.weights, axis=0)
    return QuantizedWeight(values=np.ascontiguousarray(values.T), scales=scales)
