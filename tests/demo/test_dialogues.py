"""Conversations about scenes: each question has one right answer, spelled as a model reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge import load
from internvl_edge.cli import run
from internvl_edge.demo import bundled, evaluate, language, scenes
from internvl_edge.demo.dialogues import FOLLOW_UP, Dialogue, about_one, about_two
from internvl_edge.demo.training import talk
from internvl_edge.demo.training.batches import IGNORED
from internvl_edge.demo.training.conversations import TURNS, TalkBatches
from internvl_edge.demo.training.train import PatchHeads
from internvl_edge.demo.training.vocabulary import TEMPLATE, train_vocabulary
from internvl_edge.export.models.chat import Chat
from internvl_edge.runtime.tasks.chat import Reply, Turn
from internvl_edge.runtime.text.templates import find_template

seeds = st.integers(0, 2**32 - 1)
PLACES = 9  # image tokens of a picture


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_vocabulary(tmp_path_factory.mktemp("vocabulary"))


def truth_of(question: str, pictures: tuple[language.Description, ...]) -> str:
    """The answer to a question, read off the descriptions' words alone."""
    captions = [str(picture) for picture in pictures]
    words = question.rstrip("?.").split()
    shown = [[part.split()[1:3] for part in split(caption)] for caption in captions]
    if question.startswith("describe"):
        return captions[1 if "second" in words else 0]
    if question.startswith("how many"):
        return ("zero", "one", "two", "three", "four", "five", "six")[sum(map(len, shown))]
    if question.startswith("what colour is the"):
        return next(colour for colour, digit in shown[0] if digit == words[-1])
    if question.startswith("is there"):
        return "yes" if any(digit == words[-1] for _, digit in shown[0]) else "no"
    if question.startswith("do both"):
        return "yes" if all(any(c == words[-2] for c, _ in items) for items in shown) else "no"
    if question.startswith("which picture shows"):
        here = [any(digit == words[-1] for _, digit in items) for items in shown]
        return {0: "neither", 2: "both"}.get(sum(here), "the first" if here[0] else "the second")
    if question.startswith("which picture has more"):
        first, second = map(len, shown)
        return "neither" if first == second else ("the first", "the second")[second > first]
    if question.startswith("which digit is") and words[-1] in language.COLOURS:
        return next(digit for colour, digit in shown[0] if colour == words[-1])
    assert words[-1] in ("it", "left", "right", "top", "bottom"), question
    return shown[0][-1 if words[-1] in ("right", "bottom") else 0][1]


def split(caption: str) -> list[str]:
    for axis in language.AXES:
        caption = caption.replace(f" {axis} ", "|")
    return caption.split("|")


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_every_answer_is_the_right_one(seed: int, one: int, two: int, is_pair: bool) -> None:
    rng = np.random.default_rng(seed)
    pictures = tuple(language.random_description(rng, count) for count in (one, two))
    dialogue = about_two(pictures, 5, rng) if is_pair else about_one(pictures[0], 5, rng)
    assert len(dialogue.turns) == 5
    for before, turn in zip((None, *dialogue.turns), dialogue.turns, strict=False):
        if turn.question != FOLLOW_UP:
            assert turn.answer == truth_of(turn.question, dialogue.pictures)
            continue
        assert before is not None and before.answer in language.DIGITS
        asked = f"what colour is the {before.answer}?"
        assert turn.answer == truth_of(asked, dialogue.pictures)


@pytest.mark.slow
def test_training_the_vocabulary_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        train_vocabulary(tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_answers_and_their_ends_are_learnt_and_nothing_else(tokenizer: Any) -> None:
    data = TalkBatches(tokenizer, PLACES, seed=3, count=1, size=6)
    batch, again = data[0], data[0]
    assert torch.equal(batch.ids, again.ids)
    place = tokenizer.token_to_id("<IMG_CONTEXT>")
    assert int((batch.ids == place).sum()) == PLACES * len(batch.pixels)
    stop = find_template(TEMPLATE).stop
    for ids, labels, mask in zip(batch.ids, batch.labels, batch.mask, strict=True):
        learnt = labels != IGNORED
        assert torch.equal(labels[learnt], ids[learnt])
        assert not learnt[mask == 0].any()
        text = tokenizer.decode(labels[learnt].tolist(), skip_special_tokens=False)
        answers = text.split(stop)
        assert len(answers) == TURNS + 1 and answers[-1] == ""
        whole = tokenizer.decode(ids[mask == 1].tolist(), skip_special_tokens=False)
        assert whole.endswith(f"{answers[-2]}{stop}\n")


def test_every_parameter_learns(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = talk.configuration(tokenizer.get_vocab_size(), tokenizer.token_to_id("<IMG_CONTEXT>"))
    model, heads = Chat(config), PatchHeads(talk.WIDTH)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "embedding" in name:
                parameter.normal_(std=0.1)
    batch = TalkBatches(tokenizer, PLACES, seed=6, count=1, size=6)[0]
    torch.stack(list(talk.losses(model, heads, batch).values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


class Knows:
    """Answers right from the third question of a conversation on."""

    def __init__(self, dialogues: list[Dialogue]) -> None:
        self.dialogues, self.at = dialogues, -1

    def chat(self, images: Any, question: str, history: Any = (), **_: Any) -> Reply:
        self.at += not history
        dialogue = self.dialogues[self.at]
        assert len(images) == len(dialogue.pictures)
        turn = dialogue.turns[len(history)]
        assert question == turn.question
        text = turn.answer if len(history) >= 2 else "a cat"
        return Reply(text=text, history=(*history, Turn(question=question, answer=text)))


def test_the_figure_of_dialogues_is_a_share_of_right_answers() -> None:
    _, dialogues = scenes.dialogue_scenes(12)
    assert evaluate.dialogue_accuracy(Knows(dialogues), 12) == pytest.approx(1 / 3)


@pytest.mark.slow
def test_the_bundled_model_talks(tmp_path: Path) -> None:
    """It is compiled by its name, and far better than chance in conversations of its own."""
    command = ["export", "demo-chat", "-o", str(tmp_path / "out"), "-p", "fp32", "--verify", "none"]
    assert run([*command, "-q"]) == 0
    with load(tmp_path / "out") as model:
        assert evaluate.dialogue_accuracy(model, 20) > 0.65


def test_the_chat_demo_is_calibrated_on_conversations() -> None:
    draw = scenes.samples_of(bundled("demo-chat"))
    assert draw is scenes.chat_calibration_set
    assert scenes.samples_of(bundled("demo")) is scenes.samples_of(None) is scenes.calibration_set
    assert scenes.samples_of(Path("elsewhere")) is None
    drawn = draw(7, 3)
    about = [turns[0][0].count("<image>") for turns in drawn.conversations]
    assert about == [1, 2, 1, 2, 1], "every image in a conversation"
    assert all("<image>" not in question for t in drawn.conversations for question, _ in t[1:])
    assert drawn.digest == draw(7, 3).digest != draw(7, 4).digest
