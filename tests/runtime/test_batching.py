from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support.tiny_onnx import spec

from internvl_edge.errors import FeedError, ResourceError, SessionDead, UsageError
from internvl_edge.runtime.batching import Batcher
from internvl_edge.types import Array

Arrays = Mapping[str, Array]


class FakeSession:
    """Doubles x, remembers its batches, and fails as it is told."""

    def __init__(self, fail: Callable[[Arrays], BaseException | None] = lambda feeds: None) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.fail = fail
        self.gate = threading.Event()
        self.gate.set()
        self.outputs = {"y": spec("y", "float32", "batch", "width")}

    def run(self, feeds: Arrays) -> dict[str, Array]:
        assert self.gate.wait(10)
        self.batches.append(feeds["x"].shape)
        if (error := self.fail(feeds)) is not None:
            raise error
        return {"y": feeds["x"] * 2}


def x(*values: float, width: int = 1) -> dict[str, Array]:
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


def test_who_waits_for_nobody_takes_along_who_does() -> None:
    """The others of its kind run with it at once; another kind waits on."""
    session = FakeSession()
    with batcher(session, max_delay_ms=10_000) as batches:
        waiting = [batches.submit(x(1)), batches.submit(x(2))]
        other = batches.submit(x(3, width=2))
        assert float(batches.submit(x(4), wait=False).result(5)["y"][0, 0]) == 8
        assert [float(f.result(5)["y"][0, 0]) for f in waiting] == [2, 4]
        assert session.batches == [(3, 1)]
        assert not other.done()


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


@contextmanager
def held_up() -> Iterator[tuple[FakeSession, Batcher, Future[Any]]]:
    """A batcher with two places in its queue, and the request that its session is held at."""
    session = FakeSession()
    session.gate.clear()
    with batcher(session, max_batch=1, max_delay_ms=0, max_queued=2) as batches:
        first = batches.submit(x(0))
        while not first.running():
            time.sleep(0.001)
        yield session, batches, first


def test_a_full_queue_refuses_at_once() -> None:
    with held_up() as (session, batches, first):
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
    for options in ({"max_batch": 0}, {"max_delay_ms": -1}, {"max_queued": 0}, {"workers": 0}):
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


def test_cancelled_requests_take_no_place_in_the_queue() -> None:
    with held_up() as (session, batches, first):
        cancelled = [batches.submit(x(n)) for n in (1, 2)]
        assert all(future.cancel() for future in cancelled)
        third = batches.submit(x(3))
        assert wait(cancelled, timeout=5).not_done == set()  # who waits for them is told
        session.gate.set()
        assert float(third.result(5)["y"][0, 0]) == 6
        assert first.result(5)
    assert len(session.batches) == 2


def test_a_full_batch_waits_for_no_other_shape() -> None:
    with batcher(FakeSession(), max_batch=2, max_delay_ms=10_000) as batches:
        first = batches.submit(x(0))
        full = [batches.submit(x(n, width=2)) for n in (1, 2)]
        assert all(future.result(5) for future in full)
        assert not first.done()


def test_full_batches_let_nobody_starve() -> None:
    """One that has waited long enough comes before what is full."""
    session = FakeSession()
    session.gate.clear()
    with batcher(session, max_batch=2, max_delay_ms=20) as batches:
        full = [batches.submit(x(n, width=2)) for n in range(20)]
        while not full[0].running():
            time.sleep(0.001)
        lonely = batches.submit(x(0))
        full += [batches.submit(x(n, width=2)) for n in range(20)]
        time.sleep(0.05)
        session.gate.set()
        assert lonely.result(5)
        assert all(future.result(5) for future in full)
    assert session.batches.index((1, 1)) == 10


def test_a_batch_is_full_where_the_next_does_not_fit() -> None:
    session = FakeSession()
    with batcher(session, max_batch=4, max_delay_ms=10_000) as batches:
        first = batches.submit(x(0, 1, 2))
        batches.submit(x(3, 4))
        assert len(first.result(5)["y"]) == 3
    assert session.batches == [(3, 1), (2, 1)]


def test_outputs_without_rows_go_to_each_whole() -> None:
    class Scaled(FakeSession):
        def run(self, feeds: Arrays) -> dict[str, Array]:
            return super().run(feeds) | {"scale": np.float32([3, 4]), "one": np.array(5.0)}

    session = Scaled()
    session.outputs |= {"scale": spec("scale", "float32", 2), "one": spec("one", "float32")}
    with batcher(session, max_batch=2, max_delay_ms=10_000) as batches:
        found = [future.result(5) for future in [batches.submit(x(n)) for n in (1, 2)]]
    for n, outputs in zip((1, 2), found, strict=True):
        np.testing.assert_array_equal(outputs["y"], [[2 * n]])
        np.testing.assert_array_equal(outputs["scale"], [3, 4])
        assert outputs["one"] == 5
    assert found[0]["scale"] is not found[1]["scale"]


def test_workers_run_batches_at_once() -> None:
    together = threading.Barrier(3)

    def meet(feeds: Arrays) -> None:
        together.wait(5)

    with batcher(FakeSession(meet), max_batch=1, max_delay_ms=0, workers=3) as batches:
        futures = [batches.submit(x(n)) for n in range(6)]
        assert [float(f.result(5)["y"][0, 0]) for f in futures] == [2.0 * n for n in range(6)]


def test_workers_share_no_batch_and_stop_together() -> None:
    session = FakeSession()
    with batcher(session, max_batch=4, max_delay_ms=1, workers=4) as batches:
        futures = [batches.submit(x(n)) for n in range(200)]
        assert [float(f.result(5)["y"][0, 0]) for f in futures] == [2.0 * n for n in range(200)]
    assert sum(rows for rows, _ in session.batches) == 200


def test_a_fork_is_refused_and_closes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has no thread that would answer, and the lock may be taken for ever."""
    with batcher(FakeSession(), max_delay_ms=0) as batches:
        with monkeypatch.context() as patch, batches._changed:  # a lock that never comes free
            patch.setattr("os.getpid", lambda: -1)
            refused = ThreadPoolExecutor(1)
            with pytest.raises(UsageError, match="opened before a fork"):
                refused.submit(batches.submit, x(1)).result(5)
            refused.submit(batches.close).result(5)
            refused.shutdown()
        assert float(batches.run(x(1))["y"][0, 0]) == 2
