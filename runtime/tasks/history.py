"""What was said in a conversation: turns as callers hand them over, and the places of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from internvl_edge.errors import UsageError
from internvl_edge.runtime.tasks.requests import text_problem
from internvl_edge.runtime.text.chat_tokenizer import IMAGE
from internvl_edge.runtime.text.templates import Turn

__all__ = ["answered", "as_turns", "with_places"]


def as_turns(history: Sequence[Any]) -> list[Turn]:
    """A history of turns; a pair of question and answer is one too, as in the original.

    Raises:
        UsageError: something else.
    """
    found = []
    for i, given in enumerate(history):
        is_pair = isinstance(given, tuple | list) and len(given) == 2
        turn = Turn(question=given[0], answer=given[1]) if is_pair else given
        if not isinstance(turn, Turn) or text_problem(turn.question) or text_problem(turn.answer):
            raise UsageError(
                f"history, turn {i + 1} of {len(history)}: expected a Turn with question and "
                f"answer, or a pair of these, found {given!r:.80}"
            )
        found.append(turn)
    return found


def with_places(turns: list[Turn], count: int) -> tuple[Turn, ...]:
    """Turns in which every image has its place; without any, all stand before the first question.

    Raises:
        UsageError: more or fewer places than images.
    """
    found = sum(turn.question.count(IMAGE) for turn in turns)
    if found == 0 and count:
        first = replace(turns[0], question=f"{IMAGE}\n" * count + turns[0].question)
        return (first, *turns[1:])
    if found != count:
        raise UsageError(
            f"the conversation has {found} {IMAGE}, expected one for each of {count} image(s)"
        )
    return tuple(turns)


def answered(turns: Sequence[Turn], answer: str) -> tuple[Turn, ...]:
    """Turns, the last one with its answer."""
    return (*turns[:-1], replace(turns[-1], answer=answer))
