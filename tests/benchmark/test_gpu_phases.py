"""Where a GPU's time goes, on a stand-in whose copies and kernels take a known time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.gpu.fake_engine import KERNEL_MS
from support.gpu.trt_bench import Bench, assert_same, feeds_of

from internvl_edge.benchmark.gpu_phases import METRICS, measure_phases
from internvl_edge.errors import UsageError


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("graphs", [False, True])
def test_every_phase_takes_what_it_takes(tmp_path: Path, target: str, graphs: bool) -> None:
    bench = Bench(tmp_path, target)
    feeds = feeds_of(batch=2, length=5)
    ticks = iter(range(0, 10**12, 1_000_000))  # of the host: a millisecond each time it looks
    with bench.open(graphs=graphs) as session:
        found = measure_phases(session, feeds, calls=7, clock=lambda: next(ticks))
        outputs = session.run(feeds)
        assert_same(outputs, feeds)
    sent, fetched = (
        sum(array.nbytes for array in arrays.values()) / 1000 for arrays in (feeds, outputs)
    )
    assert tuple(found) == METRICS
    assert found["H2D Latency"].p50 == pytest.approx(sent)
    assert found["GPU Compute Time"].avg == pytest.approx(KERNEL_MS)
    assert found["D2H Latency"].p99 == pytest.approx(fetched)
    assert found["Latency"].max == pytest.approx(sent + KERNEL_MS + fetched)
    assert found["Enqueue Time"].min == 1
    assert all(figures.count == 7 for figures in found.values())
    assert bench.cuda.num_live == 0


def test_a_call_begins_when_the_host_is_done(tmp_path: Path) -> None:
    """H2D Latency has neither the copy to pinned memory in it nor the binding of a context."""
    bench, feeds = Bench(tmp_path), feeds_of(batch=2, length=5)
    seen = []

    def look(step: str) -> None:
        context = bench.trt.contexts[-1]
        pinned = slot._pinned["x"].view((2, 4), feeds["x"].dtype)
        seen.append((step, (pinned == feeds["x"]).all(), context.shapes.get("x") == (2, 4)))

    with bench.open() as session, session.lease() as slot:
        slot.on_step = look
        slot.run(feeds)
    steps = ["begun", "staged", "computed", "fetched"]
    assert seen == [(step, True, True) for step in steps]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    feeds = feeds_of(batch=2, length=5)

    def broken() -> Iterator[int]:
        yield from range(20)
        raise RuntimeError("clock")

    ticks = broken()
    with bench.open() as session:
        with pytest.raises(RuntimeError, match="clock"):
            measure_phases(session, feeds, clock=lambda: next(ticks))
        assert_same(session.run(feeds), feeds)
    assert bench.cuda.num_live == 0


def test_no_calls(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with bench.open() as session, pytest.raises(UsageError, match="at least 1 call"):
        measure_phases(session, {"x": np.zeros(1)}, calls=0)
