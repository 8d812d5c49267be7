"""Requests of many callers, run as few batches: a queue and one thread.

A batch begins with the oldest request and waits for others until it is full or the first one has
waited ``max_delay_ms``. Requests that cannot share a batch, as their shapes differ in more than
the first dimension, run in batches of their own. The queue is bounded: where more come in than go
through, ``submit`` refuses at once, so that callers learn it while there is time to do less.

A request that was cancelled before its batch began is never run. What fails for a batch is tried
again for each request alone, so that one bad request takes no other along.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from internvl_edge.errors import FeedError, InternVLError, ResourceError, SessionDead, UsageError
from internvl_edge.runtime.session import Array, Session

__all__ = ["Batcher"]

Key = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(slots=True, eq=False)
class _Request:
    feeds: dict[str, Array]
    rows: int
    key: Key  # what requests of one batch have in common
    future: Future[dict[str, Array]] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs single requests of a session in batches; thread-safe, a context manager.

    Args:
        session: what runs; it stays the caller's to close.
        max_batch: rows of a batch.
        max_delay_ms: how long a request may wait for others.
        max_queued: requests that may wait; more are refused.
    """

    def __init__(
        self,
        session: Session,
        *,
        max_batch: int = 8,
        max_delay_ms: float = 2.0,
        max_queued: int = 256,
    ) -> None:
        if max_batch < 1 or max_delay_ms < 0 or max_queued < 1:
            raise UsageError(
                f"batcher: expected a positive batch and queue and no negative delay, found "
                f"max_batch={max_batch}, max_delay_ms={max_delay_ms}, max_queued={max_queued}"
            )
        self._session = session
        self._max_batch, self._max_queued = max_batch, max_queued
        self._max_delay_s = max_delay_ms / 1e3
        self._queue: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(
            target=self._work, name="internvl-edge-batcher", daemon=True
        )
        self._thread.start()

    def submit(self, feeds: Mapping[str, Array]) -> Future[dict[str, Array]]:
        """Queue a request of one or more rows; its outputs come through the future.

        Raises:
            FeedError: arrays without a common first dimension, or more rows than a batch has.
            ResourceError: the queue is full.
            UsageError: the batcher is closed.
        """
        request = _request(feeds, self._max_batch)
        with self._changed:
            if self._closed:
                raise UsageError("the batcher is closed; open another")
            if len(self._queue) >= self._max_queued:
                raise ResourceError(f"{len(self._queue)} requests are waiting; try again later")
            self._queue.append(request)
            self._changed.notify()
        return request.future

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """``submit``, and wait."""
        return self.submit(feeds).result()

    def close(self) -> None:
        """Run what is queued, then stop; may be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _work(self) -> None:
        while batch := self._next_batch():
            running = [r for r in batch if r.future.set_running_or_notify_cancel()]
            if running:
                self._run(running)

    def _next_batch(self) -> list[_Request]:
        """The oldest request and those that go with it; none when closed and done."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return []
            first = self._queue[0]
            deadline = first.arrived + self._max_delay_s
            self._changed.wait_for(
                lambda: self._closed or sum(r.rows for r in self._alike(first)) >= self._max_batch,
                timeout=max(0.0, deadline - time.monotonic()),
            )
            batch = self._alike(first)
            for request in batch:
                self._queue.remove(request)
            return batch

    def _alike(self, first: _Request) -> list[_Request]:
        """Requests that can share a batch with the first one, in order, as many as fit."""
        batch: list[_Request] = []
        rows = 0
        for request in self._queue:
            if request.key == first.key and rows + request.rows <= self._max_batch:
                batch.append(request)
                rows += request.rows
        return batch

    def _run(self, batch: list[_Request]) -> None:
        names = batch[0].feeds
        try:
            joined = {n: np.concatenate([request.feeds[n] for request in batch]) for n in names}
            outputs = self._session.run(joined)
        except BaseException as error:
            self._failed(batch, error)
            return
        start = 0
        for request in batch:
            rows = slice(start, start + request.rows)
            request.future.set_result({name: array[rows] for name, array in outputs.items()})
            start += request.rows

    def _failed(self, batch: list[_Request], error: BaseException) -> None:
        """Hand an error to its request; of a batch, find out whose it is."""
        alone = len(batch) == 1
        if alone or isinstance(error, SessionDead) or not isinstance(error, InternVLError):
            for request in batch:
                request.future.set_exception(error)
            return
        for request in batch:
            self._run([request])


def _request(feeds: Mapping[str, Array], max_batch: int) -> _Request:
    arrays = {name: np.asarray(array) for name, array in feeds.items()}
    rows = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(rows) != 1 or not 1 <= max(rows) <= max_batch:
        found = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise FeedError(
            f"a request has 1 to {max_batch} rows, the same in each array; found {found}"
        )
    key = tuple((name, array.shape[1:], array.dtype.str) for name, array in sorted(arrays.items()))
    return _Request(feeds=arrays, rows=rows.pop(), key=key)
