"""A server on a compiled directory, and the same directory in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.web.serving import Served, inside

import internvl_edge
from internvl_edge.runtime.model import Model


@pytest.fixture(scope="session")
def served(compiled: Path) -> Iterator[Served]:
    """One server for whatever leaves it as it was."""
    with inside({"tiny": compiled}, max_images=8) as running:
        yield running


@pytest.fixture(scope="session")
def model(compiled: Path) -> Iterator[Model]:
    """The same directory in this process."""
    options = internvl_edge.OrtOptions(num_threads=1)
    with internvl_edge.load(compiled, options=options) as opened:
        yield opened
