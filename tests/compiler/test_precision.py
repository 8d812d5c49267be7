"""What ``--precision`` means for each tower, and what it refuses."""

from __future__ import annotations

import pytest

from internvl_edge.compiler.precision import recipe_of
from internvl_edge.errors import UsageError
from internvl_edge.export.engine.targets import first_sm
from internvl_edge.export.precision import PRECISIONS, precision_of
from internvl_edge.quantize.recipe import Recipe, recipe_for

VISION = "vision_model.encoder.layers.0.attn.qkv"
LANGUAGE = "qllama.model.layers.0.mlp.up_proj"


def formats(precision: str) -> tuple[str | None, str | None]:
    """The format of a vision and of a language layer's weights, with -wo for weights alone."""
    recipe = recipe_of(precision)

    def fmt(name: str) -> str | None:
        if recipe is None or recipe.of(name).excludes(name):
            return None
        one = recipe.of(name)
        return one.weights + ("-wo" if one.is_weight_only else "")

    return fmt(VISION), fmt(LANGUAGE)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp16", (None, None)),
        ("int8", ("int8", "int8")),
        ("fp8", ("fp8", "fp8")),
        ("int8-wo", (None, "int8-wo")),
        ("int4-wo", (None, "int4-wo")),
        ("decoder=int4-wo", (None, "int4-wo")),
        ("vision=int8", ("int8", None)),
        ("vision=int8,decoder=int4-wo", ("int8", "int4-wo")),
        ("decoder=int8-wo, image_embed=fp8", ("fp8", "int8-wo")),
        ("vision=int8-wo,decoder=int4-wo", ("int8-wo", "int4-wo")),
        ("matcher=int8,decoder=int8", (None, "int8")),
        ("vision=int8,decoder=int8", ("int8", "int8")),
        ("vision=fp32,decoder=fp32", (None, None)),
    ],
)
def test_a_precision_belongs_to_a_tower(
    precision: str, expected: tuple[str | None, str | None]
) -> None:
    assert formats(precision) == expected
    recipe = recipe_of(precision)
    assert recipe is None or Recipe.from_json(recipe.to_json()) == recipe


def test_a_mixed_recipe_is_folded_as_one() -> None:
    recipe = recipe_of("vision=int8,decoder=int4-wo")
    assert recipe is not None and recipe.language is not None
    assert recipe.rotate and recipe.language.rotate
    assert recipe.language.smooth == recipe_for("int4-wo").smooth


def test_components_are_held_to_their_own_precision() -> None:
    mixed = "vision=int8,decoder=int4-wo"
    assert [precision_of(mixed, name) for name in ("vision", "image_embed", "matcher")] == [
        *("int8", "int8", "int4-wo")
    ]
    assert precision_of("int4-wo", "vision") == "fp32"
    assert precision_of("fp16", "decoder") == "fp16"


def test_engines_need_what_their_widest_demand_needs() -> None:
    assert [first_sm(p) for p in ("int8", "vision=fp8,decoder=int4-wo", "int8-wo")] == [80, 89, 80]


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("int5", ", ".join(PRECISIONS)),
        ("int4-w", "did you mean"),
        ("visoin=int8", "did you mean"),
        ("vision=int8,", "expected one of"),
        ("vision=fp16", "fp32, int8, fp8, int8-wo, int4-wo, found 'fp16'"),
        ("decoder=int8,matcher=fp8", "read the same weights"),
        ("vision=", "found ''"),
    ],
)
def test_what_cannot_be_is_refused(precision: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of(precision)
