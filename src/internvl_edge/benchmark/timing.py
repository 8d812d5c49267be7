"""Timing that can be repeated: warm-up until steady, raw samples, contenders interleaved.

One sample is the host's time of one call, from before it to after it. From the sorted samples
x₀ ≤ … ≤ xₙ₋₁

    p(q)   = xₖ + f (xₖ₊₁ − xₖ),   k + f = (n − 1) q/100       (linear between order statistics)
    std    = sqrt( Σ (xᵢ − mean)² / n )                        (of the samples, not an estimate)
    throughput = n · items per call / Σ xᵢ                     (or per wall time, of calls at once)

and percentiles come from all the samples, never from averaged percentiles. Latencies have long
upper tails, so p50 says what a call usually takes and p99 what to plan for; a mean alone says
neither.

Warm-up runs for a time *and* a number of calls, and then until it is steady: the median of the
last calls is within a tenth of the median of those before. It gives up after ten times its time,
and the result says so. Contenders that are compared take turns of a few calls, in an order that
rotates every round, so that a machine that slows down slows all of them. Between turns nothing
runs for a moment: thread pools of inference libraries spin for work after a call, and on the same
cores one library's idle threads would be measured as the other's latency (a factor of 50 on two
cores, before there was a pause).

How much faster one is than another is the median over rounds of the ratio of their turns'
medians: a round met both in the same state of the machine, and calls of one turn are alike, so a
round is one observation however many calls it has. The interval lies between two of the sorted
ratios r₁ ≤ … ≤ rₙ, and holds for whatever distribution they have:

    P(rₖ ≤ median ≤ rₙ₊₁₋ₖ) = 1 − 2 P(Bin(n, ½) < k) ≥ 95 %,   k the largest that keeps it

Below 6 rounds there is no such k, and no interval is given. Turns are shorter where calls are so
slow that there would be too few of them.

The JSON has AIPerf's field names (``unit``, ``avg``, ``p99``, …) under trtexec's metric names
(``latency``, ``throughput``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from internvl_edge.errors import UsageError
from internvl_edge.runtime.session import Session
from internvl_edge.types import Array

__all__ = ["Distribution", "Ratio", "Timing", "measure", "measure_many", "ratio_of", "warm_up"]

WARMUP_S, MIN_DURATION_S, MIN_ITERATIONS = 0.2, 3.0, 100  # trtexec's, with more calls for p99
WARMUP_ITERATIONS = 10
STEADY_WINDOW = 5  # calls in each of the two medians that are compared
STEADY_TOLERANCE = 0.1
WARMUP_PATIENCE = 10  # times the warm-up's time
NS_PER_S, NS_PER_MS = 1_000_000_000, 1_000_000
TURN_CALLS = 10  # at most, of one contender before the next
MIN_ROUNDS = 20  # of contenders that are compared: k = 6
SETTLE_S = 0.05  # before a turn: threads of the last contender stop spinning for work
PERCENTILES = (50, 90, 95, 99)
TAIL = 40  # 1/40 of the probability is left out on each side of an interval

Clock = Callable[[], int]  # nanoseconds, monotonic


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Figures of samples in milliseconds, under AIPerf's names."""

    avg: float
    min: float
    max: float
    p50: float
    p90: float
    p95: float
    p99: float
    std: float
    count: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Distribution:
        """Compute the distribution of samples."""
        p50, p90, p95, p99 = map(float, np.percentile(samples_ms, PERCENTILES))
        return cls(
            avg=float(np.mean(samples_ms)),
            min=min(samples_ms),
            max=max(samples_ms),
            p50=p50,
            p90=p90,
            p95=p95,
            p99=p99,
            std=float(np.std(samples_ms)),
            count=len(samples_ms),
        )

    def to_json(self) -> dict[str, Any]:
        return {"unit": "ms", **asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The samples of one contender, in the order measured."""

    samples_ms: tuple[float, ...]
    items: int  # per call: its batch
    warmup_iterations: int
    is_steady: bool  # the warm-up ended because it was
    wall_s: float | None = None  # of all samples, where several ran at once
    turn_calls: int | None = None  # of contenders that took turns: so many samples are a round's
    rate: float | None = None  # of calls that arrived by themselves, per second
    bound_ms: float | None = None  # that p99 had to keep

    def percentile_ms(self, q: float) -> float:
        """Interpolate between the order statistics, linearly."""
        return float(np.percentile(self.samples_ms, q))

    @property
    def throughput(self) -> float:
        """Items per second."""
        wall_s = sum(self.samples_ms) / 1e3 if self.wall_s is None else self.wall_s
        return self.items * len(self.samples_ms) / wall_s

    def to_json(self) -> dict[str, Any]:
        """Return everything but the raw samples."""
        fields: dict[str, Any] = {
            "latency": Distribution.of(self.samples_ms).to_json(),
            "throughput": {"unit": "items/s", "avg": self.throughput},
            "batch_size": self.items,
            "warmup_iterations": self.warmup_iterations,
            "is_steady": self.is_steady,
        }
        if self.rate is not None:
            fields["request_rate"] = {"unit": "requests/s", "avg": self.rate}
        if self.bound_ms is not None:
            fields["p99_bound"] = {"unit": "ms", "max": self.bound_ms}
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times as long one contender takes as another."""

    median: float
    low: float | None  # of the 95 % interval; None where there is none
    high: float | None
    rounds: int
    reason: str | None = None  # why there is no interval


def ratio_of(one: Timing, other: Timing) -> Ratio:
    """Divide the latency of ``one`` by that of ``other``; they were measured in turns.

    Raises:
        UsageError: they were not measured together, so that rounds do not correspond.
    """
    turn, count = one.turn_calls, len(one.samples_ms)
    if turn is None or (turn, count) != (other.turn_calls, len(other.samples_ms)):
        raise UsageError(
            f"a ratio is of contenders that took turns together: found {count} samples in turns "
            f"of {turn}, and {len(other.samples_ms)} in turns of {other.turn_calls}"
        )
    medians = [np.median(np.reshape(t.samples_ms, (-1, turn)), axis=1) for t in (one, other)]
    ratios = np.sort(medians[0] / medians[1])  # (rounds,)
    rank = _interval_rank(rounds := len(ratios))
    return Ratio(
        median=float(np.median(ratios)),
        low=float(ratios[rank - 1]) if rank else None,
        high=float(ratios[-rank]) if rank else None,
        rounds=rounds,
        reason=None if rank else f"{rounds} rounds are too few for a 95 % interval",
    )


def _interval_rank(rounds: int) -> int:
    """Find the largest k with P(Bin(rounds, ½) < k) ≤ 1/TAIL, from 1; 0 where there is none."""
    rank, ways, below = 0, 1, 1  # ways to get exactly rank, and at most rank, of the 2ⁿ
    while TAIL * below <= 1 << rounds:
        rank += 1
        ways = ways * (rounds - rank + 1) // rank
        below += ways
    return rank


def measure(
    target: Session | Callable[[Mapping[str, Array]], object],
    feeds: Mapping[str, Array],
    *,
    warmup_s: float = WARMUP_S,
    min_duration_s: float = MIN_DURATION_S,
    min_iterations: int = MIN_ITERATIONS,
    clock: Clock = time.perf_counter_ns,
) -> Timing:
    """Time a session, or a function of feeds.

    Args:
        target: what runs.
        feeds: on what; the first dimension of the first is the number of items in a call.
        warmup_s: unmeasured time before.
        min_duration_s: measure at least so long,
        min_iterations: and at least so many calls.
        clock: the time in nanoseconds.

    Raises:
        UsageError: no feeds, or a duration or count that is not positive.
    """
    if not feeds:
        raise UsageError("measure: expected feeds, found none")
    run = target if callable(target) else target.run
    items = next(iter(feeds.values())).shape[0]
    timings = measure_many(
        {"target": lambda: run(feeds)},
        items=items,
        warmup_s=warmup_s,
        min_duration_s=min_duration_s,
        min_iterations=min_iterations,
        clock=clock,
    )
    return timings["target"]


def measure_many(
    contenders: Mapping[str, Callable[[], object]],
    *,
    items: int = 1,
    warmup_s: float = WARMUP_S,
    min_duration_s: float = MIN_DURATION_S,
    min_iterations: int = MIN_ITERATIONS,
    min_rounds: int = MIN_ROUNDS,
    clock: Clock = time.perf_counter_ns,
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, Timing]:
    """Time several functions that do the same job, taking turns; each gets as many calls.

    Args:
        contenders: name → what to call.
        items: in one call, for the throughput.
        warmup_s: of each.
        min_duration_s: of all the measured calls of each contender, on average.
        min_iterations: calls of each, at least.
        min_rounds: turns of each, at least, where there are several: an interval needs 6.
        clock: the time in nanoseconds.
        pause: waits so many seconds.

    Raises:
        UsageError: nothing to measure, or a duration or count that is not positive.
    """
    counts = {"contenders": len(contenders), "items": items}
    counts |= {"min_iterations": min_iterations, "min_rounds": min_rounds}
    _require(counts, {"warmup_s": warmup_s, "min_duration_s": min_duration_s})
    warmups = {name: warm_up(run, warmup_s, clock) for name, run in contenders.items()}
    budget_ns = min_duration_s * NS_PER_S * len(contenders)
    several, turn_calls = len(contenders) > 1, 1
    if several:
        round_ns = sum(float(np.median(calls[-STEADY_WINDOW:])) for calls, _ in warmups.values())
        expected = max(min_iterations, budget_ns / max(round_ns, 1.0))
        turn_calls = min(max(int(expected / min_rounds), 1), TURN_CALLS)
        min_iterations = max(min_iterations, min_rounds * turn_calls)
    samples: dict[str, list[int]] = {name: [] for name in contenders}
    order, spent_ns, iterations = list(contenders), 0, 0
    while iterations < min_iterations or spent_ns < budget_ns:
        for name in order:
            if several:
                pause(SETTLE_S)
                contenders[name]()  # wakes its own threads, unmeasured
            turn = [_timed(contenders[name], clock) for _ in range(turn_calls)]
            samples[name] += turn
            spent_ns += sum(turn)
        iterations += turn_calls
        order = order[1:] + order[:1]
    return {
        name: Timing(
            samples_ms=tuple(ns / NS_PER_MS for ns in samples[name]),
            items=items,
            warmup_iterations=len(warmups[name][0]),
            is_steady=warmups[name][1],
            turn_calls=turn_calls if several else None,
        )
        for name in contenders
    }


def _require(counts: Mapping[str, int], times: Mapping[str, float]) -> None:
    if min(counts.values()) < 1 or min(times.values()) < 0:
        given = ", ".join(f"{name}={value}" for name, value in {**counts, **times}.items())
        raise UsageError(
            f"measure: expected counts of at least 1 and times of at least 0, found {given}"
        )


def _timed(run: Callable[[], object], clock: Clock) -> int:
    start = clock()
    run()
    return max(clock() - start, 1)  # a system's clock may be set back


def warm_up(
    run: Callable[[], object], warmup_s: float, clock: Clock = time.perf_counter_ns
) -> tuple[list[int], bool]:
    """Call until steady; what each call took in nanoseconds, and whether it became so."""
    samples: list[int] = []
    elapsed_s = 0.0
    while True:
        samples.append(_timed(run, clock))
        elapsed_s += samples[-1] / NS_PER_S
        if elapsed_s < warmup_s or len(samples) < WARMUP_ITERATIONS:
            continue
        if _is_steady(samples):
            return samples, True
        if elapsed_s >= WARMUP_PATIENCE * warmup_s:
            return samples, False


def _is_steady(samples: Sequence[int]) -> bool:
    before = float(np.median(samples[-2 * STEADY_WINDOW : -STEADY_WINDOW]))
    last = float(np.median(samples[-STEADY_WINDOW:]))
    return abs(last - before) <= STEADY_TOLERANCE * before
