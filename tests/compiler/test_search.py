"""The fewest layers in 16 bits: the search itself, and ``--precision auto`` on a small model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import write_vit

from internvl_edge import compiler
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.report import plots
from internvl_edge.errors import UsageError
from internvl_edge.quantize.recipe import Recipe, recipe_for
from internvl_edge.quantize.sensitivity import Sensitivity, exactly, fewest


def layers(count: int) -> list[Sensitivity]:
    return [
        Sensitivity(layer=f"block.{i}.fc", error=1.0 / (1 + i), parameters=10) for i in range(count)
    ]


@given(
    st.integers(1, 200),
    st.integers(0, 200),
    st.integers(1, 8),
)
def test_the_fewest_layers_are_found(count: int, enough: int, width: int) -> None:
    enough = min(enough, count)
    asked: list[int] = []

    def measure(levels: Sequence[int]) -> list[float]:
        asked.extend(levels)
        assert len(levels) <= width and list(levels) == sorted(set(levels))
        return [0.0 if k >= enough else 0.5 for k in levels]

    found = fewest(measure, layers(count), "cosine", 0.1, width)
    assert found.chosen.num_layers == enough
    assert found.chosen.nbytes == 10 * (count + enough)
    assert len(asked) == len(set(asked)), "no number is measured twice"
    assert [point.num_layers for point in found.frontier] == sorted(set(asked) | {enough})


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40), st.integers(1, 8))
def test_what_is_chosen_meets_the_budget_even_if_drops_do_not_fall(
    drops: list[float], width: int
) -> None:
    found = fewest(lambda ks: [drops[k] for k in ks], layers(len(drops)), "cosine", 0.3, width)
    k = found.chosen.num_layers
    assert k == len(drops) or drops[k] <= 0.3
    assert found.chosen.drop == (0.0 if k == len(drops) else drops[k])


def test_the_recipe_excludes_these_layers_and_no_others() -> None:
    found = fewest(lambda ks: [float(k < 2) for k in ks], layers(12), "cosine", 0.5, 4)
    recipe = found.recipe(recipe_for("int8"))
    excluded = [item.layer for item in layers(12) if recipe.excludes(item.layer)]
    assert excluded == ["block.0.fc", "block.1.fc"]
    assert not recipe.excludes("block.10.fc") and not recipe.excludes("block.1xfc")
    assert recipe.name == "int8-auto"
    assert exactly("a.b") == r"^a\.b$"


@pytest.mark.slow
def test_auto_leaves_the_worst_layer_in_16_bits(tmp_path: Path) -> None:
    written = write_vit(tmp_path / "checkpoint")
    options = ExportOptions(checkpoint=written.path, out=tmp_path / "out", precision="int8")
    plain, found = compiler.export_auto(options, 1.0)
    assert found.chosen.num_layers == 0 and plain.manifest.recipe["exclude"] == []
    budget = found.frontier[0].drop / 2
    artifact, found = compiler.export_auto(replace(options, force=True), budget)
    assert 0 < found.chosen.num_layers < len(found.ranking)
    assert found.chosen.drop <= budget
    below = [p for p in found.frontier if p.num_layers < found.chosen.num_layers]
    assert below and all(point.drop > budget for point in below)
    recipe = Recipe.from_json(json.loads(artifact.file("recipe.json").read_text()))
    assert list(recipe.exclude) == artifact.manifest.recipe["exclude"]
    assert len(recipe.exclude) == found.chosen.num_layers
    assert json.loads(artifact.file("search.json").read_text())["metric"] == "cosine"
    report = artifact.file("report.html").read_text()
    assert report.count('class="clip" cx=') >= 1 and "the filled point was chosen" in report
    assert compiler.verify(artifact.path, written.path)["vision"]["cosine"] > 0.99
    assert not list(tmp_path.glob(".out.search*")), "nothing is left behind"


def test_tasks_need_a_text_tower(tmp_path: Path) -> None:
    written = write_vit(tmp_path / "checkpoint")
    options = ExportOptions(checkpoint=written.path, out=tmp_path / "out", precision="int8")
    with pytest.raises(UsageError, match=r"recall@1 needs the components image_embed, text_embed"):
        compiler.export_auto(options, 0.1, "recall@1")


@pytest.mark.parametrize(("drop", "metric"), [(-0.1, "cosine"), (1.5, "cosine"), (0.1, "psnr")])
def test_budgets_and_metrics_that_cannot_be(tmp_path: Path, drop: float, metric: str) -> None:
    options = ExportOptions(checkpoint=tmp_path, out=tmp_path / "out", precision="int8")
    with pytest.raises(UsageError, match=r"--m"):
        compiler.export_auto(options, drop, metric)


def test_the_plot_of_a_frontier_holds_every_point() -> None:
    found = fewest(lambda ks: [0.5 / (1 + k) for k in ks], layers(12), "cosine", 0.2, 4)
    drawn = plots.frontier_plot(found.to_json())
    assert len(drawn.points) == len(found.frontier)
    assert sum(chosen for _, _, chosen, _ in drawn.points) == 1
    xs, ys = zip(*[(x, y) for x, y, _, _ in drawn.points], strict=True)
    assert list(xs) == sorted(xs), "larger to the right"
    assert list(ys) == sorted(ys), "smaller drops lie lower"
    assert all(0 <= x <= drawn.width for x in xs) and all(0 <= y <= drawn.height for y in ys)
    assert drawn.budget is not None
