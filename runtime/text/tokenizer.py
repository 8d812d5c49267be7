"""Texts to token ids and back, equal to the original's LlamaTokenizer (slow, ``legacy=True``).

SentencePiece splits a text; around it go (docs/model.md, section 8.2)

    contrastive   <s> summarize:TEXT </s> 0 0 ...      for text embeddings, right-padded
    match         <s> TEXT </s> 0 0 ...                for image-text matching, right-padded
    prompt        0 0 ... <s> TEXT                     to be continued, left-padded

The prefix is glued to the text without a space. A text that is too long loses its end and keeps
``</s>``: its hidden state is the embedding. Padding is id 0, which is also ``<unk>``, and the
graphs take ``ids > 0`` for the mask: an unknown piece in the middle of a text is masked too, as
in the original. Byte fallback makes it rare.

One deviation, on purpose: a user who types ``</s>``, ``<s>``, ``<unk>`` or ``[PAD]`` gets the
pieces of these characters. The original turns them into control ids, which lets a text end itself
early. Control ids come from this module alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from internvl_edge.errors import ArtifactError, MediaError, UsageError, shortened
from internvl_edge.files.reading import read_file
from internvl_edge.runtime.text.padding import PAD_ID, left_padded, right_padded
from internvl_edge.runtime.text.requests import require_choice, text_problem
from internvl_edge.types import Array

Ids: TypeAlias = NDArray[np.int64]
PadTo = Literal["longest", "max_length"]
OnLong = Literal["truncate", "error"]

PREFIX = "summarize:"
CAPTION_PROMPT = "English caption:"  # of the published captioning results
TOKENIZER_FILE = "tokenizer.model"  # in a checkpoint, and in a compiled directory
MAX_TEXT_LENGTH = 80  # tokens that the text tower was trained on
MAX_MODEL_NBYTES = 64 << 20
MAX_SHOWN = 40  # characters of a text, in a warning
QUIET = 2  # SentencePiece writes errors alone on stderr, no remarks, as on InternLM2's NUL piece
GUARD = "<unk>"
SPACE = "▁"  # how a piece spells a space


class Tokenizer:
    """A SentencePiece model with the ids that InternVL puts around a text.

    Args:
        model: the path of a ``tokenizer.model``, or its bytes.
        name: what to call bytes in errors.

    Raises:
        ArtifactError: it is no SentencePiece model with ``<s>``, ``</s>`` and a padding id.
    """

    def __init__(
        self, model: str | os.PathLike[str] | bytes, name: str = "the tokenizer model given"
    ) -> None:
        name = name if isinstance(model, bytes) else os.fspath(model)
        self._pieces = load_pieces(
            model if isinstance(model, bytes) else read_model(Path(model)), name
        )
        self.vocab_size: int = self._pieces.get_piece_size()
        self.bos_id: int = self._pieces.bos_id()
        self.eos_id: int = self._pieces.eos_id()
        self.unk_id: int = self._pieces.unk_id()
        # "[PAD]" is an ordinary piece to SentencePiece; unk_id where the model has none.
        pad_piece = self._pieces.piece_to_id("[PAD]")
        self._special_ids = {self.unk_id, self.bos_id, self.eos_id, pad_piece}
        self._has_warned = False  # of a text whose end is cut off

    def contrastive(
        self,
        texts: str | Iterable[str],
        max_length: int = MAX_TEXT_LENGTH,
        prefix: str = PREFIX,
        pad_to: PadTo = "max_length",
        on_long: OnLong = "truncate",
    ) -> Ids:
        """Encode texts for an embedding: int64 [B, T], right-padded with 0.

        Args:
            texts: one text or several.
            max_length: the most tokens, ``<s>`` and ``</s>`` included.
            prefix: glued to the front of every text.
            pad_to: T is ``max_length``, or that of the longest text. The embedding is the same.
            on_long: ``"truncate"`` cuts off the end of what is longer, and warns of the first
                (``UserWarning``); ``"error"`` refuses it.

        Raises:
            MediaError: a text is not one that can be encoded, or too long.
            UsageError: ``max_length``, ``pad_to`` or ``on_long`` cannot be.
        """
        rows = self._closed(_checked(texts), max_length, prefix, on_long)
        return right_padded(rows, _width(rows, max_length, pad_to))

    def match(
        self,
        texts: str | Iterable[str],
        max_length: int = MAX_TEXT_LENGTH,
        pad_to: PadTo = "longest",
        on_long: OnLong = "truncate",
    ) -> Ids:
        """Encode texts for image-text matching: as `contrastive`, without a prefix."""
        rows = self._closed(_checked(texts), max_length, "", on_long)
        return right_padded(rows, _width(rows, max_length, pad_to))

    def prompt(self, texts: str | Iterable[str]) -> tuple[Ids, Ids]:
        """Encode texts that a decoder continues.

        Returns:
            ids, int64 [B, T], left-padded with 0, and the mask, int64 [B, T], 0 where padded.

        Raises:
            MediaError: a text is not one that can be encoded.
        """
        return left_padded(self.prompt_rows(texts))

    def prompt_rows(self, texts: str | Iterable[str]) -> list[list[int]]:
        """Encode as ``prompt``, each text alone and without padding."""
        return [[self.bos_id, *self._encode(text)] for text in _checked(texts)]

    def pieces(self, text: str) -> list[int]:
        """Encode a text alone, with SentencePiece's own space in front."""
        return self._encode(text)

    def id_of(self, piece: str) -> int | None:
        """Find the id of a piece; None: there is none."""
        i: int = self._pieces.piece_to_id(piece)
        return i if self._pieces.id_to_piece(i) == piece else None

    def decode(self, ids: Sequence[int] | Array, skip_special: bool = True) -> str:
        """Decode one row of ids, without spaces around the text.

        Args:
            ids: [T].
            skip_special: leave out ``<unk>``, ``<s>``, ``</s>`` and ``[PAD]``.

        Raises:
            MediaError: an id outside the vocabulary.
        """
        row = [int(i) for i in ids]
        for at, i in enumerate(row):
            if not 0 <= i < self.vocab_size:
                raise MediaError(
                    f"expected token ids from 0 to {self.vocab_size - 1}, found {i} at {at}"
                )
        if skip_special:
            row = [i for i in row if i not in self._special_ids]
        return self._text(row).strip()

    def _text(self, ids: list[int]) -> str:
        """Decode runs of ordinary pieces, and spell out the special ones between them.

        A run that a special piece ends gets a space in front: LlamaTokenizer's legacy spacing.
        """
        text, run = "", list[str]()
        for at, i in enumerate(ids):
            piece: str = self._pieces.id_to_piece(i)
            if i in self._special_ids:
                spaced = at > 0 and ids[at - 1] not in self._special_ids
                text += " " * spaced + self._pieces.decode(run) + piece
                run = []
            else:
                run.append(piece.removeprefix(SPACE) if at == 0 else piece)
        return text + str(self._pieces.decode(run))

    def _closed(
        self, texts: list[str], max_length: int, prefix: str, on_long: str
    ) -> list[list[int]]:
        """Return <s> text </s>, of at most ``max_length`` ids."""
        if max_length < 2:
            raise UsageError(f"max_length must be 2 or more (<s> and </s>), found {max_length}")
        require_choice("on_long", on_long, ("truncate", "error"))
        rows = [self._encode(prefix + text) for text in texts]
        body = max_length - 2
        for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
            if len(row) > body:
                self._too_long(text, len(row) + 2, max_length, (i, len(texts)), on_long)
        return [[self.bos_id, *row[:body], self.eos_id] for row in rows]

    def _too_long(
        self, text: str, length: int, limit: int, place: tuple[int, int], on_long: str
    ) -> None:
        """Refuse a text, or warn that its end is cut off: once, however many there are."""
        told = f"{length} tokens, at most {limit} are read"
        if on_long == "error":
            raise MediaError(
                f"text {place[0] + 1} of {place[1]} ({shortened(text, MAX_SHOWN)}) has {told}; "
                "shorten it, or pass on_long='truncate'"
            )
        if not self._has_warned:  # and not what it says: a server's log has no texts of others
            self._has_warned = True
            warnings.warn(
                f"a text of {len(text)} characters has {told}: the end of this and of every other "
                "text as long is cut off; on_long='error' (--on-long error) refuses them",
                stacklevel=4,
            )

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._pieces.encode(text)
        return ids


def read_model(path: Path) -> bytes:
    """Read the bytes of a SentencePiece model."""
    try:
        return read_file(path, MAX_MODEL_NBYTES, ArtifactError)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; expected a SentencePiece model") from error


def load_pieces(data: bytes, name: str) -> Any:
    """Load the SentencePiece processor; its parser never sees an empty or absurdly large file."""
    import sentencepiece

    if not 0 < len(data) <= MAX_MODEL_NBYTES:
        raise ArtifactError(
            f"{name}: expected a SentencePiece model of 1 to {MAX_MODEL_NBYTES} bytes, "
            f"found {len(data) if len(data) <= MAX_MODEL_NBYTES else 'more'}"
        )
    try:
        sentencepiece.set_min_log_level(QUIET)
        pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ArtifactError(f"{name}: not a SentencePiece model: {error}") from error
    if min(pieces.bos_id(), pieces.eos_id(), pieces.unk_id()) < 0:
        raise ArtifactError(f"{name}: a SentencePiece model without <s>, </s> or <unk>")
    if not (pieces.is_unknown(PAD_ID) or pieces.is_control(PAD_ID)):
        raise ArtifactError(
            f"{name}: id {PAD_ID} is padding, but here it is {pieces.id_to_piece(PAD_ID)!r}"
        )
    return pieces


def _checked(texts: str | Iterable[str]) -> list[str]:
    """Return one text or several as a list of texts that can be encoded."""
    given = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if not given:
        raise MediaError("expected at least one text, found none")
    for i, text in enumerate(given):
        problem = text_problem(text)
        if problem is not None:
            raise MediaError(f"text {i + 1} of {len(given)}: {problem}")
    return given


def _width(rows: list[list[int]], max_length: int, pad_to: str) -> int:
    if pad_to not in ("longest", "max_length"):
        raise UsageError(f"pad_to must be 'longest' or 'max_length', found {pad_to!r}")
    return max_length if pad_to == "max_length" else max(map(len, rows))
