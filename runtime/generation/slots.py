"""Many answers, one decoder: each has a row of one cache that is written in place.

A step of the decoder reads all its weights, for one token of one row as for one token of each of
several: where memory is what a token waits for, the others cost little. So answers under way share
their steps. Each has its own row of the cache, its own place to write at, and its own options; one
thread goes round:

    1. whoever left or is late frees its row, and who waits longest takes the first free one
    2. of the prompts that are being read, the oldest has its next ``PIECE`` tokens read, in its row
    3. every row whose prompt is read gets its next token, all in one call

so that nobody waits longer than for a piece of somebody's prompt. A call takes the rows up to the
last one in use; those between that are free or not read yet compute a token that nobody sees, at
a place that the next tokens of that row are written to anyway.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue

import numpy as np

from internvl_edge.errors import ResourceError, UsageError
from internvl_edge.runtime.feeds import LOGITS_FROM, MASK, POSITIONS, WRITE_INDICES
from internvl_edge.runtime.generation.batch import Generation, Prompt, offset_of, require_finite
from internvl_edge.runtime.generation.cache import LAST, Embed
from internvl_edge.runtime.generation.fixed_cache import PAST, PRESENT
from internvl_edge.runtime.generation.loop import Choice
from internvl_edge.runtime.generation.prefixes import extended
from internvl_edge.runtime.session import Rows
from internvl_edge.types import Array

__all__ = ["Slots"]

PIECE = 256  # tokens of a prompt that are read while the others wait
Keep = Callable[[Array, Mapping[str, Array]], None]


class _Answer:
    """An answer that waits, or has a row."""

    def __init__(
        self,
        cache: Mapping[str, Array],
        prompt: Prompt,
        how: Generation,
        embed: Embed | None,
        marks: Array | None,
        keep: Keep | None,
    ) -> None:
        ids = np.array(prompt.rows, np.int64)  # (1, T)
        self.cache, self.used = cache, prompt.past
        self.inputs = ids if embed is None else embed(ids)  # that are still to be read
        self.offset = offset_of(prompt, how)
        self.embed, self.marks, self.keep = embed, marks, keep
        self.choice = Choice(prompt, how)
        self.new: list[int] = []
        self.tokens: SimpleQueue[Array | BaseException | None] = SimpleQueue()
        self.has_left = False

    @property
    def is_read(self) -> bool:
        return int(self.inputs.shape[1]) == 0

    @property
    def is_over(self) -> bool:
        return self.has_left or self.choice.is_late


class _Tokens(Iterator[Array]):
    """The tokens of an answer; dropped or closed, it frees its row."""

    def __init__(self, answer: _Answer) -> None:
        self._answer, self._process = answer, os.getpid()

    def __next__(self) -> Array:
        _require_process(self._process)
        token = None if self._answer.has_left else self._answer.tokens.get()
        if token is None or isinstance(token, BaseException):
            self.close()
            raise StopIteration if token is None else token
        return token

    def close(self) -> None:
        if not self._answer.has_left:
            self._answer.has_left = True
            self._answer.tokens.put(None)  # for a thread that waits for the next one

    def __del__(self) -> None:
        self.close()


def _require_process(process: int) -> None:
    if os.getpid() != process:
        raise UsageError(
            "the slots were opened before a fork, and their thread did not come along; load the "
            "model in the process that runs it"
        )


class Slots:
    """The rows of one decoder, and the answers that wait for one; thread-safe.

    Args:
        rows: of the decoder.
        max_queued: answers that may wait.
    """

    def __init__(self, rows: Rows, max_queued: int) -> None:
        self._rows, self._max_queued = rows, max_queued
        self._token = next(name for name in rows.inputs if name in ("input_ids", "inputs_embeds"))
        self._capacity = int(rows.inputs[MASK].shape[1])
        self._queue: deque[_Answer] = deque()
        self._taken: list[_Answer | None] = [None] * rows.count
        self._order: list[_Answer] = []  # those that have a row, the oldest first
        self._changed = threading.Condition()
        self._is_closed = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name="internvl-edge-slots", daemon=True)
        self._thread.start()

    def stream(
        self,
        cache: Mapping[str, Array],
        prompt: Prompt,
        how: Generation,
        embed: Embed | None = None,
        marks: Array | None = None,
        keep: Keep | None = None,
    ) -> Iterator[Array]:
        """Queue a prompt of one row at once, and yield its tokens int64 [1] as they come.

        Args:
            cache: what stands before the prompt, ``present.{i}.*`` [1,heads,P,d].
            prompt: see ``Prompt``.
            how: the options, of one beam.
            embed: of a decoder that takes embeddings.
            marks: of all positions, see ``prefixes``.
            keep: told the marks and the cache of what was read, when it ends.

        Raises:
            ResourceError: too many wait.
            UsageError: beams, several rows, closed, or forked since it was opened.
        """
        if how.num_beams > 1 or len(prompt.rows) != 1:
            raise UsageError(f"num_beams {how.num_beams}: only one beam of one row can be streamed")
        _require_process(self._process)  # before the lock, which a fork may have left taken
        answer = _Answer(cache, prompt, how, embed, marks, keep)
        with self._changed:
            self._require_open()
            if self._is_full():
                self._drop_those_over()
            if self._is_full():
                raise ResourceError(f"{len(self._queue)} answers are waiting; try again later")
            self._queue.append(answer)
            self._changed.notify_all()
        return _Tokens(answer)

    def _is_full(self) -> bool:
        """Tell whether as many wait as may, without those who will have a free row at once."""
        return len(self._queue) >= self._max_queued + self._taken.count(None)

    @property
    def queue_length(self) -> int:
        """The answers that wait."""
        return sum(not answer.has_left for answer in tuple(self._queue))

    @property
    def under_way(self) -> int:
        """The answers that have a row."""
        return len(self._order)

    def close(self, *, wait: bool = True) -> None:
        """End all answers, with an error; may be called again.

        Args:
            wait: for the step under way.
        """
        if os.getpid() != self._process:
            return  # it is the parent's
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError("the model is closed; load it again")

    # --- the thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._admitted():
                try:
                    self._read_prompts()
                    self._read_tokens()
                except BaseException as error:
                    for answer in list(self._order):
                        self._end(answer, error)
        except BaseException as error:  # nobody may wait for a thread that has ended
            with self._changed:
                self._is_closed = True
                for answer in (*self._order, *self._queue):
                    answer.tokens.put(error)
                self._order, self._taken = [], [None] * self._rows.count
                self._queue.clear()

    def _admitted(self) -> bool:
        """Free rows, give them away, and wait where nothing is to be done; False: it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._order or self._queue or self._is_closed)
            is_closed = self._is_closed
        closed = UsageError("the model was closed before the answer ended") if is_closed else None
        for answer in list(self._order):  # without the lock: a cache that is kept is copied
            if answer.is_over or is_closed:
                self._end(answer, None if answer.is_over else closed)
        with self._changed:
            if is_closed:
                while self._queue:
                    self._queue.popleft().tokens.put(closed)
                return False
            self._drop_those_over()
            while self._queue and None in self._taken:
                answer = self._queue.popleft()
                self._order.append(answer)
                self._taken[self._taken.index(None)] = answer
        return True

    def _drop_those_over(self) -> None:
        """End those that wait no longer: they have left, or their time is over."""
        for answer in [answer for answer in self._queue if answer.is_over]:
            self._queue.remove(answer)
            answer.tokens.put(None)

    def _read_prompts(self) -> None:
        """Read a piece of the oldest prompt that is not read yet."""
        answer = next((answer for answer in self._order if not answer.is_read), None)
        if answer is None:
            return
        row = self._taken.index(answer)
        try:
            if answer.cache:
                for name, values in answer.cache.items():
                    held = self._rows.values[name.replace(PRESENT, PAST, 1)]
                    held[row, :, : values.shape[2]] = values[0]
                answer.cache = {}
            piece, rest = answer.inputs[:, :PIECE], answer.inputs[:, PIECE:]
            first, length = answer.used, piece.shape[1]
            places = np.arange(first, first + length)[None]
            logits = self._run(
                slice(row, row + 1), piece, places + answer.offset, np.array([first])
            )
            answer.inputs, answer.used = rest, first + length
            if answer.is_read:
                self._choose(answer, logits)
        except Exception as error:
            self._end(answer, error)

    def _read_tokens(self) -> None:
        """Read the last token of every answer whose prompt is read; all in one call."""
        going = [answer for answer in self._order if answer.is_read and len(answer.new) > 0]
        if not going:
            return
        count = 1 + max(row for row, one in enumerate(self._taken) if one in going)
        ids, positions = np.zeros((count, 1), np.int64), np.zeros((count, 1), np.int64)
        places = np.zeros(count, np.int64)
        for row, one in enumerate(self._taken[:count]):
            if one is None:
                continue
            places[row] = one.used
            if one in going:
                ids[row], positions[row] = one.new[-1], one.used + one.offset
        embed = going[0].embed
        logits = self._run(slice(0, count), ids if embed is None else embed(ids), positions, places)
        for row, answer in enumerate(self._taken[:count]):
            if answer is not None and answer in going:
                answer.used += 1
                try:
                    self._choose(answer, logits[row : row + 1])
                except Exception as error:
                    self._end(answer, error)

    def _run(self, rows: slice, inputs: Array, positions: Array, places: Array) -> Array:
        """Read inputs (B, T, …) of some rows; return the logits after the last, (B, V)."""
        feeds = {
            self._token: np.ascontiguousarray(inputs),
            MASK: np.ones((len(inputs), self._capacity), np.int64),
            POSITIONS: np.ascontiguousarray(positions, dtype=np.int64),
            WRITE_INDICES: places.astype(np.int64),
        }
        if inputs.shape[1] > 1:
            feeds[LOGITS_FROM] = LAST
        logits: Array = self._rows.run(rows, feeds)[:, -1]
        return logits

    def _choose(self, answer: _Answer, logits: Array) -> None:
        require_finite(logits, answer.used)
        tokens = answer.choice.of(logits)
        answer.new.append(int(tokens[0]))
        answer.tokens.put(tokens)
        if answer.choice.is_over:
            self._end(answer)

    def _end(self, answer: _Answer, error: BaseException | None = None) -> None:
        """Free the row of an answer; what it read is kept."""
        row = self._taken.index(answer)
        self._taken[row] = None
        self._order.remove(answer)
        try:
            if error is None:
                self._keep(answer, row)
            else:  # what is masked counts where it is no number
                for held in self._rows.values.values():
                    held[row] = 0
        finally:
            answer.tokens.put(error)

    def _keep(self, answer: _Answer, row: int) -> None:
        if answer.keep is None or answer.marks is None or not answer.new:
            return
        values = {
            name.replace(PAST, PRESENT, 1): held[row : row + 1, :, : answer.used]
            for name, held in self._rows.values.items()
        }
        try:
            answer.keep(extended(answer.marks, answer.new)[: answer.used], values)
        except MemoryError:  # the answer is there all the same
            return
