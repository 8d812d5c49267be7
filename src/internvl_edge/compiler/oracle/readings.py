"""Readings of a graph: its blocks and tensors, compared with what they should be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from internvl_edge.compiler.oracle.checker import SAME_DB
from internvl_edge.export.compare import agreement
from internvl_edge.types import Array

MARGIN_DB = 3.0  # that a graph is nearer to its simulation than that is to PyTorch
CHANNEL_SLACK_DB = 20.0  # a channel may be this much worse than a tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReading:
    """A tensor compared with what it should be."""

    name: str  # the module that gives it, by its name in our reference
    sqnr_db: float
    channel_db: float  # SQNR of the worst channel, the last axis
    is_bad: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReading:
    """A block of a graph; SQNR in dB of its output compared with PyTorch in float32."""

    index: int
    isolated_db: float
    accumulated_db: float
    unrounded_db: float | None  # None: nothing in the graph is quantized
    tensors: tuple[TensorReading, ...]  # in the order of the graph


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphReading:
    """All blocks of one graph of a component."""

    component: str
    file: str
    against: str  # the name of what its tensors were compared with
    bound_db: float
    blocks: tuple[BlockReading, ...]

    @property
    def first_bad(self) -> TensorReading | None:
        tensors = (tensor for block in self.blocks for tensor in block.tensors)
        return next((tensor for tensor in tensors if tensor.is_bad), None)

    def to_json(self) -> dict[str, Any]:
        bad = self.first_bad
        return asdict(self) | {"first_bad": None if bad is None else bad.name}


def tensor_reading(
    name: str, reference: Array, expected: Array, actual: Array, bound_db: float
) -> TensorReading:
    """Compare a tensor with what it should be, and that with what it would be without rounding.

    A scale that is twice too coarse may leave a tensor above any fixed bound, but it moves it
    further than its quantization does; a few roundings to the other side do not.
    """
    whole, worst = _sqnr(expected, actual), worst_channel_db(expected, actual)
    is_good = whole >= bound_db and worst >= bound_db - CHANNEL_SLACK_DB
    if reference is not expected and whole < SAME_DB:
        is_good &= whole >= _sqnr(reference, expected) + MARGIN_DB
    return TensorReading(name=name, sqnr_db=whole, channel_db=worst, is_bad=not is_good)


def _sqnr(expected: Array, actual: Array) -> float:
    return agreement(expected, actual).sqnr_db


def worst_channel_db(expected: Array, actual: Array) -> float:
    """Compute the SQNR of the channel that is worst; (…, C) → dB.

    One wrong scale of thousands vanishes in a tensor's figure, and is all there is in its
    channel's. A channel that is almost silent is measured against a hundredth of the mean.
    """
    if not np.isfinite(actual).all():
        return -np.inf
    flat = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
    noise = ((flat - actual.reshape(flat.shape)) ** 2).sum(axis=0)
    signal = (flat**2).sum(axis=0)
    signal = np.maximum(signal, 0.01 * signal.mean())
    ratio = np.divide(signal, noise, out=np.full_like(signal, 1e20), where=noise > 0)
    return float(10 * np.log10(max(ratio.min(), 1e-20)))
