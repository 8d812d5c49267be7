"""What transformers reads in any directory: the checkpoint's own files, which are passed on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_edge.compiler.plan import demo_checkpoint
from internvl_edge.export.checkpoint.side_files import SIDE_FILES, read_preprocessing
from internvl_edge.runtime.images.transform import pixel_values
from internvl_edge.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow  # it imports transformers
TEXTS = ["a red seven", "  two  spaces", "日本 é", "left of a blue three"]


@pytest.fixture(scope="module")
def passed_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's side files, as an export copies them: without ``config.json``."""
    folder = tmp_path_factory.mktemp("side-files")
    for name in SIDE_FILES:
        if (demo_checkpoint() / name).exists():
            shutil.copy(demo_checkpoint() / name, folder)
    return folder


def test_the_image_processor_gives_the_pixels_of_clip(passed_on: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    shapes = [(48, 48), (60, 75), (131, 70), (30, 40)]
    pictures = [Image.fromarray(rng.integers(0, 256, (*s, 3), np.uint8)) for s in shapes]
    processor = transformers.AutoImageProcessor.from_pretrained(passed_on)
    theirs = processor(pictures, return_tensors="np")["pixel_values"]
    ours = pixel_values(pictures, read_preprocessing(passed_on, 48), "clip")
    np.testing.assert_array_equal(theirs, ours)


def test_the_tokenizer_lacks_what_goes_around_a_text(passed_on: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(passed_on)
    ours = Tokenizer(passed_on / "tokenizer.model")
    for text in TEXTS:
        (row,) = ours.contrastive(text, pad_to="longest")
        assert theirs("summarize:" + text)["input_ids"] + [2] == row.tolist()
        assert theirs(text)["input_ids"] != row.tolist()
    (row,) = ours.contrastive("</s>", pad_to="longest")
    assert theirs("summarize:</s>")["input_ids"] + [2] != row.tolist()  # it ends the text
