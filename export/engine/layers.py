"""The layers of an engine, as its builder lists them in the log.

At detailed verbosity a builder ends with a text of one line for each layer:

    Name: fc1/MatMul_myl0_2, LayerType: gemm, Inputs: [ { Name: …, Datatype: Int8, … }],
    Constants: [ … ], Outputs: [ { …, Datatype: BFloat16, … }], TacticName: …, Metadata: …

TensorRT-RTX writes it without a GPU. TensorRT's lines are the same but for a word before the type,
and for networks that were not lowered as a whole: the kinds of those layers are others and their
products are not told apart.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from internvl_edge.artifact.census import MAX_NAMES, WIDE, Census
from internvl_edge.errors import BuildError

__all__ = ["LayerLog", "census_of", "require_fused"]

LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[(?P<outputs>.*?)\], TacticName: "
)
TENSOR = re.compile(r"Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
ORDINAL = re.compile(r"(?:_U\d+)?_myl\d+_\d+$")  # which the builder appends to a node's name
PRODUCT, FUSION = "gemm", "runtime_fusion"  # alone, and with what follows it
ATTENTION = re.compile(r"_gem[mv]_mha_")


class LayerLog:
    """The list of layers among what a builder logs."""

    def __init__(self) -> None:
        self._text = ""

    def take(self, message: str) -> None:
        """Keep a message that lists layers; of another build's, the last."""
        if "LayerType: " in message:
            self._text = message

    def census(
        self, precision: str, *, expected_attention: int, expected_8_bit: int
    ) -> Census | None:
        """Count the layers of the last engine; None where the builder listed none.

        Args:
            precision: of the component.
            expected_attention: attention layers that the target has fused kernels for.
            expected_8_bit: products that should be in 8 bits, at least.
        """
        return census_of(
            self._text,
            precision=precision,
            expected_attention=expected_attention,
            expected_8_bit=expected_8_bit,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    name: str
    kind: str
    inputs: tuple[tuple[int, str], ...]  # size, dynamic dimensions left out, and type
    constants: tuple[tuple[int, str], ...]
    outputs: tuple[tuple[int, str], ...]

    @property
    def factors(self) -> tuple[str, ...]:
        """Types of the two factors of a product; a weight is its largest constant.

        What a fusion adds is among its inputs too, often in another type than the factors.
        """
        size, weight = max(self.constants, default=(0, ""))
        types = [of for _, of in self.inputs]
        if size <= 1:
            return tuple(types[:2])
        return (weight if weight in types else types[0] if types else "", weight)

    @property
    def is_wide(self) -> bool:
        writes = any(of == WIDE for _, of in self.outputs)
        return WIDE in self.factors or (self.kind == PRODUCT and writes)

    def __str__(self) -> str:
        written = ", ".join(dict.fromkeys(of for _, of in self.outputs))
        return f"{' · '.join(self.factors)} → {written}"


def census_of(text: str, **expected: Any) -> Census | None:
    """Count the layers of a list; None where it has none."""
    layers = list(_layers(text))
    if not layers:
        return None
    products = [layer for layer in layers if layer.kind in (PRODUCT, FUSION)]
    wide = [layer.name for layer in products if layer.is_wide]
    return Census(
        layers=dict(sorted(Counter(layer.kind for layer in layers).items())),
        fused_attention=sum(bool(ATTENTION.search(layer.name)) for layer in layers),
        products=dict(Counter(map(str, products)).most_common()),
        wide_products=tuple(ORDINAL.sub("", name) for name in wide[:MAX_NAMES]),
        num_wide_products=len(wide),
        **expected,
    )


def _layers(text: str) -> Iterator[_Layer]:
    for line in text.splitlines():
        match = LAYER.match(line.strip())
        if match:
            yield _Layer(
                name=match["name"],
                kind=match["kind"],
                inputs=_tensors(match["inputs"]),
                constants=_tensors(match["constants"] or ""),
                outputs=_tensors(match["outputs"]),
            )


def _tensors(text: str) -> tuple[tuple[int, str], ...]:
    return tuple(
        (math.prod(int(n) for n in dimensions.split(",") if int(n or 0) > 0), of)
        for dimensions, of in TENSOR.findall(text)
    )


def require_fused(component: str, census: Census | None) -> None:
    """Refuse an engine that is slower than its graph allows.

    Raises:
        BuildError: attention was decomposed, or products are not in the types of the graph.
    """
    lost = ["the builder did not list its layers, so that nobody can tell"]
    if census is not None:
        lost = census.regressions()
    if lost:
        raise BuildError(
            f"{component}: expected fused layers: {'; '.join(lost)}; leave --expect-fused out to "
            "have this engine"
        )
