"""The census of an engine: its layers by kind, and the types of its matrix products.

A builder decides what becomes one kernel, and in which types; how fast an engine is follows from
that. It says so in its log, of every engine and without a GPU. What counts:

    attention     a fused kernel reads q, k and v once; three products write scores in between
    sums          a product that writes Float hands four bytes a value to the kernel after it;
                  with a fusion after it in the same kernel, what it writes is the graph's choice
    factors       8-bit values, where the graph is quantized; Float products have no tensor cores
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Census"]

WIDE = "Float"
IN_8_BITS = ("Int8 · Int8", "FP8 · FP8")
MAX_NAMES = 16  # of products that are listed


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What a builder made of a graph; of an engine with several profiles, for all of them."""

    precision: str  # of the component: where all have one, or each tower its own
    layers: Mapping[str, int]  # the builder's kind → how many
    fused_attention: int  # kernels of a whole attention
    expected_attention: int  # attention layers that the target has such kernels for
    expected_8_bit: int  # products that the graph's pairs ask for, at least
    products: Mapping[str, int]  # "Int8 · Int8 → BFloat16" → how many
    wide_products: tuple[str, ...]  # the first of those that read Float, or write it for others
    num_wide_products: int

    @property
    def num_8_bit_products(self) -> int:
        return sum(n for types, n in self.products.items() if types.startswith(IN_8_BITS))

    def regressions(self) -> list[str]:
        """Say what the builder lost of what the graph allows."""
        lost = []
        if self.fused_attention < self.expected_attention:
            lost.append(
                f"{self.fused_attention} of {self.expected_attention} attention layers are one "
                "kernel"
            )
        if self.precision != "fp32" and self.num_wide_products:
            lost.append(
                f"{self.num_wide_products} products read or write {WIDE}, such as "
                f"{self.wide_products[0]}"
            )
        if self.num_8_bit_products < self.expected_8_bit:
            lost.append(
                f"{self.num_8_bit_products} products in 8 bits for {self.expected_8_bit} "
                "quantized inputs"
            )
        return lost

    def lines(self) -> list[str]:
        """Say it in words, and what was lost."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.layers.items())
        types = ", ".join(f"{n} × {types}" for types, n in self.products.items())
        lost = [f"lost: {loss}" for loss in self.regressions()]
        fused = f"fused attentions: {self.fused_attention}"
        return [f"layers: {kinds}; {fused}", f"products: {types}", *lost]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: object) -> Census | None:
        """Invert ``to_json`` after a pass through JSON; None stays None.

        Raises:
            ValueError, TypeError: a key is missing, unknown or of the wrong kind.
        """
        if raw is None:
            return None
        if not isinstance(raw, dict) or raw.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"expected a census, found {raw!r:.80}")
        names = raw["wide_products"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected names of products, found {names!r:.80}")
        if not isinstance(raw["precision"], str):
            raise TypeError(f"expected a precision, found {raw['precision']!r:.80}")
        return cls(
            precision=raw["precision"],
            layers=_counts(raw["layers"]),
            fused_attention=_count(raw["fused_attention"]),
            expected_attention=_count(raw["expected_attention"]),
            expected_8_bit=_count(raw["expected_8_bit"]),
            products=_counts(raw["products"]),
            wide_products=tuple(names),
            num_wide_products=_count(raw["num_wide_products"]),
        )


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a number from 0 on, found {value!r:.80}")
    return value


def _counts(value: object) -> dict[str, int]:
    if not isinstance(value, dict):
        raise TypeError(f"expected counts by name, found {value!r:.80}")
    return {str(name): _count(n) for name, n in value.items()}
