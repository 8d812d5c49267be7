"""Embeddings of many pictures or texts, from folders, Parquet and WebDataset into one Parquet file.

    job      what is embedded, how, and into which file: checked before any work; start here
    run      batches through a pool of threads, in order
    sources  rows, batch by batch: of a folder's files, Parquet tables, WebDataset shards
    rows     a batch of them with its embeddings, and an error where there is none
    staging  the folder that a run works in, and the recipe by which it is known again
    parts    finished rows in it, from which a killed run goes on, and the file made of them

A row that cannot be embedded says why in the column ``error`` and ends nothing. Everything here
needs pyarrow, which the extra ``parquet`` installs; ``integrations.ray`` runs the same on many
machines.
"""

from __future__ import annotations

from internvl_edge.files.packages import require

require("pyarrow")  # which what follows imports

from internvl_edge.integrations.bulk.job import Done, How, Problem, Progress  # noqa: E402
from internvl_edge.integrations.bulk.run import embed  # noqa: E402
from internvl_edge.integrations.bulk.sources.opening import open_source  # noqa: E402
from internvl_edge.integrations.bulk.sources.source import Source  # noqa: E402

__all__ = ["Done", "How", "Problem", "Progress", "Source", "embed", "open_source"]
