"""The few largest of many numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from internvl_edge.types import Array

__all__ = ["largest"]

BLOCK = 256  # values of which the maximum is looked at first


def largest(values: Array, count: int) -> Array:
    """Find the ``count`` largest values (V,) and their equals: indices, ascending; count ≤ V.

    As many blocks have a maximum of at least the count-th largest maximum, so that no value below
    it belongs here: of 50000 values all but a few drop out without being sorted.
    """
    whole = len(values) // BLOCK * BLOCK
    tops = np.concatenate((values[:whole].reshape(-1, BLOCK).max(axis=1), values[whole:]))
    if len(tops) < count:
        return np.flatnonzero(values >= _kth(values, count))
    candidates: Array = np.flatnonzero(values >= _kth(tops, count))
    few = values[candidates]
    result: Array = candidates[few >= _kth(few, count)]
    return result


def _kth(values: Array, count: int) -> Any:
    """Return the ``count``-th largest value."""
    at = len(values) - count
    return np.partition(values, at)[at]
