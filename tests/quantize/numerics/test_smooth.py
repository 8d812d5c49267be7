"""SmoothQuant: the function stays, the outliers go."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.errors import CalibrationError, UsageError
from internvl_edge.quantize.numerics.formats import INT8, fake_quantize, sqnr_db, weight_scale
from internvl_edge.quantize.numerics.observers import RangeObserver
from internvl_edge.quantize.numerics.smooth import (
    MAX_FACTOR,
    column_absmax,
    fold,
    smoothing_factors,
)
from internvl_edge.types import Array


def norm(x: Array, gain: Array, bias: Array | None) -> Array:
    """RMSNorm without a bias, LayerNorm with one."""
    if bias is None:
        return np.asarray(x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * gain)
    centred = x - x.mean(axis=-1, keepdims=True)
    return np.asarray(
        centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6) * gain + bias
    )


@given(
    seed=st.integers(0, 10**6),
    channels=st.integers(1, 24),
    readers=st.integers(1, 3),
    alpha=st.floats(0.0, 1.0),
    has_bias=st.booleans(),
    spread=st.floats(0.0, 4.0),
)
@settings(deadline=None, max_examples=60)
def test_folding_preserves_the_function(
    seed: int, channels: int, readers: int, alpha: float, has_bias: bool, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((7, channels))
    gain = rng.standard_normal(channels) * np.exp(spread * rng.standard_normal(channels))
    bias = rng.standard_normal(channels) if has_bias else None
    weights = [rng.standard_normal((4, channels)) for _ in range(readers)]
    gain[rng.integers(channels)] = 0.0  # a dead channel
    before = norm(x, gain, bias)
    s = smoothing_factors(np.abs(before).max(axis=0), column_absmax(weights), alpha)
    assert s.dtype == np.float32
    assert ((s >= 1 / MAX_FACTOR) & (s <= MAX_FACTOR)).all()

    new_weights = [w.copy() for w in weights]
    new_gain, new_bias = fold(gain, bias, new_weights, s)
    assert (new_bias is None) == (bias is None)
    after = norm(x, new_gain, new_bias)
    for old, new in zip(weights, new_weights, strict=True):
        np.testing.assert_allclose(after @ new.T, before @ old.T, rtol=1e-9, atol=1e-9)


def test_factors_by_their_definition() -> None:
    x, w = np.array([1.0, 4.0, 16.0]), np.array([2.0, 0.5, 1.0])
    for alpha in (0.0, 0.3, 0.5, 1.0):
        s = x**alpha / w ** (1 - alpha)
        expected = s / np.prod(s) ** (1 / 3)
        np.testing.assert_allclose(smoothing_factors(x, w, alpha), expected, rtol=1e-6)


def test_half_alpha_gives_both_sides_the_same_profile() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0.1, 100, 32), rng.uniform(0.01, 1, 32)
    s = smoothing_factors(x, w, 0.5)
    ratio = (x / s) / (w * s)
    np.testing.assert_allclose(ratio, np.full(32, ratio[0]), rtol=1e-5)


def test_dead_channels_keep_one_and_do_not_count() -> None:
    x, w = np.array([0.0, 4.0, 9.0, 3.0]), np.array([1.0, 1.0, 1.0, 0.0])
    s = smoothing_factors(x, w, 0.5)
    np.testing.assert_allclose(s, [1.0, np.sqrt(2 / 3), np.sqrt(3 / 2), 1.0], rtol=1e-6)
    np.testing.assert_array_equal(smoothing_factors(np.zeros(3), np.zeros(3), 0.5), np.ones(3))


def test_factors_are_bounded() -> None:
    s = smoothing_factors(np.array([1e-30, 1e30]), np.array([1.0, 1.0]), 1.0)
    np.testing.assert_allclose(s, [1 / MAX_FACTOR, MAX_FACTOR], rtol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha"):
        smoothing_factors(np.ones(2), np.ones(2), alpha)


def test_maxima_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match="maxima of activations"):
        smoothing_factors(np.array([1.0, np.nan]), np.ones(2), 0.5)
    with pytest.raises(CalibrationError, match="maxima of weights"):
        smoothing_factors(np.ones(2), np.array([1.0, np.inf]), 0.5)


def test_channels_that_differ_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"expected 3 channels .* found \[3, 4\]"):
        fold(np.ones(3), None, [np.ones((2, 4))], np.ones(3))


def test_types_are_kept_and_only_weights_are_changed() -> None:
    gain, weight = np.ones(3, np.float32), np.ones((2, 3), np.float16)
    s = np.array([2.0, 4.0, 0.5], np.float32)
    new_gain, new_bias = fold(gain, gain, [weight], s)
    assert new_gain.dtype == np.float32
    assert weight.dtype == np.float16
    assert new_bias is not None
    np.testing.assert_array_equal(new_gain, 1 / s)
    np.testing.assert_array_equal(weight[0], s)
    assert (gain == 1).all()


def int8_sqnr(x: Array, gain: Array, weights: list[Array], alpha: float | None) -> float:
    """The output error of linear layers after an RMSNorm, W8A8 at the maximum."""
    exact = np.concatenate([norm(x, gain, None) @ w.T for w in weights], axis=-1)
    if alpha is not None:
        peaks = np.abs(norm(x, gain, None)).max(axis=0)
        weights = [w.copy() for w in weights]
        gain, _ = fold(gain, None, weights, smoothing_factors(peaks, column_absmax(weights), alpha))
    observer = RangeObserver()
    activations = norm(x, gain, None)
    observer.update(activations)
    a = fake_quantize(activations, observer.scale("max", INT8), INT8)
    stored = [fake_quantize(w, weight_scale(w, INT8, 0), INT8, 0) for w in weights]
    return sqnr_db(exact, np.concatenate([a @ w.T for w in stored], axis=-1))


def test_outliers_that_keep_the_function_cost_less_than_a_decibel() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((256, 320))
    gain = rng.uniform(0.5, 1.5, 320)
    weights = [rng.standard_normal((64, 320)) * 0.02 for _ in range(3)]
    plain, plain_smooth = (int8_sqnr(x, gain, weights, alpha) for alpha in (None, 0.5))

    factor = np.ones(320)
    factor[rng.choice(320, 6, replace=False)] = 100.0
    gain, weights = gain * factor, [w / factor for w in weights]
    assert int8_sqnr(x, gain, weights, None) < plain - 15
    recovered = int8_sqnr(x, gain, weights, 0.5)
    assert recovered == pytest.approx(plain_smooth, abs=0.1)
    assert recovered > plain - 1
