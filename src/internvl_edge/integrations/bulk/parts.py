"""Finished rows on disk: parts from which a killed run goes on, and the file made of them.

    .DEST.parquet.partial/       see ``staging``
        000000.HASH.parquet …    rows in order; a part is synced before it gets its name
        whole                    DEST while it is written, before it is synced and renamed

Each part says where the next begins, so that after ``kill -9`` no row is missing or there twice: a
run goes on after the last part. Its name has its sha256, which is compared when it is taken up: a
disk that lost pages all the same would put other numbers into rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from internvl_edge.errors import InputError, UsageError
from internvl_edge.files.disk import (
    new_file,
    open_regular,
    os_errors,
    rename_new,
    sync,
    write_atomically,
)
from internvl_edge.files.reading import parse_json
from internvl_edge.integrations.bulk.job import Done
from internvl_edge.integrations.bulk.sources.source import ERROR, PATH
from internvl_edge.integrations.bulk.staging import (
    SUFFIX,
    Recipe,
    is_done,
    is_replacing,
    remove_staging,
    with_recipe,
)

__all__ = ["Parts", "Position", "counted", "finished"]

WHOLE = "whole"
PART_KEY = b"internvl_edge.part"  # of a schema's metadata
PART_SECONDS = 10.0  # of work that a kill loses at most, and what is under way
PART_NBYTES = 32 << 20
GROUP_NBYTES = 64 << 20  # of a row group of DEST


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where the next row is, and what came before it."""

    piece: int = 0
    row: int = 0  # of the piece
    rows: int = 0  # before it, in all
    errors: int = 0  # among these


class Parts:
    """Rows that are finished, in order.

    Args:
        folder: of ``staging``.

    Raises:
        InputError: a part is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = sorted(folder.glob("[0-9]*.parquet"))
        self.position = _position(self._files)
        self._waiting: list[pa.RecordBatch] = []
        self._nbytes = 0
        self._written_at = time.monotonic()

    def add(self, batch: pa.RecordBatch, piece: int, row: int) -> None:
        """Take rows over; they are written now and then.

        Args:
            batch: of the same columns as every other.
            piece: of the source, in which the next row is.
            row: of that piece, which is next.
        """
        before = self.position
        errors = len(batch) - batch.column(ERROR).null_count
        self.position = Position(
            piece=piece, row=row, rows=before.rows + len(batch), errors=before.errors + errors
        )
        self._waiting.append(batch)
        self._nbytes += batch.nbytes
        seconds = time.monotonic() - self._written_at
        if seconds >= PART_SECONDS or self._nbytes >= PART_NBYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last part."""
        if not self._waiting:
            return
        table = pa.Table.from_batches(self._waiting)
        table = table.replace_schema_metadata({PART_KEY: json.dumps(asdict(self.position))})
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        data = buffer.getvalue().to_pybytes()
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._folder / f"{len(self._files):06d}.{sha256}.parquet"
        write_atomically(path, data)
        self._files.append(path)
        self._waiting, self._nbytes = [], 0
        self._written_at = time.monotonic()

    def publish(self, dest: Path, recipe: Recipe, *, force: bool) -> None:
        """Make the file of all parts, and remove them.

        Raises:
            UsageError: the file is there by now, and not to be replaced.
            ResourceError: the disk is full or fails.
        """
        self.flush()
        whole = self._folder / WHOLE
        with os_errors(dest):
            whole.unlink(missing_ok=True)
            with open(whole, "xb", opener=new_file) as file:
                _join(self._files, file, recipe)
                file.flush()
                os.fsync(file.fileno())
            if force:
                os.replace(whole, dest)
            else:
                try:
                    rename_new(whole, dest)
                except FileExistsError as error:
                    raise UsageError(
                        f"{dest} was written by another run meanwhile; move it away, and pass "
                        "--resume"
                    ) from error
            sync(dest.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the rows, and the folder that they are in."""
        shutil.rmtree(self._folder, ignore_errors=True)


def finished(dest: Path, recipe: Recipe) -> Done | None:
    """Tell of a result that is complete, without what its run left; None: there is more to do.

    Raises:
        UsageError: it is of another recipe.
    """
    if is_replacing(dest) or not is_done(dest, recipe):
        return None
    remove_staging(dest)
    rows, errors = counted(dest)
    return Done(rows=rows, errors=errors, kept_rows=rows)


def counted(dest: Path) -> tuple[int, int]:
    """Count the rows of a result, a file or a folder of them, and those with an error.

    Raises:
        InputError: it is damaged.
    """
    try:
        errors = pq.read_table(dest, columns=[ERROR]).column(ERROR)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(
            f"{dest}: its rows cannot be read: {error}; --force replaces it"
        ) from error
    return len(errors), len(errors) - errors.null_count


def _join(files: list[Path], file: Any, recipe: Recipe) -> None:
    """Write the rows of the parts as one Parquet file, in row groups of a good size."""
    schema = with_recipe(pq.read_schema(files[0]), recipe)
    repeated = [field.name for field in schema if field.name != PATH]
    with pq.ParquetWriter(file, schema, use_dictionary=repeated) as writer:
        tables: list[pa.Table] = []
        for i, path in enumerate(files):
            tables.append(pq.read_table(path).replace_schema_metadata(schema.metadata))
            if i == len(files) - 1 or sum(table.nbytes for table in tables) >= GROUP_NBYTES:
                writer.write_table(pa.concat_tables(tables))
                tables = []


def _position(files: list[Path]) -> Position:
    """Read where the last part ends.

    Raises:
        InputError: a part is missing or damaged.
    """
    if not files:
        return Position()
    problem: object = "some are missing"
    if [file.name[:6] for file in files] == [f"{i:06d}" for i in range(len(files))]:
        try:
            if all(_sha256(file) == file.name[7:].removesuffix(SUFFIX) for file in files):
                return Position(**parse_json(pq.read_schema(files[-1]).metadata[PART_KEY]))
            problem = "one has another sha256 than its name says"
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            problem = error
    raise InputError(
        f"{files[-1].parent}: the parts of an interrupted run are damaged: {problem}; --force "
        "begins anew"
    )


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
