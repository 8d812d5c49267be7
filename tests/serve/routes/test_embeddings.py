from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from support.web.serving import Served, data_url, image_part, png

from internvl_edge.runtime.model import Model
from internvl_edge.types import Array

PICTURES = [png(i) for i in range(3)]
URLS = [data_url(picture) for picture in PICTURES]


def vectors(served: Served, **content: Any) -> Array:
    reply = served.ask("/v1/embeddings", content)
    assert reply.status == 200, reply.body
    data = reply.json["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    assert {one["object"] for one in data} == {"embedding"}
    return np.array([one["embedding"] for one in data], np.float32)


def test_texts_equal_the_runtime(served: Served, model: Model) -> None:
    texts = ["a red seven", "two", "a blue three left of a six"]
    np.testing.assert_array_equal(
        vectors(served, input=texts), model.encode_text(texts, normalize=True)
    )
    np.testing.assert_array_equal(
        vectors(served, input="two", normalize=False, model="tiny"), model.encode_text("two")
    )


def test_many_texts_in_more_than_one_batch(served: Served, model: Model) -> None:
    texts = [f"{i} {'seven ' * (i % 5)}" for i in range(100)]
    np.testing.assert_array_equal(
        vectors(served, input=texts, normalize=False), model.encode_text(texts)
    )


@pytest.mark.parametrize(
    "content",
    [
        {"input": URLS[0], "modality": "image"},
        {"input": [URLS[0]], "modality": "image"},
        {"input": [{"image": URLS[0]}]},
        {"messages": [{"role": "user", "content": [image_part(URLS[0])]}]},
    ],
)
def test_a_picture_in_every_dialect(served: Served, model: Model, content: dict[str, Any]) -> None:
    expected = model.encode_image(PICTURES[:1], normalize=True)
    np.testing.assert_array_equal(vectors(served, **content), expected)


def test_a_text_as_a_message(served: Served, model: Model) -> None:
    expected = model.encode_text(["two"], normalize=True)
    for part in ("two", [{"type": "text", "text": "two"}]):
        messages = [{"role": "user", "name": "", "content": part}]
        np.testing.assert_array_equal(vectors(served, messages=messages), expected)


@pytest.mark.parametrize("mode", ["c", "g"])
@pytest.mark.parametrize("transform", ["retrieval", "classification", "clip", None])
def test_pictures_of_every_mode_and_transform(
    served: Served, model: Model, mode: str, transform: Any
) -> None:
    given = {} if transform is None else {"transform": transform}
    for count in (1, 3):
        found = vectors(
            served, input=URLS[:count], modality="image", mode=mode, normalize=False, **given
        )
        expected = model.encode_image(PICTURES[:count], mode=mode, transform=transform)
        np.testing.assert_array_equal(found, expected)


def test_texts_and_pictures_come_back_in_their_order(served: Served, model: Model) -> None:
    items = [{"text": "two"}, {"image": URLS[1]}, "seven", {"image": URLS[0]}]
    found = vectors(served, input=items)
    texts = model.encode_text(["two", "seven"], normalize=True)
    images = model.encode_image([PICTURES[1], PICTURES[0]], normalize=True)
    np.testing.assert_array_equal(found, np.stack([texts[0], images[0], texts[1], images[1]]))


def test_base64_is_little_endian_float32(served: Served) -> None:
    reply = served.ask("/v1/embeddings", {"input": "two", "encoding_format": "base64"})
    spelled = reply.json["data"][0]["embedding"]
    as_numbers = vectors(served, input="two")[0]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(spelled), "<f4"), as_numbers)


def test_tokens_are_counted_and_pictures_are_none(served: Served, model: Model) -> None:
    ids = model.tokenizer.contrastive(["two", "a red seven"])
    for content, count in (
        ({"input": ["two", "a red seven"]}, int((ids > 0).sum())),
        ({"input": URLS[0], "modality": "image"}, 0),
    ):
        usage = served.ask("/v1/embeddings", content).json["usage"]
        assert usage == {"prompt_tokens": count, "total_tokens": count}


def test_stages_are_told_in_server_timing(served: Served) -> None:
    reply = served.ask("/v1/embeddings", {"input": [{"image": URLS[0]}, {"text": "two"}]})
    stages = dict(part.strip().split(";dur=") for part in reply.headers["server-timing"].split(","))
    assert {"decode", "image_embed", "text_embed", "queue", "total"} == stages.keys()
    assert all(float(value) >= 0 for value in stages.values())


TWO_PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, image_part(URLS[0])]}]


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        ({}, "invalid_value", "input"),
        ([], "invalid_value", None),
        ({"input": []}, "invalid_value", "input"),
        ({"input": ""}, "invalid_value", "input"),
        ({"input": 5}, "invalid_value", "input"),
        ({"input": [1, 2]}, "invalid_value", "input"),
        ({"input": [[1, 2]]}, "invalid_value", "input"),
        ({"input": ["a", ""]}, "invalid_value", "input[1]"),
        ({"input": ["a", {}]}, "invalid_value", "input[1]"),
        ({"input": [{"text": "a", "image": URLS[0]}]}, "invalid_value", "input[0]"),
        ({"input": [{"txt": "a"}]}, "unsupported_parameter", "input[0].txt"),
        ({"input": "x" * 8193}, "invalid_value", "input"),
        ({"input": ["a"] * 2049}, "invalid_value", "input"),
        ({"input": URLS[:1] * 9, "modality": "image"}, "invalid_value", "input"),
        ({"input": "http://x/a.png", "modality": "image"}, "invalid_image_url", "input"),
        ({"input": "/etc/passwd", "modality": "image"}, "invalid_image_url", "input"),
        ({"input": ["a", {"image": "file:///a"}]}, "invalid_image_url", "input[1]"),
        ({"input": [{"image": "data:;base64,A"}]}, "invalid_base64", "input[0]"),
        ({"input": [{"image": URLS[0]}, {"image": data_url(b"x")}]}, "invalid_image", "input[1]"),
        ({"input": [{"image": data_url(PICTURES[0][:200])}]}, "invalid_image", "input[0]"),
        ({"input": "a", "modality": "audio"}, "invalid_value", "modality"),
        ({"input": "a", "encoding_format": "hex"}, "invalid_value", "encoding_format"),
        ({"input": "a", "dimensions": 8}, "unsupported_parameter", "dimensions"),
        ({"input": "a", "mode": "x"}, "invalid_value", "mode"),
        ({"input": "a", "normalize": 1}, "invalid_value", "normalize"),
        ({"input": "a", "transform": "zoom"}, "invalid_value", "transform"),
        ({"input": "a", "inptu": 1}, "unsupported_parameter", "inptu"),
        ({"input": "a", "model": 5}, "model_not_found", "model"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": TWO_PARTS}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "system", "content": "a"}]}, "invalid_value", "messages[0].role"),
    ],
)
def test_what_cannot_be_embedded(
    served: Served, content: Any, code: str, param: str | None
) -> None:
    status = 404 if code == "model_not_found" else 400
    assert served.ask("/v1/embeddings", content).error == (status, code, param)


def test_the_models_own_dimensions_are_fine(served: Served) -> None:
    assert vectors(served, input="two", dimensions=16, user="me").shape == (1, 16)
