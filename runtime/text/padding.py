"""Rows of ids, made as long as the longest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from internvl_edge.types import Array

__all__ = ["PAD_ID", "left_padded", "right_padded"]

PAD_ID = 0


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Pad rows on the left, int64 [B,T]; also the mask, int64 [B,T], 0 where they are padded."""
    width = max(map(len, rows))
    ids = np.full((len(rows), width), PAD_ID, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def right_padded(rows: Sequence[Sequence[int]], width: int, pad_id: int = PAD_ID) -> Array:
    """Pad rows of at most ``width`` ids on the right, int64 [B,width]."""
    ids = np.full((len(rows), width), pad_id, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids
