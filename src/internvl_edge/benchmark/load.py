"""Load as it comes in: callers one after another, at once, by chance, or all there is.

    SingleStream   one caller, the next call when the last one ended: latency
    MultiStream    several such callers at once: latency when the machine is shared
    Offline        the same, for its throughput: as much as goes through
    Server         calls arrive at random, whether the last one ended or not

Arrivals of the server are a Poisson process, given how many there are in its time: as many as the
rate says, each at a moment that is as likely as any other. A latency there runs from when the call
*should* have begun, so waiting counts: one that starts the clock with the call hides every queue.
Its figure is the highest rate whose p99 stays within a bound, found by halving; the latencies are
those of the run that kept it, and not of another. A rate is offered for as long as it is asked, so
that slow models get few requests: below a hundred, p99 is nearly the slowest of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np

from internvl_edge.benchmark.timing import (
    NS_PER_MS,
    NS_PER_S,
    WARMUP_S,
    Clock,
    Timing,
    warm_up,
)
from internvl_edge.errors import UsageError

__all__ = ["SCENARIOS", "highest_rate", "run_closed_loop", "run_scenario", "run_server"]

T = TypeVar("T")

SCENARIOS = ("single-stream", "multi-stream", "offline", "server")
MOST_CALLERS = 1024  # at once; each is a thread
HALVINGS = 7  # of the range of rates: to 1 %
P99 = 99.0
DEFAULT_BOUND = 5  # of p99, in single calls


def run_scenario(
    scenario: str,
    run: Callable[[], object],
    *,
    streams: int,
    items: int,
    seconds: float,
    p99_ms: float | None = None,
) -> Timing:
    """Measure one contender by itself under a scenario's load, after a warm-up.

    Args:
        scenario: a name in ``SCENARIOS``.
        run: one call; from several threads at once.
        streams: calls at once.
        items: in one call.
        seconds: how long calls are begun; of the server, at each rate that is tried.
        p99_ms: the server's bound; None is ``DEFAULT_BOUND`` times a single call.

    Returns:
        Its latencies; of the server, those at the highest rate that kept the bound.

    Raises:
        UsageError: an unknown scenario, or a bound that not even single calls keep.
    """
    if scenario not in SCENARIOS:
        raise UsageError(f"scenario {scenario!r}: expected {', '.join(SCENARIOS)}")
    calls_ns, is_steady = warm_up(run, min(seconds, WARMUP_S))
    if scenario == "server":
        timing = _search_rate(run, streams, items, seconds, p99_ms)
    else:
        callers = 1 if scenario == "single-stream" else streams
        timing = run_closed_loop(run, streams=callers, items=items, seconds=seconds)
    return replace(timing, warmup_iterations=len(calls_ns), is_steady=is_steady)


def _search_rate(
    run: Callable[[], object], streams: int, items: int, seconds: float, p99_ms: float | None
) -> Timing:
    """Measure the server at the highest rate that keeps the bound."""
    single = run_closed_loop(run, items=items, seconds=min(seconds, 1.0))
    bound_ms = DEFAULT_BOUND * single.percentile_ms(50) if p99_ms is None else p99_ms
    refusal = UsageError(
        f"--p99 {bound_ms:.2f} ms cannot be kept at any rate: a single call takes "
        f"{single.percentile_ms(50):.2f} ms (p99 {single.percentile_ms(P99):.2f} ms); raise it"
    )
    if single.percentile_ms(50) > bound_ms:
        raise refusal
    offline = run_closed_loop(run, streams=streams, items=items, seconds=seconds)

    def serve(rate: float) -> Timing:
        return run_server(run, rate=rate, seconds=seconds, streams=streams, items=items)

    best = highest_rate(serve, bound_ms, offline.throughput / items)
    if best is None:
        raise refusal
    return best


def run_closed_loop(
    run: Callable[[], object],
    *,
    streams: int = 1,
    items: int = 1,
    seconds: float = 3.0,
    clock: Clock = time.perf_counter_ns,
) -> Timing:
    """Measure callers that begin a call when their last one ended; each makes at least one.

    Args:
        run: one call; from several threads at once.
        streams: callers.
        items: in one call.
        seconds: how long calls are begun.
        clock: the time in nanoseconds.

    Raises:
        UsageError: no callers, or no time.
    """
    _require(streams >= 1 and items >= 1 and seconds > 0, "streams, items and seconds")
    start = clock()
    end = start + round(seconds * NS_PER_S)

    def caller(_: int) -> list[float]:
        samples: list[float] = []
        while (begun := clock()) < end or not samples:
            run()
            samples.append((clock() - begun) / NS_PER_MS)
        return samples

    samples = [sample for part in _at_once(caller, streams) for sample in part]
    return _timing(samples, items, (clock() - start) / NS_PER_S)


def run_server(
    run: Callable[[], object],
    *,
    rate: float,
    seconds: float = 3.0,
    streams: int = 1,
    items: int = 1,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> Timing:
    """Measure calls that arrive at random, taken in order by as many threads as streams.

    Args:
        run: one call.
        rate: arrivals per second.
        seconds: how long calls arrive; one does in any case.
        streams: calls that run at once.
        items: in one call.
        seed: of the arrivals.
        clock: the time in nanoseconds.
        sleep: waits so many seconds.

    Returns:
        Latencies from the arrival on, in the order of arrival, and the rate at which they came.

    Raises:
        UsageError: no streams, or a rate or time that is not positive.
    """
    _require(min(rate, seconds) > 0 and streams >= 1, "rate, seconds and streams")
    requests = max(round(rate * seconds), 1)
    moments = np.sort(np.random.default_rng(seed).uniform(0, seconds, requests))
    start = clock()
    arrivals = start + np.round(moments * NS_PER_S).astype(np.int64)
    samples = [0.0] * requests
    numbers, lock = iter(range(requests)), threading.Lock()

    def server(_: int) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            arrival = int(arrivals[number])
            if (early := arrival - clock()) > 0:
                sleep(early / NS_PER_S)
            run()
            samples[number] = (clock() - arrival) / NS_PER_MS

    _at_once(server, streams)
    timing = _timing(samples, items, (clock() - start) / NS_PER_S)
    return replace(timing, rate=requests / seconds)


def highest_rate(
    serve: Callable[[float], Timing], bound_ms: float, ceiling: float
) -> Timing | None:
    """Find the run at the highest rate of arrivals whose p99 is within a bound; or None.

    Args:
        serve: runs the server at a rate.
        bound_ms: what p99 may be.
        ceiling: a rate that is too high, such as what goes through offline.
    """
    best, low, high = None, 0.0, ceiling
    for _ in range(HALVINGS):
        rate = (low + high) / 2
        timing = serve(rate)
        if timing.percentile_ms(P99) <= bound_ms:
            best, low = timing, rate
        else:
            high = rate
    return None if best is None else replace(best, bound_ms=bound_ms)


def _at_once(work: Callable[[int], T], count: int) -> list[T]:
    """Do as many pieces of work at once; a single one in this thread."""
    if count == 1:
        return [work(0)]
    with ThreadPoolExecutor(count, "stream") as pool:
        return list(pool.map(work, range(count)))


def _timing(samples_ms: list[float], items: int, wall_s: float) -> Timing:
    return Timing(
        samples_ms=tuple(samples_ms),
        items=items,
        warmup_iterations=0,
        is_steady=False,  # nothing was run before
        wall_s=wall_s,
    )


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise UsageError(f"expected positive {what}")
