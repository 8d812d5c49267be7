"""A compiled directory in the real sentence-transformers, compared with the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.checkpoints import write_internvl, write_tokenizer

import internvl_edge
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.errors import MediaError, UsageError

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
pytestmark = pytest.mark.slow  # it imports transformers

TEXTS = ["a red seven", "a photo of a blue three", "left of above"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sentence-transformers")
    checkpoint = write_internvl(root / "checkpoint").path
    write_tokenizer(checkpoint)
    export(ExportOptions(checkpoint=checkpoint, out=root / "out", verify="none"))
    return root / "out"


def opened(out: Path, **options: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    from internvl_edge.integrations.sentence_transformers import InternVLEdge

    return SentenceTransformer(modules=[InternVLEdge(out, **options)], device="cpu")


def pictures(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (33, 40, 3), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("options", [{}, {"mode": "g"}, {"transform": "classification"}])
def test_embeddings_are_those_of_the_runtime(out: Path, options: dict[str, Any]) -> None:
    model = opened(out, **options)
    with internvl_edge.load(out) as ours:
        images = ours.encode_image(pictures(), **options)
        texts = ours.encode_text(TEXTS)
    np.testing.assert_allclose(model.encode(pictures()), images, atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS), texts, atol=1e-6)
    assert model.modalities == ["text", "image"]
    assert model.get_embedding_dimension() == images.shape[1]
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (texts, images)]
    similar = model.similarity(model.encode(TEXTS), model.encode(pictures()))
    np.testing.assert_allclose(similar, units[0] @ units[1].T, atol=1e-6)


def test_what_a_picture_may_be(out: Path, tmp_path: Path) -> None:
    model, (picture,) = opened(out), pictures(1)
    picture.save(tmp_path / "one.png")
    expected = model.encode(picture)
    assert expected.ndim == 1
    for given in (np.asarray(picture), str(tmp_path / "one.png"), {"image": picture}):
        np.testing.assert_array_equal(model.encode([given])[0], expected)


def test_a_prompt_stands_before_the_text(out: Path) -> None:
    model = opened(out)
    whole = model.encode(["a photo of a red seven"])
    np.testing.assert_array_equal(model.encode(["a red seven"], prompt="a photo of "), whole)


def test_a_batch_is_of_one_kind_and_nothing_is_fetched(out: Path) -> None:
    from sentence_transformers.base.modality import infer_batch_modality

    model = opened(out)
    with pytest.raises(ValueError, match="mixes multiple modalities"):
        model.encode([*pictures(1), "a red seven"])
    with pytest.raises(MediaError, match="nothing is fetched"):
        model.encode(["https://example.org/picture.png"])
    assert infer_batch_modality([*pictures(1), "x"]) == "message"
    with pytest.raises(UsageError, match="expected a batch of text or of image, found message"):
        model[0].preprocess([*pictures(1), "x"])


def test_a_directory_of_one_tower_says_so(out: Path, tmp_path: Path) -> None:
    checkpoint = out.parent / "checkpoint"
    for component, modality in (("text_embed", "text"), ("image_embed", "image")):
        path = tmp_path / component
        export(
            ExportOptions(checkpoint=checkpoint, out=path, components=(component,), verify="none")
        )
        model = opened(path)
        assert model.modalities == [modality]
        assert model.get_embedding_dimension() == 16
    with pytest.raises(UsageError, match="has no"):
        opened(tmp_path / "image_embed", mode="g")
    with pytest.raises(UsageError, match="mode 'x'"):
        opened(out, mode="x")


def test_it_is_saved_as_the_place_of_its_directory(out: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = opened(out, mode="g")
    model.save(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").rglob("*.onnx"))
    again = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    np.testing.assert_array_equal(again.encode(pictures()), model.encode(pictures()))
