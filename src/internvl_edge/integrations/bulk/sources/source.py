r"""A source of rows: how its columns are called, and the pieces that it is read in.

Every batch has the columns that are kept, ``path`` first, and then ``CONTENT``, which holds what is
embedded and goes no further; ``PROBLEM``, where there is one, says why a row has none. ``path``
says where a row is from, of each row another place:

    folder    photos/0001.jpg                 the file, as SOURCE names it
    Parquet   shards/train-0.parquet#17       the file and the number of the row, from 0
    tar       shards/000.tar/0001             the file and the sample's key

A byte of a name that is no UTF-8, which a column of text could not hold, is spelled ``\xff``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from internvl_edge.errors import MediaError, UsageError, did_you_mean

__all__ = [
    "CONTENT",
    "EMBEDDING",
    "ERROR",
    "PATH",
    "PROBLEM",
    "Content",
    "Piece",
    "Source",
    "fingerprint",
    "message_text",
    "path_text",
    "require_column",
    "require_free_names",
    "text_of",
]

PATH, EMBEDDING, ERROR = "path", "embedding", "error"  # columns of the result
CONTENT, PROBLEM = "__content__", "__problem__"


class Content(StrEnum):
    """What the column ``CONTENT`` holds."""

    FILES = "files"  # paths of pictures, as the system spells them: binary
    PICTURES = "pictures"  # their bytes: binary, or a struct with ``bytes``
    TEXTS = "texts"  # strings


class Piece(Protocol):
    """A part of a source that is read in one place, from its beginning; it can be pickled."""

    @property
    def weight(self) -> int:
        """How much of the source it is: rows, or bytes where rows are not known."""

    @property
    def rows(self) -> int | None:
        """How many rows it has; None: unknown until it is read."""

    def batches(self, size: int, skip: int = 0) -> Iterator[tuple[pa.RecordBatch, float]]:
        """Read rows in batches of at most ``size``, each with the share of the piece read by then.

        Args:
            size: rows.
            skip: rows at the beginning that are left out.

        Raises:
            MediaError: it cannot be read.
        """


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows to embed."""

    pieces: tuple[Piece, ...]
    kept: pa.Schema  # the columns without the content, ``path`` first
    content: Content
    fingerprint: str  # sha256 of its files' names, sizes and times

    @cached_property
    def rows(self) -> int | None:
        """How many rows it has; None: unknown until it is read."""
        counts = [piece.rows for piece in self.pieces]
        return None if None in counts else sum(filter(None, counts))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The weight of each piece and of all before it."""
        return tuple(accumulate(piece.weight for piece in self.pieces))


def path_text(path: str | os.PathLike[str]) -> str:
    """Spell a path in UTF-8, for a column of text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def message_text(message: str) -> str:
    """Spell an error in UTF-8, whatever names it quotes, for a column of text."""
    try:
        data = message.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte of a name
        data = message.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def text_of(data: bytes) -> tuple[str | None, str | None]:
    """Decode a text; return it, or None and why it is none."""
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        return None, f"expected text in UTF-8, found byte {data[error.start]:#04x}"


def fingerprint(files: Iterable[Path]) -> str:
    """Hash the names, sizes and times of files: sha256.

    Raises:
        MediaError: one of them is not there.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            status = os.stat(file)
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise MediaError(f"{file}: cannot be read: {reason}") from error
        line = f"\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(os.fsencode(file) + line.encode())
    return digest.hexdigest()


def require_column(where: Path, name: str, names: Sequence[str], option: str) -> None:
    """Refuse a column that is not there.

    Raises:
        UsageError: it says which there are.
    """
    if name not in names:
        told = ", ".join(names) or "none"
        raise UsageError(
            f"{option} {name}: {where} has the columns {told}{did_you_mean(name, names)}"
        )


def require_free_names(where: Path, names: Iterable[str]) -> None:
    """Refuse columns that are called like those that are added.

    Raises:
        UsageError: which, and what to do.
    """
    if taken := sorted({PATH, EMBEDDING, ERROR, CONTENT, PROBLEM}.intersection(names)):
        raise UsageError(
            f"{where} has a column {', '.join(taken)} of its own, as the result will have: name "
            "the columns to keep (--keep), without it"
        )
