"""What needs Ray: run by ``make test-ray`` in an environment of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs.bulk import LATE, STARTS

from internvl_edge.errors import InternVLError
from internvl_edge.integrations import ray

MODEL = "INTERNVL_EDGE_TEST_MODEL"  # a compiled directory, of the demo


@pytest.fixture(scope="session")
def compiled() -> Path:
    return Path(os.environ[MODEL]).absolute()


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Ray of this machine alone."""
    with contextlib.ExitStack() as held:
        for left in reversed(range(STARTS)):
            try:
                held.enter_context(ray.connected(quiet=True))
                break
            except InternVLError as error:
                if LATE not in str(error) or not left:
                    raise
        yield
