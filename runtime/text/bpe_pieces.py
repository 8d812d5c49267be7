"""Text to the ids of a BPE vocabulary through Hugging Face's ``tokenizers``, and back.

Read from ``tokenizer.json``, or made from ``vocab.json`` and ``merges.txt`` by the rules of the
Qwen kind: NFC, split by ``QWEN_PATTERN``, GPT-2's characters for bytes, merges by rank.

A text never turns into a control token: the library is given the vocabulary without added tokens
but those of white space alone, which are text. Where the vocabulary itself spells a control token,
as the fast twins of SentencePiece models do, and merges would build it, the text is encoded
character by character.

``tokenizers`` (extra ``chat``) declares packages that download; loading from a string, as here,
imports none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from internvl_edge.errors import ArtifactError
from internvl_edge.files.packages import require
from internvl_edge.files.reading import read_file
from internvl_edge.runtime.text.token_files import (
    FAST,
    MAX_NBYTES,
    TokenFiles,
    read_json_file,
)

__all__ = ["QWEN_PATTERN", "BpePieces"]

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "None")
FIRST, NEVER = "first", "never"  # when Metaspace puts a space before a run


class BpePieces:
    """A BPE vocabulary whose control tokens no text can name.

    Args:
        files: of a directory, its vocabulary a ``tokenizer.json`` or a ``vocab.json``.

    Raises:
        ArtifactError: it is no BPE vocabulary.
        MissingDependency: ``tokenizers`` is not installed.
    """

    def __init__(self, files: TokenFiles) -> None:
        require("tokenizers")
        self._where = files.vocabulary
        raw = dict(files.fast) if files.fast is not None else _qwen(files)
        if _type_of(raw.get("model")) != "BPE":
            raise ArtifactError(
                f"{files.vocabulary}: expected a BPE vocabulary, found {_type_of(raw.get('model'))}"
            )
        try:
            self.begin = _begin(raw.get("post_processor"), files)
        except (AttributeError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{files.vocabulary}: expected a template with its special tokens as "
                f"post_processor: {error!r}"
            ) from error
        listed = raw.get("added_tokens") or []
        white = [token for token in listed if not str(token.get("content")).strip()]
        self._raw = {
            **raw,
            "added_tokens": white,
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        self._all = _load(self._raw, str(files.vocabulary))
        self.size: int = 1 + max(raw["model"]["vocab"].values(), default=-1)
        self.controls: dict[str, int] = {}  # the files list them all
        self._barred = frozenset(token.id for token in files.added if token.text.strip())

    def id_of(self, text: str) -> int | None:
        """Find the id of a piece; None: there is none."""
        i: int | None = self._all.token_to_id(text)
        return i

    def encode(self, text: str, *, is_first: bool) -> list[int]:
        """Encode a run of text; ``is_first``: nothing stands before it."""
        if not text:
            return []
        pieces = self._all if is_first else self._inside
        ids: list[int] = pieces.encode(text, add_special_tokens=False).ids
        if self._barred.isdisjoint(ids):
            return ids
        spelled = [
            (self._all if is_first and at == 0 else self._inside).encode(one).ids
            for at, one in enumerate(text)
        ]
        return [i for one in spelled for i in one]

    def opening(self, token: str) -> list[int]:
        """Return the ids before a control token that a prompt begins with: none."""
        return []

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids of pieces; others decode to nothing."""
        text: str = self._all.decode([i for i in ids if i >= 0], skip_special_tokens=False)
        return text

    @cached_property
    def _inside(self) -> Any:
        """The vocabulary for runs that are not the first: Metaspace may treat that alone."""
        changed = _without_first(self._raw.get("pre_tokenizer"))
        if changed == self._raw.get("pre_tokenizer"):
            return self._all
        return _load({**self._raw, "pre_tokenizer": changed}, str(self._where))


def _load(raw: Mapping[str, Any], name: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(raw))
    except Exception as error:  # the library raises nothing narrower
        raise ArtifactError(f"{name}: not a tokenizer: {error}") from error


def _qwen(files: TokenFiles) -> dict[str, Any]:
    """Make a ``tokenizer.json`` of ``vocab.json`` and ``merges.txt``."""
    kind = str(files.config.get("tokenizer_class"))
    if kind not in QWEN_CLASSES:
        raise ArtifactError(
            f"{files.vocabulary}: expected tokenizer_class {QWEN_CLASSES[0]}, whose rules are "
            f"known, found {kind}; add the model's {FAST}, which says its own"
        )
    assert files.merges is not None
    try:
        lines = read_file(files.merges, MAX_NBYTES, ArtifactError).decode("utf-8").split("\n")
    except ValueError as error:
        raise ArtifactError(f"{files.merges}: not readable as merges: {error}") from error
    merges = [line.rstrip("\r").split(" ") for line in lines if line and line[:9] != "#version:"]
    if not all(len(merge) == 2 for merge in merges):
        wrong = next(" ".join(merge) for merge in merges if len(merge) != 2)
        raise ArtifactError(f"{files.merges}: expected two pieces a line, found {wrong!r:.80}")
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
            ],
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {"type": "BPE", "vocab": read_json_file(files.vocabulary), "merges": merges},
    }


def _begin(post_processor: Any, files: TokenFiles) -> list[int]:
    """Find the ids that every prompt begins with: of the post-processor's template."""
    for one in _flat(post_processor, "processors"):
        if _type_of(one) != "TemplateProcessing":
            continue
        ids: list[int] = []
        for step in one.get("single") or ():
            token = (step.get("SpecialToken") or {}).get("id")
            if token is None:
                return ids
            ids += one["special_tokens"][token]["ids"]
    begins = files.config.get("add_bos_token") is True
    bos = files.id_of(str(files.config.get("bos_token"))) if begins else None
    return [] if bos is None else [bos]


def _without_first(pre_tokenizer: Any) -> Any:
    """Return pre-tokenizers in which none puts a space before the first run alone."""
    if _type_of(pre_tokenizer) == "Sequence":
        inner = [_without_first(one) for one in pre_tokenizer.get("pretokenizers") or ()]
        return {**pre_tokenizer, "pretokenizers": inner}
    if _type_of(pre_tokenizer) == "Metaspace" and pre_tokenizer.get("prepend_scheme") == FIRST:
        return {**pre_tokenizer, "prepend_scheme": NEVER}
    return pre_tokenizer


def _flat(step: Any, key: str) -> Iterable[Any]:
    if _type_of(step) == "Sequence":
        return [inner for one in step.get(key) or () for inner in _flat(one, key)]
    return [] if step is None else [step]


def _type_of(part: Any) -> str | None:
    return part.get("type") if isinstance(part, dict) else None
