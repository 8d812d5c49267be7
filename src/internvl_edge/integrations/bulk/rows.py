"""A batch of rows with its embeddings: the same columns, computed here or on other machines.

    …            the columns that came along, as they were
    embedding    FixedSizeList<float32>[E], which every reader of Parquet knows; null after an error
    error        why a row has no embedding; null where it has one

A picture or a text that cannot be embedded costs no other row anything. What concerns them all,
such as a device that failed, is raised.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from internvl_edge.artifact.components import TEXT_EMBED
from internvl_edge.errors import InputError, ResourceError, UsageError
from internvl_edge.integrations.bulk.job import How, Problem
from internvl_edge.integrations.bulk.sources.source import (
    CONTENT,
    EMBEDDING,
    ERROR,
    PATH,
    PROBLEM,
    Content,
    message_text,
    text_of,
)
from internvl_edge.runtime.images.sources import image_label
from internvl_edge.runtime.tasks.embed import encode_text, image_embedder
from internvl_edge.runtime.tasks.vectors import unit
from internvl_edge.runtime.text.requests import require_choice, require_flag, text_problem
from internvl_edge.types import Array

if TYPE_CHECKING:
    from internvl_edge.runtime.components import OpenComponents

__all__ = ["Embedder", "embedding_type", "joined", "problems_of"]

# Nothing else is opened: a string of a table could name any file of the machine.
PICTURE_TYPES: dict[Content, type] = {Content.FILES: Path, Content.PICTURES: bytes}
NO_PICTURE, NO_TEXT = "expected a picture, found none", "expected text, found none"
NO_BYTES = "expected a picture's bytes, or the path of a source's file"


class Embedder:
    """Embeds batches with an open model; thread-safe.

    Args:
        components: of the model.
        content: what batches hold.
        how: it embeds them.

    Raises:
        UsageError: the model cannot compute it, or an option that cannot be.
    """

    def __init__(
        self,
        components: OpenComponents,
        content: Content,
        how: How,
    ) -> None:
        require_flag("normalize", how.normalize)
        self._components, self._content = components, content
        self._normalize = how.normalize
        self._on_long = how.on_long
        if content is Content.TEXTS:
            components.require(TEXT_EMBED)
            require_choice("on_long", how.on_long, ("truncate", "error"))
            _ = components.tokenizer  # which it may lack
            self.rows_at_once = how.rows_at_once()
        else:
            from internvl_edge.runtime.images.transform import TRANSFORMS

            if how.transform is not None and how.transform not in TRANSFORMS:
                raise UsageError(
                    f"transform {how.transform!r}: expected one of {', '.join(TRANSFORMS)}"
                )
            self._transform = how.transform or components.preprocessing.transform
            self._embed = image_embedder(components, how.mode)
            self.rows_at_once = how.rows_at_once(components.preprocessing.size)
        self.size = components.embedding_size or 0  # E; the components that are required have it

    def __call__(self, contents: Sequence[Any]) -> tuple[Array, list[str | None]]:
        """Embed pictures (bytes, or the paths of ``Content.FILES``) or texts.

        Returns:
            float32 [B,E], zeros where there is an error; and the errors, None where there is none.
        """
        prepare = self._texts if self._content is Content.TEXTS else self._pictures
        found, errors = prepare(contents)
        embeddings = np.zeros((len(contents), self.size), np.float32)
        if len(found):
            rows = [i for i, error in enumerate(errors) if error is None]
            embeddings[rows] = unit(found) if self._normalize else found
        return embeddings, errors

    def _pictures(self, contents: Sequence[Any]) -> tuple[Array, list[str | None]]:
        """Embed the pictures that decode; one thread, as there is another for each batch."""
        from internvl_edge.runtime.images.transform import normalised, put_levels

        components = self._components
        side = components.preprocessing.size
        levels = np.empty((len(contents), 3, side, side), np.uint8)
        errors: list[str | None] = []
        good = 0
        for content in contents:
            if content is None:
                errors.append(NO_PICTURE)
                continue
            if not isinstance(content, PICTURE_TYPES[self._content]):
                errors.append(f"{NO_BYTES}, found {type(content).__name__}")
                continue
            try:
                label = image_label(content)
                put_levels(levels[good], content, label, self._transform, components.images)
            except (InputError, ResourceError) as error:
                errors.append(str(error))
            else:
                errors.append(None)
                good += 1
        if not good:
            return levels[:0], errors
        pixels: Array = levels[:good]
        if not components.takes_levels:
            pixels = normalised(levels[:good], components.preprocessing)
        return self._embed(pixels), errors

    def _texts(self, contents: Sequence[Any]) -> tuple[Array, list[str | None]]:
        errors: list[str | None] = []
        good = []
        for content in contents:
            text, problem = text_of(content) if isinstance(content, bytes) else (content, None)
            if problem is None:
                problem = NO_TEXT if text is None else text_problem(text)
            if problem is None and text is not None:
                problem = self._length_problem(text) if text.strip() else NO_TEXT
            errors.append(problem)
            if problem is None:
                good.append(text)
        found = np.empty((0, self.size), np.float32)
        return (encode_text(self._components, good) if good else found), errors

    def _length_problem(self, text: str) -> str | None:
        """Say that a text is too long, where such are not cut off."""
        if self._on_long == "truncate":
            return None
        try:
            self._components.tokenizer.contrastive([text], on_long="error")
        except InputError as error:
            return str(error)
        return None

    def embedded(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Embed a batch of a source: its columns that are kept, then embeddings and errors."""
        embeddings, errors = self(self._contents_of(batch.column(CONTENT)))
        if PROBLEM in batch.schema.names:
            known = batch.column(PROBLEM).to_pylist()
            errors = [problem or error for problem, error in zip(known, errors, strict=True)]
        kept = [name for name in batch.schema.names if name not in (CONTENT, PROBLEM)]
        return joined(batch.select(kept), embeddings, errors)

    def _contents_of(self, column: Any) -> list[Any]:
        """Take what is embedded out of its column; of texts the bytes, which may be none."""
        if self._content is Content.TEXTS:
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            column = column.cast(pa.large_binary())
        values: list[Any] = column.to_pylist()
        if self._content is Content.FILES:
            return [None if name is None else Path(os.fsdecode(name)) for name in values]
        return values


def embedding_type(size: int) -> pa.DataType:
    """Return the type of the column ``embedding``."""
    return pa.list_(pa.float32(), size)


def joined(kept: pa.RecordBatch, embeddings: Array, errors: Sequence[str | None]) -> pa.RecordBatch:
    """Add embeddings, float32 [B,E], and errors to the columns that are kept."""
    missing = pa.array([error is not None for error in errors], pa.bool_())
    kind = embedding_type(embeddings.shape[1])
    flat = pa.array(np.ascontiguousarray(embeddings).reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=missing)
    fields = [*kept.schema, pa.field(EMBEDDING, kind), pa.field(ERROR, pa.string())]
    told = [error if error is None else message_text(error) for error in errors]
    columns = [*kept.columns, vectors, pa.array(told, pa.string())]
    return pa.record_batch(columns, schema=pa.schema(fields))


def problems_of(batch: pa.RecordBatch) -> list[Problem]:
    """List the rows of a result that have an error."""
    errors = batch.column(ERROR)
    if errors.null_count == len(batch):
        return []
    both = zip(batch.column(PATH).to_pylist(), errors.to_pylist(), strict=True)
    return [Problem(path=path, message=error) for path, error in both if error is not None]
