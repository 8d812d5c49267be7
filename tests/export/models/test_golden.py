"""Golden arrays of which some numbers are stored: what they still tell apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.golden import assert_golden, read_golden, thinned

Array = np.ndarray[Any, np.dtype[Any]]


@pytest.fixture
def whole() -> Array:
    """Equal numbers: nothing but the shape tells."""
    return np.ones((1, 40, 80), np.float32)


@pytest.fixture
def stored(whole: Array, tmp_path: Path) -> Array:
    """The array as a file of golden data gives it back."""
    np.savez(tmp_path / "reference.npz", **thinned("a", whole))
    read = read_golden(tmp_path / "reference.npz")
    assert list(read) == ["a"]
    return np.asarray(read["a"])


def test_some_numbers_and_the_shape_are_stored(whole: Array, stored: Array) -> None:
    assert np.isfinite(stored).sum() == -(-whole.size // 7)
    assert_golden(whole, stored, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.transpose(0, 2, 1),
        lambda a: a[0],
        lambda a: a.reshape(-1),
        lambda a: a.reshape(1, 40, 8, 10),
        lambda a: a.reshape(-1)[::7],  # what is stored, itself
        lambda a: a.astype(np.float64),
    ],
)
def test_right_numbers_of_another_shape_are_refused(
    whole: Array, stored: Array, change: Callable[[Array], Array]
) -> None:
    with pytest.raises(AssertionError):
        assert_golden(change(whole), stored, 1)


def test_a_number_that_is_none_is_refused(whole: Array, stored: Array) -> None:
    whole[0, 0, 0] = np.nan
    with pytest.raises(AssertionError):
        assert_golden(whole, stored, 1)
    whole[0, 0, 0] = 2.0
    with pytest.raises(AssertionError):
        assert_golden(whole, stored, 0.5)
