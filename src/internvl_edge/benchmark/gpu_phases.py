"""Where a GPU spends the time of a call, by the names of TensorRT's own ``trtexec``.

    H2D Latency       inputs to the GPU
    GPU Compute Time  the engine
    D2H Latency       outputs to the host
    Latency           the three together
    Enqueue Time      the host's, until the engine was queued

The first four are differences of events in the call's stream, so they leave out what the host does
before and after; ``timing`` measures all of it. A GPU that computes for less time than the host
takes to queue waits for the host: a CUDA graph is what helps there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from internvl_edge.benchmark.timing import NS_PER_MS, Clock, Distribution
from internvl_edge.errors import UsageError
from internvl_edge.runtime.gpu.handles import Event
from internvl_edge.runtime.trt.session import TrtSession

__all__ = ["METRICS", "measure_phases"]

METRICS = ("Latency", "Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency")
CALLS, WARMUP_CALLS = 100, 10
STEPS = ("begun", "staged", "computed", "fetched")


def measure_phases(
    session: TrtSession,
    feeds: Mapping[str, Any],
    *,
    calls: int = CALLS,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Distribution]:
    """Measure the distribution of each metric over calls, one after another.

    Args:
        session: an open engine.
        feeds: host arrays.
        calls: how many are measured.
        clock: the host's time in nanoseconds.

    Raises:
        UsageError: no calls.
    """
    if calls < 1:
        raise UsageError(f"expected at least 1 call, found {calls}")
    samples: dict[str, list[float]] = {name: [] for name in METRICS}
    with session.lease() as slot, ExitStack() as stack:
        events = {s: stack.enter_context(Event(session.device, timed=True)) for s in STEPS}
        passed_ns: dict[str, int] = {}

        def record(step: str) -> None:
            passed_ns[step] = clock()
            events[step].record(slot.stream.handle)

        stack.callback(setattr, slot, "on_step", None)
        slot.on_step = record
        for i in range(WARMUP_CALLS + calls):
            slot.run(feeds, check=False)
            if i >= WARMUP_CALLS:
                for name, value in _phases(events, passed_ns).items():
                    samples[name].append(value)
    return {name: Distribution.of(values) for name, values in samples.items()}


def _phases(events: Mapping[str, Event], passed_ns: Mapping[str, int]) -> dict[str, float]:
    """Compute the metrics of one call, in milliseconds."""
    begun, staged, computed, fetched = (events[step] for step in STEPS)
    return {
        "Latency": fetched.elapsed_ms(begun),
        "Enqueue Time": (passed_ns["computed"] - passed_ns["staged"]) / NS_PER_MS,
        "H2D Latency": staged.elapsed_ms(begun),
        "GPU Compute Time": computed.elapsed_ms(staged),
        "D2H Latency": fetched.elapsed_ms(computed),
    }
