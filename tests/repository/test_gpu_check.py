from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from support.gpu.trt_bench import Bench as StandIns
from support.gpu.trt_bench import feeds_of
from support.paths import ROOT
from support.tiny_onnx import open_directory

from internvl_edge.benchmark.limits.workload import Workload
from internvl_edge.errors import ArtifactError, HardwareError, MissingDependency, UsageError
from internvl_edge.runtime.trt.options import TrtOptions
from internvl_edge.runtime.trt.session import TrtSession

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check
import gpu_row
from gpu_check import Bench, Model, Row, line
from gpu_row import largest_error, refusal

from internvl_edge.types import Array

DEMO = Model(name="demo", checkpoint=None, timed_on_cpu=True)
PLACE = {"model": "demo", "component": "vision", "precision": "fp8", "backend": "tensorrt cuda"}


def bench(work: Path, **options: Any) -> Bench:
    defaults = {"batch": 1, "seconds": 0.0, "timeout": 30.0, "components": None, "layers": None}
    defaults |= {"untimed": False, "artifacts": None}
    return Bench(work, Namespace(**defaults | options))


def test_the_error_is_relative_to_the_largest_value() -> None:
    right = {"a": np.array([4.0, -8.0], np.float16), "b": np.zeros(2, np.float32)}
    found = {"a": np.array([4.0, -6.0], np.float32), "b": np.array([0.0, 0.125], np.float32)}
    assert largest_error(found, right) == pytest.approx(0.25)
    assert largest_error(right, right) == 0


def test_results_of_the_cpu_are_the_reference_of_what_follows(tmp_path: Path) -> None:
    kept = str(tmp_path / "kept.npz")
    right, found = {"a": np.array([4.0, -8.0])}, {"a": np.array([4.0, -6.0])}
    assert gpu_row.compared(right, {"save": kept, "reference": None}) == {}
    assert gpu_row.compared(found, {"save": None, "reference": kept}) == {"max_error": 0.25}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MissingDependency("x"), {"skipped": "x"}),
        (HardwareError("x"), {"skipped": "x"}),
        (UsageError("x"), {"skipped": "x"}),
        (ArtifactError("x"), {"failed": "x"}),
        (TypeError("x"), {"failed": "TypeError: x"}),
    ],
)
def test_what_is_missing_is_no_failure(error: Exception, expected: dict[str, str]) -> None:
    assert refusal(error) == expected


def test_no_skipped_check_looks_like_a_result() -> None:
    assert "skipped: no GPU" in line(Row(**PLACE, skipped="no GPU"))
    assert "FAILED: bad" in line(Row(**PLACE, failed="bad"))
    measured = Row(**PLACE, p50_ms=1.0, p99_ms=2.0, items_per_s=900.0, gpu_memory_nbytes=3 * 10**9)
    assert line(measured).endswith("no reference p50 1.000 ms p99 2.000 ms 900.0/s 3.00 GB")
    assert line(replace(measured, mfu=0.5, mbu=0.25)).endswith("3.00 GB MFU 50% MBU 25%")
    assert "without graphs 1.500 ms" in line(replace(measured, p50_ms_without_graphs=1.5))
    assert "outputs on the GPU 0.500 ms" in line(replace(measured, p50_ms_on_device=0.5))
    assert line(replace(measured, backend="onnxruntime cpu", p50_ms=None)).endswith(
        "reference 3.00 GB"
    )


# --- rows in processes of their own --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import sys; open(sys.argv[2], 'w').write('{\"p50_ms\": 1.5}')", {"p50_ms": 1.5}),
        ("import os; os.abort()", {"failed": "the process ended with code -6: "}),
        ("raise SystemExit('no room')", {"failed": "the process ended with code 1: no room"}),
        ("import time; time.sleep(60)", {"failed": "took longer than 2 s"}),
    ],
)
def test_a_process_that_ends_badly_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, expected: dict[str, Any]
) -> None:
    (tmp_path / "row.py").write_text(program, encoding="utf-8")
    monkeypatch.setattr(gpu_check, "ROW", tmp_path / "row.py")
    assert bench(tmp_path, timeout=2).answer({"job": "component"}) == expected


def test_an_unexpected_error_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(job: Any) -> Any:
        raise TypeError("not this")

    monkeypatch.setitem(gpu_row.JOBS, "component", broken)
    monkeypatch.setattr(sys, "argv", ["gpu_row.py", '{"job": "component"}', str(tmp_path / "a")])
    gpu_row.main()
    assert json.loads((tmp_path / "a").read_text()) == {"failed": "TypeError: not this"}
    assert "Traceback" in capsys.readouterr().err


def test_rows_go_on_after_one_that_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def figures(self: Bench, model: Model, artifact: Any, component: str, place: Any) -> Any:
        if place == gpu_check.CPU:
            raise ValueError("broken")
        return {"p50_ms": 1.0}

    monkeypatch.setattr(Bench, "figures", figures)
    artifact = open_directory(tmp_path, ["vision", "matcher"])
    found = list(bench(tmp_path).rows(DEMO, artifact))
    assert [row.component for row in found] == ["vision"] * 5 + ["matcher"] * 5
    assert [row.failed for row in found[:2]] == ["ValueError: broken", None]
    assert found[4].backend == "torch-compile cuda"


def test_untimed_rows_have_the_cpu_first_and_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def answer(self: Bench, job: dict[str, Any]) -> dict[str, Any]:
        asked.append(job)
        return {}

    monkeypatch.setattr(Bench, "answer", answer)
    artifact = open_directory(tmp_path, ["vision", "decoder"])
    found = list(bench(tmp_path, untimed=True).rows(DEMO, artifact))
    assert [row.component for row in found[:3]] == ["vision", "decoder", "answers"]
    assert {row.backend for row in found[:3]} == {"onnxruntime cpu"}
    assert len(found) == 12
    assert not any("torch" in row.backend for row in found)
    assert {job["job"] for job in asked} == {"component", "answers"}
    assert not any(job["timed"] for job in asked)
    assert all((job["save"] is None) == (job["device"] == "cuda") for job in asked)


def test_directories_compiled_before_are_taken_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo-fp16").mkdir()
    open_directory(tmp_path / "demo-fp16", ["vision"])
    exported: list[str] = []
    monkeypatch.setattr(gpu_check, "targets", list)
    monkeypatch.setattr(gpu_check, "export", lambda *a: exported.append(a[2]) or "no")
    monkeypatch.setattr(Bench, "answer", lambda self, job: {})
    asking = bench(tmp_path, untimed=True, artifacts=tmp_path)
    found = list(gpu_check.check_model(DEMO, ["fp16", "int8"], asking))
    assert exported == ["int8"]
    assert [row.failed for row in found if row.precision == "int8"] == ["no"]
    assert (tmp_path / "demo-fp16").exists()


class Speaker:
    """A model of one picture."""

    def __init__(self, caption: str = "a red seven") -> None:
        self.said, self.modes = caption, list[str]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def encode_image(self, images: list[Any], mode: str) -> Array:
        self.modes.append(mode)
        return np.full((len(images), 2), 1.0 + len(mode), np.float32)

    def caption(self, images: list[Any], **how: Any) -> list[str]:
        return [self.said]


def test_answers_of_the_whole_model_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings and a caption; another caption is a row that failed."""
    kept, speaker = str(tmp_path / "kept.npz"), Speaker()
    monkeypatch.setattr(gpu_row, "load", lambda *_, **__: speaker)
    monkeypatch.setattr(gpu_row, "open_artifact", lambda out: open_directory(tmp_path, []))
    job = {"out": "", "backend": "onnxruntime", "device": "cpu", "timed": False, "seconds": 0.0}
    assert gpu_row.answers(job | {"save": kept, "reference": None}) == {}
    assert gpu_row.answers(job | {"save": None, "reference": kept}) == {"max_error": 0.0}
    assert speaker.modes == ["c", "g"] * 2
    speaker.said = "a red sevens"
    found = gpu_row.answers(job | {"save": None, "reference": kept})
    assert found["failed"] == "caption 'a red sevens', expected 'a red seven'"


def test_shares_are_of_the_peaks_of_the_same_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two kinds of products, measured once each; the better of the two bandwidths."""
    asked: list[tuple[str, ...]] = []

    def answer(self: Bench, job: dict[str, Any]) -> dict[str, Any]:
        asked.append((job["kind"], job["backend"], job["device"]))
        return {"operations": {job["kind"]: 1e9}, "bytes": 1e9 * len(asked)}

    work = Workload(operations={"int8": 10**6, "float32": 10**6}, weight_nbytes=10**6, io_nbytes=0)
    monkeypatch.setattr(Bench, "answer", answer)
    monkeypatch.setattr(gpu_check, "component_workload", lambda *_: work)
    artifact, asking = open_directory(tmp_path, ["vision"]), bench(tmp_path)
    for _ in range(2):
        found = asking.below_roof(artifact, "vision", ("tensorrt", "cuda"), 4.0)
    assert asked == [("int8", "tensorrt", "cuda"), ("float32", "tensorrt", "cuda")]
    assert found is not None
    assert found.mfu == pytest.approx(0.5)
    assert found.mbu == pytest.approx(0.125)


def test_peaks_that_cannot_be_measured_leave_no_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = Workload(operations={"int8": 10**6}, weight_nbytes=10**6, io_nbytes=0)
    monkeypatch.setattr(Bench, "answer", lambda self, job: {"failed": "no"})
    monkeypatch.setattr(gpu_check, "component_workload", lambda *_: work)
    artifact = open_directory(tmp_path, ["vision"])
    assert bench(tmp_path).below_roof(artifact, "vision", ("tensorrt", "cuda"), 4.0) is None


def test_an_engine_is_timed_with_graphs_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stand-ins of TensorRT and CUDA."""
    stand_ins = StandIns(tmp_path)
    opened: list[bool] = []

    def open_one(*args: Any, options: TrtOptions | None = None) -> TrtSession:
        graphs = (options or TrtOptions()).graphs
        opened.append(graphs)
        return stand_ins.open(graphs=graphs)

    monkeypatch.setattr(gpu_row, "open_artifact", lambda out: None)
    monkeypatch.setattr(gpu_row, "seeded_feeds", lambda *_: feeds_of(2, 3))
    monkeypatch.setattr(gpu_row, "require_backend", lambda name: name)
    free = iter([5 * 10**9, 3 * 10**9])
    monkeypatch.setattr(gpu_row, "free_nbytes", lambda device: next(free))
    monkeypatch.setattr(gpu_row, "open_component", open_one)
    job = {"out": "", "component": "vision", "batch": 1, "backend": "tensorrt", "device": "cuda"}
    job |= {"seconds": 0.0, "timed": True, "save": None, "reference": None}
    found = gpu_row.component(job)
    assert found.keys() <= Row.__dataclass_fields__.keys()
    assert found["gpu_memory_nbytes"] == 2 * 10**9
    assert found["p50_ms_without_graphs"] > 0
    assert "GPU Compute Time" in found["phases_ms"]
    assert opened == [True, False]


# --- what is checked -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "layers", "fitting"),
    [
        (80e9, 48, ["fp32", "fp16", "bf16", "int8", "fp8"]),
        (24e9, 48, ["fp16", "bf16", "int8", "fp8"]),  # 48 layers: 5.9 G weights
        (8e9, 48, ["int8", "fp8"]),
        (4e9, 4, ["fp32", "fp16", "bf16", "int8", "fp8"]),
        (4e9, 48, []),
    ],
)
def test_depths_are_what_the_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: float, layers: int, fitting: list[str]
) -> None:
    asked: list[list[str]] = []

    def check_model(model: Model, precisions: list[str], bench: Bench) -> Iterator[Row]:
        asked.append(precisions)
        yield Row(**PLACE)

    monkeypatch.setattr(gpu_check, "gpu_nbytes", lambda: int(memory))
    monkeypatch.setattr(gpu_check, "synthesize", lambda layers, path: None)
    monkeypatch.setattr(gpu_check, "check_model", check_model)
    found = list(gpu_check.check_depth(layers, list(gpu_check.NBYTES), bench(tmp_path)))
    assert asked == ([fitting] if fitting else [])
    skipped = [row for row in found if row.skipped is not None]
    assert len(skipped) == 5 - len(fitting)
    assert all("GB of GPU memory, found" in str(row.skipped) for row in skipped)


def test_without_a_gpu_the_depths_are_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "gpu_nbytes", lambda: None)
    (row,) = gpu_check.check_depth(48, ["fp32"], bench(tmp_path))
    assert "--layers 48 runs them on the CPU" in str(row.skipped)


def test_a_checkpoint_that_cannot_be_written_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def synthesize(layers: int, path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(gpu_check, "gpu_nbytes", lambda: 10**11)
    monkeypatch.setattr(gpu_check, "synthesize", synthesize)
    (row,) = gpu_check.check_depth(4, ["fp32"], bench(tmp_path))
    assert row.failed == "OSError: disk full"


def test_the_json_is_whole_after_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    counts: list[int] = []

    def check(bench: Bench) -> Iterator[Row]:
        for _ in range(2):
            yield Row(**PLACE, p50_ms=1.0, p99_ms=1.0, items_per_s=1.0)
            counts.append(len(json.loads(out.read_text())["rows"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "check", check)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main()
    assert counts == [1, 2]
    assert not json.loads(out.read_text())["is_complete"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_machine_without_a_gpu_has_no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(backend: str) -> str:
        raise HardwareError(backend)

    monkeypatch.setattr(gpu_check, "require_backend", refuse)
    assert gpu_check.targets() == []
