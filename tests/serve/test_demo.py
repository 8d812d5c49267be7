"""``make serve`` and ``make bench-serve``, on something small."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from internvl_edge.compiler import ExportOptions
from internvl_edge.runtime.images.decode import image_size

sys.path.insert(0, str(ROOT / "examples"))
import serve_demo


@pytest.mark.slow
def test_the_demo_is_compiled_and_drawn_once(
    tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    made: list[str] = []

    def export(options: ExportOptions) -> None:
        made.append(options.precision)
        shutil.copytree(compiled, options.out)

    monkeypatch.setattr(serve_demo, "export", export)
    monkeypatch.setattr(serve_demo, "NUM_PICTURES", 3)
    for _ in range(2):
        served = serve_demo.prepare(tmp_path)
        assert served == [f"int8={tmp_path / 'int8'}", f"fp32={tmp_path / 'fp32'}"]
    assert made == ["int8", "fp32"]
    drawn = sorted((tmp_path / "pictures").iterdir())
    assert [image_size(path.read_bytes()) for path in drawn] == [(48, 48)] * 3


@pytest.mark.slow
def test_the_load_generator_compares_every_answer(tmp_path: Path, compiled: Path) -> None:
    script, result = ROOT / "benchmarks" / "serve.py", tmp_path / "found.json"
    few = ["--clients", "4", "--seconds", "1", "--rounds", "5", "--json", str(result)]
    subprocess.run(
        [sys.executable, str(script), str(compiled), *few], check=True, capture_output=True
    )
    found = json.loads(result.read_text())
    assert found["exit_code"] == 0
    assert found["load"]["wrong"] == 0
    assert found["load"]["statuses"].keys() == {"200"}
    assert found["load"]["statuses"]["200"] > 4
    assert found["overhead"]["rounds"] == 5
