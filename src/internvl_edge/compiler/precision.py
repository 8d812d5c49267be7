"""The recipe that a precision stands for."""

from __future__ import annotations

from dataclasses import replace

from internvl_edge.export.precision import (
    QUANTIZED,
    WEIGHT_ONLY,
    precisions_of_towers,
    require_precision,
)
from internvl_edge.quantize.recipe import Recipe, recipe_for

VISION_LAYERS = r"^vision_model\."
LANGUAGE_LAYERS = r"^(?!vision_model\.)"


def recipe_of(precision: str) -> Recipe | None:
    """Choose the default recipe of ``--precision``; None where nothing is quantized.

    Raises:
        UsageError: an unknown precision or component, or a tower with two precisions.
    """
    if "=" not in precision and precision not in WEIGHT_ONLY:
        require_precision(precision)
        return recipe_for(precision) if precision in QUANTIZED else None
    vision, language = precisions_of_towers(precision)
    if vision == language == "fp32":
        return None
    if "fp32" in (vision, language):
        one = recipe_for(vision if language == "fp32" else language)
        spared = VISION_LAYERS if vision == "fp32" else LANGUAGE_LAYERS
        return replace(one, name=precision, exclude=(*one.exclude, spared))
    outer, inner = recipe_for(vision), recipe_for(language)
    if vision == language:
        return replace(outer, name=precision)
    # one checkpoint is folded and rotated as a whole
    inner = replace(inner, fold=outer.fold, rotate=outer.rotate, shift=False)
    return replace(outer, name=precision, language=inner)


def is_quantized(precision: str) -> bool:
    """Tell whether a precision that ``recipe_of`` takes quantizes anything."""
    return recipe_of(precision) is not None
