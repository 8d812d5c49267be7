"""Parquet files as rows: pictures as bytes, or as Hugging Face's ``{bytes, path}``; or texts.

The ``path`` of such a struct is never opened: it is a name on the machine that wrote the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from internvl_edge.errors import MediaError, UsageError
from internvl_edge.files.reading import open_file
from internvl_edge.integrations.bulk.sources.source import (
    CONTENT,
    PATH,
    Content,
    Source,
    fingerprint,
    path_text,
    require_column,
    require_free_names,
)

__all__ = ["bytes_of", "content_of", "tables_source"]

PIECE = 256  # rows at least, as many whole row groups as that takes
AT_ONCE_NBYTES = 1 << 20  # of each column's pages; else whole row groups are read ahead
BYTES = "bytes"  # the field of a struct that holds a picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Some row groups of a file."""

    file: str
    groups: tuple[int, ...]
    first: int  # row of the file
    rows: int
    column: str
    keep: tuple[str, ...]

    @property
    def weight(self) -> int:
        return self.rows

    def batches(self, size: int, skip: int = 0) -> Iterator[tuple[pa.RecordBatch, float]]:
        """Read the columns in batches; see ``Piece``."""
        spelled, row = path_text(self.file), 0
        with _opened(Path(self.file)) as opened:
            columns = [self.column, *self.keep]
            for batch in opened.iter_batches(size, row_groups=list(self.groups), columns=columns):
                start, row = row, row + len(batch)
                if row <= skip:
                    continue
                some = batch.slice(max(0, skip - start))
                first = self.first + row - len(some)
                paths = [f"{spelled}#{first + i}" for i in range(len(some))]
                found = {name: some.column(name) for name in self.keep}
                content = bytes_of(some.column(self.column))
                named = {PATH: pa.array(paths, pa.string()), **found, CONTENT: content}
                yield pa.record_batch(named), row / self.rows


def tables_source(
    files: Sequence[Path], column: str | None = None, keep: Sequence[str] | None = None
) -> Source:
    """Make a source of the rows of Parquet files, in the order given.

    Args:
        files: all of the same columns.
        column: what is embedded; None: the only one that can hold pictures.
        keep: the columns that go along; None: all others.

    Raises:
        MediaError: a file is no Parquet, or has other columns than the first.
        UsageError: there is no such column, or more than one that may be meant, or two of one name.
    """
    pieces: list[Groups] = []
    schema: pa.Schema | None = None
    for file in files:
        with _opened(file) as opened:
            own, metadata = opened.schema_arrow.remove_metadata(), opened.metadata
        _require_distinct(file, own.names, own.names if keep is None else [column, *keep])
        if schema is None:
            schema = own
            column = _chosen(file, schema, column)
            others = [name for name in schema.names if name != column]
            keep = others if keep is None else list(dict.fromkeys(keep))
            for name in keep:
                require_column(file, name, others, "--keep")
            require_free_names(file, keep)
        wanted = [str(column), *(keep or ())]
        if missing := [n for n in wanted if n not in own.names or own.field(n) != schema.field(n)]:
            raise MediaError(
                f"{file}: expected the columns of {files[0]}, found another "
                f"{', '.join(missing)}; embed it by itself"
            )
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        pieces += _pieces(str(file), counts, str(column), tuple(keep or ()))
    if schema is None or column is None:
        raise MediaError("expected at least one Parquet file, found none")
    kept = [pa.field(PATH, pa.string()), *(schema.field(name) for name in keep or ())]
    return Source(
        pieces=tuple(pieces),
        kept=pa.schema(kept),
        content=Content.TEXTS if _is_text(schema.field(column).type) else Content.PICTURES,
        fingerprint=fingerprint(files),
    )


def _require_distinct(file: Path, names: Sequence[str], wanted: Sequence[str | None]) -> None:
    """Refuse a file that has one of the columns that are read twice."""
    if twice := sorted(
        name for name, count in Counter(names).items() if count > 1 and name in wanted
    ):
        raise UsageError(
            f"{file}: expected columns of different names, found more than one "
            f"{', '.join(twice)}; name the columns to keep (--keep), without it"
        )


def _pieces(
    file: str, counts: Sequence[int], column: str, keep: tuple[str, ...]
) -> Iterator[Groups]:
    """Join row groups, each whole, to pieces that are worth the opening of a file."""
    groups: list[int] = []
    first = rows = 0
    for group, count in enumerate(counts):
        groups.append(group)
        rows += count
        if rows >= PIECE or group == len(counts) - 1:
            if rows:
                yield Groups(
                    file=file,
                    groups=tuple(groups),
                    first=first,
                    rows=rows,
                    column=column,
                    keep=keep,
                )
            groups, first, rows = [], first + rows, 0


def _chosen(file: Path, schema: pa.Schema, column: str | None) -> str:
    """Choose the column to embed, or check the one that was asked for."""
    pictures = [field.name for field in schema if _is_picture(field.type)]
    if column is None:
        if len(pictures) != 1:
            told = f"{len(pictures)}: {', '.join(pictures)}" if pictures else "none"
            raise UsageError(
                f"{file}: expected one column of pictures (bytes), found {told}; name it as "
                f"--column; there are {', '.join(schema.names)}"
            )
        return str(pictures[0])
    require_column(file, column, schema.names, "--column")
    kind = schema.field(column).type
    if content_of(kind) is None:
        raise UsageError(
            f"--column {column}: expected bytes, or a struct with bytes, or texts, found {kind} in "
            f"{file}"
        )
    return column


def content_of(kind: pa.DataType) -> Content | None:
    """Tell what a column of a type holds that can be embedded; None: nothing."""
    if _is_picture(kind):
        return Content.PICTURES
    return Content.TEXTS if _is_text(kind) else None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _is_picture(kind: pa.DataType) -> bool:
    if types.is_struct(kind):
        return any(field.name == BYTES and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def bytes_of(column: Any) -> Any:
    """Take the bytes out of an Arrow column of structs, as Hugging Face writes; others stay."""
    if not types.is_struct(column.type):
        return column
    at = column.type.get_field_index(BYTES)
    return column.flatten()[at]


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file for the length of a block, in which it may turn out to be damaged."""
    with open_file(path, MediaError) as file:
        try:
            with pq.ParquetFile(file, pre_buffer=False, buffer_size=AT_ONCE_NBYTES) as opened:
                yield opened
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise MediaError(f"{path}: expected a Parquet file: {error}") from error
