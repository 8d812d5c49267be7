"""``tokenizer.json``: InternVL's SentencePiece model for Hugging Face's ``tokenizers``.

It gives the ids of ``runtime.text.tokenizer.Tokenizer.contrastive``:

    <s> summarize:TEXT </s> 0 0 ...     right-padded with 0; a long text loses its end, not </s>

SentencePiece joins the two neighbours whose joined piece has the highest score, of equal scores
those furthest left; ``tokenizers`` those whose pair stands first in a list. With distinct scores,
as LLaMA has them, both join in one order: the list is sorted by score. Pieces that were added to a
vocabulary later share a score (Chinese ones in InternVL-14B's), and no list says "furthest left":
texts of such pieces may be split elsewhere. ``differing`` finds some, where there are any.

What else SentencePiece may do to a text, and InternVL's does not, is refused: normalising, pieces
that a user defined, other ways to split than by joining.

No token is listed as an added one: ``</s>`` in a text that somebody typed stays text here too. The
empty text alone gets no prefix: ``tokenizers`` puts nothing in front of nothing.
"""

from __future__ import annotations

import json
import random
from typing import Any

from internvl_edge.errors import CheckpointError
from internvl_edge.files.packages import require
from internvl_edge.runtime.text.padding import PAD_ID
from internvl_edge.runtime.text.tokenizer import MAX_TEXT_LENGTH, PREFIX, SPACE, Tokenizer

__all__ = ["differing", "fast_tokenizer"]

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of pieces
BPE = 2  # how a model splits
MOST, PER_TEXT = 4096, 3  # texts of several pieces, and pieces of each


def fast_tokenizer(model: bytes, name: str) -> dict[str, Any]:
    """Make the JSON values of ``tokenizer.json``.

    Args:
        model: a SentencePiece model.
        name: what to call it in errors.

    Raises:
        CheckpointError: it does to a text what cannot be said there.
        ArtifactError: it is none.
    """
    tokenizer, read = Tokenizer(model, name), _parsed(model)
    _require_sayable(read, name)
    padding, unknown, begin, end = (
        read.pieces[i].piece for i in (PAD_ID, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    )
    return {
        "version": "1.0",
        "truncation": {
            "direction": "Right",
            "max_length": MAX_TEXT_LENGTH,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": PAD_ID,
            "pad_type_id": 0,
            "pad_token": padding,
        },
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE + PREFIX},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _around({begin: tokenizer.bos_id, end: tokenizer.eos_id}),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: i for i, piece in enumerate(read.pieces)},
            "merges": _merges({p.piece: p.score for p in read.pieces if p.type == NORMAL}),
        },
    }


def differing(fast: dict[str, Any], model: bytes) -> list[str]:
    """List texts that get other ids than the runtime's, of some that would show it.

    Args:
        fast: of ``fast_tokenizer``.
        model: that it was made from.

    Raises:
        MissingDependency: ``tokenizers``.
    """
    require("tokenizers")
    from tokenizers import Tokenizer as Fast

    texts = [text for text in _probes(_parsed(model)) if "\0" not in text]
    ours = Tokenizer(model).contrastive(texts)
    theirs = Fast.from_str(json.dumps(fast)).encode_batch(texts)
    return [
        text
        for text, row, other in zip(texts, ours, theirs, strict=True)
        if other.ids != row[: len(other.ids)].tolist() or row[len(other.ids) :].any()
    ]


def _probes(read: Any) -> list[str]:
    """List texts: every piece, several in a row, and two of one score that overlap."""
    pieces = [piece.piece.replace(SPACE, " ") for piece in read.pieces]
    rng = random.Random(0)
    mixed = ["".join(rng.choices(pieces, k=PER_TEXT)) for _ in range(MOST)]
    begins: dict[tuple[float, str], list[str]] = {}
    long = [(p.score, p.piece) for p in read.pieces if p.type == NORMAL and len(p.piece) > 1]
    for score, text in long:
        begins.setdefault((score, text[0]), []).append(text)
    overlapping = [
        (text + other[1:]).replace(SPACE, " ")
        for score, text in long
        for other in begins.get((score, text[-1]), ())
    ]
    return pieces + mixed + rng.sample(overlapping, min(MOST, len(overlapping)))


def _parsed(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as schema

    return schema.ModelProto.FromString(model)  # type: ignore[attr-defined]


def _require_sayable(read: Any, name: str) -> None:
    """Refuse a model that does more than to put a space in front, and to join."""
    rules = read.normalizer_spec
    known = {NORMAL, UNKNOWN, CONTROL, BYTE}
    odd = {
        "splits by another way than joining pairs (BPE)": read.trainer_spec.model_type != BPE,
        "has no byte pieces": not any(piece.type == BYTE for piece in read.pieces),
        "normalises texts": bool(rules.precompiled_charsmap) or rules.remove_extra_whitespaces,
        "puts no space in front of a text": not rules.add_dummy_prefix,
        "keeps spaces as they are": not rules.escape_whitespaces,
        "has user-defined or unused pieces": any(p.type not in known for p in read.pieces),
    }
    for what, is_so in odd.items():
        if is_so:
            raise CheckpointError(
                f"{name}: expected a SentencePiece model as LLaMA's, found one that {what}, which "
                "is not written as tokenizer.json; leave --layout out"
            )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """List the pairs that are joined, the first ones first; of equal scores in the order of ids."""
    splits = ((text, at) for text in scores for at in range(1, len(text)))
    pairs = [(text[:at], text[at:]) for text, at in splits]
    pairs = [(left, right) for left, right in pairs if left in scores and right in scores]
    return sorted(pairs, key=lambda pair: -scores[pair[0] + pair[1]])


def _around(ends: dict[str, int]) -> dict[str, Any]:
    """Say what stands around a text."""
    begin, end = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ends)
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text, end],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 0}}, end],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ends.items()
        },
    }
