"""One token after another on a GPU, each step one CUDA graph.

A decoder whose cache is written in place computes every step with the same shapes, at the same
addresses. What differs, ids, positions and the places to write at, lies on the GPU and is written
over before each step; logits are copied from there to page-locked memory. A captured step has
addresses of its own: its buffers, cache included, are lent to one generation at a time, and go back
when that forgets its cache.

What a captured step computed in between goes back to the session's memory pool, and every replay
writes there again. So calls take turns, and nothing that outlasts a call lies in the pool.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime

from internvl_edge.runtime.feeds import LOGITS_FROM, MASK, POSITIONS
from internvl_edge.runtime.ort.cuda_graphs import MAX_GRAPHS, UNCAPTURED, run_options
from internvl_edge.runtime.ort.pinned import PinnedPool
from internvl_edge.runtime.ort.values import Place, array_of, copied, value_like, value_of
from internvl_edge.types import Array

__all__ = ["Lent", "Steps"]


class Steps:
    """The calls of a decoder's session that was opened for capture; thread-safe.

    Args:
        session: ONNX Runtime's.
        place: where it computes.
        limit: steps that may be captured; generations beyond run kernel by kernel.
    """

    def __init__(self, session: Any, place: Place, limit: int = MAX_GRAPHS) -> None:
        self._session, self._place, self._limit = session, place, limit
        self._plain = run_options(UNCAPTURED)
        self._turn = Lock()
        self._idle: dict[int, list[_Step]] = {}  # by rows
        self._num_steps = 0

    def run(self, binding: Any) -> None:
        """Run a call that is not captured, whose outputs lie in buffers of its own."""
        with self._turn:
            self._session.run_with_iobinding(binding, self._plain)

    def outputs_of(self, binding: Any) -> list[Any]:
        """Run a call that is not captured; copy its outputs out of the pool that steps write to."""
        with self._turn:
            self._session.run_with_iobinding(binding, self._plain)
            outputs: list[Any] = binding.get_outputs()
            if self._place[0] != "cuda":
                return outputs
            return [v if v.device_name() == "cpu" else copied(v, self._place) for v in outputs]

    def step(
        self, feeds: Mapping[str, Array], names: Sequence[str], cache: Sequence[Any], logits: str
    ) -> tuple[Array, Lent] | None:
        """Compute a token of every row; None where no more steps may be captured.

        Args:
            feeds: what is not in the cache.
            names: of the cache's inputs; its outputs come in the same order, after the logits.
            cache: their values, or what the step before left.
            logits: the output's name.
        """
        feeds = {name: array for name, array in feeds.items() if name != LOGITS_FROM}
        lent = cache if isinstance(cache, Lent) else self._lend(feeds, names, cache, logits)
        if lent is None:
            return None
        with self._turn:
            return lent.step.run(feeds), lent

    def _lend(
        self, feeds: Mapping[str, Array], names: Sequence[str], cache: Sequence[Any], logits: str
    ) -> Lent | None:
        rows = len(feeds[POSITIONS])
        with self._turn:
            idle = self._idle.setdefault(rows, [])
            if idle:
                step = idle.pop()
            elif self._num_steps == self._limit:
                return None
            else:
                self._num_steps += 1
                step = _Step(
                    self._session, self._place, self._num_steps, feeds, names, cache, logits
                )
            step.take(cache)
        lent = Lent(step)
        end = weakref.finalize(lent, idle.append, step)
        end.atexit = False
        return lent


class Lent(list[Any]):
    """The values of a cache in a step's buffers; once it is forgotten, they are lent again."""

    def __init__(self, step: _Step) -> None:
        super().__init__(step.cache)
        self.step = step


class _Step:
    """A call of one token a row, bound to buffers of its own; its first run captures it."""

    def __init__(
        self,
        session: Any,
        place: Place,
        graph_id: int,
        feeds: Mapping[str, Array],
        names: Sequence[str],
        cache: Sequence[Any],
        logits: str,
    ) -> None:
        self._session, self._place, self._options = session, place, run_options(graph_id)
        self._binding = session.io_binding()
        self._inputs = {name: value_of(array.copy(), place) for name, array in feeds.items()}
        self.cache = [value_like(value, place) for value in cache]
        outputs = session.get_outputs()
        rows, width = len(feeds[POSITIONS]), int(outputs[0].shape[-1])
        self._shape = rows, 1, width
        self._logits = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            self._shape, np.float32, *place
        )
        for name, value in (*self._inputs.items(), *zip(names, self.cache, strict=True)):
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output(logits, self._logits)
        others = [output.name for output in outputs if output.name != logits]
        for name, value in zip(others, self.cache, strict=True):
            self._binding.bind_ortvalue_output(name, value)
        self._pool = PinnedPool(4 * rows * width if place[0] == "cuda" else 0)

    def take(self, cache: Sequence[Any]) -> None:
        """Copy a cache to the buffers."""
        for held, value in zip(self.cache, cache, strict=True):
            held.update_inplace(value)

    def run(self, feeds: Mapping[str, Array]) -> Array:
        for name, value in self._inputs.items():
            if name != MASK:  # which such a graph does not read
                value.update_inplace(np.ascontiguousarray(feeds[name]))
        self._session.run_with_iobinding(self._binding, self._options)
        shape, dtype = self._shape, np.dtype(np.float32)
        fetched = self._pool.fetch(self._logits.data_ptr(), shape, dtype)
        return array_of(self._logits, self._place).copy() if fetched is None else fetched
