"""The texts about a scene: captions, near misses, questions and answers.

A scene holds one to three digits of different values and colours, side by side or one above the
other. Its caption names them in reading order, so that every scene has exactly one:

    a red seven
    a red seven left of a blue three
    a red seven above a blue three above a green one

Everything here is text about :class:`Item` tuples; nothing is drawn.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
COUNTS = ("one", "two", "three")
TEMPLATES = ("a {}", "a photo of a {}", "the digit {}", "a handwritten {}")

CONTRASTIVE_PREFIX = "summarize:"
CAPTION_PROMPT = "English caption:"

Axis = Literal["left of", "above"]
AXES: tuple[Axis, Axis] = ("left of", "above")
ENDS = {"left of": ("left", "right"), "above": ("above", "below")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One digit of a scene."""

    digit: int
    colour: int  # index into COLOURS

    def __str__(self) -> str:
        return f"a {COLOURS[self.colour]} {DIGITS[self.digit]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The content of a scene: its items in reading order, and how they lie."""

    items: tuple[Item, ...]
    axis: Axis

    def __str__(self) -> str:
        return f" {self.axis} ".join(str(item) for item in self.items)


class Question(NamedTuple):
    """A prompt for the language model, and the only right answer."""

    prompt: str
    answer: str


def random_description(rng: np.random.Generator, count: int) -> Description:
    """Draw ``count`` items of different digits and colours along a random axis."""
    digits = rng.permutation(len(DIGITS))[:count]
    colours = rng.permutation(len(COLOURS))[:count]
    items = tuple(Item(digit=int(d), colour=int(c)) for d, c in zip(digits, colours, strict=True))
    return Description(items=items, axis=AXES[int(rng.integers(2))])


def near_miss(truth: Description, rng: np.random.Generator) -> Description:
    """Describe falsely, with one thing changed: a colour, a digit, or the relation.

    The relation is changed by turning the axis or by reversing the order; a scene of one digit
    has none.
    """
    kind = rng.integers(3 if len(truth.items) > 1 else 2)
    if kind == 2:
        if rng.integers(2):
            return replace(truth, items=truth.items[::-1])
        return replace(truth, axis=AXES[1 - AXES.index(truth.axis)])
    at = int(rng.integers(len(truth.items)))
    if kind == 0:
        changed = replace(truth.items[at], colour=_other(rng, len(COLOURS), _colours(truth)))
    else:
        changed = replace(truth.items[at], digit=_other(rng, len(DIGITS), _digits(truth)))
    return replace(truth, items=(*truth.items[:at], changed, *truth.items[at + 1 :]))


def random_question(truth: Description, rng: np.random.Generator) -> Question:
    """Ask about colour, digit, place or number; the question and its answer."""
    kind = rng.integers(4 if len(truth.items) > 1 else 3)
    item = truth.items[int(rng.integers(len(truth.items)))]
    colour, digit = COLOURS[item.colour], DIGITS[item.digit]
    if kind == 0:
        return _question(f"what colour is the {digit}?", colour)
    if kind == 1:
        return _question(f"which digit is {colour}?", digit)
    if kind == 2:
        return _question("how many digits?", COUNTS[len(truth.items) - 1])
    end = int(rng.integers(2))
    last = truth.items[-end]  # 0: the first, 1: the last
    return _question(f"which digit is {ENDS[truth.axis][end]}?", DIGITS[last.digit])


def corpus() -> list[str]:
    """List the sentences that the tokenizer is trained on: every word, in every role."""
    pairs = [
        Description(
            items=(Item(digit=a, colour=a % 6), Item(digit=b, colour=(a + b) % 6)), axis=axis
        )
        for a, b in itertools.permutations(range(len(DIGITS)), 2)
        for axis in AXES
    ]
    rng = np.random.default_rng(0)
    sentences = [str(pair) for pair in pairs]
    sentences += [f"{CAPTION_PROMPT} {pair}" for pair in pairs]
    sentences += [f"{CONTRASTIVE_PREFIX}{pair}" for pair in pairs]
    for pair in pairs:
        prompt, answer = random_question(pair, rng)
        sentences.append(f"{prompt} {answer}")
    for template, digit in itertools.product(TEMPLATES, DIGITS):
        sentences += [CONTRASTIVE_PREFIX + template.format(digit)] * 4
    return sentences


def _question(text: str, answer: str) -> Question:
    return Question(f"Question: {text} Answer:", answer)


def _digits(truth: Description) -> set[int]:
    return {item.digit for item in truth.items}


def _colours(truth: Description) -> set[int]:
    return {item.colour for item in truth.items}


def _other(rng: np.random.Generator, count: int, taken: set[int]) -> int:
    return int(rng.choice([value for value in range(count) if value not in taken]))
