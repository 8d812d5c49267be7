"""Scenes composed from real handwritten digits, for training, evaluation and calibration.

The digits are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test
set: 1797 scans of 8 x 8 pixels. Four fifths of the scans of each digit are for training, one
fifth is held out; the split is by scan, so no stroke of an evaluation scene was ever trained on.

A scene is drawn on a dark, noisy canvas: each scan is enlarged, rotated, sheared and tinted, and
laid out in a row or a column. Every scene follows from (split, seed, index) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.demo import MODELS, bundled
from internvl_edge.demo.dialogues import Dialogue, about_one, about_two
from internvl_edge.demo.language import (
    COLOURS,
    DIGITS,
    TEMPLATES,
    Description,
    Question,
    near_miss,
    random_description,
    random_question,
)
from internvl_edge.errors import MissingDependency
from internvl_edge.quantize.calibration.images import CalibrationSet, Turns

CANVAS = 48  # pixels, both ways
CALIBRATION_TURNS = 3  # of a conversation
HELD_OUT_SHARE = 0.2
SPLIT_SEED = 20
COUNT_SHARES = (0.35, 0.4, 0.25)  # of scenes with one, two and three digits
RGB = {
    "red": (228, 42, 38),
    "green": (44, 190, 60),
    "blue": (58, 92, 240),
    "yellow": (238, 216, 48),
    "purple": (186, 62, 214),
    "white": (232, 232, 232),
}

Split = Literal["train", "held-out"]
Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture and what it shows."""

    image: Pixels  # (CANVAS, CANVAS, 3)
    owner: NDArray[np.int8]  # (CANVAS, CANVAS): which item's ink is here, -1 none
    truth: Description

    @property
    def caption(self) -> str:
        return str(self.truth)


@lru_cache
def scans(split: Split) -> tuple[Pixels, ...]:
    """Load the scans of one split, by digit: ten arrays (n, 8, 8), 0 paper, 255 ink."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependency.of("scikit-learn", "demo") from error
    data = load_digits()
    ink = np.round(data.images * (255 / 16)).astype(np.uint8)
    return tuple(_part(ink[data.target == digit], split) for digit in range(len(DIGITS)))


def _part(ink: Pixels, split: Split) -> Pixels:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(ink))
    held_out = round(HELD_OUT_SHARE * len(ink))
    return ink[order[:held_out] if split == "held-out" else order[held_out:]]


def scene(split: Split, seed: int, index: int, count: int | None = None) -> Scene:
    """Draw scene number ``index`` of a seed, with ``count`` digits or, by default, one to three."""
    rng = np.random.default_rng((seed, index, len(split), count or 0))
    number = int(rng.choice(3, p=COUNT_SHARES)) + 1 if count is None else count
    return draw(random_description(rng, number), split, rng)


def draw(truth: Description, split: Split, rng: np.random.Generator) -> Scene:
    """Draw a description with random scans of a split; training scenes are distorted more."""
    canvas = _background(rng)
    owner = np.full((CANVAS, CANVAS), -1, np.int8)
    strength = 1.0 if split == "train" else 0.5
    boxes = _layout(len(truth.items), truth.axis == "above", rng)
    for number, (item, (x, y, size)) in enumerate(zip(truth.items, boxes, strict=True)):
        choices = scans(split)[item.digit]
        alpha = _stamp(choices[rng.integers(len(choices))], size, strength, rng)
        here = np.s_[y : y + size, x : x + size]
        tint = np.array(RGB[COLOURS[item.colour]]) * rng.uniform(0.8, 1.1) + rng.normal(0, 9, 3)
        canvas[here] += alpha[..., None] * (tint - canvas[here])
        owner[here][alpha > 0.4] = number
    canvas += rng.normal(0, rng.uniform(2, 12), canvas.shape)
    image = np.clip(np.round(canvas), 0, 255).astype(np.uint8)
    return Scene(image=image, owner=owner, truth=truth)


def _background(rng: np.random.Generator) -> Floats:
    """Shade a dark canvas slowly from side to side, (CANVAS, CANVAS, 3)."""
    ramp = np.linspace(-1, 1, CANVAS)
    slope = rng.uniform(-15, 15, (2, 3))
    shade = rng.uniform(15, 65) + rng.normal(0, 6, 3)
    return shade + ramp[:, None, None] * slope[0] + ramp[None, :, None] * slope[1]


def _layout(count: int, vertical: bool, rng: np.random.Generator) -> Iterator[tuple[int, int, int]]:
    """Place ``count`` squares along an axis, one to a cell: (x, y, side) of each."""
    cell = CANVAS // count
    largest = (28, 23, 16)[count - 1]
    middle = rng.uniform(largest / 2 + 2, CANVAS - largest / 2 - 2)
    for number in range(count):
        size = int(rng.integers((16, 17, 13)[count - 1], largest + 1))
        along = number * cell + int(rng.integers(cell - size + 1))
        across = round(middle - size / 2 + rng.uniform(-2, 2))
        across = min(max(across, 0), CANVAS - size)
        yield (across, along, size) if vertical else (along, across, size)


def _stamp(scan: Pixels, size: int, strength: float, rng: np.random.Generator) -> Floats:
    """Resample a scan to (size, size), rotated, sheared and warped; 0 paper to 1 ink."""
    angle = np.deg2rad(rng.normal(0, 11 * strength))
    shear, stretch = rng.normal(0, [0.15 * strength, 0.08 * strength])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shape = turn @ np.array([[1 + stretch, shear], [0, 1 - stretch]])
    corners = np.array([(-1, -1), (-1, 1), (1, 1), (1, -1)]) * 4.6  # as Pillow's QUAD wants them
    source = corners @ shape.T + rng.normal(0, 0.45 * strength, (4, 2)) + 6
    paper = Image.fromarray(np.pad(scan, 2))  # 12 x 12, so that turning cuts no ink off
    quad = paper.transform(
        (size, size), Image.Transform.QUAD, tuple(source.ravel()), Image.Resampling.BICUBIC
    )
    alpha: Floats = np.asarray(quad, np.float64) / 255
    return alpha ** np.exp(rng.normal(0, 0.25 * strength))


# --- data sets: held-out scans for evaluation, training scans for calibration ---------------


def classification_scenes(n: int, seed: int = 1) -> tuple[list[Pixels], NDArray[np.int64]]:
    """Draw one held-out digit an image; the digits too, (n,), with names in ``DIGITS``."""
    chosen = [scene("held-out", seed, i, count=1) for i in range(n)]
    return [s.image for s in chosen], np.array([s.truth.items[0].digit for s in chosen])


def retrieval_scenes(n: int = 100, seed: int = 2) -> tuple[list[Pixels], list[str]]:
    """Draw images of two held-out digits; their captions are all different."""
    chosen: dict[str, Pixels] = {}
    index = 0
    while len(chosen) < n:
        drawn = scene("held-out", seed, index, count=2)
        chosen.setdefault(drawn.caption, drawn.image)
        index += 1
    return list(chosen.values()), list(chosen)


def caption_scenes(n: int, seed: int = 3) -> tuple[list[Pixels], list[str]]:
    """Draw images of one to three held-out digits, with their captions."""
    chosen = [scene("held-out", seed, i) for i in range(n)]
    return [s.image for s in chosen], [s.caption for s in chosen]


def matching_pairs(n: int, seed: int = 4) -> tuple[list[Pixels], list[str], NDArray[np.bool_]]:
    """Draw images, a text for each, and whether it is true (n,): half are, half are near misses."""
    chosen = [scene("held-out", seed, i) for i in range(n)]
    rng = np.random.default_rng((seed, n))
    is_match = rng.permutation(np.arange(n) % 2 == 0)
    texts = [
        s.caption if true else str(near_miss(s.truth, rng))
        for s, true in zip(chosen, is_match, strict=True)
    ]
    return [s.image for s in chosen], texts, is_match


def question_scenes(n: int, seed: int = 5) -> tuple[list[Pixels], list[Question]]:
    """Draw images of one to three held-out digits, with a question and its answer on each."""
    chosen = [scene("held-out", seed, i) for i in range(n)]
    rng = np.random.default_rng((seed, n))
    return [s.image for s in chosen], [random_question(s.truth, rng) for s in chosen]


def dialogue_scenes(
    n: int, seed: int = 7, turns: int = 3
) -> tuple[list[list[Pixels]], list[Dialogue]]:
    """Draw dialogues on held-out digits, about one image and two in turns; images and dialogues."""
    rng = np.random.default_rng((seed, n))
    images, dialogues = [], []
    for i in range(n):
        one, two = (scene("held-out", seed, 2 * i + j) for j in range(2))
        if i % 2:
            dialogues.append(about_two((one.truth, two.truth), turns, rng))
            images.append([one.image, two.image])
        else:
            dialogues.append(about_one(one.truth, turns, rng))
            images.append([one.image])
    return images, dialogues


def calibration_set(count: int, seed: int) -> CalibrationSet:
    """Draw what the demo is calibrated on: for ``ExportOptions.samples``."""
    return CalibrationSet.from_arrays(
        calibration_images(count, seed),
        calibration_texts(count, seed),
        name="demo training scenes",
    )


def chat_calibration_set(count: int, seed: int) -> CalibrationSet:
    """Draw what the chat demo is calibrated on: conversations about one image and two in turns."""
    chosen = [scene("train", seed, i) for i in range(count)]
    rng = np.random.default_rng((seed, count))
    conversations, first = list[Turns](), 0
    while first < count:
        number = 2 if len(conversations) % 2 and first + 1 < count else 1
        truths = [s.truth for s in chosen[first : first + number]]
        dialogue = (
            about_two((truths[0], truths[1]), CALIBRATION_TURNS, rng)
            if number == 2
            else about_one(truths[0], CALIBRATION_TURNS, rng)
        )
        places = "<image>\n" * number
        conversations.append(
            tuple(
                (turn.question if i else places + turn.question, turn.answer)
                for i, turn in enumerate(dialogue.turns)
            )
        )
        first += number
    return CalibrationSet.from_arrays(
        [s.image for s in chosen],
        [s.caption for s in chosen],
        conversations=conversations,
        name="demo training scenes",
    )


def samples_of(checkpoint: Path | None) -> Callable[[int, int], CalibrationSet] | None:
    """Return what draws a bundled model's calibration set; None for any other checkpoint."""
    if checkpoint is None:
        return calibration_set
    found = {path.resolve(): name for name in MODELS if (path := bundled(name)) is not None}
    return {"demo": calibration_set, "demo-chat": chat_calibration_set}.get(
        found.get(checkpoint.resolve(), "")
    )


def calibration_images(n: int, seed: int = 6) -> list[Pixels]:
    """Draw images from training scans, for calibration."""
    return [scene("train", seed, i).image for i in range(n)]


def calibration_texts(n: int, seed: int = 6) -> list[str]:
    """Write texts as the model meets them, without prefix: captions and, one in four, templates."""
    rng = np.random.default_rng((seed, n))
    captions = [str(random_description(rng, int(rng.integers(1, 4)))) for _ in range(n)]
    named: list[Any] = [
        TEMPLATES[rng.integers(len(TEMPLATES))].format(DIGITS[rng.integers(len(DIGITS))])
        for _ in range(n)
    ]
    return [named[i] if i % 4 == 3 else captions[i] for i in range(n)]
