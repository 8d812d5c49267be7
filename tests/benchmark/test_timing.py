from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.runs.fake_time import MS, FakeTime, timing

from internvl_edge.benchmark import machine
from internvl_edge.benchmark import timing as bench
from internvl_edge.benchmark.machine import environment
from internvl_edge.benchmark.timing import (
    MIN_ROUNDS,
    TURN_CALLS,
    WARMUP_ITERATIONS,
    Timing,
    measure,
    measure_many,
    ratio_of,
)
from internvl_edge.errors import UsageError
from internvl_edge.files.memory import peak_rss_nbytes
from internvl_edge.runtime.ort import cpu


def test_figures_of_known_samples() -> None:
    found = timing(range(1, 101), items=8).to_json()
    assert found["latency"] == {
        "unit": "ms",
        "avg": 50.5,
        "min": 1,
        "max": 100,
        "p50": 50.5,
        "p90": pytest.approx(90.1),  # k + f = 99 · 0.9 = 89.1: between the 90th and 91st
        "p95": pytest.approx(95.05),
        "p99": pytest.approx(99.01),
        "std": pytest.approx(math.sqrt((100**2 - 1) / 12)),
        "count": 100,
    }
    assert found["throughput"] == {"unit": "items/s", "avg": pytest.approx(8 * 100 / 5.050)}
    assert json.loads(json.dumps(found)) == found


def test_percentiles_of_a_long_tail() -> None:
    """Exponential latencies: p(q) = −mean · ln(1 − q)."""
    samples = np.random.default_rng(0).exponential(10.0, 200_000)
    found = timing(samples)
    for q in (50, 90, 99):
        assert found.percentile_ms(q) == pytest.approx(-10 * math.log(1 - q / 100), rel=0.03)
    assert found.to_json()["latency"]["std"] == pytest.approx(10, rel=0.03)


def test_one_sample_is_every_percentile() -> None:
    found = timing([7.0])
    assert [found.percentile_ms(q) for q in bench.PERCENTILES] == [7.0] * 4
    assert found.to_json()["latency"]["std"] == 0


def test_the_samples_are_what_the_clock_said() -> None:
    clock = FakeTime()
    measured = itertools.cycle([1.0, 3.0])
    run = clock.call(itertools.chain([2.0] * 10, measured))
    found = measure(
        run,
        {"x": np.zeros((4, 2))},
        warmup_s=0.005,
        min_duration_s=0,
        min_iterations=6,
        clock=clock,
    )
    assert found.samples_ms == (1.0, 3.0, 1.0, 3.0, 1.0, 3.0)
    assert found.items == 4
    assert found.throughput == pytest.approx(4 * 6 / 0.012)
    assert (found.warmup_iterations, found.is_steady) == (10, True)


def test_it_lasts_as_long_as_asked() -> None:
    clock = FakeTime()
    run = clock.call(itertools.repeat(2.0))
    arguments: dict[str, Any] = {"warmup_s": 0.1, "min_iterations": 3, "clock": clock}
    found = measure(run, {"x": np.zeros(1)}, min_duration_s=1.0, **arguments)
    assert len(found.samples_ms) == 500
    assert found.warmup_iterations == 50


def test_warm_up_ends_when_it_is_steady() -> None:
    clock = FakeTime()
    slowing = [100 * 0.8**i for i in range(20)]  # 20 % per call, a window of five is 67 %
    run = clock.call(itertools.chain(slowing, itertools.repeat(1.0)))
    found = measure_many({"a": run}, warmup_s=0.1, min_duration_s=0, min_iterations=3, clock=clock)[
        "a"
    ]
    assert found.samples_ms == (1.0, 1.0, 1.0)
    assert found.is_steady
    assert found.warmup_iterations > 20


def test_warm_up_gives_up_and_says_so() -> None:
    clock = FakeTime()
    run = clock.call(1.05**i for i in itertools.count())
    found = measure_many({"a": run}, warmup_s=0.1, min_duration_s=0, min_iterations=1, clock=clock)[
        "a"
    ]
    assert not found.is_steady


def test_contenders_take_turns_in_a_rotating_order() -> None:
    clock, calls = FakeTime(), []

    def contender(name: str) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            clock.now_ns += MS

        return run

    contenders = {name: contender(name) for name in "abc"}
    pauses: list[float] = []
    found = measure_many(
        contenders,
        warmup_s=0,
        min_duration_s=0,
        min_iterations=2 * TURN_CALLS,
        min_rounds=2,
        clock=clock,
        pause=pauses.append,
    )
    turns = ["".join(group) for _, group in itertools.groupby(calls[3 * WARMUP_ITERATIONS :])]
    # one unmeasured call to wake up, then the measured ones
    assert turns == [name * (1 + TURN_CALLS) for name in "abcbca"]
    assert len(pauses) == 6
    assert all(len(timing.samples_ms) == 2 * TURN_CALLS for timing in found.values())


def test_a_machine_that_slows_down_slows_all() -> None:
    """Twice the work is twice the time, though the machine ends up at a tenth of its speed."""
    clock = FakeTime()

    def contender(work_ms: float) -> Callable[[], None]:
        def run() -> None:
            slowdown = 1 + 9 * min(clock.now_ns / (2000 * MS), 1)
            clock.now_ns += round(work_ms * slowdown * MS)

        return run

    found = measure_many(
        {"once": contender(1), "twice": contender(2)},
        warmup_s=0.01,
        min_duration_s=1,
        min_iterations=50,
        clock=clock,
        pause=lambda seconds: None,
    )
    assert found["twice"].percentile_ms(50) / found["once"].percentile_ms(50) == pytest.approx(
        2, rel=0.02
    )


def test_a_session_is_run_on_the_feeds() -> None:
    seen = []

    class FakeSession:
        def run(self, feeds: dict[str, Any]) -> None:
            seen.append(feeds)

    feeds = {"pixel_values": np.zeros((2, 3))}
    found = measure(FakeSession(), feeds, warmup_s=0, min_duration_s=0, min_iterations=5)  # type: ignore[arg-type]
    assert found.items == 2
    assert len(found.samples_ms) == 5
    assert min(found.samples_ms) > 0
    assert all(given is feeds for given in seen)


@pytest.mark.parametrize(
    "arguments",
    [
        {"items": 0},
        {"min_iterations": 0},
        {"min_rounds": 0},
        {"warmup_s": -1},
        {"min_duration_s": -1},
    ],
)
def test_rejections(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="measure: expected"):
        measure_many({"a": lambda: None}, **arguments)


def test_nothing_to_measure() -> None:
    with pytest.raises(UsageError, match="contenders=0"):
        measure_many({})
    with pytest.raises(UsageError, match="expected feeds"):
        measure(lambda feeds: None, {})


def test_the_environment_is_a_card_of_json() -> None:
    card = environment()
    assert json.loads(json.dumps(card)) == card
    assert card["packages"]["numpy"] == np.__version__
    assert 1 <= card["cores_usable"] <= card["cores_online"]


def test_the_peak_of_memory_includes_what_was_freed() -> None:
    before = peak_rss_nbytes()
    if before is None:
        pytest.skip("the system does not say")
    block = np.ones(1 << 27, np.uint8)  # 134 MB, every page of it
    del block
    after = peak_rss_nbytes()
    assert after is not None
    assert after >= before
    assert after > 1 << 27


def test_what_the_system_does_not_say_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine, cpu):
        monkeypatch.setattr(module, "system_text", lambda path: "")
    monkeypatch.setattr(machine, "MEASURED_WITH", ("no-such-package",))
    card = environment()
    assert (card["clock_mhz"], card["governor"]) == (None, None)
    assert card["cpu_features"] == []
    assert card["packages"] == {"no-such-package": None}


# --- ratios --------------------------------------------------------------------------------------


def test_a_ratio_of_known_rounds() -> None:
    """Of 20 rounds the interval is r₆ to r₁₅: P(Bin(20, ½) < 6) = 2.07 %, < 7: 5.77 %."""
    ratios = np.random.default_rng(1).permutation(np.arange(1.0, 21))
    ones = np.random.default_rng(2).gamma(9, 1 / 9, 20)
    turns = np.array([0.5, 1.0, 7.0])  # the median counts
    slow = timing(np.ravel(np.outer(ratios * ones, turns)), turn_calls=3)
    fast = timing(np.ravel(np.outer(ones, turns)), turn_calls=3)
    found = ratio_of(slow, fast)
    assert (found.median, found.low, found.high) == pytest.approx((10.5, 6, 15))
    assert (found.rounds, found.reason) == (20, None)


@pytest.mark.parametrize("rounds", [6, 7, 10, 20, 50, 600])
def test_the_interval_leaves_out_what_it_may_and_no_less(rounds: int) -> None:
    """Against the sum itself: k keeps 95 %, k + 1 does not."""
    found = ratio_of(timing(range(1, rounds + 1), turn_calls=1), timing([1.0] * rounds, 1, 1))
    assert found.low is not None
    rank = round(found.low)
    below = [sum(math.comb(rounds, i) for i in range(k)) / 2**rounds for k in (rank, rank + 1)]
    assert below[0] <= 0.025 < below[1]
    assert found.high == rounds + 1 - rank


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_too_few_rounds_have_no_interval(rounds: int) -> None:
    samples = [2.0] * (3 * rounds)
    found = ratio_of(timing(samples, turn_calls=3), timing(samples, turn_calls=3))
    assert (found.median, found.low, found.high) == (1, None, None)
    assert found.reason == f"{rounds} rounds are too few for a 95 % interval"


@pytest.mark.parametrize("rounds", [6, 20, 40])
def test_the_interval_holds_the_truth_as_often_as_it_says(rounds: int) -> None:
    """Rounds have their own speed, turns their own luck, calls of a turn are alike; long tails."""
    rng = np.random.default_rng(rounds)
    trials, hits = 600, 0
    for _ in range(trials):
        speed = rng.lognormal(0, 0.3, (rounds, 1))
        luck = rng.lognormal(0, 0.1, (2, rounds, 1)) * np.where(
            rng.random((2, rounds, 1)) < 0.1, 3, 1
        )
        calls = speed * luck * rng.lognormal(0, 0.02, (2, rounds, 4))
        found = ratio_of(
            timing(2 * np.ravel(calls[0]), turn_calls=4), timing(np.ravel(calls[1]), turn_calls=4)
        )
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 2 <= found.high
    assert hits / trials >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / trials)


@pytest.mark.parametrize(
    ("call_ms", "arguments", "turn_calls"),
    [
        (1.0, {"min_duration_s": 3, "min_iterations": 100}, TURN_CALLS),
        (100.0, {"min_duration_s": 3, "min_iterations": 100}, 5),
        (1000.0, {"min_duration_s": 5, "min_iterations": 20}, 1),
        (1000.0, {"min_duration_s": 0, "min_iterations": 1}, 1),
    ],
)
def test_slow_calls_take_shorter_turns(
    call_ms: float, arguments: dict[str, Any], turn_calls: int
) -> None:
    clock = FakeTime()
    runs = {name: clock.call(itertools.repeat(call_ms)) for name in "ab"}
    found = measure_many(runs, warmup_s=0, clock=clock, pause=lambda seconds: None, **arguments)
    assert found["a"].turn_calls == turn_calls
    ratio = ratio_of(found["a"], found["b"])
    assert ratio.rounds >= MIN_ROUNDS
    assert (ratio.low, ratio.median, ratio.high) == (1, 1, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (timing([1, 2], 1, 1), timing([1, 2, 3], 1, 1)),
        (timing([1, 2], 1, 1), timing([1, 2], 1, 2)),
        (timing([1, 2], 1, None), timing([1, 2], 1, None)),
    ],
)
def test_a_ratio_needs_the_same_rounds(one: Timing, other: Timing) -> None:
    with pytest.raises(UsageError, match="took turns together: found 2 samples"):
        ratio_of(one, other)


def test_a_clock_that_is_set_back_ends_no_measurement() -> None:
    """By hours, in the middle of warming up and of measuring."""
    now, calls = 0, 0

    def clock() -> int:
        nonlocal now, calls
        calls += 1
        now += 1_000_000
        if calls in (7, 301):
            now -= 5 * 3600 * 10**9
        return now

    timing = measure(
        lambda feeds: None,
        {"x": np.zeros((1, 1), np.float32)},
        warmup_s=0.05,
        min_duration_s=0.1,
        min_iterations=200,
        clock=clock,
    )
    assert min(timing.samples_ms) > 0
    assert timing.percentile_ms(50) == 1.0
