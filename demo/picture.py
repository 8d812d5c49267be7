"""One picture that the models were never trained on, and what compiled directories say of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.style import Style
from rich.text import Text

import internvl_edge
from internvl_edge.demo import scenes
from internvl_edge.demo.evaluate import MAX_NEW_TOKENS
from internvl_edge.demo.language import DIGITS, TEMPLATES, random_question
from internvl_edge.runtime.tasks.chat import Turn

SEED = 11  # of the held-out scene
CHAT_SEED = 13  # of the conversation: the next whose three questions differ
ANY_SPEED = internvl_edge.OrtOptions(allow_slow=True)  # also INT8 on a GPU, for comparison
NUM_CLASSES_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A picture, what it really shows, and what the model says."""

    image: scenes.Pixels  # (CANVAS, CANVAS, 3)
    truth: str
    classes: tuple[tuple[str, float], ...]  # digit and probability, the most likely first
    caption: str
    question: str
    answer: str
    seconds: float  # for the three answers, images and texts encoded

    def lines(self) -> Iterator[str]:
        """Spell the answers for people, one a line."""
        shares = ", ".join(f"{digit} {100 * share:.1f} %" for digit, share in self.classes)
        yield f"shown      {self.truth}"
        yield f"classified {shares}"
        yield f"captioned  {self.caption}"
        yield f"answered   {self.question} {self.answer}"


def ask(out: Path, seed: int = SEED) -> Answers:
    """Classify, caption and question one held-out picture with a compiled directory."""
    scene = scenes.scene("held-out", seed, 0, count=1)
    question = random_question(scene.truth, np.random.default_rng(seed))
    with internvl_edge.load(out, options=ANY_SPEED) as model:
        started = time.perf_counter()
        (ranking,) = model.classify([scene.image], list(DIGITS), templates=list(TEMPLATES))
        (caption,) = model.caption([scene.image], max_new_tokens=MAX_NEW_TOKENS)
        (answer,) = model.answer([scene.image], [question.prompt], max_new_tokens=MAX_NEW_TOKENS)
        seconds = time.perf_counter() - started
    return Answers(
        image=scene.image,
        truth=scene.caption,
        classes=tuple((best["label"], best["score"]) for best in ranking[:NUM_CLASSES_SHOWN]),
        caption=caption,
        question=question.prompt.removeprefix("Question: ").removesuffix(" Answer:"),
        answer=answer,
        seconds=seconds,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Questions about pictures, what the chat model says, and what is right."""

    images: tuple[scenes.Pixels, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    truths: tuple[str, ...]
    seconds: float  # for all answers, pictures encoded

    def lines(self) -> Iterator[str]:
        """Spell the conversation for people, one answer a line."""
        for question, answer, truth in zip(self.questions, self.answers, self.truths, strict=True):
            wrong = "" if answer == truth else f" (wrong: {truth})"
            yield f"asked      {question} {answer}{wrong}"


def talk(out: Path, seed: int = CHAT_SEED) -> Conversation:
    """Have a conversation about two held-out pictures with a compiled directory."""
    images, dialogues = scenes.dialogue_scenes(2, seed)
    pictures, turns = images[1], dialogues[1].turns  # the second is about two
    answers: list[str] = []
    with internvl_edge.load(out, options=ANY_SPEED) as model:
        started = time.perf_counter()
        history: tuple[Turn, ...] = ()
        for turn in turns:
            reply = model.chat(pictures, turn.question, history, max_new_tokens=MAX_NEW_TOKENS)
            answers.append(reply.text.strip())
            history = reply.history
        seconds = time.perf_counter() - started
    return Conversation(
        images=tuple(pictures),
        questions=tuple(turn.question for turn in turns),
        answers=tuple(answers),
        truths=tuple(turn.answer for turn in turns),
        seconds=seconds,
    )


def drawn(image: scenes.Pixels) -> Text:
    """Draw a picture for a colour terminal: two rows of pixels to a line, as upper half blocks."""
    text = Text()
    for upper, lower in zip(image[::2], image[1::2], strict=True):  # (W, 3) each
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            style = Style.parse("rgb({},{},{}) on rgb({},{},{})".format(*above, *below))
            text.append("▀", style)
        text.append("\n")
    return text
