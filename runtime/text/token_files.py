"""The tokenizer files of a checkpoint, or of a compiled directory, as published.

    tokenizer.model               SentencePiece: InternLM2, Yi, Phi-3
    tokenizer.json                Hugging Face's own: Llama-3, most of the Qwen kind, ``*-hf``
    vocab.json, merges.txt        byte-level BPE of the Qwen kind, in two files
    added_tokens.json             token → id of the tokens added to the vocabulary
    tokenizer_config.json         the same with their rules, and how a prompt begins
    special_tokens_map.json       which token is for padding, the beginning and the end

A directory may have several vocabularies; one is read, as the original does: SentencePiece, unless
the files say that the fast tokenizer made the ids (a class ``…Fast``, or the ``*-hf`` layout).
Nothing here loads a vocabulary: this is JSON, read without trust.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.errors import ArtifactError
from internvl_edge.files.reading import read_json

__all__ = [
    "ADDED_TOKENS",
    "CONFIG",
    "FAST",
    "MERGES",
    "SENTENCEPIECE",
    "SPECIAL_TOKENS",
    "TOKENIZER_FILES",
    "VOCAB",
    "AddedToken",
    "TokenFiles",
    "read_json_file",
    "read_token_files",
]

SENTENCEPIECE, FAST, VOCAB, MERGES = "tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt"
ADDED_TOKENS, CONFIG = "added_tokens.json", "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TOKENIZER_FILES = (SENTENCEPIECE, FAST, VOCAB, MERGES, ADDED_TOKENS, CONFIG, SPECIAL_TOKENS)
MAX_NBYTES = 64 << 20
MAX_ID = 1 << 24
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

Find = Callable[[str], Path | None]  # the path of a file by its name; None: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that is found in a text before the vocabulary splits the rest."""

    text: str
    id: int
    is_special: bool = True  # not part of what a decoded answer says
    eats_before: bool = False  # white space before it vanishes (lstrip)
    eats_after: bool = False  # and after it (rstrip)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFiles:
    """What the tokenizer files of a directory say, without its vocabulary."""

    vocabulary: Path  # one of SENTENCEPIECE, FAST, VOCAB
    merges: Path | None  # of VOCAB
    added: tuple[AddedToken, ...]
    named: frozenset[str]  # tokens with a role: beginning, end, padding, and further special ones
    config: Mapping[str, Any]  # of tokenizer_config.json
    fast: Mapping[str, Any] | None  # of tokenizer.json, where it is the vocabulary

    @property
    def kind(self) -> str:
        """The name of the file that has the vocabulary."""
        return self.vocabulary.name

    @property
    def pad_token(self) -> str | None:
        """The token that rows are padded with; None: the files name none."""
        return _spelling(self.config.get("pad_token"))

    def id_of(self, text: str) -> int | None:
        """Find the id of an added token; None: there is no such one."""
        return next((token.id for token in self.added if token.text == text), None)


def read_token_files(find: Find, *, fast_first: bool = False) -> TokenFiles | None:
    """Read the tokenizer files of a directory; None where it has no vocabulary.

    Args:
        find: gives the path of a file by its name.
        fast_first: prefer ``tokenizer.json`` to ``tokenizer.model``, as the ``*-hf`` layout does.

    Raises:
        ArtifactError: a file that is not what its name says, or two that contradict each other.
    """
    config = _read_found(find(CONFIG))
    special = _read_found(find(SPECIAL_TOKENS))
    prefers_fast = fast_first or str(config.get("tokenizer_class", "")).endswith("Fast")
    order = (FAST, SENTENCEPIECE, VOCAB) if prefers_fast else (SENTENCEPIECE, FAST, VOCAB)
    vocabulary = next((path for path in map(find, order) if path is not None), None)
    if vocabulary is None:
        return None
    merges = None
    if vocabulary.name == VOCAB and (merges := find(MERGES)) is None:
        raise ArtifactError(f"{vocabulary}: expected {MERGES} with it, found no such file")
    fast = read_json_file(vocabulary) if vocabulary.name == FAST else None
    return TokenFiles(
        vocabulary=vocabulary,
        merges=merges,
        added=_added(vocabulary, fast, find(CONFIG), config, find(ADDED_TOKENS)),
        named=_named(config) | _named(special),
        config={**special, **config},
        fast=fast,
    )


def read_json_file(path: Path) -> dict[str, Any]:
    """Read one JSON object of at most 64 MiB.

    Raises:
        ArtifactError: it is something else.
    """
    read = read_json(path, MAX_NBYTES, ArtifactError)
    if not isinstance(read, dict):
        raise ArtifactError(f"{path}: expected one JSON object, found {type(read).__name__}")
    return read


def _read_found(path: Path | None) -> dict[str, Any]:
    return {} if path is None else read_json_file(path)


def _added(
    vocabulary: Path,
    fast: Mapping[str, Any] | None,
    config_path: Path | None,
    config: Mapping[str, Any],
    listed_path: Path | None,
) -> tuple[AddedToken, ...]:
    """Join the lists of added tokens; the first that has a token says its rules."""
    tokens: dict[str, AddedToken] = {}
    for entry in (fast or {}).get("added_tokens") or ():
        _join(tokens, _token(entry, _get(entry, "id"), vocabulary), vocabulary)
    if config_path is not None:
        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise _no_list(config_path, decoder)
        for number, entry in decoder.items():
            _join(tokens, _token(entry, number, config_path), config_path)
    if listed_path is not None:
        for text, number in read_json_file(listed_path).items():
            _join(tokens, _token({"content": text}, number, listed_path), listed_path)
    return tuple(tokens.values())


def _join(tokens: dict[str, AddedToken], token: AddedToken, path: Path) -> None:
    known = tokens.setdefault(token.text, token)
    if known.id != token.id:
        raise ArtifactError(
            f"{path}: {token.text!r} has id {token.id}, another tokenizer file says {known.id}: "
            "expected the tokenizer files of one model"
        )


def _token(entry: Any, number: Any, path: Path) -> AddedToken:
    text = _get(entry, "content")
    is_number = isinstance(number, int) and not isinstance(number, bool)
    if isinstance(number, str) and number.isascii() and number.isdigit():
        number, is_number = int(number), True
    if not isinstance(text, str) or not text or not is_number or not 0 <= number < MAX_ID:
        raise _no_list(path, entry)
    return AddedToken(
        text=text,
        id=number,
        is_special=entry.get("special", True) is not False,
        eats_before=entry.get("lstrip") is True,
        eats_after=entry.get("rstrip") is True,
    )


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _no_list(path: Path, entry: Any) -> ArtifactError:
    return ArtifactError(f"{path}: expected added tokens and their ids, found {entry!r:.80}")


def _named(raw: Mapping[str, Any]) -> frozenset[str]:
    more = raw.get("additional_special_tokens")
    tokens = [raw.get(role) for role in NAMED] + (more if isinstance(more, list) else [])
    return frozenset(text for text in map(_spelling, tokens) if text)


def _spelling(token: Any) -> str | None:
    """Return the text of a token that is spelled alone or with its rules."""
    text = _get(token, "content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
