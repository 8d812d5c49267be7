from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from internvl_edge.errors import ArtifactError, HardwareError, MissingDependency, UsageError

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu_check
from gpu_check import Row, largest_error, line, refusal


def test_the_error_is_relative_to_the_largest_value() -> None:
    right = {"a": np.array([4.0, -8.0], np.float16), "b": np.zeros(2, np.float32)}
    found = {"a": np.array([4.0, -6.0], np.float32), "b": np.array([0.0, 0.125], np.float32)}
    assert largest_error(found, right) == pytest.approx(0.25)
    assert largest_error(right, right) == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MissingDependency("x"), "skipped"),
        (HardwareError("x"), "skipped"),
        (UsageError("x"), "skipped"),
        (ArtifactError("x"), "failed"),
    ],
)
def test_what_is_missing_is_no_failure(error: Exception, expected: str) -> None:
    assert refusal(error) == {expected: "x"}  # type: ignore[arg-type]


def test_no_skipped_check_looks_like_a_result() -> None:
    place = {"model": "demo", "component": "vision", "precision": "fp8", "backend": "tensorrt cuda"}
    assert "skipped: no GPU" in line(Row(**place, skipped="no GPU"))
    assert "FAILED: bad" in line(Row(**place, failed="bad"))
    measured = Row(**place, p50_ms=1.0, p99_ms=2.0, gpu_memory_nbytes=3 * 10**9)
    assert line(measured).endswith("no reference p50 1.000 ms p99 2.000 ms 3.00 GB")


def test_a_machine_without_a_gpu_has_no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(backend: str) -> str:
        raise HardwareError(backend)

    monkeypatch.setattr(gpu_check, "require_backend", refuse)
    assert gpu_check.targets() == []
