"""Choices by the error of the output."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from internvl_edge.quantize.numerics import formats
from internvl_edge.quantize.numerics.output_error import (
    SAMPLE_ROWS,
    RowSample,
    best_factors,
    best_scale,
    best_spread,
    output_error,
    sample_weights,
)
from internvl_edge.quantize.numerics.smooth import column_absmax


def test_output_error_is_that_of_the_rounded_product() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 12)).astype(np.float32)
    w = rng.standard_normal((5, 12)).astype(np.float32)
    scale = float(np.abs(x).max() / 127)
    rounded = np.clip(np.rint(x / np.float32(scale)), -128, 127) * np.float32(scale)
    steps = np.abs(w).max(axis=1, keepdims=True) / np.float32(127)
    steps = steps.astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = np.square(rounded @ (np.rint(w / steps) * steps).T - x @ w.T).sum()
    np.testing.assert_allclose(output_error(x, w, scale, "int8"), expected, rtol=1e-3)


def test_a_sample_is_spread_over_all_rows() -> None:
    sample = RowSample()
    for start in range(0, 5000, 100):
        sample.update(np.arange(start, start + 100, dtype=np.float32)[:, None])
    rows = np.array(sample.rows)[:, 0]
    assert SAMPLE_ROWS <= len(rows) < 2 * SAMPLE_ROWS
    assert len(set(np.diff(rows))) == 1
    assert rows[-1] > 4900


def test_the_sample_does_not_depend_on_batches() -> None:
    values = np.arange(3000, dtype=np.float32)[:, None]
    whole, parts = RowSample(), RowSample()
    whole.update(values)
    for part in np.split(values, [7, 600, 601, 2500]):
        parts.update(part)
    assert len(parts.rows) >= SAMPLE_ROWS
    assert len(whole.rows) >= SAMPLE_ROWS


def test_weights_of_all_readers_are_sampled() -> None:
    sample = sample_weights([np.zeros((600, 4), np.float32), np.ones((600, 4), np.float32)])
    assert set(sample[:, 0]) == {0.0, 1.0}
    assert len(sample) <= 2 * SAMPLE_ROWS


def smoothing(outliers: float) -> np.ndarray:
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((400, 64)), rng.standard_normal((32, 64))
    x[:, :3] *= outliers
    w[:, :3] /= outliers
    return best_factors([x], np.abs(x).max(0), column_absmax([w]), w, lambda rows: rows, "int8")


def test_smoothing_is_chosen_where_it_pays() -> None:
    assert smoothing(1.0).max() < 2.0
    factors = smoothing(60.0)
    assert factors[:3].min() > 10 * np.median(factors)


def test_a_range_is_chosen_by_the_output() -> None:
    """One huge activation in a channel that no weight looks at is left to saturate."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((100, 16)).astype(np.float32)
    w = rng.standard_normal((8, 16)).astype(np.float32)
    x[0, 5], w[:, 5] = 1000.0, 0.0
    whole, clip = (1000.0 / 127, 0.0), (4.0 / 127, 0.0)
    assert best_scale(x, w, [whole], [clip], "int8") == (clip, whole)


def test_a_clip_that_gains_little_is_not_taken() -> None:
    """It was made from these rows; the next ones will have more beyond it."""
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((300, 64)), rng.standard_normal((32, 64))
    whole, clip = (float(np.abs(x).max()) * 1.1 / 127, 0.0), (3.6 / 127, 0.0)
    assert output_error(x, w, clip[0], "int8") < output_error(x, w, whole[0], "int8")
    assert best_scale(x, w, [whole], [clip], "int8") == (whole, whole)


def spread(outliers: float) -> tuple[tuple[float, float], np.ndarray] | None:
    rng = np.random.default_rng(4)
    x = np.abs(rng.standard_normal((300, 64))).astype(np.float32)
    w = rng.standard_normal((32, 64)).astype(np.float32)
    x[:, :3] *= outliers
    w[:, :3] /= outliers
    peaks = np.abs(x).max(0)
    whole = (float(peaks.max()) / 127, 0.0)
    return best_spread(x, w, peaks, whole, lambda top: [(top / 127, 0.0)], "int8")


def test_outlier_channels_are_divided_where_it_pays() -> None:
    found = spread(50.0)
    assert found is not None
    (scale, _), factors = found
    assert factors[:3].max() < 0.1
    assert factors[3:].min() > 5 * factors[:3].max()
    assert factors.max() <= 1
    assert scale < 10 / 127
    assert spread(1.0) is None


def test_a_shift_halves_the_step_of_a_one_sided_range() -> None:
    x = np.abs(np.random.default_rng(3).standard_normal((200, 16))).astype(np.float32)
    w = np.eye(16, dtype=np.float32)
    high = float(x.max())
    plain = output_error(x, w, high / 127, "int8")
    shifted = output_error(
        x, w, float(formats.scale_of(high, formats.SHIFTED_INT8)), "int8", high / 2
    )
    assert shifted < plain / 2
