"""The text of ``--precision``: one precision for all, or one for each tower.

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

from collections.abc import Sequence

from internvl_edge.artifact.components import COMPONENTS, VISION_PREFIX, find_component
from internvl_edge.errors import UsageError, did_you_mean

WEIGHT_ONLY = ("int8-wo", "int4-wo")
QUANTIZED = ("int8", "fp8", *WEIGHT_ONLY)
PRECISIONS = ("fp32", "fp16", "bf16", *QUANTIZED)
# What others call them.
ALIASES = {
    **dict.fromkeys(("int4", "w4a16", "4bit", "4-bit", "awq", "gptq", "nf4", "q4"), "int4-wo"),
    **dict.fromkeys(("w8a16", "int8-weight-only", "int8-weights", "q8"), "int8-wo"),
    **dict.fromkeys(("w8a8", "8bit", "8-bit", "qdq"), "int8"),
    **dict.fromkeys(("float8", "e4m3", "fp8-e4m3", "f8"), "fp8"),
    **dict.fromkeys(("half", "float16", "f16"), "fp16"),
    **dict.fromkeys(("bfloat16",), "bf16"),
    **dict.fromkeys(("float32", "float", "full", "f32", "tf32"), "fp32"),
}
OF_TOWERS = ("fp32", *QUANTIZED)  # what may stand after a tower's name


def precision_of(precision: str, component: str) -> str:
    """Read the precision of one component."""
    if "=" not in precision and precision not in WEIGHT_ONLY:
        return precision
    vision, language = precisions_of_towers(precision)
    return vision if find_component(component).tower == VISION_PREFIX else language


def precisions_of_towers(precision: str) -> tuple[str, str]:
    """Read the precisions of the vision tower and of the language model.

    Raises:
        UsageError: an unknown precision or component, or a tower with two precisions.
    """
    if precision in PRECISIONS:
        return ("fp32", precision) if precision in WEIGHT_ONLY else (precision, precision)
    known = [name for name, component in COMPONENTS.items() if component.stream is not None]
    named: dict[bool, tuple[str, str]] = {}  # is it the vision tower → component, precision
    for part in precision.split(","):
        name, _, value = (text.strip() for text in part.partition("="))
        if name not in known:
            raise UsageError(
                f"--precision {precision}: expected one of {', '.join(PRECISIONS)}, or "
                f"COMPONENT=PRECISION with a component of {', '.join(known)}, found "
                f"{part.strip()!r}{did_you_mean(name, known)}"
            )
        require_precision(value, OF_TOWERS)
        is_vision = COMPONENTS[name].tower == VISION_PREFIX
        other, before = named.setdefault(is_vision, (name, value))
        if before != value:
            raise UsageError(
                f"--precision {precision}: {other} and {name} read the same weights, expected one "
                f"precision for both, found {before} and {value}"
            )
    none = ("", "fp32")
    return named.get(True, none)[1], named.get(False, none)[1]


def precision_hint(value: str, choices: Sequence[str]) -> str:
    """Return a hint to append to an error: what the precision is called here; "" where unknown."""
    meant = ALIASES.get(value.strip().lower().replace("_", "-"))
    if meant in choices:
        return f"; {value} is called {meant} here"
    return did_you_mean(value, choices)


def require_precision(value: str, choices: tuple[str, ...] = PRECISIONS) -> None:
    """Refuse a precision that is not one of the choices.

    Raises:
        UsageError: with the nearest one.
    """
    if value not in choices:
        raise UsageError(
            f"precision must be one of {', '.join(choices)}, found {value!r}"
            f"{precision_hint(value, choices)}"
        )
