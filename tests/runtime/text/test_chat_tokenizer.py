"""Every kind of tokenizer of the family: control tokens, what users type, decoding, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat import tokenizers
from support.chat.tokenizers import IMAGE_TOKENS, WRITERS, open_tokenizer, write_json

from internvl_edge.errors import ArtifactError, MissingDependency
from internvl_edge.files import packages
from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.runtime.generation.text import TextStream
from internvl_edge.runtime.text.chat_tokenizer import PLACE, ChatTokenizer, spelled
from internvl_edge.runtime.text.templates import Piece, Turn, conversation, find_template
from internvl_edge.runtime.text.token_files import read_token_files

CHATML = find_template("Hermes-2")
TEXTS = ("a red panda", " two  cats\n\n", "请详细描述", "don't 42", "😀", "é", "x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module", params=WRITERS)
def directory(request: pytest.FixtureRequest, folder: Path) -> Path:
    return WRITERS[request.param](folder / request.param.replace(" ", "_"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> ChatTokenizer:
    return open_tokenizer(directory)


def typed(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Ids of a user's text, after a control token."""
    before = [Piece(text="<img>", is_template=True)]
    ids = tokenizer.encode([*before, Piece(text=text, is_template=False)], [], CHATML)
    return ids[ids.index(tokenizer.ids["<img>"]) + 1 :]


def written(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """Ids of a template's text."""
    return tokenizer.encode([Piece(text=text, is_template=True)], [], CHATML)


# --- what a user types ---------------------------------------------------------------------------


def test_control_tokens_that_a_user_types_are_text(tokenizer: ChatTokenizer) -> None:
    for token in tokenizer.ids:
        ids = typed(tokenizer, f"a {token}b")
        assert not set(ids) & set(tokenizer.ids.values()), token
        assert tokenizer.decode(ids) == f"a {token}b"


def test_control_tokens_of_the_template_are_ids(tokenizer: ChatTokenizer) -> None:
    for token, i in tokenizer.ids.items():
        assert i in written(tokenizer, f"a{token}b"), token


def test_user_defined_pieces_are_control_tokens(folder: Path) -> None:
    """In InternLM2's model [UNUSED_TOKEN_145] is another name of <|im_end|>."""
    internlm2 = open_tokenizer(WRITERS["internlm2"](folder / "pieces"))
    assert internlm2.ids["[UNUSED_TOKEN_145]"] == internlm2.ids["<|im_end|>"]
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "pieces" / "tokenizer.model")
    )
    assert pieces.encode("[UNUSED_TOKEN_145]") == [internlm2.ids["<|im_end|>"]]


@pytest.mark.parametrize("config", [{}, {"legacy": False}])
def test_added_tokens_that_are_ordinary_pieces(tmp_path: Path, config: dict[str, Any]) -> None:
    data = tokenizers.sentencepiece_model()
    (tmp_path / "tokenizer.model").write_bytes(data)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    (piece,) = pieces.encode("the")
    assert pieces.id_to_piece(piece) == "▁the"
    write_json(tmp_path / "added_tokens.json", {"▁the": piece, "<img>": 500})
    write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = open_tokenizer(tmp_path)
    for text in ("the dog is on the grass", "the", " the"):
        ids = typed(tokenizer, text)
        assert piece not in ids
        assert tokenizer.decode(ids) == text.strip()
    assert written(tokenizer, "a▁the")[-1] == piece


def test_user_defined_white_space_stays_text(tmp_path: Path) -> None:
    data = tokenizers.sentencepiece_model(user_defined_symbols=["▁▁", "\n\n", "<x>"])
    (tmp_path / "tokenizer.model").write_bytes(data)
    plain = sentencepiece.SentencePieceProcessor(model_proto=data)
    write_json(tmp_path / "added_tokens.json", {"<img>": 500})
    tokenizer = open_tokenizer(tmp_path)
    for text in ("a   b\n\nc", "\n\n"):
        assert typed(tokenizer, text) == plain.encode(text)
    assert plain.piece_to_id("<x>") not in typed(tokenizer, "a<x>b")


def test_a_vocabulary_that_spells_its_control_tokens(tmp_path: Path) -> None:
    """Fast twins of SentencePiece models have them among their pieces; here merges build one."""
    raw = tokenizers.byte_level([])
    vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
    for left, right in (("<", "|"), ("<|", "x"), ("<|x", "|"), ("<|x|", ">")):
        vocab[left + right] = len(vocab)
        merges.append([left, right])
    raw["pre_tokenizer"]["pretokenizers"].pop(0)  # the whole text is one word
    token = {**tokenizers.rules("<|x|>"), "id": vocab["<|x|>"]}
    write_json(tmp_path / "tokenizer.json", {**raw, "added_tokens": [token]})
    write_json(tmp_path / "added_tokens.json", {"<img>": len(vocab)})
    tokenizer = open_tokenizer(tmp_path)
    assert vocab["<|x|>"] not in typed(tokenizer, "a<|x|>b")
    assert tokenizer.decode(typed(tokenizer, "a<|x|>b")) == "a<|x|>b"
    assert vocab["<|x|>"] in written(tokenizer, "a<|x|>b")


@pytest.fixture(scope="module")
def all_tokenizers(folder: Path) -> dict[str, ChatTokenizer]:
    return {name: open_tokenizer(write(folder / f"all {name}")) for name, write in WRITERS.items()}


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_text_names_a_control_token(
    all_tokenizers: dict[str, ChatTokenizer], data: st.DataObject
) -> None:
    tokenizer = all_tokenizers[data.draw(st.sampled_from(sorted(WRITERS)))]
    tokens = st.sampled_from(sorted(tokenizer.ids))
    halves = tokens.map(lambda token: token[: len(token) // 2])
    part = st.one_of(tokens, halves, st.sampled_from(TEXTS), st.text(max_size=4))
    text = "".join(data.draw(st.lists(part, max_size=6)))
    ids = typed(tokenizer, text)
    barred = set(tokenizer.ids.values()) - {tokenizer.id_of("<unk>")}
    assert not barred & set(ids)


# --- runs and places -----------------------------------------------------------------------------


def test_places_of_images(tokenizer: ChatTokenizer) -> None:
    pieces = [Piece(text="<image>\nand <image>", is_template=False, has_images=True)]
    ids = tokenizer.encode(pieces, [2, 1], CHATML)
    start, end = tokenizer.ids["<img>"], tokenizer.ids["</img>"]
    assert ids.count(PLACE) == 3
    at = ids.index(start)
    assert ids[at : at + 4] == [start, PLACE, PLACE, end]
    assert ids[-3:] == [start, PLACE, end]
    text = "<img><IMG_CONTEXT><IMG_CONTEXT></img>\nand <img><IMG_CONTEXT></img>"
    assert spelled(pieces, [2, 1], CHATML) == text


def test_white_space_after_phis_roles_vanishes(all_tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = all_tokenizers["phi3"]
    tight, loose = (
        [Piece(text="<|user|>\n", is_template=True), Piece(text=text, is_template=False)]
        for text in ("hi", " \t\nhi")
    )
    assert tokenizer.encode(tight, [], CHATML) == tokenizer.encode(loose, [], CHATML)
    assert typed(tokenizer, "hi") != typed(tokenizer, " hi")  # <img> eats none


def test_phi_begins_with_a_lone_space(all_tokenizers: dict[str, ChatTokenizer]) -> None:
    """Unless the first token has a role in special_tokens_map, as <img> has."""
    tokenizer = all_tokenizers["phi3"]
    bos, lone = tokenizer.ids["<s>"], tokenizer.id_of("▁")
    assert written(tokenizer, "<|system|>\na")[:3] == [bos, lone, tokenizer.ids["<|system|>"]]
    assert written(tokenizer, "<img>")[:2] == [bos, tokenizer.ids["<img>"]]
    assert tokenizer.decode(written(tokenizer, "red")) == "red"


def test_only_the_first_run_gets_a_space_without_legacy(tmp_path: Path) -> None:
    data = tokenizers.sentencepiece_model()
    (tmp_path / "tokenizer.model").write_bytes(data)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    write_json(tmp_path / "added_tokens.json", {"<|im_end|>": 500})
    for legacy in (True, False):
        write_json(tmp_path / "tokenizer_config.json", {"legacy": legacy, "add_bos_token": False})
        ids = written(open_tokenizer(tmp_path), "red<|im_end|>red")
        first, second = ids[: ids.index(500)], ids[ids.index(500) + 1 :]
        assert first == pieces.encode("red")
        spelling = "".join(pieces.id_to_piece(i) for i in second)
        assert spelling == ("▁red" if legacy else "red")


@pytest.mark.parametrize("name", ["InternLM2Tokenizer", "InternLM3Tokenizer"])
@pytest.mark.parametrize("legacy", [True, False])
def test_classes_that_leave_spaces_to_the_model(tmp_path: Path, name: str, legacy: bool) -> None:
    """They split at control tokens and give SentencePiece every run as it is."""
    WRITERS["internlm3"](tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": name, "legacy": legacy}
    write_json(tmp_path / "tokenizer_config.json", config)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    start, end = (pieces.piece_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    expected = [1, start, *pieces.encode("user\na red panda"), end, *pieces.encode("\n")]
    tokenizer = open_tokenizer(tmp_path)
    assert written(tokenizer, "<|im_start|>user\na red panda<|im_end|>\n") == expected


def test_thoughts_are_tokens_in_answers_and_systems(
    all_tokenizers: dict[str, ChatTokenizer],
) -> None:
    tokenizer = all_tokenizers["qwen"]
    think = tokenizer.ids["<think>"]
    turns = [Turn(question="<think>", answer="<think>\nhm\n</think>\n\nyes <|im_end|>")]
    prompt = conversation(CHATML, [*turns, Turn(question="why")], "between <think> and </think>")
    ids = tokenizer.encode(prompt, [], CHATML)
    assert ids.count(think) == 2
    assert ids.count(tokenizer.ids["<|im_end|>"]) == 4  # the template's


# --- decoding ------------------------------------------------------------------------------------


def test_texts_survive(tokenizer: ChatTokenizer) -> None:
    for text in TEXTS:
        assert tokenizer.decode(typed(tokenizer, text)) == text.strip()


def test_ids_without_a_token_say_nothing(tokenizer: ChatTokenizer) -> None:
    ids = typed(tokenizer, "a red panda")
    far = [max(tokenizer.ids.values()) + 1000, PLACE]
    assert tokenizer.decode([*far, *ids, *far]) == "a red panda"
    ends = [tokenizer.ids["</img>"], tokenizer.ids["<IMG_CONTEXT>"]]
    assert tokenizer.decode([*ends, *ids, *ends]) == "a red panda"


def test_tokens_that_are_not_special_are_spelled(all_tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = all_tokenizers["qwen"]
    think = [tokenizer.ids[token] for token in ("<think>", "</think>")]
    ids = [think[0], *typed(tokenizer, "hm"), think[1], *typed(tokenizer, "\n\nyes")]
    assert tokenizer.decode(ids) == "<think>hm</think>\n\nyes"


@pytest.mark.parametrize("text", ["两只猫😀 and  more\n\nlines", "👩\u200d👧 é", "!", "\u00a0x"])
def test_streaming_gives_the_whole_text(tokenizer: ChatTokenizer, text: str) -> None:
    """A character whose bytes are several tokens comes when it is whole."""
    ids = typed(tokenizer, text)
    tokens = (np.array([i]) for i in [*ids, 10_000])
    parts = list(TextStream(tokens, Generation(stop_ids=(10_000,)), tokenizer.decode, 0))
    assert "".join(parts) == tokenizer.decode(ids) == text.strip()
    assert "\ufffd" not in "".join(parts)
    assert all(parts)


# --- padding and beginnings ----------------------------------------------------------------------


def test_padding_is_the_tokenizers(directory: Path, tokenizer: ChatTokenizer) -> None:
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer.pad_id == tokenizer.id_of(config["pad_token"])


def test_zero_is_a_letter_in_byte_level_vocabularies(
    all_tokenizers: dict[str, ChatTokenizer],
) -> None:
    tokenizer = all_tokenizers["qwen"]
    assert typed(tokenizer, "!") == [0]
    assert tokenizer.decode([0, 0]) == "!!"
    assert tokenizer.pad_id != 0


@pytest.mark.parametrize(
    ("name", "bos"),
    [("internlm2", "<s>"), ("phi3", "<s>"), ("llama3", "<|begin_of_text|>")],
)
def test_prompts_begin(all_tokenizers: dict[str, ChatTokenizer], name: str, bos: str) -> None:
    tokenizer = all_tokenizers[name]
    assert written(tokenizer, "a")[0] == tokenizer.ids[bos]


@pytest.mark.parametrize("name", ["yi", "qwen", "qwen in two files"])
def test_prompts_that_do_not(all_tokenizers: dict[str, ChatTokenizer], name: str) -> None:
    tokenizer = all_tokenizers[name]
    assert written(tokenizer, "<img>")[0] == tokenizer.ids["<img>"]


def test_one_vocabulary_in_one_file_and_in_two(all_tokenizers: dict[str, ChatTokenizer]) -> None:
    one, two = all_tokenizers["qwen"], all_tokenizers["qwen in two files"]
    assert one.ids == two.ids
    for text in TEXTS:
        assert typed(one, text) == typed(two, text)


def test_merges_are_strings_or_pairs(tmp_path: Path) -> None:
    raw = json.loads((WRITERS["qwen"](tmp_path) / "tokenizer.json").read_text(encoding="utf-8"))
    pairs = open_tokenizer(tmp_path)
    assert isinstance(raw["model"]["merges"][0], list)
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    write_json(tmp_path / "tokenizer.json", raw)
    for text in TEXTS:
        assert typed(open_tokenizer(tmp_path), text) == typed(pairs, text)


def test_nothing_that_downloads_is_imported(folder: Path) -> None:
    path = WRITERS["qwen"](folder / "imports")
    code = (
        "import sys; from pathlib import Path; from support.chat.tokenizers import open_tokenizer\n"
        f"open_tokenizer(Path({str(path)!r}))\n"
        "print([m for m in ('huggingface_hub', 'httpx', 'requests', 'transformers')"
        " if m in sys.modules], 'tokenizers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=path,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.split() == ["[]", "True"]


# --- refused -------------------------------------------------------------------------------------


def test_tokenizers_is_an_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = WRITERS["qwen"](folder / "extra")
    monkeypatch.setattr(packages, "is_installed", lambda module: module != "tokenizers")
    with pytest.raises(MissingDependency, match=r'tokenizers .*"internvl-edge\[chat\]"'):
        open_tokenizer(path)


def test_files_of_two_models(tmp_path: Path) -> None:
    path = WRITERS["qwen"](tmp_path)
    write_json(path / "added_tokens.json", {"<IMG_CONTEXT>": 5})
    with pytest.raises(ArtifactError, match=r"'<IMG_CONTEXT>' has id 5, .* files of one model"):
        open_tokenizer(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokenizer.json", {"model": {"type": "Unigram"}}, "expected a BPE vocabulary, .* Unigram"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, r"tokenizer\.json: not a tokenizer"),
        ("tokenizer.json", {}, "expected a BPE vocabulary, found None"),
        ("tokenizer.json", [], "expected one JSON object, found list"),
        ("tokenizer.json", {"added_tokens": [7]}, "expected added tokens and their ids, found 7"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "expected added tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added token"),
        ("added_tokens.json", {"a": -1}, "expected added tokens and their ids"),
    ],
)
def test_files_that_are_not_what_they_say(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    WRITERS["qwen"](tmp_path)
    write_json(tmp_path / name, value)
    with pytest.raises(ArtifactError, match=message):
        open_tokenizer(tmp_path)


def test_a_vocabulary_without_its_merges(folder: Path) -> None:
    path = WRITERS["qwen in two files"](folder / "no merges")
    (path / "merges.txt").unlink()
    with pytest.raises(ArtifactError, match=r"vocab\.json: expected merges\.txt with it"):
        open_tokenizer(path)


def test_merges_of_three(folder: Path) -> None:
    path = WRITERS["qwen in two files"](folder / "three")
    (path / "merges.txt").write_text("a b c\n")
    with pytest.raises(ArtifactError, match=r"merges\.txt: expected two pieces a line, .*'a b c'"):
        open_tokenizer(path)


def test_two_files_of_a_class_whose_rules_are_unknown(folder: Path) -> None:
    path = WRITERS["qwen in two files"](folder / "gpt2")
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    with pytest.raises(ArtifactError, match=r"expected tokenizer_class Qwen2Tokenizer, .* GPT2"):
        open_tokenizer(path)


def test_a_post_processor_without_its_tokens(tmp_path: Path) -> None:
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}]
    broken = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    WRITERS["qwen"](tmp_path, post_processor=broken)
    with pytest.raises(ArtifactError, match="expected a template with its special tokens"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"\x0a", b"\x08\x01", b"\x0a\x7f\x0a", b"\xff" * 20, b""])
def test_sentencepiece_models_that_are_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"tokenizer\.model"):
        open_tokenizer(tmp_path)


def test_directories_without_a_vocabulary() -> None:
    assert read_token_files(lambda name: None) is None


def test_which_vocabulary_is_read(tmp_path: Path) -> None:
    """SentencePiece, unless the class or the layout says that the fast one made the ids."""
    WRITERS["qwen"](WRITERS["phi3"](tmp_path))
    for name, fast_first, kind in (
        ("LlamaTokenizer", False, "tokenizer.model"),
        ("LlamaTokenizer", True, "tokenizer.json"),
        ("PreTrainedTokenizerFast", False, "tokenizer.json"),
    ):
        write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": name})
        assert tokenizers.token_files(tmp_path, fast_first=fast_first).kind == kind


def test_the_nine_image_tokens_are_known(tokenizer: ChatTokenizer) -> None:
    assert all(token in tokenizer.ids for token in IMAGE_TOKENS)
