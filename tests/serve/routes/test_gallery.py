from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.web.serving import Served, data_url, inside, png

from internvl_edge.errors import UsageError
from internvl_edge.runtime.model import Model
from internvl_edge.serve.models.gallery import MOST, pictures_in

COUNT = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a broken one, and what is none, among them."""
    path = tmp_path_factory.mktemp("gallery")
    for i in range(COUNT):
        (path / f"{i:02}.png").write_bytes(png(i, 300, 200))
    (path / "05a.png").write_bytes(b"no picture")
    (path / "notes.txt").write_text("mine")
    return path


@pytest.fixture(scope="module")
def with_gallery(compiled: Path, folder: Path) -> Iterator[Served]:
    with inside({"tiny": compiled}, gallery=folder) as running:
        yield running


def test_pictures_by_a_text_and_by_a_picture(with_gallery: Served, model: Model) -> None:
    pictures = [png(i, 300, 200) for i in range(COUNT)]
    vectors = model.encode_image(pictures, normalize=True, transform="retrieval")
    assert with_gallery.ask("/gallery").json == {"count": COUNT}
    by_text = with_gallery.ask("/gallery/search?q=a+red+seven&top_k=3").json
    expected = vectors @ model.encode_text("a red seven", normalize=True)[0]
    assert [one["index"] for one in by_text["data"]] == np.argsort(-expected)[:3].tolist()
    scores = [one["score"] for one in by_text["data"]]
    np.testing.assert_allclose(scores, sorted(expected)[::-1][:3], atol=1e-5)
    assert with_gallery.ask("/gallery/search", {"text": "a red seven", "top_k": 3}).json == by_text
    by_picture = with_gallery.ask("/gallery/search", {"image": data_url(pictures[7])}).json
    assert by_picture["data"][0]["index"] == 7
    assert by_picture["data"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert len(by_picture["data"]) == COUNT


def test_small_pictures_by_number(with_gallery: Served) -> None:
    reply = with_gallery.ask("/gallery/3.jpg")
    assert reply.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(reply.body)).size == (128, 192)


@pytest.mark.parametrize(
    "name",
    ["11", "-1", "9" * 9, "9" * 5000, "00.png/../0", "x", "%2e%2e%2fnotes.txt", "%D9%A3", ""],
)
def test_only_a_number_is_a_picture(with_gallery: Served, name: str) -> None:
    assert with_gallery.ask(f"/gallery/{name}.jpg").error[:2] == (404, "not_found")


@pytest.mark.parametrize(
    ("query", "param"),
    [("", "q"), ("q=", "q"), ("q=a&top_k=0", "top_k"), ("q=a&top_k=x", "top_k"), ("q=%00", "q")],
)
def test_searches_that_cannot_be(with_gallery: Served, query: str, param: str) -> None:
    assert with_gallery.ask(f"/gallery/search?{query}").error == (400, "invalid_value", param)


def test_without_a_gallery(served: Served) -> None:
    assert served.ask("/gallery").json == {"count": 0}
    assert served.ask("/gallery/0.jpg").error[:2] == (404, "not_found")
    assert served.ask("/gallery/search?q=a").error[:2] == (404, "not_found")


def test_folders_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        pictures_in(tmp_path / "none")
    with pytest.raises(UsageError, match=f"expected 1 to {MOST} pictures"):
        pictures_in(tmp_path)
    for i in range(3):
        (tmp_path / f"{i}.jpg").touch()
    monkeypatch.setattr("internvl_edge.serve.models.gallery.MOST", 2)
    with pytest.raises(UsageError, match="found 3"):
        pictures_in(tmp_path)
