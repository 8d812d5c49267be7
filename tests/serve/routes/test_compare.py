from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.web.serving import Served, data_url, png

from internvl_edge.runtime.model import Model

PICTURES = [png(i) for i in range(3)]
URLS = [data_url(picture) for picture in PICTURES]
METHOD = ("invalid_value", "method")
LABELS = ["seven", "two", "a blue three"]


@pytest.mark.parametrize("mode", ["c", "g"])
@pytest.mark.parametrize("templates", [("a photo of a {}",), ("{} here", "no {c} at all")])
def test_labels_equal_the_runtime(
    served: Served, model: Model, mode: str, templates: tuple[str, ...]
) -> None:
    content = {"images": URLS, "labels": LABELS, "templates": templates, "mode": mode}
    for _ in range(2):  # the second time the labels are remembered
        reply = served.ask("/v1/classify", content)
        assert reply.json["object"] == "list"
        assert reply.json["data"] == [
            {"index": i, "labels": labels}
            for i, labels in enumerate(model.classify(PICTURES, LABELS, templates, mode=mode))
        ]


def test_the_best_few_labels(served: Served, model: Model) -> None:
    content = {"images": URLS[:1], "labels": LABELS, "top_k": 2}
    (found,) = served.ask("/v1/classify", content).json["data"]
    assert found["labels"] == model.classify(PICTURES[:1], LABELS)[0][:2]


def test_documents_by_their_cosine(served: Served, model: Model) -> None:
    documents = ["two", {"text": "a blue three"}, {"image": URLS[0]}, {"image": URLS[1]}]
    content = {"query": "seven", "documents": documents, "return_documents": True}
    reply = served.ask("/v1/rerank", content).json
    texts = model.encode_text(["seven", "two", "a blue three"], normalize=True)
    images = model.encode_image(PICTURES[:2], normalize=True, transform="retrieval")
    expected = np.concatenate([texts[1:], images]) @ texts[0]
    found = {one["index"]: one["relevance_score"] for one in reply["results"]}
    np.testing.assert_allclose([found[i] for i in range(4)], expected, atol=1e-6)
    assert [one["index"] for one in reply["results"]] == np.argsort(-expected).tolist()
    given = {one["index"]: one["document"] for one in reply["results"]}
    assert given == {0: {"text": "two"}, **{i: documents[i] for i in (1, 2, 3)}}
    assert reply["usage"]["prompt_tokens"] > 0


def test_a_picture_asks_for_texts_and_the_best_of_them(served: Served) -> None:
    content = {"query": {"image": URLS[0]}, "documents": LABELS, "top_n": 2}
    results = served.ask("/v1/rerank", content).json["results"]
    assert len(results) == 2
    assert "document" not in results[0]
    assert results[0]["relevance_score"] >= results[1]["relevance_score"]


def test_documents_by_the_matching_head(served: Served, model: Model) -> None:
    of_images = {
        "query": "seven",
        "documents": [{"image": url} for url in URLS],
        "method": "match",
    }
    of_texts = {"query": {"image": URLS[0]}, "documents": LABELS, "method": "match"}
    for content, expected in (
        (of_images, model.match(PICTURES, ["seven"])),
        (of_texts, model.match(PICTURES[:1], LABELS)),
    ):
        results = served.ask("/v1/rerank", content).json["results"]
        found = {one["index"]: one["relevance_score"] for one in results}
        np.testing.assert_allclose([found[i] for i in range(3)], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "content", "code", "param"),
    [
        ("classify", {}, "invalid_value", "images"),
        ("classify", {"images": []}, "invalid_value", "images"),
        ("classify", {"images": URLS[0], "labels": LABELS}, "invalid_value", "images"),
        ("classify", {"images": URLS[:1] * 9, "labels": LABELS}, "invalid_value", "images"),
        ("classify", {"images": ["a.png"], "labels": LABELS}, "invalid_image_url", "images[0]"),
        ("classify", {"images": URLS, "labels": []}, "invalid_value", "labels"),
        ("classify", {"images": URLS, "labels": ["a", 5]}, "invalid_value", "labels[1]"),
        ("classify", {"images": URLS, "labels": ["a", "a"]}, "invalid_value", "labels"),
        ("classify", {"images": URLS, "labels": ["a"] * 1001}, "invalid_value", "labels"),
        (
            "classify",
            {"images": URLS, "labels": ["a"], "templates": ["x"]},
            "invalid_value",
            "templates",
        ),
        (
            "classify",
            {"images": URLS, "labels": ["a"], "templates": ["{}"] * 81},
            "invalid_value",
            "templates",
        ),
        (
            "classify",
            {"images": URLS, "labels": [f"{i}" for i in range(500)], "templates": ["{}"] * 21},
            "invalid_value",
            "labels",
        ),
        ("classify", {"images": URLS, "labels": ["a"], "top_k": 0}, "invalid_value", "top_k"),
        ("rerank", {"documents": ["a"]}, "invalid_value", "query"),
        ("rerank", {"query": "a"}, "invalid_value", "documents"),
        ("rerank", {"query": "a", "documents": [""]}, "invalid_value", "documents[0]"),
        ("rerank", {"query": "a", "documents": ["a"] * 2049}, "invalid_value", "documents"),
        (
            "rerank",
            {"query": "a", "documents": [{"image": URLS[0]}] * 9},
            "invalid_value",
            "documents",
        ),
        (
            "rerank",
            {"query": "a", "documents": ["b"], "method": "match"},
            "invalid_value",
            "method",
        ),
        ("rerank", {"query": "a", "documents": ["b"], "method": "best"}, "invalid_value", "method"),
        ("rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "invalid_value", "top_n"),
    ],
)
def test_what_cannot_be_compared(
    served: Served, path: str, content: Any, code: str, param: str
) -> None:
    assert served.ask(f"/v1/{path}", content).error == (400, code, param)
