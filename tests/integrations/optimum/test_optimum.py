"""The demo in the layout optimum, opened by optimum's and transformers' own classes.

Run by ``make test-optimum``, in an environment of its own: optimum-onnx wants another transformers
than the rest of the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optimum.onnxruntime import ORTModelForZeroShotImageClassification
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

import internvl_edge
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.demo.scenes import calibration_set, classification_scenes

LABELS = [f"{colour} {digit}" for colour in ("red", "blue") for digit in ("three", "five", "eight")]
TEMPLATE = "a photo of a {}"
# FP8 is computed in float32 on a CPU, whose sums depend on how they are split among threads: a
# rounding then falls to the other side, and moves a score by a step of its format.
CLOSE = {"fp8": 0.02}


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8", "fp8"])
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("optimum") / request.param
    export(
        ExportOptions(
            out=path,
            precision=request.param,
            components=("image_embed", "text_embed"),
            samples=calibration_set,
            layout="optimum",
        )
    )
    return path


@pytest.fixture
def model(out: Path) -> Any:
    return ORTModelForZeroShotImageClassification.from_pretrained(out)


def pictures() -> list[Image.Image]:
    """Scenes of the demo, and wider and higher ones; the excess of all is even."""
    scenes = [Image.fromarray(image) for image in classification_scenes(4)[0]]
    return [*scenes, scenes[0].resize((96, 48)), scenes[1].resize((48, 64))]


def test_the_pipeline_gives_the_scores_of_classify(out: Path, model: Any) -> None:
    classify = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(out),
        image_processor=AutoImageProcessor.from_pretrained(out),
    )
    with internvl_edge.load(out) as ours:
        # one at a time, as the pipeline does: INT8 on a CPU depends on what else is in a batch
        expected = [ours.classify([p], LABELS, templates=[TEMPLATE])[0] for p in pictures()]
    spread = []
    for picture, ranked in zip(pictures(), expected, strict=True):
        answer = classify(picture, candidate_labels=LABELS, hypothesis_template=TEMPLATE)
        scores = {one["label"]: one["score"] for one in answer}
        wanted = {one["label"]: one["score"] for one in ranked}
        assert scores == pytest.approx(wanted, abs=CLOSE.get(out.name, 1e-5))
        spread.append(max(scores.values()))
    assert min(spread) < 0.999  # scores of 1 and 0 would agree by themselves


def test_the_embeddings_are_those_of_the_runtime(out: Path, model: Any) -> None:
    texts = [TEMPLATE.format(label) for label in LABELS]
    given = AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="np")
    pixels = AutoImageProcessor.from_pretrained(out)(pictures(), return_tensors="np")
    outputs = model(**given, **pixels)
    with internvl_edge.load(out) as ours:
        images = ours.encode_image(pictures(), normalize=True, transform="clip")
        words = ours.encode_text(texts, normalize=True)
    np.testing.assert_allclose(outputs.image_embeds, images, atol=1e-5)
    np.testing.assert_allclose(outputs.text_embeds, words, atol=1e-5)
    np.testing.assert_allclose(outputs.logits_per_image, 100 * images @ words.T, atol=1e-3)
