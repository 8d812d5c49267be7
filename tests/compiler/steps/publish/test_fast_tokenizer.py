"""``tokenizer.json`` compared with the SentencePiece model that it was made from."""

from __future__ import annotations

import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as schema
from support.chat.tokenizers import sentencepiece_model
from tokenizers import Tokenizer as Fast

from internvl_edge.compiler.plan import demo_checkpoint
from internvl_edge.compiler.steps.publish.fast_tokenizer import differing, fast_tokenizer
from internvl_edge.errors import CheckpointError
from internvl_edge.runtime.text.tokenizer import Tokenizer

DEMO = (demo_checkpoint() / "tokenizer.model").read_bytes()
SMALL = sentencepiece_model(pad_id=-1)
OURS = {"demo": Tokenizer(DEMO), "small": Tokenizer(SMALL)}
THEIRS = {
    name: Fast.from_str(json.dumps(fast_tokenizer(model, name)))
    for name, model in (("demo", DEMO), ("small", SMALL))
}
words = st.sampled_from(
    ["a red seven", "left of", " ", "  ", "</s>", "<s>", "<unk>", "[PAD]", "▁", "é", "日本", "🙂"]
)
texts = st.one_of(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), words)


@pytest.mark.parametrize("name", ["demo", "small"])
@given(st.lists(texts, min_size=1, max_size=4).map("".join).filter(bool))
def test_ids_are_those_of_sentencepiece(name: str, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a text may be too long
        (row,) = OURS[name].contrastive(text, pad_to="longest")
    assert THEIRS[name].encode(text).ids == row.tolist()


def test_rows_are_padded_and_cut_off_as_ours() -> None:
    given_texts = ["a red seven", "a blue three left of a green two", "one " * 100]
    with pytest.warns(UserWarning, match="is cut off"):
        ours = Tokenizer(DEMO).contrastive(given_texts)
    rows = THEIRS["demo"].encode_batch(given_texts)
    assert [row.ids for row in rows] == ours.tolist()
    assert [sum(row.attention_mask) for row in rows] == (ours > 0).sum(axis=1).tolist()


def test_the_empty_text_alone_has_no_prefix() -> None:
    assert THEIRS["demo"].encode("").ids == [1, 2]


def test_ids_are_turned_back_into_text() -> None:
    ids = THEIRS["demo"].encode("a red  seven, é").ids[1:-1]
    assert THEIRS["demo"].decode(ids) == "summarize:a red  seven, é"


@pytest.mark.parametrize("model", [DEMO, SMALL])
def test_no_text_differs_where_scores_are_distinct(model: bytes) -> None:
    assert differing(fast_tokenizer(model, "m"), model) == []


def test_texts_that_differ_are_found_where_scores_are_shared() -> None:
    """Pieces that were added to a vocabulary: of equal scores the one furthest left wins."""
    read = schema.ModelProto.FromString(DEMO)
    for text, score in {"中": -300, "国": -301, "人": -302, "国人": 0, "中国": 0}.items():
        read.pieces.add(piece=text, score=score, type=1)
    model = read.SerializeToString()
    found = differing(fast_tokenizer(model, "m"), model)
    assert found
    assert all("中国人" in text for text in found)


def changed(**options: object) -> bytes:
    """The demo's model with other settings of its normaliser or of how it was trained."""
    read = schema.ModelProto.FromString(DEMO)
    for name, value in options.items():
        where = read.trainer_spec if name == "model_type" else read.normalizer_spec
        setattr(where, name, value)
    return read.SerializeToString()


def with_piece(kind: int) -> bytes:
    read = schema.ModelProto.FromString(DEMO)
    read.pieces.add(piece="<|new|>", score=0.0, type=kind)
    return read.SerializeToString()


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (sentencepiece_model(model_type="unigram", pad_id=-1), "joining pairs"),
        (sentencepiece_model(byte_fallback=False, pad_id=-1), "has no byte pieces"),
        (changed(remove_extra_whitespaces=True), "normalises texts"),
        (sentencepiece_model(normalization_rule_name="nfkc", pad_id=-1), "normalises texts"),
        (changed(add_dummy_prefix=False), "puts no space in front"),
        (changed(escape_whitespaces=False), "keeps spaces as they are"),
        (with_piece(4), "user-defined or unused"),
        (with_piece(5), "user-defined or unused"),
    ],
)
def test_what_cannot_be_said_is_refused(model: bytes, what: str) -> None:
    with pytest.raises(CheckpointError, match=f"folder/tokenizer.model.*{what}.*--layout"):
        fast_tokenizer(model, "folder/tokenizer.model")
