"""Conversations about scenes: questions, answers, and questions that follow from them.

A dialogue is about one picture or about two. Its turns are independent questions but for one kind:
"what colour is it?" follows an answer that named a digit, and can only be understood after it.

    one picture    describe the picture. · what colour is the seven? · which digit is red?
                   which digit is on the left? · how many digits are there? · is there a seven?
                   what colour is it?
    two pictures   describe the first picture. · how many digits are there in both pictures?
                   which picture has more digits? · which picture shows a seven?
                   do both pictures show a red digit?

Every question has exactly one right answer. Everything here is text about ``Description`` tuples;
nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from internvl_edge.demo.language import COLOURS, DIGITS, Description, Item

__all__ = ["Dialogue", "Exchange", "about_one", "about_two", "corpus"]

T = TypeVar("T")
Pair = tuple[Description, Description]

COUNTS = ("zero", "one", "two", "three", "four", "five", "six")
PLACES = {
    ("left of", 0): "on the left",
    ("left of", -1): "on the right",
    ("above", 0): "at the top",
    ("above", -1): "at the bottom",
}
FOLLOW_UP = "what colour is it?"
DESCRIBE = "describe the picture."
FOLLOW_SHARE = 0.6  # of the answers that name a digit


class Exchange(NamedTuple):
    """A question and its only right answer."""

    question: str
    answer: str
    item: Item | None = None  # the one digit that the answer names


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """Turns about pictures, which stand before the first question."""

    pictures: tuple[Description, ...]
    turns: tuple[Exchange, ...]


def about_one(truth: Description, turns: int, rng: np.random.Generator) -> Dialogue:
    """Ask ``turns`` questions about one picture; "it" is the digit that was named just before."""
    asked: list[Exchange] = []
    while len(asked) < turns:
        named = asked[-1].item if asked else None
        if named is not None and rng.random() < FOLLOW_SHARE:
            asked.append(Exchange(FOLLOW_UP, COLOURS[named.colour]))
        else:
            ask = ASKS_ABOUT_ONE[int(rng.integers(len(ASKS_ABOUT_ONE)))]
            asked.append(ask(truth, rng))
    return Dialogue(pictures=(truth,), turns=tuple(asked))


def about_two(pictures: Pair, turns: int, rng: np.random.Generator) -> Dialogue:
    """Ask ``turns`` questions that compare two pictures."""
    chosen = rng.integers(len(ASKS_ABOUT_TWO), size=turns)
    asked = tuple(ASKS_ABOUT_TWO[int(kind)](pictures, rng) for kind in chosen)
    return Dialogue(pictures=pictures, turns=asked)


# --- one picture -----------------------------------------------------------------------------


def _describe(truth: Description, rng: np.random.Generator) -> Exchange:
    return Exchange(DESCRIBE, str(truth))


def _colour(truth: Description, rng: np.random.Generator) -> Exchange:
    item = _one_of(truth.items, rng)
    return Exchange(f"what colour is the {DIGITS[item.digit]}?", COLOURS[item.colour])


def _digit(truth: Description, rng: np.random.Generator) -> Exchange:
    item = _one_of(truth.items, rng)
    return Exchange(f"which digit is {COLOURS[item.colour]}?", DIGITS[item.digit], item)


def _place(truth: Description, rng: np.random.Generator) -> Exchange:
    if len(truth.items) == 1:
        return Exchange("which digit is it?", DIGITS[truth.items[0].digit], truth.items[0])
    end = -int(rng.integers(2))
    item = truth.items[end]
    return Exchange(f"which digit is {PLACES[truth.axis, end]}?", DIGITS[item.digit], item)


def _count(truth: Description, rng: np.random.Generator) -> Exchange:
    return Exchange("how many digits are there?", COUNTS[len(truth.items)])


def _is_there(truth: Description, rng: np.random.Generator) -> Exchange:
    shown = {item.digit for item in truth.items}
    digit = _one_of(truth.items, rng).digit
    if rng.random() < 0.5:
        digit = int(rng.choice([d for d in range(len(DIGITS)) if d not in shown]))
    return Exchange(f"is there a {DIGITS[digit]}?", "yes" if digit in shown else "no")


Ask = Callable[[Description, np.random.Generator], Exchange]
ASKS_ABOUT_ONE: tuple[Ask, ...] = (_describe, _colour, _digit, _place, _place, _count, _is_there)


# --- two pictures ----------------------------------------------------------------------------


def _describe_either(pictures: Pair, rng: np.random.Generator) -> Exchange:
    which = int(rng.integers(2))
    return Exchange(f"describe the {('first', 'second')[which]} picture.", str(pictures[which]))


def _count_both(pictures: Pair, rng: np.random.Generator) -> Exchange:
    total = sum(len(picture.items) for picture in pictures)
    return Exchange("how many digits are there in both pictures?", COUNTS[total])


def _more(pictures: Pair, rng: np.random.Generator) -> Exchange:
    first, second = (len(picture.items) for picture in pictures)
    answer = "neither" if first == second else ("the first" if first > second else "the second")
    return Exchange("which picture has more digits?", answer)


def _shows(pictures: Pair, rng: np.random.Generator) -> Exchange:
    shown = [{item.digit for item in picture.items} for picture in pictures]
    digit = _one_of(_one_of(pictures, rng).items, rng).digit
    if rng.random() < 0.2:
        digit = int(rng.integers(len(DIGITS)))
    here = WHICH[digit in shown[0], digit in shown[1]]
    return Exchange(f"which picture shows a {DIGITS[digit]}?", here)


def _same_colour(pictures: Pair, rng: np.random.Generator) -> Exchange:
    shown = [{item.colour for item in picture.items} for picture in pictures]
    shared = shown[0] & shown[1]
    choices = sorted(shared) if shared and rng.random() < 0.6 else sorted(shown[0] | shown[1])
    colour = int(rng.choice(choices))
    answer = "yes" if colour in shared else "no"
    return Exchange(f"do both pictures show a {COLOURS[colour]} digit?", answer)


WHICH = {
    (True, False): "the first",
    (False, True): "the second",
    (True, True): "both",
    (False, False): "neither",
}
AskOfTwo = Callable[[Pair, np.random.Generator], Exchange]
ASKS_ABOUT_TWO: tuple[AskOfTwo, ...] = (_describe_either, _count_both, _more, _shows, _same_colour)


def corpus() -> list[str]:
    """List sentences with every word in every role, for a tokenizer."""
    from internvl_edge.demo.language import random_description

    rng = np.random.default_rng(0)
    sentences = []
    for number in range(3000):
        one, two = (random_description(rng, int(rng.integers(1, 4))) for _ in range(2))
        dialogue = about_two((one, two), 2, rng) if number % 3 == 0 else about_one(one, 3, rng)
        for turn in dialogue.turns:
            sentences += [turn.question, turn.answer]
    return sentences


def _one_of(values: tuple[T, ...], rng: np.random.Generator) -> T:
    return values[int(rng.integers(len(values)))]
