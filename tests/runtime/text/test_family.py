"""Ids and prompts of the golden family and of real vocabularies, exact; the latter skip."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.chat.tokenizers import open_tokenizer, rules, write_json
from support.golden import FAMILY, REAL_TOKENIZERS

from internvl_edge.runtime.text.chat_tokenizer import PLACE, ChatTokenizer, spelled
from internvl_edge.runtime.text.templates import Piece, Turn, conversation, find_template

# Where the original takes a user's text for a control token, on purpose otherwise here.
TYPED = (
    *("im_end", "im_start", "endoftext", "bos", "img", "boxes", "unused", "phi", "think"),
    *("tool", "vision_pads", "llama3"),
)
CHATML = find_template("Hermes-2")

needs_real = pytest.mark.skipif(not REAL_TOKENIZERS.is_dir(), reason="needs real vocabularies")


@cache
def cases(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def ids_of(tokenizer: ChatTokenizer, text: str, *, is_template: bool) -> list[int]:
    """Ids without the prompt's beginning."""
    begin = len(tokenizer.encode([], [], CHATML))
    return tokenizer.encode([Piece(text=text, is_template=is_template)], [], CHATML)[begin:]


def check_texts(tokenizer: ChatTokenizer, texts: dict[str, Any], key: str) -> None:
    for name, case in texts.items():
        expected = case.get(key, case["ids"])
        assert ids_of(tokenizer, case["text"], is_template=True) == expected, name
        typed = ids_of(tokenizer, case["text"], is_template=False)
        if name not in TYPED:
            assert typed == expected, name
        barred = set(tokenizer.ids.values()) - {tokenizer.id_of("<unk>")}
        assert not barred & set(typed), name


def prompt_of(case: dict[str, Any], template: str) -> list[Piece]:
    turns = [Turn(question=question, answer=answer) for question, answer in case["turns"]]
    return conversation(find_template(template), turns, case["system"])


def check_prompt(tokenizer: ChatTokenizer, case: dict[str, Any], template: str, per: int) -> None:
    pieces, chosen = prompt_of(case, template), find_template(template)
    places = [tiles * per for tiles in case["tiles"]]
    place = tokenizer.ids["<IMG_CONTEXT>"]
    ids = [place if i == PLACE else i for i in tokenizer.encode(pieces, places, chosen)]
    assert ids == case["ids"]
    if "prompt" in case:
        assert spelled(pieces, places, chosen) == case["prompt"]
    assert tokenizer.ids[chosen.stop] == case["eos"]


@pytest.mark.parametrize("layout", ["chat", "hf"])
@pytest.mark.parametrize("kind", FAMILY)
def test_ids_of_the_family(family: Path, kind: str, layout: str) -> None:
    tokenizer = open_tokenizer(family / kind / layout, fast_first=layout == "hf")
    texts = cases(family / kind / "tokenizer_cases.json")["cases"]
    check_texts(tokenizer, texts, "hf_ids" if layout == "hf" else "ids")


@pytest.mark.parametrize("kind", FAMILY)
def test_prompts_of_the_family(family: Path, kind: str) -> None:
    tokenizer = open_tokenizer(family / kind / "chat")
    told = cases(family / kind / "prompt_cases.json")
    asked = {name: case for name, case in told["cases"].items() if name != "one_image_implicit"}
    for case in asked.values():
        check_prompt(tokenizer, case, told["template"], told["tokens_per_tile"])


# --- real vocabularies ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of the real vocabularies, each with the tokens that its release added."""
    with gzip.open(REAL_TOKENIZERS / "qwen3_tokenizer.json.gz") as file:
        raw = json.load(file)
    directories = {}
    for name, model in cases(REAL_TOKENIZERS / "real_cases.json")["models"].items():
        path = tmp_path_factory.mktemp("real") / "checkpoint"
        path.mkdir()
        kept = {token["content"]: token for token in raw["added_tokens"]}
        if "<|endoftext|>" not in model["added"]:  # InternLM2
            data = (REAL_TOKENIZERS / "internlm2_tokenizer.model").read_bytes()
            (path / "tokenizer.model").write_bytes(data)
            write_json(path / "added_tokens.json", model["added"])
        else:
            added = [{**kept.get(text, rules(text)), "id": i} for text, i in model["added"].items()]
            write_json(path / "tokenizer.json", {**raw, "added_tokens": added})
        directories[name] = path
    return directories


@pytest.mark.slow
@needs_real
def test_ids_of_real_vocabularies(real: dict[str, Path]) -> None:
    models = cases(REAL_TOKENIZERS / "real_cases.json")["models"]
    for name, model in models.items():
        tokenizer = open_tokenizer(real[name])
        check_texts(tokenizer, model["tokens"], "ids")
        for title, case in model["prompts"].items():
            if title == "one_image_implicit":
                continue
            ids: list[int] = []
            for one in case["ids"]:
                ids += [one] if isinstance(one, int) else [one["id"]] * one["times"]
            folded = {"eos": tokenizer.ids["<|im_end|>"], **case, "ids": ids}
            check_prompt(tokenizer, folded, model["template"], 256)
