"""What a chat checkpoint's files say of its prompts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from support.chat.tokenizers import WRITERS, write_json
from support.checkpoints.family import chat_config, native_config

from internvl_edge.errors import CheckpointError
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import load_config
from internvl_edge.export.config.prompts import (
    KNOWN,
    find_pad_id,
    find_system,
    find_template_name,
    find_token_id,
)
from internvl_edge.runtime.text.templates import NATIVE

UNKNOWN = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


# --- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<IMG_CONTEXT>": 7}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<IMG_CONTEXT>"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 7, "content": "<IMG_CONTEXT>"}]}),
        ("tokenizer.json", {"model": {"vocab": {"<IMG_CONTEXT>": 7}}}),
    ],
)
def test_a_token_is_found_wherever_it_stands(
    tmp_path: Path, name: str, content: dict[str, Any]
) -> None:
    write_json(tmp_path / name, content)
    assert find_token_id(tmp_path, "<IMG_CONTEXT>") == 7
    assert find_token_id(tmp_path, "<img>") is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", [1]),
        ("added_tokens.json", {"<IMG_CONTEXT>": "x"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [7]}),
        ("tokenizer.json", {"added_tokens": [7]}),
        ("tokenizer.json", [7]),
    ],
)
def test_lists_of_tokens_that_are_none(tmp_path: Path, name: str, content: Any) -> None:
    write_json(tmp_path / name, content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        find_token_id(tmp_path, "<IMG_CONTEXT>")


@pytest.mark.parametrize("kind", WRITERS)
def test_padding_has_the_id_of_the_tokenizers_own(tmp_path: Path, kind: str) -> None:
    path = WRITERS[kind](tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    known = {"<unk>": 0, "</s>": 2}
    token = config["pad_token"]
    expected = find_token_id(path, token)
    assert find_pad_id(path) == (known[token] if expected is None else expected)


def test_padding_that_nothing_names(tmp_path: Path) -> None:
    assert find_pad_id(tmp_path) is None
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": {"content": "<pad>"}})
    assert find_pad_id(tmp_path) is None
    write_json(tmp_path / "added_tokens.json", {"<pad>": 9})
    assert find_pad_id(tmp_path) == 9


def test_padding_in_a_broken_vocabulary(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer_config.json", {"pad_token": "<unk>"})
    (tmp_path / "tokenizer.model").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a SentencePiece model"):
        find_pad_id(tmp_path)


# --- the system sentence -------------------------------------------------------------------------


def test_a_system_sentence_that_is_null_is_none(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert find_system({}, path) is None
    assert find_system({"system_message": None}, path) is None
    assert find_system({"system_message": "Be brief."}, path) == "Be brief."
    assert find_system({"system_message": ""}, path) == ""
    with pytest.raises(CheckpointError, match="system_message must be str, found 7"):
        find_system({"system_message": 7}, path)


def load(path: Path, raw: dict[str, Any]) -> ChatConfig:
    path.mkdir(exist_ok=True)
    write_json(path / "config.json", raw)
    chat = load_config(path).chat
    assert chat is not None
    return chat


def test_a_configuration_says_how_it_is_talked_to(tmp_path: Path) -> None:
    raw = chat_config("qwen2", {}, {})
    plain = load(tmp_path / "plain", raw)
    assert (plain.template, plain.system, plain.padding_id) == ("internvl2_5", None, None)
    WRITERS["qwen"](tmp_path / "own")
    own = load(tmp_path / "own", {**raw, "system_message": "Be brief."})
    assert own.system == "Be brief."
    assert own.padding_id == find_token_id(tmp_path / "own", "<|endoftext|>")
    assert ChatConfig.from_json(dataclasses.asdict(own)) == own


def test_a_native_configuration_has_the_template_of_its_file(tmp_path: Path) -> None:
    raw = native_config(chat_config("qwen2", {}, {}), "qwen2")
    assert load(tmp_path, raw).template == ""
    (tmp_path / "chat_template.jinja").write_text(KNOWN, encoding="utf-8")
    assert load(tmp_path, raw).template == NATIVE


@pytest.mark.parametrize("tiles", [0, 41])
def test_tiles_that_no_model_has(tmp_path: Path, tiles: int) -> None:
    raw = {**chat_config("qwen2", {}, {}), "max_dynamic_patch": tiles}
    with pytest.raises(CheckpointError, match="max_dynamic_patch"):
        load(tmp_path, raw)


# --- chat templates ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        KNOWN,
        KNOWN.replace("\\n", "\n"),  # a line break itself
        KNOWN.replace("<IMG_CONTEXT>", "<image>"),  # of the first uploads
        KNOWN.replace("{% ", "\n  {%-  ").replace("'", '"'),
        f"\n{KNOWN}\n",
    ],
)
def test_the_published_chat_template_is_known(tmp_path: Path, text: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
    assert find_template_name(tmp_path) == NATIVE


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
def test_a_chat_template_inside_of_json(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / name, {"chat_template": KNOWN})
    assert find_template_name(tmp_path) == NATIVE


@pytest.mark.parametrize(
    "text",
    [
        UNKNOWN,
        KNOWN.replace("<|im_end|>\\n", "<|im_end|>"),
        KNOWN.replace("<IMG_CONTEXT>\\n", "<IMG_CONTEXT>"),
        KNOWN.replace("{% for message", "{{'<|im_start|>system\\nS<|im_end|>\\n'}}{% for message"),
        "",
    ],
)
def test_others_are_not(tmp_path: Path, text: str) -> None:
    (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
    assert find_template_name(tmp_path) == ""


def test_a_checkpoint_without_a_chat_template(tmp_path: Path) -> None:
    assert find_template_name(tmp_path) == ""


@pytest.mark.parametrize("kind", ["llama", "llama3", "internlm2", "qwen2", "qwen3"])
def test_chat_templates_of_the_family(family: Path, kind: str) -> None:
    assert find_template_name(family / kind / "hf") == NATIVE
