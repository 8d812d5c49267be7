"""Arithmetic on rows of numbers: unit length, softmax, order."""

from __future__ import annotations

import numpy as np

from internvl_edge.types import Array

__all__ = ["ranked", "softmax", "unit"]


def unit(rows: Array) -> Array:
    """Divide each row by its length; a row of zeros stays."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    result: Array = rows / np.where(norms > 0, norms, 1)
    return result


def softmax(logits: Array) -> Array:
    """Compute the softmax over the last axis, in the dtype given."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Array = powers / powers.sum(axis=-1, keepdims=True)
    return result


def ranked(scores: Array) -> Array:
    """Rank indices over the last axis, best first; equal scores in the order given."""
    return np.argsort(-scores, axis=-1, kind="stable")
