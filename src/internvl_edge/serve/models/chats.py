"""Conversations, one after the other or a few at a time; a bounded number of others wait.

Each under way has a thread. Where the decoder's cache has a fixed capacity there are several, whose
answers share the decoder's steps (``runtime.generation.slots``); else there is one.

An answer comes to the event loop in pieces. Nobody waits for a client that does not read: the
pieces of an answer are kept until they are sent, and there are no more than its tokens. Who leaves
frees the place, at once where it waited, else after the token under way.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from internvl_edge.artifact.components import DECODER, IMAGE_EMBED
from internvl_edge.runtime.model import Model
from internvl_edge.runtime.text.templates import Turn
from internvl_edge.serve.http.meters import Stages
from internvl_edge.serve.http.problems import Problem, overloaded

__all__ = ["Answer", "Chats", "Question", "StopCutter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What ``Model.chat_stream`` is asked."""

    images: Sequence[bytes]
    text: str
    history: Sequence[Turn] = ()
    options: dict[str, Any] = field(default_factory=dict)
    stops: Sequence[str] = ()  # the answer ends before the first of these


NOTHING = Question(images=(), text="")


class StopCutter:
    """Text in pieces, up to the first of some strings; what may begin one is held back.

    Args:
        stops: the strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = stops, ""
        self.is_over = False

    def feed(self, piece: str) -> str:
        """Take a piece, and give what cannot be part of a stop any more."""
        text = self._held + piece
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.is_over, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """Give what was held back; no more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of a text with which a stop begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """An answer under way: an asynchronous iterator of its pieces.

    Attributes:
        finish_reason: ``"stop"`` or ``"length"`` after its end.
        prompt_tokens: that stand before it; reused_tokens: of them, not read again;
            completion_tokens: made so far.
        thought: what the model wrote for itself, from the first piece on; None: nothing.
    """

    def __init__(self, question: Question, stages: Stages) -> None:
        self.question, self.stages = question, stages
        self.finish_reason: str | None = None
        self.prompt_tokens = self.reused_tokens = self.completion_tokens = 0
        self.thought: str | None = None
        self.is_closed = False
        self.queued_at = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self._stream: Any = None  # of the runtime, once it began

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> str:
        piece = await self._pieces.get()
        if isinstance(piece, str):
            return piece
        self._pieces.put_nowait(None)  # for whoever asks again
        if piece is None:
            raise StopAsyncIteration
        try:
            raise piece
        finally:
            del piece  # its traceback has this frame

    def close(self) -> None:
        """End it; what is left of it is not told."""
        self.is_closed, self.question = True, NOTHING
        if self._stream is not None:
            self._stream.close()

    # --- in the worker's thread ------------------------------------------------------------------

    def run(self, model: Model) -> None:
        """Compute it, to its end or until it is closed."""
        try:
            self._run(model)
        except Exception as error:
            self._put(error)
        else:
            self._put(None)
        self.question = NOTHING  # an answer that nobody read yet needs no pictures

    def _run(self, model: Model) -> None:
        asked, stages = self.question, self.stages
        stages.add("queue", time.perf_counter() - self.queued_at)
        seen = None
        if asked.images:
            with stages.stage(IMAGE_EMBED):
                seen = model.see(list(asked.images))
        with stages.stage(DECODER):
            stream = model.chat_stream(seen, asked.text, asked.history, **asked.options)
            self._stream, self.prompt_tokens = stream, stream.prompt_tokens
            self.reused_tokens = stream.reused_tokens
            cutter = StopCutter(asked.stops)
            try:
                for piece in stream:
                    self.thought = stream.thought
                    self._put(cutter.feed(piece))
                    if cutter.is_over or self.is_closed:
                        break
                self.completion_tokens, self.thought = stream.completion_tokens, stream.thought
                self.finish_reason = "stop" if cutter.is_over else stream.finish_reason
                self._put(cutter.rest())
            finally:
                stream.close()

    def _put(self, piece: str | Exception | None) -> None:
        if piece != "":
            with suppress(RuntimeError):  # the loop has ended, and nobody listens
                self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Chats:
    """The conversations of a model.

    Args:
        model: that answers.
        places: of those under way and those that wait.
        at_once: that are under way at a time.
    """

    def __init__(self, model: Model, places: int, at_once: int = 1) -> None:
        self._model, self._places = model, places
        self._queue: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._running: list[Answer] = []
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name="internvl-edge-chats", daemon=True)
            for _ in range(at_once)
        ]
        for thread in self._threads:
            thread.start()

    def ask(self, question: Question, stages: Stages) -> Answer:
        """Queue a question.

        Raises:
            Problem: there is no place left, or the server ends.
        """
        answer = Answer(question, stages)
        with self._changed:
            if self._is_closed:
                raise Problem(503, "draining", "the server ends")
            self._forget_closed()
            if len(self._queue) + len(self._running) >= self._places:
                raise overloaded(f"{self._places} chats are under way; try again later")
            self._queue.append(answer)
            self._changed.notify()
        return answer

    @property
    def waiting(self) -> int:
        """The questions that wait."""
        with self._changed:
            self._forget_closed()
            return len(self._queue)

    def close(self) -> None:
        """Answer what is queued, then stop; may be called again."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _forget_closed(self) -> None:
        for answer in [answer for answer in self._queue if answer.is_closed]:
            self._queue.remove(answer)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if not self._queue:
                    return
                answer = self._queue.popleft()
                self._running.append(answer)
            if not answer.is_closed:
                answer.run(self._model)
            with self._changed:
                self._running.remove(answer)
            del answer  # which nobody needs while this thread waits
