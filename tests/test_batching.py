from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from internvl_edge.errors import FeedError, ResourceError, SessionDead, UsageError
from internvl_edge.runtime.batching import Batcher

Arrays = Mapping[str, np.ndarray[Any, Any]]


class FakeSession:
    """Doubles x, remembers its batches, and fails as it is told."""

    def __init__(self, fail: Callable[[Arrays], BaseException | None] = lambda feeds: None) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.fail = fail
        self.gate = threading.Event()
        self.gate.set()

    def run(self, feeds: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        assert self.gate.wait(10)
        self.batches.append(feeds["x"].shape)
        if (error := self.fail(feeds)) is not None:
            raise error
        return {"y": feeds["x"] * 2}


def x(*values: float, width: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.repeat(np.array(values, np.float32)[:, None], width, axis=1)}


def batcher(session: FakeSession, **options: Any) -> Batcher:
    return Batcher(session, **options)  # type: ignore[arg-type]


def test_requests_of_one_moment_share_a_batch() -> None:
    session = FakeSession()
    with batcher(session, max_batch=8, max_delay_ms=500) as batches:
        futures = [batches.submit(x(n)) for n in range(8)]
        assert [float(f.result(5)["y"][0, 0]) for f in futures] == [2.0 * n for n in range(8)]
    assert session.batches == [(8, 1)]


def test_a_request_waits_no_longer_than_the_delay() -> None:
    with batcher(FakeSession(), max_delay_ms=30) as batches:
        start = time.monotonic()
        batches.run(x(1))
        assert 0.02 < time.monotonic() - start < 5


def test_batches_hold_no_more_than_they_may() -> None:
    session = FakeSession()
    with batcher(session, max_batch=4, max_delay_ms=50) as batches:
        futures = [batches.submit(x(*range(rows))) for rows in (3, 2, 1, 4)]
        assert [len(f.result(5)["y"]) for f in futures] == [3, 2, 1, 4]
    assert max(rows for rows, _ in session.batches) <= 4


def test_other_shapes_run_apart() -> None:
    session = FakeSession()
    with batcher(session, max_delay_ms=30) as batches:
        futures = [batches.submit(x(n, width=1 + n % 2)) for n in range(6)]
        assert [f.result(5)["y"].shape[1] for f in futures] == [1, 2] * 3
    assert sorted(session.batches) == [(3, 1), (3, 2)]


def test_one_bad_request_takes_no_other_along() -> None:
    session = FakeSession(lambda feeds: FeedError("bad") if (feeds["x"] == 3).any() else None)
    with batcher(session, max_batch=5, max_delay_ms=500) as batches:
        futures = [batches.submit(x(n)) for n in range(5)]
        with pytest.raises(FeedError, match="bad"):
            futures[3].result(5)
        assert [float(futures[n].result(5)["y"][0, 0]) for n in (0, 1, 2, 4)] == [0, 2, 4, 8]


@pytest.mark.parametrize("error", [SessionDead("gone"), MemoryError()])
def test_what_no_request_caused_is_not_tried_again(error: BaseException) -> None:
    session = FakeSession(lambda feeds: error)
    with batcher(session, max_batch=3, max_delay_ms=500) as batches:
        for future in [batches.submit(x(n)) for n in range(3)]:
            with pytest.raises(type(error)):
                future.result(5)
    assert len(session.batches) == 1


def test_a_full_queue_refuses_at_once() -> None:
    session = FakeSession()
    session.gate.clear()
    with batcher(session, max_batch=1, max_delay_ms=0, max_queued=2) as batches:
        first = batches.submit(x(0))
        while not first.running():
            time.sleep(0.001)
        waiting = [batches.submit(x(n)) for n in (1, 2)]
        with pytest.raises(ResourceError, match="2 requests are waiting"):
            batches.submit(x(3))
        session.gate.set()
        assert all(future.result(5) for future in (first, *waiting))


def test_a_cancelled_request_is_never_run() -> None:
    session = FakeSession()
    session.gate.clear()
    with batcher(session, max_batch=1, max_delay_ms=0) as batches:
        first = batches.submit(x(0))
        while not first.running():
            time.sleep(0.001)
        second, third = batches.submit(x(1)), batches.submit(x(2))
        assert second.cancel()
        session.gate.set()
        assert float(third.result(5)["y"][0, 0]) == 4
    assert len(session.batches) == 2


def test_closing_runs_what_is_queued() -> None:
    batches = batcher(FakeSession(), max_delay_ms=10_000)
    futures = [batches.submit(x(n)) for n in range(3)]
    batches.close()
    batches.close()
    assert [float(f.result(0)["y"][0, 0]) for f in futures] == [0, 2, 4]
    with pytest.raises(UsageError, match="closed"):
        batches.submit(x(1))


def test_rejections() -> None:
    for options in ({"max_batch": 0}, {"max_delay_ms": -1}, {"max_queued": 0}):
        with pytest.raises(UsageError, match="batcher: expected"):
            batcher(FakeSession(), **options)
    with batcher(FakeSession(), max_batch=2) as batches:
        for feeds in ({}, x(), x(1, 2, 3), {"x": np.float32(1)}, x(1) | {"z": np.zeros(2)}):
            with pytest.raises(FeedError, match="1 to 2 rows"):
                batches.submit(feeds)  # type: ignore[arg-type]


def test_many_threads_get_their_own_answers() -> None:
    def work(thread: int) -> None:
        rng = np.random.default_rng(thread)
        for _ in range(100):
            values = rng.standard_normal(int(rng.integers(1, 4)))
            found = batches.run(x(*values, width=int(rng.integers(1, 3))))
            np.testing.assert_array_equal(found["y"][:, 0], 2 * values.astype(np.float32))

    with batcher(FakeSession(), max_delay_ms=0.2) as batches, ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, thread) for thread in range(8)]:
            future.result(60)
