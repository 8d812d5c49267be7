"""What importing costs, and what it must not bring in."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from support.paths import ROOT

import internvl_edge
from internvl_edge import runtime

HEAVY = [
    "PIL",
    "click",
    "cuda",
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "rich",
    "safetensors",
    "sentencepiece",
    "skimage",
    "sklearn",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "transformers",
]


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return set(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "import internvl_edge",
        "import internvl_edge.runtime",
        "from internvl_edge import load, open_session",
        "from internvl_edge import OrtOptions, TrtOptions",
        "import internvl_edge.benchmark.timing",
    ],
)
def test_importing_brings_nothing_heavy(statement: str) -> None:
    modules = modules_after(statement)
    assert modules.isdisjoint(HEAVY)
    ours = {name for name in modules if name.startswith("internvl_edge.")}
    layers = {name.split(".")[1] for name in ours}
    assert layers.isdisjoint({"export", "quantize", "compiler", "cli", "demo"})


def test_the_root_alone_does_not_need_numpy() -> None:
    assert "numpy" not in modules_after("import internvl_edge; internvl_edge.InternVLError")


def test_the_folder_is_not_a_package_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import runtime"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode != 0
    assert "ImportError: import internvl_edge.runtime" in done.stderr


@pytest.mark.parametrize("module", [internvl_edge, runtime])
def test_public_names(module: object) -> None:
    names: list[str] = module.__all__  # type: ignore[attr-defined]
    assert names == sorted(names)
    assert all(hasattr(module, name) for name in names)
    assert set(names) <= set(dir(module))


def test_lazy_names_are_the_runtimes() -> None:
    assert internvl_edge.load is runtime.load
    assert internvl_edge.open_session is runtime.open_session


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        internvl_edge.lod  # noqa: B018
