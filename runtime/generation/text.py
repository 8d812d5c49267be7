"""The ids of one row as text: up to its end, and piece by piece as they come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from typing import Literal, Self

from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.types import Array

__all__ = ["TextStream", "split_thought", "until_end"]

REPLACEMENT = "\ufffd"  # half a character, decoded
THINK, THOUGHT_END = "<think>", "</think>"


class TextStream:
    """The text of one row's tokens in pieces, as they come; none is empty.

    After its end it says why it ended, and how many tokens there were. Only the tokens of the last
    piece are decoded again, which the next one may change: spaces are the text's own between two
    words, and not around it.

    Attributes:
        finish_reason: ``"stop"`` after a stop id, ``"length"`` after the most tokens; None before
            the end, and where it was closed.
        prompt_tokens: positions that the decoder read before, those of images included.
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
    ) -> None:
        self.finish_reason: Literal["stop", "length"] | None = None
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0
        self.thought: str | None = None
        self._is_closed = False
        self._pieces = self._answer(self._decoded(tokens, how, decode))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End it after the token that is being computed; from any thread, and more than once."""
        self._is_closed = True
        with suppress(ValueError):  # it runs in another thread, which looks at the flag
            self._pieces.close()

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

    def _decoded(
        self, tokens: Iterator[Array], how: Generation, decode: Callable[[list[int]], str]
    ) -> Generator[str, None, None]:
        ids: list[int] = []  # of the last piece, and since
        count, told = 0, ""  # of the last piece: its tokens, and their text
        reason: Literal["stop", "length"] = "length"
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
        self.finish_reason = reason


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
