"""Training batches of conversations: scenes, prompts as the runtime spells them, and answers.

Batch ``i`` of a seed is always the same. Dialogues are about one picture or about two. Questions
are varied as people type them, with a capital letter and without the last sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from internvl_edge.demo import scenes
from internvl_edge.demo.dialogues import Dialogue, about_one, about_two
from internvl_edge.demo.training.batches import IGNORED, pad, patch_labels, pixel_values
from internvl_edge.demo.training.vocabulary import TEMPLATE
from internvl_edge.runtime.text.templates import Turn, conversation, find_template

ONE_PICTURE_SHARE = 0.65
TURNS = 6
PLACE = "<image>"


@dataclass(frozen=True, slots=True, kw_only=True)
class TalkBatch:
    """B dialogues about M pictures; ids are padded on the right."""

    pixels: Tensor  # float32 (M, 3, H, W), normalised; pictures in the order of their places
    patch_digits: Tensor  # int64 (M, h·w), IGNORED where there is no ink
    patch_colours: Tensor
    patch_places: Tensor
    ids: Tensor  # int64 (B, T)
    mask: Tensor  # int64 (B, T)
    labels: Tensor  # int64 (B, T): the ids of answers and their ends, IGNORED elsewhere


class TalkBatches(Dataset[TalkBatch]):
    """Batches of random dialogues about training scenes, by number."""

    def __init__(
        self, tokenizer: Any, tokens_per_image: int, seed: int, count: int, size: int
    ) -> None:
        self.tokenizer, self.tokens_per_image = tokenizer, tokens_per_image
        self.seed, self.count, self.size = seed, count, size
        self.pad_id: int = tokenizer.token_to_id("<|endoftext|>")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> TalkBatch:
        rng = np.random.default_rng((self.seed, number))
        drawn: list[scenes.Scene] = []
        rows: list[list[int]] = []
        labels: list[list[int]] = []
        for _ in range(self.size):
            count = 1 if rng.random() < ONE_PICTURE_SHARE else 2
            index = 2 * number * self.size + len(drawn)
            shown = [scenes.scene("train", self.seed, index + i) for i in range(count)]
            drawn += shown
            spelled, learnt = self.spelled(_dialogue(shown, rng), rng)
            rows.append(spelled)
            labels.append(learnt)
        ids = pad(rows, self.pad_id)
        lengths = torch.tensor([len(row) for row in rows])
        return TalkBatch(
            pixels=pixel_values([s.image for s in drawn]),
            **patch_labels(drawn),
            ids=ids,
            mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            labels=pad(labels, IGNORED),
        )

    def spelled(
        self, dialogue: Dialogue, rng: np.random.Generator | None = None
    ) -> tuple[list[int], list[int]]:
        """Spell a dialogue as ids and labels; with ``rng``, as somebody might type it."""
        asked = [
            turn.question if rng is None else _typed(turn.question, rng) for turn in dialogue.turns
        ]
        count = len(dialogue.pictures)
        numbered = rng is not None and rng.random() < 0.5
        places = "".join(
            f"Image-{i + 1}: {PLACE}\n" if numbered and count > 1 else f"{PLACE}\n"
            for i in range(count)
        )
        turns = [
            Turn(question=(places if i == 0 else "") + question, answer=turn.answer)
            for i, (question, turn) in enumerate(zip(asked, dialogue.turns, strict=True))
        ]
        image = f"<img>{'<IMG_CONTEXT>' * self.tokens_per_image}</img>"
        ids: list[int] = []
        labels: list[int] = []
        run, is_answer = "", False
        template = find_template(TEMPLATE)
        answers = {turn.answer for turn in turns}
        for piece in conversation(template, turns):
            is_next = not piece.is_template and not piece.has_images and piece.text in answers
            text = piece.text.replace(PLACE, image) if piece.has_images else piece.text
            if is_next or is_answer:
                self._add(run, ids, labels, is_learnt=is_answer)
                run = ""
            if is_answer:  # what follows an answer begins with its end, which is learnt too
                self._add(template.stop, ids, labels, is_learnt=True)
                text = text.removeprefix(template.stop)
            run, is_answer = run + text, is_next
        self._add(run, ids, labels, is_learnt=is_answer)
        return ids, labels

    def _add(self, text: str, ids: list[int], labels: list[int], *, is_learnt: bool) -> None:
        new = self.tokenizer.encode(text, add_special_tokens=False).ids
        ids += new
        labels += new if is_learnt else [IGNORED] * len(new)


def _dialogue(shown: list[scenes.Scene], rng: np.random.Generator) -> Dialogue:
    if len(shown) == 1:
        return about_one(shown[0].truth, TURNS, rng)
    return about_two((shown[0].truth, shown[1].truth), TURNS, rng)


def _typed(question: str, rng: np.random.Generator) -> str:
    text = question[0].upper() + question[1:] if rng.random() < 0.4 else question
    return text[:-1] if rng.random() < 0.15 else text
