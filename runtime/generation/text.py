"""The ids of one row as text: up to its end, and piece by piece as they come."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Literal, Self

from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.types import Array

__all__ = [
    "Closing",
    "FinishReason",
    "TextStream",
    "Usage",
    "split_thought",
    "until_end",
    "usage_of",
]

REPLACEMENT = "\ufffd"  # half a character, decoded
THINK, THOUGHT_END = "<think>", "</think>"


class Closing(ABC):
    """Tokens that are computed elsewhere, until they are closed; from any thread."""

    @abstractmethod
    def close(self) -> None: ...


FinishReason = Literal["stop", "length", "time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer took."""

    prompt_tokens: int = 0  # positions that stand before the answer, those of images included
    reused_tokens: int = 0  # of them, those that were not read again
    completion_tokens: int = 0  # a stop id included
    # after a stop id, after the most tokens, or when the time was over; None: not at its end
    finish_reason: FinishReason | None = None


def usage_of(ids: Sequence[int], how: Generation, prompt_tokens: int, reused_tokens: int) -> Usage:
    """Say what an answer took, whose ids may be padded after their end."""
    ends = [at + 1 for at, token in enumerate(ids) if token in how.stop_ids]
    reason = _unfinished(len(ids), how)
    return Usage(
        prompt_tokens=prompt_tokens,
        reused_tokens=reused_tokens,
        completion_tokens=ends[0] if ends else len(ids),
        finish_reason="stop" if ends else reason,
    )


def _unfinished(count: int, how: Generation) -> FinishReason:
    """Say why an answer of so many tokens ended without a stop id."""
    return "length" if how.max_time is None or count >= how.max_new_tokens else "time"


class TextStream:
    """The text of one row's tokens in pieces, as they come; none is empty.

    After its end it says why it ended, and how many tokens there were. Only the tokens of the last
    piece are decoded again, which the next one may change: spaces are the text's own between two
    words, and not around it.

    Attributes:
        finish_reason: ``"stop"`` after a stop id, ``"length"`` after the most tokens, ``"time"``
            after ``max_time``; None before the end, and where it was closed.
        prompt_tokens: positions that stand before the answer, those of images included.
        reused_tokens: of them, those that were not read again.
        completion_tokens: tokens so far, a stop id included.
        thought: what stood between ``<think>`` and ``</think>`` in front, and is none of the
            pieces; None where nothing did.
    """

    def __init__(
        self,
        tokens: Iterator[Array],
        how: Generation,
        decode: Callable[[list[int]], str],
        prompt_tokens: int,
        reused_tokens: int = 0,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.reused_tokens = reused_tokens
        self.thought: str | None = None
        self._is_closed, self._tokens = False, tokens
        self._pieces = self._answer(self._closing(tokens, self._decoded(tokens, how, decode)))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    async def __aiter__(self) -> AsyncIterator[str]:
        """Yield the pieces without keeping the event loop; each is waited for in a thread."""
        import asyncio  # which takes longer than all else here

        with closing(self):
            while (piece := await asyncio.to_thread(next, self, None)) is not None:
                yield piece

    @property
    def usage(self) -> Usage:
        """What it took so far, as ``Reply.usage``."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            completion_tokens=self.completion_tokens,
            finish_reason=self.finish_reason,
        )

    def close(self) -> None:
        """End it after the token that is being computed; from any thread, and more than once."""
        self._is_closed = True
        with suppress(ValueError):  # it runs in another thread, which looks at the flag
            self._pieces.close()
        if isinstance(self._tokens, Closing):
            self._tokens.close()

    def _answer(self, pieces: Generator[str, None, None]) -> Generator[str, None, None]:
        """Yield what follows a thought; hold back only what may yet become one."""
        with closing(pieces):
            text = ""
            for piece in pieces:  # until an answer begins
                text = (text + piece) if self.thought is None else piece.lstrip()
                if THOUGHT_END in text and text.startswith(THINK):
                    self.thought, text = split_thought(text)
                may_be_thought = text.startswith(THINK) or THINK.startswith(text)
                if text and (self.thought is not None or not may_be_thought):
                    break
            if self.thought is None:
                self.thought, text = split_thought(text)
            if text:
                yield text
            yield from pieces

    def _closing(
        self, tokens: Iterator[Array], pieces: Generator[str, None, None]
    ) -> Generator[str, None, None]:
        """Yield all pieces; after the last one, or when it is closed, end the tokens."""
        try:
            yield from pieces
        finally:
            if isinstance(tokens, Generator):  # what it read is kept by then
                tokens.close()

    def _decoded(
        self, tokens: Iterator[Array], how: Generation, decode: Callable[[list[int]], str]
    ) -> Generator[str, None, None]:
        ids: list[int] = []  # of the last piece, and since
        count, told = 0, ""  # of the last piece: its tokens, and their text
        reason: FinishReason | None = None
        for token in tokens:
            if self._is_closed:
                return
            self.completion_tokens += 1
            if int(token[0]) in how.stop_ids:
                reason = "stop"
                break
            ids.append(int(token[0]))
            text = decode(ids)
            is_whole = not text.endswith(REPLACEMENT)  # the last character may want another token
            if is_whole and text != told and text.startswith(told):
                yield text[len(told) :]
                del ids[:count]
                count, told = len(ids), decode(ids)
        text = decode(ids)
        if text != told:
            yield text[len(told) :]
        self.finish_reason = reason or _unfinished(self.completion_tokens, how)


def split_thought(text: str) -> tuple[str | None, str]:
    """Split a text into the thought in front of it, None where there is none, and the answer.

    A thought that was cut off before its end has no answer after it.
    """
    if not text.startswith(THINK):
        return None, text
    thought, _, answer = text[len(THINK) :].partition(THOUGHT_END)
    return thought.strip(), answer.strip()


def until_end(ids: list[int], how: Generation) -> list[int]:
    """Cut ids off at the first that ends a text."""
    ends = [at for at, token in enumerate(ids) if token in how.stop_ids]
    return ids[: ends[0]] if ends else ids
