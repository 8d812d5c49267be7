"""What needs Ray: run by ``make test-ray`` in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from internvl_edge.integrations import ray

MODEL = "INTERNVL_EDGE_TEST_MODEL"  # a compiled directory, of the demo


@pytest.fixture(scope="session")
def compiled() -> Path:
    return Path(os.environ[MODEL]).absolute()


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray of this machine alone."""
    with ray.connected(quiet=True):
        yield
