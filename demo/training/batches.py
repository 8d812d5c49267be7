"""Training batches: the same scenes seen through every task, as tensors.

Batch ``i`` of a seed is always the same. For each scene it holds

- a contrastive text, and which other scenes of the batch the text is also true of
- a text that is true or a near miss, for matching
- a prompt and its continuation, for generation: a caption or an answer
- for every patch, the digit under it, its colour, and its place among the others
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sentencepiece as spm
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from internvl_edge.demo import scenes
from internvl_edge.demo.language import (
    AXES,
    CAPTION_PROMPT,
    CONTRASTIVE_PREFIX,
    DIGITS,
    TEMPLATES,
    Description,
    near_miss,
    random_question,
)

PATCH = 8
NUM_PLACES = 11  # alone; first or second, in a row or a column; first to third, likewise
BOS, EOS, PAD, IGNORED = 1, 2, 0, -100
TEMPLATE_SHARE = 0.6  # of the contrastive texts of scenes of one digit
QUESTION_SHARE = 0.4  # of the generated texts
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B scenes; ids are padded with 0 on the right."""

    pixels: Tensor  # float32 (B, 3, H, W), normalised
    patch_digits: Tensor  # int64 (B, h·w), IGNORED where there is no ink
    patch_colours: Tensor  # int64 (B, h·w)
    patch_places: Tensor  # int64 (B, h·w), below NUM_PLACES
    text_ids: Tensor  # int64 (B, T): contrastive
    positives: Tensor  # bool (B, B): is text j true of scene i
    match_ids: Tensor  # int64 (B, T)
    is_match: Tensor  # int64 (B,)
    generated_ids: Tensor  # int64 (B, T): prompt, continuation, EOS
    generated_labels: Tensor  # int64 (B, T): the ids, IGNORED on prompt and padding


class TrainingBatches(Dataset[Batch]):
    """Batches of random training scenes, by number."""

    def __init__(
        self, tokenizer: spm.SentencePieceProcessor, seed: int, count: int, size: int
    ) -> None:
        self.tokenizer, self.seed, self.count, self.size = tokenizer, seed, count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Batch:
        first = number * self.size
        drawn = [scenes.scene("train", self.seed, first + i) for i in range(self.size)]
        rng = np.random.default_rng((self.seed, number))
        texts, positives = self._contrastive(drawn, rng)
        is_match = rng.random(self.size) < 0.5
        statements = [
            str(s.truth if true else near_miss(s.truth, rng))
            for s, true in zip(drawn, is_match, strict=True)
        ]
        generated, labels = self._generation(drawn, rng)
        return Batch(
            pixels=pixel_values([s.image for s in drawn]),
            **patch_labels(drawn),
            text_ids=pad([self._ids(CONTRASTIVE_PREFIX + text) for text in texts]),
            positives=positives,
            match_ids=pad([self._ids(text) for text in statements]),
            is_match=torch.from_numpy(is_match).long(),
            generated_ids=generated,
            generated_labels=labels,
        )

    def _ids(self, text: str) -> list[int]:
        return [BOS, *self.tokenizer.encode(text), EOS]

    def _contrastive(
        self, drawn: Sequence[scenes.Scene], rng: np.random.Generator
    ) -> tuple[list[str], Tensor]:
        """Write a text for each scene, and tell whether text j is true of scene i, (B, B)."""
        captions = np.array([s.caption for s in drawn])
        digits = np.array(
            [s.truth.items[0].digit if len(s.truth.items) == 1 else -1 for s in drawn]
        )
        is_named = (digits >= 0) & (rng.random(len(drawn)) < TEMPLATE_SHARE)
        templates = [TEMPLATES[i] for i in rng.integers(len(TEMPLATES), size=len(drawn))]
        texts = [
            template.format(DIGITS[digit]) if named else str(caption)
            for caption, digit, named, template in zip(
                captions, digits, is_named, templates, strict=True
            )
        ]
        same_digit = digits[:, None] == digits
        same_caption = captions[:, None] == captions
        return texts, torch.from_numpy(np.where(is_named, same_digit, same_caption))

    def _generation(
        self, drawn: Sequence[scenes.Scene], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        for s in drawn:
            prompt, answer = (CAPTION_PROMPT, s.caption)
            if rng.random() < QUESTION_SHARE:
                prompt, answer = random_question(s.truth, rng)
            head = [BOS, *self.tokenizer.encode(prompt)]
            tail = [*self.tokenizer.encode(answer), EOS]
            ids.append(head + tail)
            labels.append([IGNORED] * len(head) + tail)
        return pad(ids), pad(labels, IGNORED)


def pad(rows: Sequence[Sequence[int]], value: int = PAD) -> Tensor:
    """Pad rows of ids on the right to the longest, int64 (B, T)."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def pixel_values(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Turn pictures of the canvas's size → float32 (B, 3, H, W), normalised as ImageNet's."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return (pixels.float() / 255 - MEAN) / STD


def patch_labels(drawn: Sequence[scenes.Scene]) -> dict[str, Tensor]:
    """Find what owns most ink of each patch, row by row: digit, colour and place, (B, h·w) each."""
    owner = np.stack([s.owner for s in drawn])  # (B, H, W)
    side = scenes.CANVAS // PATCH
    tiles = owner.reshape(-1, side, PATCH, side, PATCH).swapaxes(2, 3)
    tiles = tiles.reshape(len(drawn), side * side, PATCH * PATCH)
    ink = (tiles[..., None] == np.arange(3)).sum(axis=2)  # (B, h·w, items)
    best = np.where(ink.max(axis=2) >= PATCH, ink.argmax(axis=2), 3)
    known = np.full((3, len(drawn), 4), IGNORED)  # of each item, and of bare canvas
    for row, s in enumerate(drawn):
        for number, item in enumerate(s.truth.items):
            known[:, row, number] = item.digit, item.colour, _place(s.truth, number)
    digits, colours, places = (np.take_along_axis(part, best, axis=1) for part in known)
    return {
        "patch_digits": torch.from_numpy(digits),
        "patch_colours": torch.from_numpy(colours),
        "patch_places": torch.from_numpy(places),
    }


def _place(truth: Description, number: int) -> int:
    """Number every position of every layout."""
    count = len(truth.items)
    first = (0, 1, 5)[count - 1]
    return first + number + (count if count > 1 and truth.axis == AXES[1] else 0)
