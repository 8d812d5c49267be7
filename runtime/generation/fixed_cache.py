"""A decoder's cache of fixed capacity, written where it lies.

A cache that grows is copied by every step: the old positions and the new one go into another
buffer, and every shape changes. One of C positions stays: the graph takes the whole of it
[B,heads,C,d], a mask of all places [B,C] and ``write_indices`` [B], and writes the new keys and
values from there on (``TensorScatter``, opset 24). A session that gives input and output the same
memory writes T positions per step and copies none; shapes and addresses stay the same, so that a
GPU can replay a step as one CUDA graph. The price is attention over places that hold nothing yet.

The graph itself masks the places after the new tokens: none is seen, whatever the mask says. So one
mask serves a whole generation.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from internvl_edge.artifact import TensorSpec
from internvl_edge.errors import UsageError
from internvl_edge.runtime.feeds import MASK, WRITE_INDICES, numpy_dtype
from internvl_edge.types import Array

__all__ = [
    "MASK",
    "PAST",
    "PRESENT",
    "WRITE_INDICES",
    "capacity_of",
    "grown",
    "in_place",
    "placed",
    "positions_of",
]

PAST, PRESENT = "past_key_values.", "present."


def capacity_of(inputs: Mapping[str, TensorSpec]) -> int | None:
    """Count the positions of a cache that is written in place; None where it grows."""
    if WRITE_INDICES not in inputs:
        return None
    return int(inputs[MASK].shape[1])


def position_nbytes(inputs: Mapping[str, TensorSpec]) -> int:
    """Count the bytes that a decoder's cache has for each position of a row."""
    caches = [spec for name, spec in inputs.items() if name.startswith(PAST)]
    return sum(
        int(spec.shape[1]) * int(spec.shape[3]) * numpy_dtype(spec.dtype).itemsize
        for spec in caches
    )


def positions_of(mask: Array, first: int, capacity: int) -> dict[str, Array]:
    """Make the feeds that say where new positions go.

    Args:
        mask: int64 [B,n] of the positions so far, the new ones included; n ≤ capacity.
        first: where the new ones begin.
        capacity: of the cache.

    Raises:
        UsageError: the cache has no room for them.
    """
    rows, used = mask.shape
    _require_room(used, capacity)
    wide = np.ones((rows, capacity), np.int64)
    wide[:, :used] = mask
    return {MASK: wide, WRITE_INDICES: np.full(rows, first, np.int64)}


def _require_room(used: int, capacity: int) -> None:
    if used > capacity:
        raise UsageError(
            f"the cache has {capacity} positions, {used} are needed; ask for less, or export with "
            f"--cache-capacity {used} or more"
        )


def placed(values: Array, capacity: int) -> Array:
    """Place a cache [B,heads,P,d] at the beginning of one of zeros, [B,heads,C,d].

    Raises:
        UsageError: it has more positions than that.
    """
    rows, heads, past, width = values.shape
    _require_room(past, capacity)
    whole = np.zeros((rows, heads, capacity, width), values.dtype)
    whole[:, :, :past] = values
    return whole


def in_place(feeds: Mapping[str, Array], inputs: Mapping[str, TensorSpec]) -> dict[str, Array]:
    """Turn feeds for a cache that grows into those that a session with ``inputs`` takes.

    They stay as they are where its cache grows too.
    """
    capacity = capacity_of(inputs)
    if capacity is None:
        return dict(feeds)
    past = next(values.shape[2] for name, values in feeds.items() if name.startswith(PAST))
    caches = {n: placed(feeds[n], capacity) for n in inputs if n.startswith(PAST)}
    return {**feeds, **caches, **positions_of(feeds[MASK], past, capacity)}


def grown(outputs: Mapping[str, Array], positions: int) -> dict[str, Array]:
    """Cut outputs of a cache that is written in place as if it had grown to ``positions``."""
    return {
        name: values[:, :, :positions] if name.startswith(PRESENT) else values
        for name, values in outputs.items()
    }
