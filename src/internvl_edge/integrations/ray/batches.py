"""A batch of Ray Data with its embeddings: classes for ``Dataset.map_batches``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import internvl_edge
from internvl_edge.errors import UsageError
from internvl_edge.integrations.bulk.job import How
from internvl_edge.integrations.bulk.rows import Embedder, embedding_type
from internvl_edge.integrations.bulk.sources.source import (
    CONTENT,
    EMBEDDING,
    ERROR,
    PROBLEM,
    Content,
    require_column,
)
from internvl_edge.integrations.bulk.sources.tables import bytes_of, content_of
from internvl_edge.integrations.bulk.staging import Recipe, with_recipe

if TYPE_CHECKING:
    from internvl_edge.runtime.images.options import ImageOptions
    from internvl_edge.runtime.images.transform import Transform
    from internvl_edge.types import Array

__all__ = ["EmbedImages", "EmbedTexts", "Rows"]


class EmbedImages:
    """Embeds a column of pictures: a class for ``Dataset.map_batches``.

    The batch comes back as an Arrow table: its other columns as they were, ``embedding``
    (FixedSizeList<float32>[E]) and ``error``. A picture that cannot be embedded has a null and an
    error that says why, and fails no block.

    Args:
        out: the compiled directory, at this path on every machine.
        column: of pictures: bytes, or structs of ``bytes`` and ``path`` as Hugging Face has them.
        mode: ``"c"`` or ``"g"``.
        transform: instead of the model's own.
        normalize: scale every embedding to length one.
        batch_size: rows that are computed at a time, however many come; None: see ``How``.
        num_threads: of this actor; ask Ray for as many with ``num_cpus``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; a GPU is Ray's to give, with ``num_gpus``.
        allow_slow: on a GPU, let ONNX Runtime run what it is slow at; see ``OrtOptions``.

    Raises:
        InternVLError: a directory or an option that cannot be.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        column: str = "bytes",
        mode: str = "c",
        transform: Transform | None = None,
        normalize: bool = False,
        batch_size: int | None = None,
        num_threads: int = 1,
        device: str = "auto",
        allow_slow: bool = False,
    ) -> None:
        how = How(mode=mode, transform=transform, normalize=normalize, batch_size=batch_size)
        self._column = column
        self._rows = Rows(
            os.fspath(out), Content.PICTURES, how, num_threads, device, allow_slow=allow_slow
        )

    def __call__(self, batch: Any) -> pa.Table:
        """Embed a batch: a dict of arrays, an Arrow table or a pandas frame.

        Raises:
            UsageError: it lacks the column, has two of one name, or the column holds no pictures;
            paths are not opened.
        """
        return self._rows(_with_content(batch, self._column, Content.PICTURES))


class EmbedTexts:
    """Embeds a column of texts, as ``EmbedImages`` does pictures.

    Args:
        out: the compiled directory, at this path on every machine.
        column: of texts.
        normalize: scale every embedding to length one.
        batch_size: rows that are computed at a time, however many come; None: see ``How``.
        num_threads: of this actor; ask Ray for as many with ``num_cpus``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; a GPU is Ray's to give, with ``num_gpus``.
        allow_slow: on a GPU, let ONNX Runtime run what it is slow at; see ``OrtOptions``.

    Raises:
        InternVLError: a directory or an option that cannot be.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        column: str = "text",
        normalize: bool = False,
        batch_size: int | None = None,
        num_threads: int = 1,
        device: str = "auto",
        allow_slow: bool = False,
    ) -> None:
        how = How(normalize=normalize, batch_size=batch_size)
        self._column = column
        self._rows = Rows(
            os.fspath(out), Content.TEXTS, how, num_threads, device, allow_slow=allow_slow
        )

    def __call__(self, batch: Any) -> pa.Table:
        """Embed a batch: a dict of arrays, an Arrow table or a pandas frame.

        Raises:
            UsageError: it lacks the column, has two of one name, or the column holds no texts.
        """
        return self._rows(_with_content(batch, self._column, Content.TEXTS))


class Rows:
    """An actor of ``embed``: an open model that embeds the batches of a source."""

    def __init__(
        self,
        out: str,
        content: Content,
        how: How,
        num_threads: int,
        device: str,
        images: ImageOptions | None = None,
        recipe: Recipe | None = None,
        allow_slow: bool = False,
    ) -> None:
        options = internvl_edge.OrtOptions(
            num_threads=num_threads, spin=False, allow_slow=allow_slow
        )
        self._model = internvl_edge.load(out, device=device, options=options, images=images)
        self._recipe = recipe
        self._embedder = Embedder(self._model.components, content, how)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.combine_chunks().to_batches(self._embedder.rows_at_once)
        if not rows:
            table = self._none(batch)
        else:
            table = pa.Table.from_batches([self._embedder.embedded(some) for some in rows])
        if self._recipe is None:
            return table
        return table.replace_schema_metadata(with_recipe(table.schema, self._recipe).metadata)

    def _none(self, batch: pa.Table) -> pa.Table:
        """Make the result of a batch without rows, which Ray may ask for."""
        kept = batch.drop_columns([CONTENT])
        missing = pa.array([], embedding_type(self._embedder.size))
        return kept.append_column(EMBEDDING, missing).append_column(
            ERROR, pa.array([], pa.string())
        )


def _with_content(batch: Any, column: str, content: Content) -> pa.Table:
    """Return a batch as a table whose column to embed is ``CONTENT``, its last.

    Raises:
        UsageError: there is no such column, it holds something else, two have one name, or one is
            called like those that are added.
    """
    table = _table_of(batch)
    names = table.column_names
    require_column(Path("the batch"), column, names, "column")
    if taken := {EMBEDDING, ERROR, CONTENT, PROBLEM}.intersection(names):
        raise UsageError(
            f"the batch has a column {', '.join(sorted(taken))} of its own, a name that the result "
            "needs; rename it"
        )
    values = table.column(column)
    if values.null_count == len(values):  # of any type
        found = pa.nulls(len(values))
    elif content_of(values.type) is content:
        found = bytes_of(values)
    else:
        wanted = "texts" if content is Content.TEXTS else "bytes, or a struct with bytes"
        raise UsageError(f"column {column}: expected {wanted}, found {values.type}")
    return table.drop_columns([column]).append_column(CONTENT, found)


def _table_of(batch: Any) -> pa.Table:
    if isinstance(batch, pa.Table):
        _require_distinct(batch.column_names)
        return batch
    if hasattr(batch, "columns") and hasattr(batch, "iloc"):  # of pandas
        _require_distinct([str(name) for name in batch.columns])
        return pa.Table.from_pandas(batch, preserve_index=False)
    if not isinstance(batch, Mapping):
        raise UsageError(
            "expected a batch of columns (a dict, a table or a frame), found "
            f"{type(batch).__name__}"
        )
    return pa.table({name: _arrow_of(values) for name, values in batch.items()})


def _require_distinct(names: Sequence[str]) -> None:
    """Refuse a batch that has two columns of one name, of which Arrow finds neither."""
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UsageError(
            f"the batch has more than one column {', '.join(twice)}; rename one, or leave it out"
        )


def _arrow_of(values: Array | Sequence[Any]) -> pa.Array:
    array = np.asarray(values) if not isinstance(values, np.ndarray) else values
    if array.dtype.kind in "OSU":  # of Python's own: bytes, structs, texts
        return pa.array(list(values))
    return pa.array(array if array.ndim == 1 else array.tolist())
