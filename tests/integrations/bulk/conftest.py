"""A compiled directory that embeds pictures and texts, and its model as a pool runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs.bulk import write_compiled

import internvl_edge
from internvl_edge.runtime.model import Model


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compiled(tmp_path_factory.mktemp("bulk"))


@pytest.fixture(scope="session")
def model(compiled: Path) -> Iterator[Model]:
    options = internvl_edge.OrtOptions(num_threads=1)
    with internvl_edge.load(compiled, options=options) as opened:
        yield opened
