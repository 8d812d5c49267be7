"""How long an answer may be where nobody says, and what rows of ids are padded with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.tasks.chat_decoder import fitting, padding_of


def of(
    room: int = 32768,
    largest: dict[str, int] | None = None,
    files: tuple[str, ...] = (),
    **own: Any,
) -> OpenComponents:
    """Components as far as lengths and padding need them."""
    padding = own.pop("padding_id", None)
    manifest = SimpleNamespace(
        components={"chat_decoder": SimpleNamespace(inputs=())},
        language_model=own | {"max_position_embeddings": room},
        files=dict.fromkeys(files),
        model={"chat": {"padding_id": padding}},
    )
    session = SimpleNamespace(largest=largest or {})
    made: Any = SimpleNamespace(
        artifact=SimpleNamespace(manifest=manifest),
        session=lambda name: session,
    )
    return cast(OpenComponents, made)


@pytest.mark.parametrize(
    ("length", "room", "largest", "most"),
    [
        (100, 32768, {}, 1024),
        (100, 200, {}, 101),
        (200, 200, {}, 1),
        (300, 200, {}, 1),  # which is refused
        (100, 32768, {"past": 300}, 202),
    ],
)
def test_an_answer_fits(length: int, room: int, largest: dict[str, int], most: int) -> None:
    assert fitting(of(room, largest), length) == most


@pytest.mark.parametrize(
    ("length", "most"),
    [(100, 1024), (3329, 768), (3969, 128), (3970, 1024), (5000, 1024)],
)
def test_an_answer_keeps_to_the_positions_of_short_texts(length: int, most: int) -> None:
    """Unless it would be cut short by that."""
    rope = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
    }
    assert fitting(of(131072, **rope), length) == most


@pytest.mark.parametrize(
    ("files", "own", "expected"),
    [
        (("tokenizer.json",), 151643, 151643),
        (("tokenizer.model",), 2, 2),
        (("tokenizer.model",), None, 0),
        ((), None, 0),
        (("tokenizer.json",), None, None),
        (("vocab.json", "merges.txt"), None, None),
    ],
)
def test_padding(files: tuple[str, ...], own: int | None, expected: int | None) -> None:
    assert padding_of(of(files=files, padding_id=own)) == expected
