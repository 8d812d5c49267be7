"""Sessions, slots and threads: calls at once, closing, and waiting."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.gpu.trt_bench import RESULT_SHAPES, Arrays, Bench, assert_same, feeds_of

from internvl_edge.errors import FeedError, UsageError
from internvl_edge.runtime.trt.session import TrtSession


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_eight_threads_and_serial_give_the_same(bench: Bench, slots: int) -> None:
    def work(thread: int) -> None:
        rng = np.random.default_rng(thread)
        for call in range(200):
            feeds = feeds_of(int(rng.integers(1, 9)), int(rng.integers(1, 7)), 1000 * thread + call)
            assert_same(session.run(feeds), feeds)

    with bench.open(slots=slots, batch_buckets=(2, 4, 8)) as session, ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, thread) for thread in range(8)]:
            future.result()
    assert bench.cuda.num_live == 0


def test_close_during_a_run_lets_it_end(bench: Bench) -> None:
    session = bench.open()
    with session.lease() as slot:
        waiting = threading.Thread(target=lambda: errors.append(closed_run(session)))
        errors: list[str] = []
        waiting.start()
        session.close()
        waiting.join()
        assert "is closed" in errors[0]
        assert_same(slot.run(feeds_of(2, 2)), feeds_of(2, 2))
        assert bench.cuda.num_live > 0
    assert bench.cuda.num_live == 0
    session.close()
    with pytest.raises(UsageError, match="is closed"):
        session.run(feeds_of(1, 1))
    with pytest.raises(UsageError, match="is closed"):
        session.submit(feeds_of(1, 1))


@pytest.mark.parametrize("slots", [1, 2])
def test_a_thread_does_not_wait_for_itself(bench: Bench, slots: int) -> None:
    feeds = feeds_of(2, 2)
    with bench.open(slots=slots) as session:
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                for _ in range(slots):
                    slot = stack.enter_context(session.lease())
                with pytest.raises(UsageError, match=r"every slot .*would wait for itself"):
                    session.run(feeds)
                assert_same(slot.run(feeds), feeds)
        assert_same(session.run(feeds), feeds)


@pytest.mark.slow
def test_a_session_that_is_dropped_is_closed(bench: Bench) -> None:
    feeds = feeds_of(2, 3)
    session = bench.open(slots=2)
    out = {name: session.empty(name, shape) for name, shape in RESULT_SHAPES.items()}
    session.submit(feeds).result()
    with session.lease() as slot:
        slot.run_device(feeds, out=out)
    del session, slot
    gc.collect()
    assert_same({name: bench.fetch(array) for name, array in out.items()}, feeds)
    del out
    assert bench.cuda.num_live == 0


def closed_run(session: TrtSession) -> str:
    with pytest.raises(UsageError) as caught:
        session.run(feeds_of(1, 1))
    return str(caught.value)


def test_runs_can_be_awaited(bench: Bench) -> None:
    calls = [feeds_of(2, 2, seed) for seed in range(20)]

    async def main() -> list[Arrays]:
        return await asyncio.gather(*(session.run_async(feeds) for feeds in calls))

    with bench.open(slots=2) as session:
        for feeds, found in zip(calls, asyncio.run(main()), strict=True):
            assert_same(found, feeds)
        with pytest.raises(FeedError):
            session.submit({}).result()
        assert list(session.submit(calls[0], outputs=["y"]).result()) == ["y"]


def test_open_and_close_leave_nothing(bench: Bench) -> None:
    for _ in range(100):
        with bench.open() as session:
            session.run(feeds_of(1, 1))
            session.run(feeds_of(1, 1))
    assert bench.cuda.num_live == 0
