"""What would make a compiled component more accurate, in words: the layers, and what to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from internvl_edge.export.precision import precision_of

EXACT_DB = 150.0  # of what is not rounded
SPARING = "a recipe that excludes them keeps them in 16 bits (docs/howto/accuracy.md)"
CALIBRATING = "--calib with images as it will see calibrates on those"
REMEDIES = {
    "fp16": "try bf16, whose range is float32's, or fp32",
    "bf16": "try fp16, whose numbers are eight times as fine, or fp32",
    "int8": f"try --precision auto --max-drop 0.001, which leaves such layers in 16 bits; "
    f"{SPARING}; {CALIBRATING}",
    "fp8": f"{SPARING}; try int8, whose recipe moves outliers; {CALIBRATING}",
    "int8-wo": f"{SPARING}; try fp16",
    "int4-wo": f'try int8-wo, or a recipe with "block_size": 32 or "rounding": "gptq"; {SPARING}',
}


def advice(precision: str, costly: Sequence[Mapping[str, Any]]) -> str:
    """Say which layers lose most to rounding, and what would help.

    Args:
        precision: of the component.
        costly: layers with the figures that ``costly_words`` reads.
    """
    remedy = REMEDIES.get(precision, "try fp32")
    return f"{costly_words(costly)}; {remedy}" if costly else remedy


def advice_of(precision: str, component: str, costly: Sequence[Mapping[str, Any]]) -> str:
    """Say the same of a component of a directory, whose towers may differ in precision."""
    return advice(precision_of(precision, component), costly)


def costly_words(costly: Sequence[Mapping[str, Any]]) -> str:
    """Name the layers that lose most, with the SQNR of their inputs and weights."""
    return "most is lost in " + ", ".join(map(_layer, costly))


def _layer(figures: Mapping[str, Any]) -> str:
    kinds = ("inputs", figures["input_sqnr_db"]), ("weights", figures["weight_sqnr_db"])
    rounded = [f"{kind} {value:.1f} dB" for kind, value in kinds if value < EXACT_DB]
    return f"{figures['layer']} ({', '.join(rounded)})" if rounded else str(figures["layer"])
