"""The samples that a plan is calibrated on: loaded, normalised and turned into ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from internvl_edge.compiler.plan import Plan
from internvl_edge.errors import MissingDependency
from internvl_edge.export.checkpoint.tokenizer import token_files
from internvl_edge.export.components import language_config
from internvl_edge.export.towers.streams import NO_TOKEN, Samples
from internvl_edge.files.reading import is_there
from internvl_edge.quantize.calibration.images import (
    CalibrationSet,
    Turns,
    list_images,
    load_calibration,
    sample_set,
)
from internvl_edge.runtime.images.transform import pixel_values
from internvl_edge.runtime.text.chat_tokenizer import IMAGE, PLACE, load_chat_tokenizer
from internvl_edge.runtime.text.padding import right_padded
from internvl_edge.runtime.text.templates import TEMPLATES, Turn, conversation
from internvl_edge.runtime.text.tokenizer import (
    CAPTION_PROMPT,
    MAX_TEXT_LENGTH,
    TOKENIZER_FILE,
    Tokenizer,
)
from internvl_edge.types import Array

logger = logging.getLogger(__name__)

TEXT_TEMPLATE = "internvl2_5"  # where a checkpoint names none
DESCRIBE = "Please describe the image shortly."  # as model cards do
MAX_CHAT_LENGTH = 128  # tokens of a conversation after its last image
BATCH = 8  # samples that flow through the blocks together


def load_samples(plan: Plan) -> CalibrationSet:
    """Load the calibration set of a plan: the folder given, the caller's, or a bundled set.

    Raises:
        CalibrationError: nothing usable in the folder, or a sample set's file has changed.
    """
    assert plan.recipe is not None
    count, seed = plan.recipe.num_samples, plan.recipe.seed
    if plan.options.calibration is not None:
        samples = load_calibration(plan.options.calibration, count, seed)
        for note in samples.notes:
            logger.warning("%s: %s", plan.options.calibration, note)
        if len(samples) < count:
            logger.warning(
                "%s: %d image(s) to calibrate on, the recipe asks for %d; ranges that few images "
                "reach may clip others, add more",
                plan.options.calibration,
                len(samples),
                count,
            )
        return samples
    if plan.options.samples is not None:
        return plan.options.samples(count, seed)
    return sample_set("digits" if plan.is_demo else "photographs", count, seed)


def tokenize(plan: Plan, captions: list[str]) -> tuple[Array, Array, Array] | None:
    """Make ids for text embedding, matching and captioning, right-padded; None: no tokenizer."""
    path, config = plan.checkpoint.path / TOKENIZER_FILE, plan.checkpoint.config
    if config.internvl is None or not is_there(path):
        return None
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size > language_config(plan.checkpoint.config).vocab_size:  # type: ignore[union-attr]
        return None  # ids of another vocabulary; it was said when the plan was made
    return (
        tokenizer.contrastive(captions, MAX_TEXT_LENGTH, pad_to="longest"),
        tokenizer.match(captions, MAX_TEXT_LENGTH),
        tokenizer.match([f"{CAPTION_PROMPT} {c}" for c in captions], MAX_TEXT_LENGTH),
    )


def chat_ids(plan: Plan, calibration: CalibrationSet) -> Array:
    """Spell conversations as a chat model reads them, template and all.

    Args:
        plan: of a chat model; without a tokenizer, random ids follow each image.
        calibration: its conversations, or a question about each image that its caption answers.

    Returns:
        (B, T), ``PLACE`` in the place of an image, right-padded by ``NO_TOKEN``.
    """
    folder, config = plan.checkpoint.path, plan.checkpoint.config
    assert config.chat is not None
    files = None if language_config(config) is None else token_files(folder, config)
    tokenizer = None
    try:
        tokenizer = None if files is None else load_chat_tokenizer(files)
    except MissingDependency as error:
        logger.warning("calibration sees random ids and no texts: %s", error)
    if tokenizer is None:
        ids = random_ids(plan, len(calibration))
        return np.insert(ids, 0, PLACE, axis=1)
    template = TEMPLATES.get(config.chat.template, TEMPLATES[TEXT_TEMPLATE])
    rows = []
    for turns in calibration.conversations or _descriptions(calibration.captions):
        spelled = [Turn(question=question, answer=answer) for question, answer in turns]
        pieces = conversation(template, spelled, config.chat.system)
        places = [1] * sum(question.count(IMAGE) for question, _ in turns)
        row = tokenizer.encode(pieces, places, template)
        last = max((at for at, i in enumerate(row) if i == PLACE), default=0)
        rows.append(row[: last + 1 + MAX_CHAT_LENGTH])
    return right_padded(rows, max(map(len, rows)), NO_TOKEN)


def _descriptions(captions: Sequence[str]) -> list[Turns]:
    return [((f"{IMAGE}\n{DESCRIBE}", caption),) for caption in captions]


def samples_for(plan: Plan, calibration: CalibrationSet) -> Samples:
    """Make batches of normalised images and of ids."""
    count = len(calibration)
    # one by one: photographs are large until they are resized
    each = [pixel_values(calibration.image(i), plan.preprocessing) for i in range(count)]
    pixels = _batches(np.concatenate(each))
    if plan.checkpoint.config.chat is not None:
        return Samples(pixel_values=pixels, chat_ids=_batches(chat_ids(plan, calibration)))
    ids = tokenize(plan, list(calibration.captions))
    text, match, caption = ids or (random_ids(plan, count),) * 3
    return Samples(
        pixel_values=pixels,
        input_ids=_batches(text),
        match_ids=_batches(match),
        caption_ids=_batches(caption),
    )


def random_ids(plan: Plan, count: int, length: int = 16) -> Array:
    """Draw seeded ids for a checkpoint that comes without a tokenizer."""
    llama = language_config(plan.checkpoint.config)
    if llama is None:
        return np.zeros((0, length), np.int64)
    rng = np.random.default_rng(0 if plan.recipe is None else plan.recipe.seed)
    ids = rng.integers(min(3, llama.vocab_size - 1), llama.vocab_size, (count, length))
    ids[:, 0], ids[:, -1] = llama.bos_token_id, llama.eos_token_id
    return ids.astype(np.int64)


def _batches(array: Array) -> list[Tensor]:
    return [torch.from_numpy(array[i : i + BATCH]) for i in range(0, len(array), BATCH)]


def num_images(plan: Plan) -> int:
    """Count the images that calibration will see."""
    assert plan.recipe is not None
    if plan.options.calibration is not None:
        return min(len(list_images(plan.options.calibration).images), plan.recipe.num_samples)
    if plan.options.samples is not None:
        return plan.recipe.num_samples  # as many as are asked for; they are not drawn for this
    return len(load_samples(plan))
