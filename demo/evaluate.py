"""How well a model does the demo's tasks, on scenes of scans that it was never trained on.

The functions take anything with the methods of a loaded model: a compiled directory on any
backend, at any precision, or the ``ReferenceModel`` of ``demo/training``. Every figure is a share
of right answers in 0..1, on scenes that ``seed`` decides. ``…_hits`` tell which answers are right,
(n,), so that two models can be compared scene by scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from internvl_edge.demo import scenes
from internvl_edge.demo.language import CAPTION_PROMPT, DIGITS, TEMPLATES
from internvl_edge.runtime.generation.fixed_cache import in_place
from internvl_edge.runtime.session import Session

Hits = NDArray[np.bool_]
MAX_NEW_TOKENS = 24  # the longest caption has 16, and the end


class Embeds(Protocol):
    """The methods that classification and retrieval need."""

    def encode_image(self, images: Any, mode: str = "c", normalize: bool = False) -> Any:
        """Embed images, (B, E)."""

    def encode_text(self, texts: Any, normalize: bool = False) -> Any:
        """Embed texts, (B, E)."""


class Matches(Protocol):
    """The method that matching needs."""

    def match(self, images: Any, texts: Any) -> Any:
        """Return the probability that text i is true of image i, (B,)."""


class Sees(Protocol):
    """The methods that the probabilities of captions need."""

    @property
    def tokenizer(self) -> Any: ...
    def see(self, images: Any) -> Any:
        """Run the vision tower, and return what the decoder keeps of images."""


class Speaks(Protocol):
    """The methods that captioning and answering need."""

    def caption(self, images: Any, *, num_beams: int = 1, max_new_tokens: int = 30) -> Any:
        """Caption each image."""

    def answer(self, images: Any, prompts: Any, *, max_new_tokens: int = 30) -> Any:
        """Continue prompt i on image i."""


class Talks(Protocol):
    """The method that conversations need."""

    def chat(
        self, images: Any, question: str, history: Any = (), *, max_new_tokens: int | None = None
    ) -> Any:
        """Answer a question in a conversation about images; text and history."""


def zero_shot_accuracy(model: Embeds, n: int = 500, mode: str = "c", seed: int = 1) -> float:
    """Measure how often the digit's class has the nearest mean over the templates."""
    return float(np.mean(zero_shot_hits(model, n, mode, seed)))


def zero_shot_hits(model: Embeds, n: int, mode: str, seed: int) -> Hits:
    """Tell scene by scene which answer is right, (n,)."""
    images, labels = scenes.classification_scenes(n, seed)
    texts = [template.format(digit) for digit in DIGITS for template in TEMPLATES]
    embeds = np.asarray(model.encode_text(texts, normalize=True))
    classes = embeds.reshape(len(DIGITS), len(TEMPLATES), -1).mean(axis=1)  # (10, E)
    classes /= np.linalg.norm(classes, axis=-1, keepdims=True)
    similarity = np.asarray(model.encode_image(images, mode=mode, normalize=True)) @ classes.T
    return np.asarray(similarity.argmax(axis=1) == labels)


def retrieval_recall_at_1(model: Embeds, n: int = 100, mode: str = "c", seed: int = 2) -> float:
    """Measure how often the nearest of ``n`` different captions is the image's own."""
    images, captions = scenes.retrieval_scenes(n, seed)
    image = np.asarray(model.encode_image(images, mode=mode, normalize=True))
    text = np.asarray(model.encode_text(captions, normalize=True))
    return float(np.mean((image @ text.T).argmax(axis=1) == np.arange(n)))


def matching_accuracy(model: Matches, n: int = 500, seed: int = 4) -> float:
    """Measure how often a caption is told from a near miss, half the pairs being each."""
    return float(np.mean(matching_hits(model, n, seed)))


def matching_hits(model: Matches, n: int, seed: int) -> Hits:
    """Tell pair by pair which answer is right, (n,)."""
    images, texts, is_match = scenes.matching_pairs(n, seed)
    return np.asarray((np.asarray(model.match(images, texts)) > 0.5) == is_match)


def caption_exact_match(model: Speaks, n: int = 300, seed: int = 3) -> float:
    """Measure how often the greedy caption is the scene's, word for word."""
    return float(np.mean(caption_hits(model, n, seed)))


def caption_hits(model: Speaks, n: int, seed: int) -> Hits:
    """Tell scene by scene which answer is right, (n,)."""
    images, captions = scenes.caption_scenes(n, seed)
    return _exact(model.caption(images, num_beams=1, max_new_tokens=MAX_NEW_TOKENS), captions)


def caption_logs(
    model: Sees, decoder: Session, n: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Log p of every token where those of held-out captions stand, (tokens, V), and these."""
    images, captions = scenes.caption_scenes(n, seed)
    cache = model.see(images).cache
    logs, targets = [], []
    for i, caption in enumerate(captions):
        start = model.tokenizer.prompt([CAPTION_PROMPT])[0]
        text = model.tokenizer.prompt([f"{CAPTION_PROMPT} {caption}"])[0]
        ids = np.concatenate((text, [[model.tokenizer.eos_id]]), axis=1)  # (1, T)
        past = {
            name.replace("present", "past_key_values", 1): values[i : i + 1]
            for name, values in cache.items()
        }
        seen = next(iter(past.values())).shape[2]
        mask = np.ones((1, seen + ids.shape[1]), np.int64)
        positions = np.arange(seen, mask.shape[1])[None]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        found = decoder.run(in_place(feeds, decoder.inputs), outputs=["logits"])
        logits = found["logits"][0].astype(np.float64)  # (T, V)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        first = start.shape[1]
        logs.append(logits[first - 1 : -1])
        targets.append(ids[0, first:])
    return np.concatenate(logs), np.concatenate(targets)


def vqa_accuracy(model: Speaks, n: int = 300, seed: int = 5) -> float:
    """Measure how often the greedy answer to a question is the right one."""
    return float(np.mean(vqa_hits(model, n, seed)))


def vqa_hits(model: Speaks, n: int, seed: int) -> Hits:
    """Tell question by question which answer is right, (n,)."""
    images, questions = scenes.question_scenes(n, seed)
    prompts = [question.prompt for question in questions]
    answers = model.answer(images, prompts, max_new_tokens=MAX_NEW_TOKENS)
    return _exact(answers, [question.answer for question in questions])


def dialogue_accuracy(model: Talks, n: int = 100, seed: int = 7) -> float:
    """Measure how often an answer in a conversation is the right one, the model's own before it."""
    return float(np.mean(dialogue_hits(model, n, seed)))


def dialogue_hits(model: Talks, n: int, seed: int) -> Hits:
    """Tell which answers are right, (all turns of n conversations,)."""
    hits: list[bool] = []
    for images, dialogue in zip(*scenes.dialogue_scenes(n, seed), strict=True):
        history: Any = ()
        for turn in dialogue.turns:
            reply = model.chat(images, turn.question, history, max_new_tokens=MAX_NEW_TOKENS)
            hits.append(reply.text.strip() == turn.answer)
            history = reply.history
    return np.array(hits)


def _exact(found: Sequence[str], expected: Sequence[str]) -> Hits:
    pairs = zip(found, expected, strict=True)
    return np.array([text.strip() == truth for text, truth in pairs])
