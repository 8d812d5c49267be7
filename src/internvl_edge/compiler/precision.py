"""What ``--precision`` says: one precision for all, or one for each tower.

The components of a tower read the same weights, so a precision belongs to a tower:

    vision      the vision tower: vision, image_embed
    decoder     the language model: decoder, and where they are there text_embed, matcher and
                image_queries, which run the same blocks

``vision=int8,decoder=int4-wo`` names them by any of their components. A tower that is not named
is not quantized: float32 in ONNX Runtime's graphs, 16 bits in those for engines. Weight-only
precisions pay where weights are read for one token at a time: alone, ``int4-wo`` is
``decoder=int4-wo``.
"""

from __future__ import annotations

from dataclasses import replace

from internvl_edge.errors import UsageError, did_you_mean
from internvl_edge.export.towers.blocks import COMPONENT_STREAM, VISION_PREFIX, tower_of
from internvl_edge.quantize.recipe import Recipe, recipe_for

WEIGHT_ONLY = ("int8-wo", "int4-wo")
QUANTIZED = ("int8", "fp8", *WEIGHT_ONLY)
PRECISIONS = ("fp32", "fp16", "bf16", *QUANTIZED)
OF_TOWERS = ("fp32", *QUANTIZED)  # what may stand behind a tower's name
VISION_LAYERS = r"^vision_model\."
LANGUAGE_LAYERS = r"^(?!vision_model\.)"


def recipe_of(precision: str) -> Recipe | None:
    """The default recipe of ``--precision``; None where nothing is quantized.

    Raises:
        UsageError: an unknown precision or component, or a tower with two precisions.
    """
    if "=" not in precision and precision not in WEIGHT_ONLY:
        _require(precision, PRECISIONS)
        return recipe_for(precision) if precision in QUANTIZED else None
    vision, language = towers(precision)
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


def precision_of(precision: str, component: str) -> str:
    """The precision of one component."""
    if "=" not in precision and precision not in WEIGHT_ONLY:
        return precision
    vision, language = towers(precision)
    return vision if tower_of(component) == VISION_PREFIX else language


def is_quantized(precision: str) -> bool:
    """Whether a precision that ``recipe_of`` takes quantizes anything."""
    return recipe_of(precision) is not None


def towers(precision: str) -> tuple[str, str]:
    """The precisions of the vision tower and of the language model.

    Raises:
        UsageError: as ``recipe_of``.
    """
    if precision in PRECISIONS:
        return ("fp32", precision) if precision in WEIGHT_ONLY else (precision, precision)
    found: dict[bool, tuple[str, str]] = {}  # is it the vision tower → component, precision
    for part in precision.split(","):
        name, _, value = (text.strip() for text in part.partition("="))
        if name not in COMPONENT_STREAM:
            raise UsageError(
                f"--precision {precision}: expected one of {', '.join(PRECISIONS)}, or "
                f"COMPONENT=PRECISION with a component of {', '.join(COMPONENT_STREAM)}, found "
                f"{part.strip()!r}{did_you_mean(name, COMPONENT_STREAM)}"
            )
        _require(value, OF_TOWERS)
        is_vision = tower_of(name) == VISION_PREFIX
        other, before = found.setdefault(is_vision, (name, value))
        if before != value:
            raise UsageError(
                f"--precision {precision}: {other} and {name} read the same weights, expected one "
                f"precision for both, found {before} and {value}"
            )
    none = ("", "fp32")
    return found.get(True, none)[1], found.get(False, none)[1]


def _require(value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(
            f"precision must be one of {', '.join(choices)}, found {value!r}"
            f"{did_you_mean(value, choices)}"
        )
