"""Range observers: exact under any split, and clips that are what they claim to be."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from internvl_edge.errors import CalibrationError, UsageError
from internvl_edge.quantize.numerics.formats import FORMATS, as_format, fake_quantize
from internvl_edge.quantize.numerics.observers import (
    NUM_BINS,
    RANGE_METHODS,
    Histogram,
    RangeMethod,
    RangeObserver,
    divergence,
    percentile_clip,
    squared_error,
)
from internvl_edge.types import Array

BOTH = pytest.mark.parametrize("fmt", FORMATS)
ROWS = arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.just(5)),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def observed(*parts: Array) -> RangeObserver:
    observer = RangeObserver("layer")
    for part in parts:
        observer.update(part)
    return observer


def assert_same(a: RangeObserver, b: RangeObserver) -> None:
    left, right = a.state(), b.state()
    assert left.keys() == right.keys()
    for key, value in left.items():
        np.testing.assert_array_equal(value, right[key])


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def mean_error(x: Array, clip: float, fmt: str) -> float:
    y = fake_quantize(x, clip / as_format(fmt).max_value, fmt)
    return float(np.mean((x.astype(np.float64) - y) ** 2))


@given(x=ROWS, cuts=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 99))
@settings(deadline=None)
def test_merging_any_split_in_any_order_equals_the_whole(
    x: Array, cuts: list[int], seed: int
) -> None:
    parts = [observed(part) for part in np.split(x, sorted(min(c, len(x)) for c in cuts))]
    merged = RangeObserver("layer")
    for i in np.random.default_rng(seed).permutation(len(parts)):
        merged.merge(parts[i])
    assert_same(merged, observed(x))


@given(x=ROWS)
@settings(deadline=None)
def test_maxima_and_histogram_against_their_definition(x: Array) -> None:
    observer = observed(x)
    np.testing.assert_array_equal(observer.channel_absmax, np.abs(x).max(axis=0))
    assert observer.absmax == np.abs(x).max()
    assert observer.num_values == x.size
    histogram = observer.histogram()
    expected, _ = np.histogram(np.abs(x).astype(np.float64), bins=histogram.edges)
    np.testing.assert_array_equal(histogram.counts, expected)
    positive = histogram.edges[:-1] >= np.finfo(np.float32).tiny
    widths = np.diff(histogram.edges) / np.maximum(histogram.edges[:-1], 1e-300)
    assert (widths[positive] <= 1 / 256).all()


def test_a_stream_longer_than_a_chunk_and_channels_last_of_any_rank() -> None:
    x = normal(3, 200, 700)
    np.testing.assert_array_equal(observed(x).channel_absmax, np.abs(x).max(axis=(0, 1)))
    assert_same(observed(x), observed(*x.reshape(-1, 700)))
    assert_same(observed(x), observed(np.asfortranarray(x)))
    assert observed(np.float32(-3.0) * np.ones((), np.float32)).absmax == 3.0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types(dtype: Any) -> None:
    x = normal(7, 5).astype(dtype)
    assert_same(observed(x), observed(x.astype(np.float32)))


def test_state_survives_a_file() -> None:
    observer = observed(normal(50, 6))
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **observer.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as state:
        restored = RangeObserver.from_state(state, "layer")
    assert_same(restored, observer)
    restored.update(normal(9, 6, seed=1))
    observer.update(normal(9, 6, seed=1))
    assert_same(restored, observer)
    assert_same(RangeObserver.from_state(RangeObserver().state()), RangeObserver())


@pytest.mark.parametrize(
    "change",
    [
        {"counts": np.array([-1])},
        {"counts": np.array([1, 2])},
        {"bins": np.array([NUM_BINS], np.uint32)},
        {"bins": np.array([0.5])},
        {"channel_absmax": np.array([np.nan], np.float32)},
        {"channel_absmax": np.array([-1.0], np.float32)},
        {"channel_absmax": np.zeros(0, np.float32)},
    ],
)
def test_a_broken_state_is_refused(change: dict[str, Array]) -> None:
    state = observed(np.ones((1, 1), np.float32)).state()
    with pytest.raises(CalibrationError, match=r"layer: .*state"):
        RangeObserver.from_state(state | change, "layer")
    with pytest.raises(CalibrationError, match=r"layer: .*state"):
        RangeObserver.from_state({}, "layer")


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_and_leave_no_trace(bad: float) -> None:
    observer, x = observed(normal(4, 3)), normal(4, 3)
    x[2, 1] = bad
    with pytest.raises(CalibrationError, match=r"layer: .*NaN or infinity \(channel 1\)"):
        observer.update(x)
    assert_same(observer, observed(normal(4, 3)))
    with pytest.raises(CalibrationError, match="infinity"):
        observer.update(np.array([1e300, 0.0, 0.0]))


def test_another_number_of_channels_is_refused() -> None:
    observer = observed(normal(4, 3))
    with pytest.raises(CalibrationError, match=r"expected 3 channels .* found 4"):
        observer.update(normal(3, 4))
    with pytest.raises(CalibrationError, match=r"expected 3 channels .* found 4"):
        observer.merge(observed(normal(3, 4)))
    assert_same(observer, observed(normal(4, 3)))


def test_nothing_observed_is_refused() -> None:
    observer = observed(np.zeros((0, 4), np.float32))
    for method in RANGE_METHODS:
        with pytest.raises(CalibrationError, match="layer: no activation"):
            observer.scale(method, "int8")


@BOTH
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_zeros_and_denormals_have_a_usable_scale(method: RangeMethod, fmt: str) -> None:
    for value in (0.0, 1e-42, 1e-37, 3.4e38):
        observer = observed(np.full((4, 4), value, np.float32))
        assert 0.0 <= observer.clip(method, fmt) <= observer.absmax
        scale = observer.scale(method, fmt)
        assert scale >= np.finfo(np.float32).tiny
        assert np.isfinite(1.0 / scale)


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.99, 100.0])
def test_percentile_agrees_with_numpy(percentile: float) -> None:
    x = normal(500, 400)
    clip = observed(x).clip("percentile", "int8", percentile)
    assert clip == pytest.approx(np.percentile(np.abs(x), percentile), rel=1 / 256)
    assert clip <= np.abs(x).max()


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_impossible_percentiles_are_refused(percentile: float) -> None:
    with pytest.raises(UsageError, match="percentile"):
        percentile_clip(observed(normal(2, 2)).histogram(), percentile)


def test_unknown_methods_and_formats_are_refused() -> None:
    observer = observed(normal(2, 2))
    with pytest.raises(UsageError, match="expected one of max, percentile"):
        observer.clip("minmax", "int8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="int2"):
        observer.scale("mse", "int2")


@BOTH
@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.8, 1.0])
def test_predicted_error_is_the_measured_one(fmt: str, ratio: float) -> None:
    x = normal(400, 500)
    histogram = observed(x).histogram()
    clip = ratio * histogram.absmax
    predicted = float(squared_error(histogram, clip, fmt))
    assert predicted == pytest.approx(mean_error(x, clip, fmt), rel=0.04)


def cases() -> dict[str, Array]:
    x = normal(400, 500)
    massive = x.copy()
    massive[0, 0] = 1000.0
    outliers = x * np.where(np.arange(500) < 6, 100.0, 1.0).astype(np.float32)
    laplace = np.asarray(np.random.default_rng(1).laplace(size=x.shape), np.float32)
    return {
        "normal": x,
        "few": x[:2],
        "massive": massive,
        "outliers": outliers,
        "laplace": laplace,
        "half": np.maximum(x, 0),
    }


@BOTH
@pytest.mark.parametrize("case", cases())
def test_mse_clip_is_the_best_of_a_brute_force_search(fmt: str, case: str) -> None:
    x = cases()[case]
    observer = observed(x)
    candidates = observer.absmax * np.exp2(-np.arange(0, 12, 0.2))
    best = min(mean_error(x, c, fmt) for c in candidates)
    assert mean_error(x, observer.clip("mse", fmt), fmt) <= best * 1.02
    for method in RANGE_METHODS:
        assert 0.0 < observer.clip(method, fmt) <= observer.absmax


def linear_divergence(x: Array, clip: float, pieces: Sequence[Array]) -> float:
    """KL by the definition, for a grid given as the edges of the pieces of every cell."""
    values, total = np.abs(x[x != 0]).astype(np.float64), np.count_nonzero(x)
    p = [np.histogram(values, bins=edges)[0] / total for edges in pieces]
    q = [np.where(part > 0, part.sum() / max(np.count_nonzero(part), 1), 0.0) for part in p]
    flat_p, flat_q = np.concatenate(p), np.concatenate(q)
    flat_p[np.flatnonzero(flat_p)[-1]] += np.count_nonzero(values > clip) / total
    used = flat_p > 0
    return float(np.sum(flat_p[used] * np.log(flat_p[used] / flat_q[used])))


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_divergence_against_its_definition(fmt: str, ratio: float) -> None:
    x = normal(1000, 1000)
    histogram = observed(x).histogram()
    clip = ratio * histogram.absmax
    levels = np.arange(128.0) if fmt == "int8" else None
    if levels is None:
        import torch  # an FP8 table from elsewhere

        stored = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
        levels = stored.double().numpy()
    levels = levels * clip / levels[-1]
    bounds = np.concatenate(([0.0], (levels[1:] + levels[:-1]) / 2, [clip]))
    pieces = [np.linspace(a, b, 17) for a, b in pairwise(bounds)]
    expected = linear_divergence(x, clip, pieces)
    assert float(divergence(histogram, clip, fmt)) == pytest.approx(expected, rel=0.05, abs=2e-3)


def test_entropy_cuts_a_lone_outlier_and_keeps_a_uniform_range() -> None:
    massive = normal(1000, 1000)
    massive[0, 0] = 1000.0
    assert 3.5 < observed(massive).clip("entropy", "int8") < 6.0
    uniform = np.random.default_rng(0).uniform(-1, 1, (400, 500)).astype(np.float32)
    observer = observed(uniform)
    assert observer.clip("entropy", "int8") > 0.98 * observer.absmax


def test_entropy_does_not_collapse_onto_a_few_values() -> None:
    for x in (cases()["few"], cases()["half"], normal(4, 4)):
        observer = observed(x)
        assert observer.clip("entropy", "int8") > 0.5 * observer.absmax


def test_losses_take_many_clips_at_once() -> None:
    histogram = observed(normal(30, 30)).histogram()
    clips = np.array([[0.5, 1.0], [2.0, 3.0]])
    for loss in (squared_error, divergence):
        together = loss(histogram, clips, "fp8")
        alone = [[float(loss(histogram, c, "fp8")) for c in row] for row in clips]
        np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_zeros_do_not_move_the_entropy() -> None:
    x = normal(100, 100)
    padded = np.concatenate((x, np.zeros((300, 100), np.float32)))
    assert observed(x).clip("entropy", "int8") == observed(padded).clip("entropy", "int8")


def test_counts_are_exact_beyond_float_precision() -> None:
    observer = observed(np.full((1, 1), 0.75, np.float32))
    for _ in range(60):
        observer.merge(RangeObserver.from_state(observer.state()))
    assert observer.num_values == 2**60
    one_more = observed(np.full((1, 1), 0.75, np.float32))
    observer.merge(one_more)
    assert observer.num_values == 2**60 + 1


def test_histogram_is_where_the_solvers_read() -> None:
    edges = np.array([1.0, 2.0, 3.0])
    histogram = Histogram(edges=edges, counts=np.array([3, 1]), absmax=2.5)
    assert percentile_clip(histogram, 75.0) == 2.0
    assert percentile_clip(histogram, 99.0) == 2.5  # never beyond what was seen
