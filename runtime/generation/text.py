"""The ids of one row as text: up to its end, and piece by piece as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Literal, Protocol, Self, runtime_checkable

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


@runtime_checkable
class Closing(Protocol):
    """Tokens that can be ended before their end, as a generator's can."""

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


@dataclass(slots=True)
class _Progress:
    """How far a stream is: written by its generators, which do not hold the stream itself.

    So a stream that is dropped ends at once, and frees what its tokens are computed in.
    """

    finish_reason: FinishReason | None = None
    completion_tokens: int = 0
    thought: str | None = None
    is_closed: bool = False


class TextStream:
    """The text of one row's tokens in pieces, as they come; none is empty.

    After its end it says why it ended, and how many tokens there were. Only the tokens of the last
    piece are decoded again, which the next one may change: spaces are the text's own between two
    words, and not around it.

    Attributes:
        prompt_tokens: positions that stand before the answer, those of images included.
        reused_tokens: of them, those that were not read again.
    """

    def __init__(
        self,
        tokens: Iterator[Array],
        how: Generation,
        decode: Callable[[list[int]], str],
        prompt_tokens: int,
        reused_tokens: int = 0,
    ) -> None:
        self.prompt_tokens, self.reused_tokens = prompt_tokens, reused_tokens
        self._tokens, self._progress = tokens, _Progress()
        pieces = _closing(tokens, _decoded(tokens, how, decode, self._progress))
        self._pieces = _after_thought(pieces, self._progress)

    @property
    def finish_reason(self) -> FinishReason | None:
        """``"stop"``, ``"length"`` or ``"time"``; None before the end, and where it was closed."""
        return self._progress.finish_reason

    @property
    def completion_tokens(self) -> int:
        """The tokens so far, a stop id included."""
        return self._progress.completion_tokens

    @property
    def thought(self) -> str | None:
        """The text between ``<think>`` and ``</think>`` in front, which is none of the pieces."""
        return self._progress.thought

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
        self._progress.is_closed = True
        with suppress(ValueError):  # it runs in another thread, which looks at the flag
            self._pieces.close()
        _end(self._tokens)


def _after_thought(
    pieces: Generator[str, None, None], progress: _Progress
) -> Generator[str, None, None]:
    """Yield what follows a thought; hold back only what may yet become one."""
    with closing(pieces):
        text = ""
        for piece in pieces:  # until an answer begins
            text = (text + piece) if progress.thought is None else piece.lstrip()
            if THOUGHT_END in text and text.startswith(THINK):
                progress.thought, text = split_thought(text)
            may_be_thought = text.startswith(THINK) or THINK.startswith(text)
            if text and (progress.thought is not None or not may_be_thought):
                break
        if progress.thought is None:
            progress.thought, text = split_thought(text)
        if text:
            yield text
        yield from pieces


def _closing(
    tokens: Iterator[Array], pieces: Generator[str, None, None]
) -> Generator[str, None, None]:
    """Yield all pieces; after the last one, or when it is closed, end the tokens."""
    try:
        yield from pieces
    finally:
        _end(tokens)  # what it read is kept by then


def _end(tokens: Iterator[Array]) -> None:
    if isinstance(tokens, Closing):
        with suppress(ValueError):  # a generator that runs in another thread
            tokens.close()


def _decoded(
    tokens: Iterator[Array],
    how: Generation,
    decode: Callable[[list[int]], str],
    progress: _Progress,
) -> Generator[str, None, None]:
    ids: list[int] = []  # of the last piece, and since
    count, told = 0, ""  # of the last piece: its tokens, and their text
    reason: FinishReason | None = None
    for token in tokens:
        if progress.is_closed:
            return
        progress.completion_tokens += 1
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
    if progress.is_closed and reason is None:  # from another thread: the tokens ended early
        return
    text = decode(ids)
    if text != told:
        yield text[len(told) :]
    progress.finish_reason = reason or _unfinished(progress.completion_tokens, how)


def split_thought(text: str) -> tuple[str | None, str]:
    """Split a text into the thought before it, None where there is none, and the answer.

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
