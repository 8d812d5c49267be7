"""Token ids equal to the original's, and one test per rule that refuses."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import WHOLE

from internvl_edge.errors import ArtifactError, MediaError, UsageError
from internvl_edge.runtime.text.tokenizer import Tokenizer

CORPUS = ("a photo of a red panda", "two dogs on the grass", "eine rote Katze im Wald")
SPECIALS = "<s>", "</s>", "<unk>", "[PAD]"
PUBLISHED = WHOLE.parent / "data" / "tokenizer" / "tokenizer.model"


def train(**options: Any) -> bytes:
    """A small SentencePiece model of the kind that LLaMA's is."""
    file = io.BytesIO()
    given_options = {
        "vocab_size": 310,
        "model_type": "bpe",
        "byte_fallback": True,
        "minloglevel": 2,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "num_threads": 1,
    } | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=file, **given_options
    )
    return file.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return train()


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> Tokenizer:
    return Tokenizer(model)


# --- the original's numbers ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:a text of")
def test_the_tiny_tokenizer_equals_the_original(golden: Path) -> None:
    tiny = Tokenizer(golden / "tiny" / "checkpoint" / "tokenizer.model")
    cases = json.loads((golden / "tiny" / "tokenizer_cases.json").read_text())
    with np.load(golden / "tiny" / "reference.npz") as arrays:
        summarize, caption = arrays["tok.summarize_ids"], arrays["tok.caption_ids"]
    found = tiny.contrastive(cases["texts"], prefix=cases["prefix"])
    np.testing.assert_array_equal(found, summarize)
    np.testing.assert_array_equal(tiny.prompt([cases["prompt"]])[0], caption)


if PUBLISHED.is_file():  # another's work, which the repository does not hold

    @pytest.fixture(scope="module")
    def published() -> Tokenizer:
        return Tokenizer(PUBLISHED)

    @pytest.mark.filterwarnings("ignore:a text of")
    def test_the_published_tokenizer_equals_the_original(published: Tokenizer) -> None:
        cases = json.loads((WHOLE / "tokens.json").read_text())
        texts, ids = zip(*cases["summarize"], strict=True)
        np.testing.assert_array_equal(published.contrastive(texts), ids)
        prompt, expected = cases["caption_prompt"]
        np.testing.assert_array_equal(published.prompt(prompt)[0], [expected])
        facts = cases["facts"]
        assert published.vocab_size == facts["vocab_size"]
        found = published.unk_id, published.bos_id, published.eos_id
        assert found == (facts["unk"], facts["bos"], facts["eos"])

    def test_the_published_pad_piece_is_left_out(published: Tokenizer) -> None:
        ids = published.prompt("a red panda")[0][0].tolist()
        assert published.decode([49953, *ids, 2, 49953, 0]) == "a red panda"

    def test_special_tokens_are_text_to_the_published_model_too(published: Tokenizer) -> None:
        ids = published.match(" ".join(SPECIALS))[0].tolist()
        assert not {0, 1, 2, 49953} & set(ids[1:-1])


# --- what ids are made of ------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


@pytest.mark.filterwarnings("ignore:a text of")
@settings(max_examples=150, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), st.integers(2, 60))
def test_shapes_and_frames(
    model: bytes, tokenizer: Tokenizer, given_texts: list[str], length: int
) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = tokenizer.contrastive(given_texts, length)
    assert ids.shape == (len(given_texts), length) and ids.dtype == np.int64
    for row, text in zip(ids, given_texts, strict=True):
        body = pieces.encode("summarize:" + text)[: length - 2]
        padding = [0] * (length - 2 - len(body))
        assert row.tolist() == [pieces.bos_id(), *body, pieces.eos_id(), *padding]


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4))
def test_padding_to_the_longest_changes_nothing_else(
    tokenizer: Tokenizer, given_texts: list[str]
) -> None:
    full = tokenizer.contrastive(given_texts, 200)
    short = tokenizer.contrastive(given_texts, 200, pad_to="longest")
    np.testing.assert_array_equal(full[:, : short.shape[1]], short)
    assert not full[:, short.shape[1] :].any() and short[:, -1].any()
    matched = tokenizer.match(given_texts, 200, pad_to="max_length")
    np.testing.assert_array_equal(matched, tokenizer.contrastive(given_texts, 200, prefix=""))


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4))
def test_prompts_are_padded_on_the_left(tokenizer: Tokenizer, given_texts: list[str]) -> None:
    ids, mask = tokenizer.prompt(given_texts)
    for row, kept, text in zip(ids, mask, given_texts, strict=True):
        alone, all_ones = tokenizer.prompt(text)
        count = alone.shape[1]
        assert row[-count:].tolist() == alone[0].tolist() and all_ones.all()
        assert kept.tolist() == [0] * (ids.shape[1] - count) + [1] * count
        assert row[-count] == tokenizer.bos_id and tokenizer.eos_id not in row


def test_one_text_is_a_batch_of_one(tokenizer: Tokenizer) -> None:
    np.testing.assert_array_equal(tokenizer.match("a dog"), tokenizer.match(["a dog"]))


def test_an_empty_text_has_a_beginning_and_an_end(tokenizer: Tokenizer) -> None:
    assert tokenizer.match("").tolist() == [[tokenizer.bos_id, tokenizer.eos_id]]


def test_a_long_text_is_cut_with_one_warning(model: bytes) -> None:
    tokenizer, long = Tokenizer(model), "a red panda " * 100
    count = len(tokenizer.prompt("summarize:" + long)[0][0]) + 1
    with pytest.warns(UserWarning) as warned:
        ids = tokenizer.contrastive(["a dog", long, long], 20)
        tokenizer.match([long], 20)
    assert ids[1, -1] == tokenizer.eos_id and ids[1].all()
    (message,) = (str(warning.message) for warning in warned)
    assert message.startswith(f"a text of 1200 characters has {count} tokens, at most 20 are read")


def test_a_long_text_is_refused_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    long = "a red panda " * 100
    for encode in (tokenizer.contrastive, tokenizer.match):
        with pytest.raises(MediaError, match=r"text 2 of 2 .*at most 20 are read; shorten it"):
            encode(["a dog", long], 20, on_long="error")
        with pytest.raises(UsageError, match="on_long must be 'truncate' or 'error', found 'cut'"):
            encode(["a dog"], on_long="cut")  # type: ignore[arg-type]


@pytest.mark.parametrize("special", SPECIALS)
def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer, special: str) -> None:
    text = f"a {special} dog{special}"
    ids = tokenizer.match(text)[0].tolist()
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id} & set(ids[1:-1])
    assert tokenizer.decode(ids) == text


# --- decoding ------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(texts)
def test_decoding_undoes_encoding(tokenizer: Tokenizer, text: str) -> None:
    plain = text.replace("▁", " ")  # SentencePiece's own sign for a space
    ids = tokenizer.contrastive(plain, 400, prefix="")[0]
    assert tokenizer.decode(ids) == plain.strip()
    assert tokenizer.decode(ids.tolist()) == plain.strip()


def test_special_pieces_can_be_shown(tokenizer: Tokenizer) -> None:
    words = tokenizer.prompt("red panda")[0][0].tolist()[1:]
    ids = [tokenizer.bos_id, *words, tokenizer.eos_id, tokenizer.unk_id]
    assert tokenizer.decode(ids) == "red panda"
    # LlamaTokenizer's legacy spacing: one space before a run that a special piece ends.
    assert tokenizer.decode(ids, skip_special=False) == "<s> red panda</s><unk>"
    assert tokenizer.decode(words, skip_special=False) == "red panda"


def test_no_ids_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([]) == "" == tokenizer.decode([], skip_special=False)


def test_bytes_that_are_no_character_do_not_fail(tokenizer: Tokenizer) -> None:
    fox = tokenizer.match("🦊")[0].tolist()[2:-2]  # without <s>, the space, the last byte
    assert tokenizer.decode(fox) == "\ufffd" * 3


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**63 - 1])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(MediaError, match=f"found {wrong} at 1"):
        tokenizer.decode([5, wrong])


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "found NoneType"),
        (b"a dog", "found bytes"),
        ("a\0dog", "found one at 1"),
        ("a \ud800 dog", "lone surrogate at 2"),
        ("x" * 1_000_001, "found 1000001"),
    ],
)
def test_texts_that_cannot_be_encoded_are_refused(
    tokenizer: Tokenizer, text: Any, reason: str
) -> None:
    for encode in (tokenizer.contrastive, tokenizer.match, tokenizer.prompt):
        with pytest.raises(MediaError, match=f"text 2 of 3: .*{reason}"):
            encode(["a dog", text, "a cat"])


@pytest.mark.parametrize("given_texts", [None, 3, [], b"dog", (), {}])
def test_what_is_no_text_is_refused(tokenizer: Tokenizer, given_texts: Any) -> None:
    with pytest.raises(MediaError, match="expected"):
        tokenizer.contrastive(given_texts)


def test_a_length_without_room_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="2 or more"):
        tokenizer.contrastive("a dog", 1)


def test_unknown_padding_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="found 'left'"):
        tokenizer.match("a dog", pad_to="left")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"", "found 0"),
        (lambda data: b"hello", "not a SentencePiece model"),
        (lambda data: data[: len(data) // 2], "not a SentencePiece model"),
        (lambda data: b"\x80\x04K\x01.", "not a SentencePiece model"),
    ],
)
def test_a_corrupt_model_is_refused(tmp_path: Path, model: bytes, change: Any, reason: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(change(model))
    with pytest.raises(ArtifactError, match=rf"tokenizer\.model: .*{reason}"):
        Tokenizer(path)
    with pytest.raises(ArtifactError, match=reason):
        Tokenizer(path.read_bytes())


def test_a_model_truncated_anywhere_is_refused_or_complete(model: bytes) -> None:
    for length in range(0, len(model), 97):
        try:
            ids = Tokenizer(model[:length]).match("a dog")
        except ArtifactError:
            continue
        assert ids.ndim == 2


def test_a_model_above_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)  # sparse
    with pytest.raises(ArtifactError, match="at most 67,108,864 bytes, found 67,108,865"):
        Tokenizer(path)


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(ArtifactError, match="without <s>, </s> or <unk>"):
        Tokenizer(train(eos_id=-1))


def test_a_model_with_words_at_id_0_is_refused() -> None:
    with pytest.raises(ArtifactError, match="id 0 is padding, but here it is '<0x00>'"):
        Tokenizer(train(unk_id=256, bos_id=257, eos_id=258))


def test_a_missing_model_and_a_fifo_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent", "pipe", "."):
        with pytest.raises(ArtifactError, match="; expected a SentencePiece model"):
            Tokenizer(tmp_path / name)
