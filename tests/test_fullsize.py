"""The real widths, a few blocks deep: what a step takes must not grow with the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.quantize.recipe import recipe_for

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fullsize

DEPTHS = (2, 4)
PARAMETER_NBYTES = 2  # bfloat16
BASE_NBYTES = 600_000_000  # Python, PyTorch, the exporter and the builder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, int], Any]]:
    """Every step at both depths: (step, layers) → what it took, and sizes of checkpoints."""
    work = tmp_path_factory.mktemp("fullsize")
    recipe = recipe_for("int8").to_json() | {"num_samples": 2}
    (work / "recipe.json").write_text(json.dumps(recipe))
    found: dict[tuple[str, int], Any] = {}
    tool = [sys.executable, "-m", "internvl_edge"]
    for layers in DEPTHS:
        here = work / str(layers)
        here.mkdir()
        checkpoint = [sys.executable, "-m", "internvl_edge.export.synthetic", "internvit-6b-224"]
        bf16, int8 = (
            [*tool, "export", str(here / "checkpoint"), "-o", str(here / p), "-p", p]
            for p in ("bf16", "int8")
        )
        commands = {
            "synthetic": [*checkpoint, str(here / "checkpoint"), "--layers", str(layers)],
            "bf16": [*bf16, "--weights", "link", "--verify", "none"],
            "int8": [*int8, "--verify", "none", "--recipe", str(work / "recipe.json")],
            "engine-int8": [*tool, "build", str(here / "int8"), "--batch", "1,1,1"],
            "run": [sys.executable, fullsize.__file__, "--worker", "run", str(here / "int8")],
        }
        for step, command in commands.items():
            found[step, layers] = fullsize.measure(step, layers, command)
            assert found[step, layers].error is None, found[step, layers].error
        found["size", layers] = sum(
            path.stat().st_size for path in (here / "checkpoint").glob("*.safetensors")
        )
        (plan,) = (here / "int8" / "engines").glob("*.plan")
        found["plan", layers] = plan.stat().st_size
    yield found


@pytest.mark.parametrize("step", ["synthetic", "bf16", "int8"])
def test_memory_does_not_grow_with_depth(measured: dict[Any, Any], step: str) -> None:
    shallow, deep = (measured[step, layers].peak_anonymous_nbytes for layers in DEPTHS)
    more = measured["size", 4] - measured["size", 2]  # bfloat16; resident, they would be twice that
    assert deep - shallow < more, "allocators differ by some 0.3 GB from run to run"


def test_linking_writes_next_to_nothing(measured: dict[Any, Any]) -> None:
    assert measured["bf16", 4].written_nbytes < 50_000_000
    assert measured["bf16", 4].peak_rss_nbytes < 0.6e9


def test_synthesis_streams(measured: dict[Any, Any]) -> None:
    assert measured["synthetic", 4].peak_rss_nbytes < 300 * 2**20


def test_engine_weights_are_in_memory_once(measured: dict[Any, Any]) -> None:
    more = measured["plan", 4] - measured["plan", 2]
    grown = (
        measured["engine-int8", 4].peak_anonymous_nbytes
        - measured["engine-int8", 2].peak_anonymous_nbytes
    )
    assert grown < 1.2 * more


def test_running_holds_the_weights_about_once(measured: dict[Any, Any]) -> None:
    more = measured["plan", 4] - measured["plan", 2]
    grown = measured["run", 4].peak_rss_nbytes - measured["run", 2].peak_rss_nbytes
    assert grown < 1.5 * more
