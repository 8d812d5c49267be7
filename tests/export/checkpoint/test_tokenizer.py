"""The tokenizer of a checkpoint: which files are passed on, and what is refused before any work."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.chat.tokenizers import WRITERS, open_tokenizer, write_json

from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.side_files import check_side_files, passed_on
from internvl_edge.export.checkpoint.tokenizer import check_tokenizer, has_vocabulary
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import CheckpointConfig, VisionConfig
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.files import packages

STOPS = {"phi3": "phi3-chat"}


def config_for(path: Path, rows: int | None = None, **chat: Any) -> CheckpointConfig:
    """The configuration that the tokenizer in a folder belongs to."""
    tokenizer = open_tokenizer(path)
    size = max(tokenizer.ids.values()) + 1 if rows is None else rows
    named = {"template": "Hermes-2", "image_token_id": tokenizer.ids["<IMG_CONTEXT>"], **chat}
    return CheckpointConfig(
        kind="chat",
        vision=VisionConfig(),
        chat=ChatConfig(llama=LanguageConfig(vocab_size=size), **named),
    )


@pytest.fixture(params=WRITERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(kind: str, tmp_path: Path) -> Path:
    return WRITERS[kind](tmp_path)


# --- passed on -----------------------------------------------------------------------------------


def test_one_vocabulary_is_passed_on(tmp_path: Path) -> None:
    WRITERS["qwen in two files"](tmp_path)
    two = passed_on(tmp_path, config_for(tmp_path))
    assert {"vocab.json", "merges.txt"} <= set(two)
    assert not {"tokenizer.json", "tokenizer.model"} & set(two)
    WRITERS["qwen"](tmp_path)
    one = passed_on(tmp_path, config_for(tmp_path))
    assert "tokenizer.json" in one
    assert not {"vocab.json", "merges.txt"} & set(one)


def test_the_layout_chooses_the_vocabulary(tmp_path: Path) -> None:
    """*-hf was made with the fast tokenizer, also where SentencePiece's file lies next to it."""
    config = config_for(WRITERS["phi3"](tmp_path), template="phi3-chat")
    native = config_for(tmp_path, layout="internvl_hf", template="")
    assert "tokenizer.model" in passed_on(tmp_path, native)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "tokenizer.model" in passed_on(tmp_path, config)
    assert "tokenizer.json" in passed_on(tmp_path, native)
    assert "tokenizer.model" not in passed_on(tmp_path, native)


def test_models_that_are_no_chat_read_sentencepiece(tmp_path: Path) -> None:
    config = CheckpointConfig(kind="vit", vision=VisionConfig())
    names = passed_on(tmp_path, config)
    assert "tokenizer.model" in names
    assert "tokenizer.json" not in names
    assert not has_vocabulary(tmp_path, config)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    assert has_vocabulary(tmp_path, config)


def test_a_checkpoint_without_a_tokenizer_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(WRITERS["qwen"](tmp_path / "other"))
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.WARNING):
        check_side_files(tmp_path / "empty", config, ["chat_decoder"])
    assert "has no tokenizer files: chat_decoder will take token ids only" in caplog.text


# --- of another model ----------------------------------------------------------------------------


def test_every_kind_is_accepted(kind: str, path: Path) -> None:
    check_tokenizer(path, config_for(path, template=STOPS.get(kind, "Hermes-2")))


def test_ids_beyond_the_embedding(kind: str, path: Path) -> None:
    template = STOPS.get(kind, "Hermes-2")
    size = max(open_tokenizer(path).ids.values()) + 1
    with pytest.raises(
        CheckpointError, match=rf"ids below {size - 1}, .* found {size - 1}; the to"
    ):
        check_tokenizer(path, config_for(path, size - 1, template=template))


def test_pieces_beyond_the_embedding(tmp_path: Path) -> None:
    path = WRITERS["yi"](tmp_path)
    config = config_for(path, 300, image_token_id=None)
    write_json(path / "added_tokens.json", {})
    with pytest.raises(CheckpointError, match="ids below 300, the rows of the embedding, found 4"):
        check_tokenizer(path, config)


def test_the_place_of_a_video_has_no_row(tmp_path: Path) -> None:
    """In -hf files of InternVL2.5 and 3 the id of <video> is the vocabulary's size."""
    config = config_for(WRITERS["qwen"](tmp_path))
    assert config.chat is not None
    assert config.chat.llama is not None
    write_json(tmp_path / "added_tokens.json", {"<video>": config.chat.llama.vocab_size})
    check_tokenizer(tmp_path, config)


def test_another_id_of_image_tokens(kind: str, path: Path) -> None:
    template = STOPS.get(kind, "Hermes-2")
    with pytest.raises(CheckpointError, match="expected <IMG_CONTEXT> as id 5, found"):
        check_tokenizer(path, config_for(path, template=template, image_token_id=5))


def test_a_tokenizer_without_image_tokens(tmp_path: Path) -> None:
    path = WRITERS["yi"](tmp_path)
    config = config_for(path)
    write_json(path / "added_tokens.json", {})
    with pytest.raises(CheckpointError, match="expected <IMG_CONTEXT> among its tokens, found no"):
        check_tokenizer(path, config)


def test_a_tokenizer_without_the_end_of_an_answer(tmp_path: Path) -> None:
    path = WRITERS["qwen"](tmp_path)
    with pytest.raises(CheckpointError, match=r"expected <\|end\|> among its tokens, which ends"):
        check_tokenizer(path, config_for(path, template="phi3-chat"))


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    path = WRITERS["qwen"](tmp_path)
    config = config_for(path)
    write_json(path / "added_tokens.json", {"<img>": 1})
    with pytest.raises(CheckpointError, match="another tokenizer file says"):
        check_tokenizer(path, config)


def test_a_vocabulary_that_is_none(tmp_path: Path) -> None:
    path = WRITERS["qwen"](tmp_path)
    config = config_for(path)
    raw = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(path / "tokenizer.json", {**raw, "model": {"type": "WordPiece"}})
    with pytest.raises(CheckpointError, match="expected a BPE vocabulary, found WordPiece"):
        check_tokenizer(path, config)


def test_without_the_package_nothing_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = WRITERS["qwen"](tmp_path)
    config = config_for(path, image_token_id=5)
    monkeypatch.setattr(packages, "is_installed", lambda module: module != "tokenizers")
    with caplog.at_level(logging.WARNING):
        check_tokenizer(path, config)
    assert "the tokenizer is passed on unchecked" in caplog.text
    assert "internvl-edge[chat]" in caplog.text
