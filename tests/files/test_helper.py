"""Processes of our own: code of the current folder and of PYTHON* variables does not run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_edge.files import helper
from internvl_edge.files.helper import run_helper

MINE = """
import json, sys
def main():
    import fractions
    print(json.dumps([sys.argv[1:], fractions.__file__]))
"""


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder whose modules have the names of Python's own."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in ("fractions", "json", "importlib", "sitecustomize", "usercustomize"):
        (folder / f"{name}.py").write_text("raise SystemExit('code of the folder ran')")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_helper.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return "my_helper"


def test_a_helper_runs_with_its_arguments_and_pythons_modules(trap: Path, mine: str) -> None:
    for name in ("PYTHONPATH", "PYTHONSTARTUP", "PYTHONUSERBASE"):
        os.environ[name] = str(trap)
    done = run_helper(mine, ["a b", "--c"])
    assert done.returncode == 0, done.stderr
    arguments, file = json.loads(done.stdout)
    assert arguments == ["a b", "--c"]
    assert not Path(file).is_relative_to(trap)


def test_a_helper_is_told_of_a_current_folder_in_no_way(
    trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper.sys, "path", ["", str(trap), "/usr/lib", *sys.path])
    places = helper._import_path()
    assert "" not in places
    assert str(trap) not in places
    assert places[0] == "/usr/lib"


def test_benchmark_measures_memory_in_a_folder_of_traps(trap: Path) -> None:
    """The command's own process is started as a console script is, without the current folder."""
    code = """
import sys
sys.path[:] = [p for p in sys.path if p]
from internvl_edge.benchmark.footprint import measure_footprint
print(measure_footprint("nowhere", "vision", "onnxruntime", 1).failed)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "nowhere" in done.stdout
    assert "code of the folder ran" not in done.stdout + done.stderr
