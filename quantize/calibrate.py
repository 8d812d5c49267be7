"""Calibrate and quantize one block: ranges from its activations, 8-bit weights, folded norms.

The block is run once on what the previous block left. While it runs, every activation that enters
a linear layer is seen:

- behind a norm, the activations are spooled until the block is done. Per-channel maxima of
  activations and weights give SmoothQuant's factors s; they move from the norm's gain into the
  columns of the linear layers that read it (``smooth``), and the range is that of x / s;
- elsewhere the activation goes straight into its range observer and is forgotten.

Then each weight is quantized per output channel and stored (K, N), as ``qdq`` needs it. A layer
that runs in several streams (texts, image queries, pairs) has one set of weights and one smoothing,
made from all of them, and one activation range per stream.

In memory are this block's weights, which are changed in place, and whatever of the activations
the spools' budget allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from internvl_edge.quantize.statistics import LayerStatistics, input_sqnr_db, weight_sqnr_db
from internvl_edge.spool import Spool

QUANTIZING_THREADS = 2
Array = np.ndarray[Any, Any]
NewSpool = Callable[[], Spool]


class Block(Protocol):
    """What calibration needs of a block; see ``export.blocks.Block``."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def norms(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def run(self) -> Callable[[Tensor, Any], Tensor]: ...
    def linears(self) -> dict[str, nn.Linear]: ...


class Stream(Protocol):
    """What calibration needs of one use of a block; see ``export.blocks.Stream``."""

    hidden: Spool

    @property
    def contexts(self) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """A linear layer's weight in 8 bits."""

    values: Array  # (K, N) int8 or float8_e4m3fn
    scales: Array  # (N,) float32
    sqnr_db: float  # beside the weight that it was made from


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedBlock:
    """What a block leaves behind: everything by full parameter name."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    folded: dict[str, Array] = field(default_factory=dict)  # changed norm gains and biases
    activations: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # stream → weight → scale
    statistics: list[LayerStatistics] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Range:
    """An activation's scale, and what it costs."""

    absmax: float
    scale: float
    sqnr_db: float


@dataclass(slots=True)
class _Seen:
    """What the hooks collected of one stream."""

    new_spool: NewSpool
    observers: dict[str, RangeObserver] = field(default_factory=dict)  # by linear
    ranges: dict[str, _Range] = field(default_factory=dict)  # by weight
    kept: dict[str, Spool] = field(default_factory=dict)  # by norm
    peaks: dict[str, Array] = field(default_factory=dict)  # by norm: largest |x| of each channel

    def observe(self, linear: str, values: Array) -> None:
        self.observers.setdefault(linear, RangeObserver()).update(values)

    def keep(self, norm: str, values: Array) -> None:
        if norm not in self.kept:
            self.kept[norm] = self.new_spool()
        self.kept[norm].append(values)
        peak = np.maximum(values.max(axis=0), -values.min(axis=0))
        self.peaks[norm] = np.maximum(self.peaks.get(norm, peak), peak)


def is_quantized(recipe: Recipe, name: str, in_features: int, out_features: int) -> bool:
    """Whether a recipe puts the linear layer called ``name`` into 8 bits."""
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
    linears = {
        name: linear
        for name, linear in block.linears().items()
        if is_quantized(recipe, name, linear.in_features, linear.out_features)
    }
    groups = _groups(block, linears)
    seen = {name: _Seen(new_spool=new_spool) for name in streams}
    for name, stream in streams.items():
        outputs = behind(name)
        with _watching(block, linears, groups, seen[name]) as look_at:
            for x, context in zip(stream.hidden, stream.contexts, strict=True):
                look_at(getattr(context, "rows", None))
                outputs.append(block.run(torch.from_numpy(x), context).numpy())
        stream.hidden.close()
        stream.hidden = outputs

    result = CalibratedBlock(activations={stream: {} for stream in streams})
    weights = {name: linear.weight.detach().numpy() for name, linear in linears.items()}
    for norm, readers in groups.items():
        _fold_norm(block, norm, readers, weights, seen, recipe, result)
    for stream_name, watched in seen.items():
        for name, observer in watched.observers.items():
            watched.ranges[f"{name}.weight"] = _range(observer, name, stream_name, recipe)
        scales = {name: found.scale for name, found in watched.ranges.items()}
        result.activations[stream_name].update(scales)
    with ThreadPoolExecutor(QUANTIZING_THREADS) as pool:
        quantized = pool.map(
            lambda item: _quantize_weight(item[1], item[0], recipe), weights.items()
        )
        for name, weight in zip(weights, quantized, strict=True):
            result.weights[f"{name}.weight"] = weight
    result.statistics.extend(_statistics(seen, result.weights, recipe))
    return result


def _statistics(
    seen: Mapping[str, _Seen], weights: Mapping[str, QuantizedWeight], recipe: Recipe
) -> Iterator[LayerStatistics]:
    for stream, watched in seen.items():
        for name, found in watched.ranges.items():
            yield LayerStatistics(
                stream=stream,
                weight=name,
                absmax=found.absmax,
                clip=found.scale * formats.as_format(recipe.activations).max_value,
                scale=found.scale,
                input_sqnr_db=found.sqnr_db,
                weight_sqnr_db=weights[name].sqnr_db,
            )


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
                seen.keep(grouped[name], values)
            else:
                seen.observe(name, values)

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
    peaks = [watched.peaks[norm] for watched in seen.values() if norm in watched.peaks]
    if not peaks:
        return
    factors = np.ones(peaks[0].shape, np.float32)
    if recipe.smooth is not None:
        columns = smooth.column_absmax([weights[name] for name in readers])
        factors = smooth.smoothing_factors(np.max(peaks, axis=0), columns, recipe.smooth)
        gain, bias = smooth.fold(*_norm_arrays(block, norm), [weights[n] for n in readers], factors)
        result.folded[f"{block.name}.{norm}.weight"] = gain
        if bias is not None:
            result.folded[f"{block.name}.{norm}.bias"] = bias
    for stream, watched in seen.items():
        if norm in watched.kept:
            observer = RangeObserver()
            for values in watched.kept[norm]:
                observer.update(values / factors)
            watched.kept[norm].close()
            found = _range(observer, f"{block.name}.{norm}", stream, recipe)
            watched.ranges.update({f"{name}.weight": found for name in readers})


def _norm_arrays(block: Block, norm: str) -> tuple[Array, Array | None]:
    module = block.module.get_submodule(norm)
    gain, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    assert isinstance(gain, Tensor)
    return gain.detach().numpy(), bias.detach().numpy() if isinstance(bias, Tensor) else None


def _range(observer: RangeObserver, name: str, stream: str, recipe: Recipe) -> _Range:
    scale = observer.scale(recipe.range_method, recipe.activations, recipe.percentile)
    if not (np.isfinite(scale) and scale > 0):
        raise CalibrationError(f"{name}: the {stream} stream gave an unusable scale {scale}")
    sqnr = input_sqnr_db(observer, scale, recipe.activations)
    return _Range(absmax=observer.absmax, scale=scale, sqnr_db=sqnr)


def _quantize_weight(weight: Array, name: str, recipe: Recipe) -> QuantizedWeight:
    """(N, K) float → (K, N) in 8 bits and N scales."""
    if not np.isfinite(weight).all():
        raise CalibrationError(f"{name}.weight holds NaN or infinity")
    scales = formats.weight_scale(weight, recipe.weights, axis=0)
    if recipe.granularity == "per-tensor":
        scales[:] = scales.max()
    values = formats.quantize(weight, scales, recipe.weights, axis=0)
    stored = np.ascontiguousarray(values.T)
    sqnr = weight_sqnr_db(weight, stored, scales)
    return QuantizedWeight(values=stored, scales=scales, sqnr_db=sqnr)
