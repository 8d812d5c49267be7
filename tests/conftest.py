"""What every test may use: the golden data, and an environment left as it was found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The reference outputs of the original implementation."""
    path = SHARED / "golden"
    if not path.is_dir():
        pytest.skip("the golden data (../shared/golden) is not here")
    return path


@pytest.fixture(autouse=True)
def _restore_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
