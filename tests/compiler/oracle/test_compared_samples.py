"""The samples that graphs are compared on: the last of a calibration, with all of their images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.checkpoints import CHAT, write_chat

from internvl_edge.compiler.oracle.checker import SAMPLES, Checker
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.towers.streams import NO_TOKEN, Samples
from internvl_edge.runtime.text.chat_tokenizer import PLACE

BATCH = 8
SIZE = CHAT.vision.image_size


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_chat(tmp_path_factory.mktemp("chat")).path)


def samples_of(pictures: list[int]) -> Samples:
    """Make conversations about so many images each, and these, in batches as calibration does."""
    rng = np.random.default_rng(0)
    ids = np.full((len(pictures), max(pictures) + 6), NO_TOKEN, np.int64)
    for row, count in zip(ids, pictures, strict=True):
        row[: count + 6] = [*[PLACE] * count, *rng.integers(3, 300, 6)]
    pixels = rng.standard_normal((sum(pictures), 3, SIZE, SIZE), np.float32)
    return Samples(
        pixel_values=torch.from_numpy(pixels).split(BATCH),
        chat_ids=torch.from_numpy(ids).split(BATCH),
    )


@pytest.mark.parametrize(
    ("pictures", "images"),
    [
        ([1, 2, 1, 2, 1, 2], SAMPLES),  # 9: the last batch has one image, its conversation two
        ([1] * 9, SAMPLES),
        ([1, 5], 5),
        ([10], 10),  # in two batches
        ([2, 1], 3),  # fewer than are asked for
    ],
)
def test_the_last_conversation_has_its_images(
    pictures: list[int], images: int, checkpoint: Checkpoint
) -> None:
    samples = samples_of(pictures)
    feeds = Checker(checkpoint, SIZE, samples).feeds
    every = torch.cat([*samples.pixel_values]).numpy()
    np.testing.assert_array_equal(feeds["pixel_values"], every[-images:])
    fitting = [sum(pictures[i:]) <= images for i in range(len(pictures))][-SAMPLES:]
    assert len(feeds["inputs_embeds"]) == sum(fitting) > 0
