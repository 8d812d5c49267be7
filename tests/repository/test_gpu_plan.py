"""The plan of a GPU's ten minutes: what is measured again, and what is decided by the rows."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_plan
from gpu_plan import Rows, carry_out, decisions, is_done

PRODUCTS: list[dict[str, Any]] = [
    {"format": "bf16", "rows": 257, "sum_us": 150.0},
    {"format": "bf16 + bias", "rows": 257, "sum_us": 120.0},
    {"format": "bf16 [K,N]", "rows": 257, "sum_us": 153.0},
    {"format": "fp8", "rows": 257, "sum_us": 60.0},
    {"format": "int8", "rows": 257, "sum_us": 148.5},
    {"format": "fp8", "rows": 2056, "failed": "no such type"},
]


def wanted(**given: Any) -> Namespace:
    return Namespace(**{"minutes": 1.0, "layers": 2, "batches": [1]} | given)


def test_nothing_is_decided_without_rows() -> None:
    assert decisions({}) == []
    assert decisions({"products": [{"failed": "x"}], "tower": [{"failed": "x"}]}) == []


def test_products_decide_on_8_bits() -> None:
    said = decisions({"products": PRODUCTS})
    assert "batch 1: FP8 products take 0.40 of bf16's: an engine is worth it" in said
    assert "batch 1: INT8 products take 0.99 of bf16's: not worth it" in said
    assert "batch 1: bf16 products with a bias take 0.80 of bf16's" in said
    assert "batch 1: bf16 weights as [K,N] take 1.02 of those as [N,K]" in said
    assert len(said) == 4


@pytest.mark.parametrize(
    ("block_us", "verdict"),
    [(150.0, "1.00 times torch.compile: faster"), (157.0, "close"), (160.0, "slower")],
    ids=["faster", "close", "slower"],
)
def test_a_tower_is_compared_at_its_own_batch(block_us: float, verdict: str) -> None:
    tower = {"runs": "X.onnx", "graphs": True, "batch": 1, "block_us": block_us}
    rows: Rows = {
        "torch": [{"batch": 1, "block_us": 150.0}],
        "tower": [tower, tower | {"batch": 8}],
    }
    (said,) = decisions(rows)
    assert said.startswith("batch 1: X.onnx, CUDA graphs: ") and said.endswith(verdict)


def test_attention_and_a_decoder_decide() -> None:
    token = {"runs": "X.onnx", "graphs": False, "token_us": 130.0}
    rows: Rows = {
        "attention": [{"batch": 1, "flash_us": 18.0, "cudnn_us": 10.5}, {"batch": 8}],
        "decoder": [token, token | {"graphs": True, "token_us": 100.0}],
    }
    assert decisions(rows) == [
        "batch 1: cuDNN's attention saves 7.5 µs a block",
        "decoder, X.onnx: 1.30 times as fast as a CUDA graph: capture it",
    ]


def test_only_what_is_missing_or_failed_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    monkeypatch.setattr(gpu_plan, "perform", lambda name, *_: measured.append(name) or [{"us": 1}])
    rows: Rows = {"products": [{"sum_us": 1.0}], "copies": [{"failed": "x"}]}
    found = dict(carry_out(["products", "attention", "copies"], rows, wanted(), tmp_path))
    assert measured == ["attention", "copies"]
    assert found == {"attention": [{"us": 1}], "copies": [{"us": 1}]}


def test_a_format_that_a_gpu_lacks_is_a_finding() -> None:
    assert is_done(PRODUCTS)
    assert not is_done([]) and not is_done([{"failed": "x"}])


def test_what_has_no_time_left_waits_for_the_next_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(carry_out(["products"], {}, wanted(minutes=0.0), tmp_path)) == []
    assert "products: no time is left; call again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiler_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tower-2-checkpoint").write_text("no folder", encoding="utf-8")
    ((name, rows),) = carry_out(["tower"], {}, wanted(), tmp_path)
    assert name == "tower" and not is_done(rows)
    assert "tower-2-checkpoint" in rows[0]["failed"]


def test_an_experiment_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(gpu_plan, "WORKER", worker)
    worker.write_text("raise SystemExit('the GPU is gone')", encoding="utf-8")
    assert gpu_plan.perform("copies", {}, 60.0) == [{"failed": "the GPU is gone"}]
    worker.write_text("import time; time.sleep(60)", encoding="utf-8")
    assert gpu_plan.perform("copies", {}, 0.5) == [{"failed": "took longer than 0 s"}]


def test_rows_of_another_depth_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    monkeypatch.setattr(gpu_plan, "environment", dict)
    gpu_plan.save(path, {"products": PRODUCTS}, wanted(layers=2))
    assert gpu_plan.load(path, 2, [1]) == {"products": PRODUCTS}
    assert gpu_plan.load(path, 3, [1]) == gpu_plan.load(path, 2, [1, 8]) == {}
    assert json.loads(path.read_text(encoding="utf-8"))["decisions"] == decisions(
        {"products": PRODUCTS}
    )


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_plan, "gpu_count", int)
    monkeypatch.setattr(sys, "argv", ["gpu_plan.py"])
    gpu_plan.main()
    assert capsys.readouterr().err == "skipped: the plan needs a CUDA device, found none\n"
