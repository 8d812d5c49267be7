"""The model as a pool of threads runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import internvl_edge
from internvl_edge.runtime.model import Model


@pytest.fixture(scope="session")
def model(compiled: Path) -> Iterator[Model]:
    options = internvl_edge.OrtOptions(num_threads=1)
    with internvl_edge.load(compiled, options=options) as opened:
        yield opened
