from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_onnx import open_directory

from internvl_edge.compiler.peaks import Peaks
from internvl_edge.compiler.workload import Workload
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
    assert line(replace(measured, mfu=0.5, mbu=0.25)).endswith("3.00 GB MFU 50% MBU 25%")


def test_shares_are_of_the_peaks_of_the_same_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two kinds of products, measured one by one; the better of the two bandwidths."""
    asked = []

    def measured(kinds: list[str], backend: str, device: str) -> Peaks:
        asked.append((*kinds, backend, device))
        return Peaks(operations=dict.fromkeys(kinds, 1e9), bytes=1e9 * len(asked))

    work = Workload(operations={"int8": 10**6, "float32": 10**6}, weight_nbytes=10**6, io_nbytes=0)
    monkeypatch.setattr(gpu_check, "measure_backend", measured)
    monkeypatch.setattr(gpu_check, "component_workload", lambda *_: work)
    gpu_check.peaks_of.cache_clear()
    artifact = open_directory(tmp_path, ["vision"])
    for _ in range(2):
        found = gpu_check.below_roof(artifact, "vision", {}, ("tensorrt", "cuda"), 4.0)
    assert asked == [("int8", "tensorrt", "cuda"), ("float32", "tensorrt", "cuda")]
    assert found.mfu == pytest.approx(0.5)
    assert found.mbu == pytest.approx(0.125)
    gpu_check.peaks_of.cache_clear()


def test_a_machine_without_a_gpu_has_no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(backend: str) -> str:
        raise HardwareError(backend)

    monkeypatch.setattr(gpu_check, "require_backend", refuse)
    assert gpu_check.targets() == []
