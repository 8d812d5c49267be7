"""The notebooks, as Jupyter reads them: each cell runs, and none was committed with an output.

They are jupytext's Markdown. Their cells run here in this process, after one another, without a
kernel; ``demo-fp32``, which each of them compiles where it is missing, is compiled once.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from internvl_edge.compiler import ExportOptions, export

jupytext = pytest.importorskip("jupytext")

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.md"))


def read(path: Path) -> Any:
    return jupytext.read(path)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("notebooks") / "demo-fp32"
    export(ExportOptions(out=out, verify="none"))
    return out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_a_notebook_for_python(path: Path) -> None:
    notebook = read(path)
    assert notebook.metadata.kernelspec.language == "python"
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown"
    assert kinds.count("code") >= 4
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(
    path: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / compiled.name).symlink_to(compiled)
    monkeypatch.chdir(tmp_path)
    namespace = types.ModuleType("__main__").__dict__
    for number, cell in enumerate(read(path).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.name}:{number}", "exec"), namespace)


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 3
