"""The directory, GPU and TensorRT that the tests of this folder run on."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.gpu.trt_bench import TARGETS, Bench


@pytest.fixture(params=list(TARGETS))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path, request.param)
