"""A source embedded by one process: batches through a pool of threads, rows in their order.

Each thread decodes a batch, prepares it and runs the model on it with one thread of its own: no
core waits for another within an operator, and decoding needs no cores of its own. On a GPU the
batches take turns there, while the next ones are decoded. How many are under way is bounded, so
that memory does not grow with the source.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from internvl_edge.artifact.publish import placed
from internvl_edge.errors import InternVLError, MediaError, ResourceError
from internvl_edge.files.cores import usable_cores
from internvl_edge.integrations.bulk.job import Done, How, Problem, Progress, Report, make_recipe
from internvl_edge.integrations.bulk.parts import Parts, Position, finished
from internvl_edge.integrations.bulk.rows import Embedder, problems_of
from internvl_edge.integrations.bulk.sources.source import Source
from internvl_edge.integrations.bulk.staging import check_dest, is_replacing, staging

if TYPE_CHECKING:
    from internvl_edge.runtime.model import Model

__all__ = ["embed"]

AHEAD = 1  # batches that wait for each thread
MAX_PROBLEMS = 100  # that are told one by one


def silent(progress: Progress) -> None:
    """Report nothing."""


def embed(
    source: Source,
    model: Model,
    dest: str | os.PathLike[str],
    how: How = How(),
    *,
    threads: int | None = None,
    resume: bool = False,
    force: bool = False,
    report: Report = silent,
) -> Done:
    """Embed every row of a source into a new Parquet file.

    The columns are those that the source keeps, then ``embedding`` and ``error`` (``rows``). On a
    CPU open the model with ``OrtOptions(num_threads=1)``: each thread here runs it.

    Args:
        source: of ``open_source``.
        model: open; it stays the caller's to close.
        dest: the file; parts of it lie next to it until it is complete.
        how: rows are embedded.
        threads: of the pool; None: as many as there are cores.
        resume: go on after what an interrupted run of the same recipe left, if there is anything;
            what that was to replace is replaced.
        force: replace the file, and whatever an interrupted run left.
        report: is called after every batch.

    Raises:
        UsageError: the file exists or cannot be written, another run is writing to it, or what an
            interrupted run left is of another recipe.
        MediaError: the source has no row, or none that can be embedded, or is damaged.
        ResourceError: the disk is full, or memory ran out; what is finished stays.
    """
    path = placed(Path(dest))
    check_dest(path, resume=resume, force=force)
    components = model.components
    embedder = Embedder(components, source.content, how)
    recipe = make_recipe(components.artifact.digest, source, how, components.images)
    if resume and (done := finished(path, recipe)) is not None:
        return done
    replaces = resume and is_replacing(path)
    began = time.monotonic()
    with staging(path, recipe, resume=resume, force=force) as folder:
        force |= replaces  # as the interrupted run was told
        parts = Parts(folder)
        kept, problems = parts.position.rows, list[Problem]()
        try:
            _fill(parts, source, embedder, threads or usable_cores(), report, problems)
        except (KeyboardInterrupt, InternVLError) as error:
            if not isinstance(error, ResourceError):
                with suppress(InternVLError):
                    parts.flush()
            raise
        end = parts.position
        if not end.rows:
            raise MediaError("the source has no rows; there is nothing to embed")
        if end.errors == end.rows:
            parts.discard()
            first = f", such as {problems[0].path}: {problems[0].message}" if problems else ""
            raise MediaError(f"none of {end.rows} rows can be embedded{first}")
        parts.publish(path, recipe, force=force)
    seconds = time.monotonic() - began
    return Done(
        rows=end.rows,
        errors=end.errors,
        kept_rows=kept,
        seconds=seconds,
        problems=tuple(problems[:MAX_PROBLEMS]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows to embed, and where in the source the next one is."""

    rows: pa.RecordBatch
    piece: int
    row: int
    share: float  # of the source that is read by then, 0 to 1


def _fill(
    parts: Parts,
    source: Source,
    embedder: Embedder,
    threads: int,
    report: Report,
    problems: list[Problem],
) -> None:
    """Embed the rows that are not there yet."""
    start, began = parts.position, time.monotonic()
    before = _share(source, start.piece, 0.0)
    with closing(_computed(source, embedder, threads, start)) as computed:
        for batch, found in computed:
            parts.add(found, batch.piece, batch.row)
            if len(problems) < MAX_PROBLEMS:
                problems += problems_of(found)
            now, seconds = parts.position, max(time.monotonic() - began, 1e-9)
            read = batch.share - before
            report(
                Progress(
                    rows=now.rows,
                    of=source.rows,
                    errors=now.errors,
                    rows_per_second=(now.rows - start.rows) / seconds,
                    seconds_left=seconds * (1 - batch.share) / read if read > 0 else None,
                    share=batch.share,
                )
            )


def _computed(
    source: Source, embedder: Embedder, threads: int, start: Position
) -> Generator[tuple[Batch, pa.RecordBatch], None, None]:
    """Yield batches and what became of them, in order; a bounded number is under way."""
    waiting: deque[tuple[Batch, Future[pa.RecordBatch]]] = deque()
    with ThreadPoolExecutor(threads, "embed") as pool:
        try:
            for batch in _batches(source, start, embedder.rows_at_once):
                waiting.append((batch, pool.submit(embedder.embedded, batch.rows)))
                if len(waiting) >= threads * (1 + AHEAD):
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _batches(source: Source, start: Position, size: int) -> Iterator[Batch]:
    """Read the source from a position on."""
    for number, piece in enumerate(source.pieces):
        if number < start.piece:
            continue
        row = start.row if number == start.piece else 0
        for rows, share in piece.batches(size, row):
            row += len(rows)
            yield Batch(rows=rows, piece=number, row=row, share=_share(source, number, share))


def _share(source: Source, piece: int, share: float) -> float:
    """Return the share of a source that is before a place in a piece, 0 to 1."""
    ends = source.ends
    begin = ends[piece - 1] if piece else 0
    return (begin + share * (ends[piece] - begin)) / ends[-1] if piece < len(ends) else 1.0
