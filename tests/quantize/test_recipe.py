"""Recipes: a JSON round trip that refuses what it does not know."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paths import ROOT

from internvl_edge.errors import InputError, UsageError
from internvl_edge.quantize.numerics.formats import FORMATS, WEIGHT_FORMATS
from internvl_edge.quantize.numerics.observers import RANGE_METHODS
from internvl_edge.quantize.recipe import (
    HEADS,
    PRESETS,
    FormatName,
    Recipe,
    WeightFormat,
    load_recipe,
    recipe_for,
)

FORMAT = st.sampled_from(["int8", "fp8"])


@given(
    fmt=FORMAT,
    method=st.sampled_from(RANGE_METHODS),
    percentile=st.floats(1e-3, 100.0),
    smooth=st.none() | st.floats(0.0, 1.0),
    exclude=st.lists(st.sampled_from([r"\.fc2$", "layers.0", "^a|b"]), max_size=3),
    base=st.sampled_from([None, "fp32", "fp16", "bf16"]),
    seed=st.integers(0, 2**40),
)
def test_json_round_trip(
    fmt: Any, method: Any, percentile: float, smooth: Any, exclude: Any, base: Any, seed: int
) -> None:
    recipe = Recipe(
        name="any",
        activations=fmt,
        weights=fmt,
        range_method=method,
        percentile=percentile,
        smooth=smooth,
        exclude=tuple(exclude),
        base=base,
        seed=seed,
    )
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize("precision", PRESETS)
def test_presets_are_recipes_of_their_precision(precision: str) -> None:
    recipe = recipe_for(precision)
    fmt, is_weight_only = precision.removesuffix("-wo"), precision.endswith("-wo")
    assert (recipe.name, recipe.weights, recipe.is_weight_only) == (precision, fmt, is_weight_only)
    assert recipe.activations == (None if is_weight_only else fmt)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_formats_and_presets_are_those_that_exist() -> None:
    assert set(get_args(FormatName)) == set(FORMATS) < set(PRESETS)
    assert set(get_args(WeightFormat)) == set(WEIGHT_FORMATS)
    assert {recipe_for(name).weights for name in PRESETS} == set(WEIGHT_FORMATS)


@pytest.mark.parametrize("precision", ["fp32", "int4", ""])
def test_unknown_precision_is_refused(precision: str) -> None:
    with pytest.raises(UsageError, match="int8, fp8"):
        recipe_for(precision)


def test_left_out_keys_keep_their_defaults() -> None:
    assert Recipe.from_json({"name": "mine"}) == Recipe(name="mine")


BAD: list[dict[str, Any]] = [
    {"activations": "int4", "weights": "int4"},
    {"activations": "fp8"},  # weights stay int8
    {"activations": "int8", "weights": "int4"},
    {"activations": None, "weights": "fp8"},
    {"activations": None, "smooth": 0.5},
    {"activations": None, "correct_bias": True},
    {"activations": None, "fold": True, "shift": True},
    {"block_size": 8},
    {"language": "int4-wo"},
    {"language": {"name": "b", "language": {"name": "c"}}},
    {"language": {"name": "b", "fold": True}},
    {"language": {"name": "b", "num_samples": 5}},
    {"attention": "int8"},
    {"attention": True},
    {"activations": "int8", "attention": "fp8"},
    {"language": {"name": "b", "activations": "fp8", "weights": "fp8", "attention": "fp8"}},
    {"activations": ["int8"]},
    {"granularity": "per-block"},
    {"rounding": "up"},
    {"rounding": None},
    {"range_method": "minmax"},
    {"percentile": 0},
    {"percentile": 100.5},
    {"percentile": float("nan")},
    {"percentile": True},
    {"percentile": "99"},
    {"smooth": -0.1},
    {"smooth": 1.5},
    {"smooth": False},
    {"smooth": "search"},
    {"rotate": 1},
    {"correct_bias": "yes"},
    {"rotation_seed": -1},
    {"head": "int4"},
    {"head": True},
    {"exclude": "fc2"},
    {"exclude": [3]},
    {"exclude": ["("]},
    {"exclude": ["a{99999999999999999999}"]},
    {"base": "fp8"},
    {"engine_base": "fp32"},
    {"engine_base": None},
    {"min_features": 0},
    {"min_features": 16.0},
    {"seed": -1},
    {"seed": True},
    {"num_samples": 0},
    {"name": ""},
    {"name": 3},
]


@pytest.mark.parametrize("change", BAD, ids=str)
def test_a_bad_value_is_refused_by_name(change: dict[str, Any]) -> None:
    names = "weights" if change == {"activations": "fp8"} else "|".join(change)
    with pytest.raises(InputError, match=f"recipe: ({names}) must be"):
        Recipe.from_json({"name": "mine"} | change)


@pytest.mark.parametrize("field", ["rotate", "shift"])
def test_what_needs_folding_is_refused_without(field: str) -> None:
    with pytest.raises(InputError, match=f"recipe: fold must be true with {field}"):
        Recipe(name="mine", **{field: True})  # type: ignore[arg-type]


def test_factors_after_gelu_need_the_shift_too() -> None:
    with pytest.raises(InputError, match="recipe: shift must be true with spread"):
        Recipe(name="mine", fold=True, spread=True)


@pytest.mark.parametrize("data", [None, [], "int8", 3])
def test_only_an_object_is_a_recipe(data: object) -> None:
    with pytest.raises(InputError, match="JSON object"):
        Recipe.from_json(data)


def test_unknown_and_missing_keys_are_named() -> None:
    with pytest.raises(InputError, match="also alpha, smoothing"):
        Recipe.from_json({"name": "mine", "smoothing": 0.5, "alpha": 1})
    with pytest.raises(InputError, match="no name"):
        Recipe.from_json({})


def test_excludes_finds_patterns_anywhere_in_the_name() -> None:
    recipe = Recipe(name="mine", exclude=(r"\.fc2$", r"layers\.0\."))
    assert recipe.excludes("vision_model.encoder.layers.7.mlp.fc2")
    assert recipe.excludes("vision_model.encoder.layers.0.attn.qkv")
    assert not recipe.excludes("vision_model.encoder.layers.10.attn.qkv")
    assert not recipe_for("int8").excludes("vision_model.encoder.layers.0.attn.qkv")


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe_for("int8").seed = 1  # type: ignore[misc]


def test_load_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"name": "mine", "smooth": None, "exclude": ["fc2"]}))
    assert load_recipe(path) == Recipe(name="mine", exclude=("fc2",))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"name": "a", "name": "b"}',
        '{"name": "a", "unknown": 1}',
        '{"name": "a", "seed": -1}',
        "[" * 100_000,
        '{"name": "' + "a" * (1 << 20) + '"}',
    ],
    ids=["empty", "cut", "twice", "unknown", "value", "deep", "large"],
)
def test_a_file_that_is_no_recipe_is_refused_by_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"recipe\.json: ") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json: not found; expected a recipe"):
        load_recipe(tmp_path / "nowhere.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary: .*; expected a recipe"):
        load_recipe(tmp_path / "binary")
    with pytest.raises(InputError, match="expected a recipe"):
        load_recipe(tmp_path)


def test_the_recipe_of_the_docs_is_one() -> None:
    found = load_recipe(ROOT / "docs" / "reference" / "recipes" / "demo-auto.json")
    assert len(found.exclude) == 4
    assert dataclasses.replace(found, name="int8", exclude=()) == recipe_for("int8")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("heads", [(None, "int8"), ("int8", None), ("int8", "int8")])
def test_a_head_has_a_recipe_of_its_own(name: str, heads: tuple[Any, Any]) -> None:
    """It may be of the language model's recipe, or of the one around it."""
    inner = replace(recipe_for("int4-wo"), head=heads[1], fold=True, rotate=True)
    outer = replace(recipe_for("int8"), language=inner, head=heads[0])
    for recipe in (outer.of(name), outer.of(f"{name}.weight")):
        assert (recipe.weights, recipe.activations, recipe.rounding) == ("int8", None, "nearest")
    assert outer.of("language_model.model.layers.0.mlp.up_proj") is inner
    assert replace(outer, language=None, head=None).of(name).head is None  # as it is stored
