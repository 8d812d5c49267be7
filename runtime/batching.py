"""Requests of many callers, run as few batches: a queue, and a thread for each batch at once.

A batch begins with a request and waits for others like it until it is full or the first one has
waited ``max_delay_ms``; full is also a batch into which the next like it does not fit. Requests
that cannot share a batch, as their shapes differ in more than the first dimension, run in batches
of their own, and neither waits for the other. The queue is bounded: where more come in than go
through, ``submit`` refuses at once, so that callers learn it while there is time to do less.

A request that was cancelled before its batch began is never run, and takes no place. What fails for
a batch is tried again for each request alone, so that one bad request takes no other along. Outputs
whose first dimension is the batch's are cut into each request's rows; any other depends on no row,
and each request gets it whole.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from internvl_edge.artifact import TensorSpec
from internvl_edge.errors import FeedError, InternVLError, ResourceError, SessionDead, UsageError
from internvl_edge.runtime.session import Session
from internvl_edge.types import Array

__all__ = ["Batcher"]

Key = tuple[tuple[str, tuple[int, ...], str], ...]


@dataclass(slots=True, eq=False)
class _Request:
    feeds: dict[str, Array]
    rows: int
    key: Key  # what requests of one batch have in common
    due: float  # when its batch begins, full or not
    future: Future[dict[str, Array]] = field(default_factory=Future)


class Batcher:
    """Runs single requests of a session in batches; thread-safe, a context manager.

    Args:
        session: what runs; it stays the caller's to close.
        max_batch: rows of a batch.
        max_delay_ms: how long a request may wait for others.
        max_queued: requests that may wait; more are refused.
        workers: batches that run at once; of an engine, as many as it has slots.
    """

    def __init__(
        self,
        session: Session,
        *,
        max_batch: int = 8,
        max_delay_ms: float = 2.0,
        max_queued: int = 256,
        workers: int = 1,
    ) -> None:
        if min(max_batch, max_queued, workers) < 1 or max_delay_ms < 0:
            raise UsageError(
                f"batcher: expected a positive batch, queue and number of workers and no negative "
                f"delay, found max_batch={max_batch}, max_delay_ms={max_delay_ms}, "
                f"max_queued={max_queued}, workers={workers}"
            )
        self._session = session
        self._max_batch, self._max_queued = max_batch, max_queued
        self._max_delay_s = max_delay_ms / 1e3
        self._queue: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._process = os.getpid()
        self._threads = [
            threading.Thread(target=self._work, name="internvl-edge-batcher", daemon=True)
            for _ in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, feeds: Mapping[str, Array], *, wait: bool = True) -> Future[dict[str, Array]]:
        """Queue a request of one or more rows; its outputs come through the future.

        Args:
            feeds: as the session takes them.
            wait: for others; False where the caller knows that nobody else comes, so that whatever
                is queued like this runs as soon as a worker is free.

        Raises:
            FeedError: arrays without a common first dimension, or more rows than a batch has.
            ResourceError: the queue is full.
            UsageError: the batcher is closed, or the process was forked since it was opened.
        """
        if os.getpid() != self._process:  # before the lock, which a fork may have left taken
            raise UsageError(
                "the batcher was opened before a fork, and its threads did not come along; open "
                "one in the process that runs it"
            )
        delay_s = self._max_delay_s if wait else 0.0
        request = _request(feeds, self._max_batch, time.monotonic() + delay_s)
        with self._changed:
            if self._closed:
                raise UsageError("the batcher is closed; open another")
            if len(self._queue) >= self._max_queued:
                self._drop_cancelled()
            if len(self._queue) >= self._max_queued:
                raise ResourceError(f"{len(self._queue)} requests are waiting; try again later")
            self._queue.append(request)
            if not wait:
                for other in self._queue:
                    if other.key == request.key:
                        other.due = min(other.due, request.due)
            self._changed.notify()
        return request.future

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Submit a request and wait for its outputs."""
        return self.submit(feeds).result()

    def close(self) -> None:
        """Run what is queued, then stop; may be called again."""
        if os.getpid() != self._process:
            return  # it is the parent's
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if threading.current_thread() is not thread:
                thread.join()

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
        """Wait for a batch that is full or has waited long enough; none when closed and done."""
        with self._changed:
            while True:
                self._drop_cancelled()
                if self._closed and not self._queue:
                    return []
                if batch := self._due():
                    for request in batch:
                        self._queue.remove(request)
                    if self._queue:
                        self._changed.notify()  # another worker looks after the rest
                    return batch
                self._changed.wait(self._patience_s() if self._queue else None)

    def _due(self) -> list[_Request]:
        """Choose the batch to run now: one that has waited long enough, then one that is full."""
        if not self._queue:
            return []
        first = self._soonest()
        if self._closed or first.due <= time.monotonic():
            return self._alike(first)[0]
        firsts: dict[Key, _Request] = {}
        for request in self._queue:
            firsts.setdefault(request.key, request)
        batches = (self._alike(first) for first in firsts.values())
        return next((batch for batch, is_full in batches if is_full), [])

    def _patience_s(self) -> float:
        """Return how long the first request that is due may still wait."""
        return self._soonest().due - time.monotonic()

    def _soonest(self) -> _Request:
        """Find the request that is due first; of several, the oldest."""
        return min(self._queue, key=lambda request: request.due)

    def _alike(self, first: _Request) -> tuple[list[_Request], bool]:
        """Collect requests that share a batch with the first one, and tell whether it is full."""
        batch: list[_Request] = []
        rows, is_full = 0, False
        for request in self._queue:
            if request.key != first.key:
                continue
            if rows + request.rows <= self._max_batch:
                batch.append(request)
                rows += request.rows
            else:
                is_full = True
        return batch, is_full or rows == self._max_batch

    def _drop_cancelled(self) -> None:
        """Forget requests that were cancelled, and tell whoever waits for them."""
        for request in [r for r in self._queue if r.future.cancelled()]:
            self._queue.remove(request)
            request.future.set_running_or_notify_cancel()

    def _run(self, batch: list[_Request]) -> None:
        names = batch[0].feeds
        try:
            joined = {n: np.concatenate([request.feeds[n] for request in batch]) for n in names}
            outputs = self._session.run(joined)
            by_row = {n for n in outputs if _has_rows(self._session.outputs[n])}
        except BaseException as error:
            self._failed(batch, error)
            return
        start = 0
        for request in batch:
            rows = slice(start, start + request.rows)
            request.future.set_result(
                {n: array[rows] if n in by_row else array.copy() for n, array in outputs.items()}
            )
            start += request.rows

    def _failed(self, batch: list[_Request], error: BaseException) -> None:
        """Hand an error to its request; where a batch failed, find out whose it is."""
        alone = len(batch) == 1
        if alone or isinstance(error, SessionDead) or not isinstance(error, InternVLError):
            for request in batch:
                request.future.set_exception(error)
            return
        for request in batch:
            self._run([request])


def _has_rows(spec: TensorSpec) -> bool:
    """Tell whether an output has a row for each of the batch: its first dimension is a name."""
    return bool(spec.shape) and isinstance(spec.shape[0], str)


def _request(feeds: Mapping[str, Array], max_batch: int, due: float) -> _Request:
    arrays = {name: np.asarray(array) for name, array in feeds.items()}
    rows = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
    if len(rows) != 1 or not 1 <= max(rows) <= max_batch:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise FeedError(
            f"a request has 1 to {max_batch} rows, the same in each array; found {shapes}"
        )
    key = tuple((name, array.shape[1:], array.dtype.str) for name, array in sorted(arrays.items()))
    return _Request(feeds=arrays, rows=rows.pop(), key=key, due=due)
