"""A component whose requests share batches, and what each of them waited for.

The batcher hands out what its session gives; ``Timed`` adds when a batch ran, as an output that
belongs to no row, so that every request learns how long it waited and how long it was computed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Self

import numpy as np

from internvl_edge.artifact import TensorSpec
from internvl_edge.runtime.batching import Batcher
from internvl_edge.runtime.session import Session
from internvl_edge.serve.http.meters import Stages
from internvl_edge.types import Array

__all__ = ["Batched"]

RAN = "ran_from_to"  # an output of seconds, in addition to the component's own
RAN_SPEC = TensorSpec(name=RAN, dtype="float64", shape=(2,))


class Timed:
    """A session that gives only some outputs, and when it ran."""

    def __init__(self, session: Session, wanted: Sequence[str], ran: Callable[[int], None]) -> None:
        self._session, self._wanted, self._ran = session, list(wanted), ran
        self.inputs: Mapping[str, TensorSpec] = session.inputs
        self.outputs = {name: session.outputs[name] for name in wanted} | {RAN: RAN_SPEC}
        self.largest: Mapping[str, int] = session.largest

    def run(
        self,
        feeds: Mapping[str, Array],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Compute the wanted outputs, and say from when to when."""
        began = time.perf_counter()
        found = self._session.run(feeds, check=check, outputs=self._wanted)
        self._ran(len(next(iter(feeds.values()))))
        return {**found, RAN: np.array([began, time.perf_counter()])}

    def close(self) -> None:
        """Do nothing: the session is the model's to close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Batched:
    """One output of a component, computed for many requests at once.

    Args:
        session: of the component; it stays the caller's to close.
        output: which one.
        stage: what its time is called.
        max_batch: rows of a batch; less where the session takes less.
        max_delay_ms: how long a request waits for others, where there may be others.
        max_queued: requests that may wait.
        coming: counts the requests that may come here.
        ran: is told the rows of every batch.
    """

    def __init__(
        self,
        session: Session,
        output: str,
        stage: str,
        *,
        max_batch: int,
        max_delay_ms: float,
        max_queued: int,
        coming: Callable[[], int],
        ran: Callable[[int], None],
    ) -> None:
        self._output, self._stage, self._coming = output, stage, coming
        self.max_batch = min(max_batch, session.largest.get("batch", max_batch))
        self._waiting: set[Future[dict[str, Array]]] = set()
        self._batcher = Batcher(
            Timed(session, [output], ran),
            max_batch=self.max_batch,
            max_delay_ms=max_delay_ms,
            max_queued=max_queued,
        )

    async def run(self, feeds: Mapping[str, Array], stages: Stages) -> Array:
        """Compute rows, at most ``max_batch``; what is cancelled before it runs never does."""
        began = time.perf_counter()
        # Whoever may come is here already: nobody is worth waiting for.
        is_last = self.queue_length + 1 >= self._coming()
        future = self._batcher.submit(feeds, wait=not is_last)
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        outputs = await asyncio.wrap_future(future)
        ran_from, ran_to = outputs[RAN].tolist()
        stages.add("queue", ran_from - began)
        stages.add(self._stage, ran_to - ran_from)
        return outputs[self._output]

    @property
    def queue_length(self) -> int:
        """The requests that wait for their batch."""
        return sum(not (future.running() or future.done()) for future in tuple(self._waiting))

    def close(self) -> None:
        """Run what is queued, then stop."""
        self._batcher.close()
