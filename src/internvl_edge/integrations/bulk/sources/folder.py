"""The pictures of a folder as rows: the paths alone, which are read where they are decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from internvl_edge.integrations.bulk.sources.source import (
    CONTENT,
    PATH,
    Content,
    Source,
    fingerprint,
    path_text,
)

__all__ = ["files_source"]

PIECE = 256  # files
KEPT = pa.schema([(PATH, pa.string())])


@dataclass(frozen=True, slots=True)
class Files:
    """Some of the files, in order."""

    names: tuple[bytes, ...]

    @property
    def weight(self) -> int:
        return len(self.names)

    @property
    def rows(self) -> int:
        return len(self.names)

    def batches(self, size: int, skip: int = 0) -> Iterator[tuple[pa.RecordBatch, float]]:
        """Give the paths in batches; see ``Piece``."""
        for start in range(skip, len(self.names), size):
            some = self.names[start : start + size]
            texts = pa.array([path_text(os.fsdecode(name)) for name in some], pa.string())
            batch = pa.record_batch({PATH: texts, CONTENT: pa.array(some, pa.binary())})
            yield batch, (start + len(some)) / len(self.names)


def files_source(paths: Sequence[Path]) -> Source:
    """Make a source of picture files, in the order given.

    Raises:
        MediaError: one of them is not there.
    """
    names = [os.fsencode(path) for path in paths]
    pieces = tuple(Files(tuple(names[i : i + PIECE])) for i in range(0, len(names), PIECE))
    return Source(pieces=pieces, kept=KEPT, content=Content.FILES, fingerprint=fingerprint(paths))
