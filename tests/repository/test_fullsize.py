"""The real widths, a few blocks deep: what a step takes must not grow with the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from support.paths import ROOT

from internvl_edge.quantize.recipe import recipe_for

sys.path.insert(0, str(ROOT / "benchmarks"))
import fullsize

pytestmark = pytest.mark.slow

DEPTHS = (2, 4)


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


def grown(measured: dict[Any, Any], step: str, kind: str, of: str) -> float:
    """Memory that two more layers take, over their bytes in the checkpoint or the engine."""
    shallow, deep = (getattr(measured[step, n], f"peak_{kind}_nbytes") for n in DEPTHS)
    ratio: float = (deep - shallow) / (measured[of, DEPTHS[1]] - measured[of, DEPTHS[0]])
    return ratio


@pytest.mark.parametrize("step", ["synthetic", "bf16", "int8"])
def test_memory_does_not_grow_with_depth(measured: dict[Any, Any], step: str) -> None:
    """Loaded in float32, two more layers would take twice their bytes in bfloat16."""
    ratio = grown(measured, step, "anonymous", "size")
    assert ratio < 1.0, "allocators differ by some 0.3 GB from run to run"


def test_memory_compared_with_the_model(measured: dict[Any, Any]) -> None:
    """ONNX Runtime's quantizer takes 6.6 times the bytes of these four layers in bfloat16."""
    ratio = measured["int8", DEPTHS[1]].peak_rss_nbytes / measured["size", DEPTHS[1]]
    assert ratio < 2.4


def test_linking_writes_next_to_nothing(measured: dict[Any, Any]) -> None:
    assert measured["bf16", 4].written_nbytes < 50_000_000
    assert measured["bf16", 4].peak_rss_nbytes < 0.6e9


def test_synthesis_streams(measured: dict[Any, Any]) -> None:
    assert measured["synthetic", 4].peak_rss_nbytes < 300 * 2**20


def test_engine_weights_are_in_memory_once(measured: dict[Any, Any]) -> None:
    assert grown(measured, "engine-int8", "anonymous", "plan") < 1.2


def test_running_holds_the_weights_about_once(measured: dict[Any, Any]) -> None:
    assert grown(measured, "run", "rss", "plan") < 1.5
