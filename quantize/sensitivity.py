"""The fewest layers to leave in 16 bits for an accuracy budget: which ones, and how many.

Every quantized layer adds an error to the residual stream, and errors of different layers are
close to independent, so their energies add. The layer whose own error is largest is therefore the
one to leave in 16 bits first. A layer's sensitivity is the relative error of its block's output
when this layer alone is quantized:

    e = Σ |ŷ − y|² / Σ |y|²       ŷ: the block with this layer quantized and no other

The cost of a set of layers is measured, never added up: the drop of a metric with the k most
sensitive layers in 16 bits. It falls with k, apart from noise, so the smallest k that meets the
budget is bracketed from both sides, with several k at a time where one pass over the weights can
try them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from internvl_edge.quantize.recipe import Recipe

Measure = Callable[[Sequence[int]], Sequence[float]]  # numbers of 16-bit layers → drops


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """A linear layer, and the error that its quantization causes."""

    layer: str  # full name, without the ".weight"
    error: float  # e above, in the stream where it is largest
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of the frontier between accuracy and size."""

    num_layers: int  # in 16 bits
    nbytes: int  # of the weights of all ranked layers
    drop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """The result of a search: the ranking, the points measured, and the one chosen."""

    metric: str
    max_drop: float
    ranking: tuple[Sensitivity, ...]  # the most sensitive first
    frontier: tuple[Point, ...]  # every point that was measured, by number of layers
    chosen: Point

    def recipe(self, base: Recipe) -> Recipe:
        """Return the base recipe with the chosen layers left in 16 bits."""
        layers = [item.layer for item in self.ranking[: self.chosen.num_layers]]
        return replace(
            base, name=f"{base.name}-auto", exclude=(*base.exclude, *map(exactly, layers))
        )

    def to_json(self) -> dict[str, Any]:
        """Return the search as JSON types."""
        return asdict(self)


def exactly(layer: str) -> str:
    """Return the recipe's pattern that excludes this layer and no other."""
    return f"^{re.escape(layer)}$"


def fewest(
    measure: Measure, ranking: Sequence[Sensitivity], metric: str, max_drop: float, width: int
) -> Search:
    """Find how many of the ranking's first layers to leave in 16 bits to meet a budget.

    Args:
        measure: gives the drops of the metric for several numbers of layers, in rising order.
        ranking: all layers that could be left in 16 bits, the most sensitive first.
        metric: its name, for the record.
        max_drop: the budget; with every layer in 16 bits the drop is assumed to be zero.
        width: how many numbers to measure at a time.
    """
    drops: dict[int, float] = {}
    failing, passing = -1, len(ranking)
    while passing - failing > 1:
        levels = _between(failing, passing, width)
        drops |= dict(zip(levels, measure(levels), strict=True))
        passing = min([k for k in levels if drops[k] <= max_drop], default=passing)
        failing = max([k for k in levels if k < passing], default=failing)
    drops.setdefault(passing, 0.0)
    frontier = tuple(
        Point(num_layers=k, nbytes=_nbytes(ranking, k), drop=drops[k]) for k in sorted(drops)
    )
    return Search(
        metric=metric,
        max_drop=max_drop,
        ranking=tuple(ranking),
        frontier=frontier,
        chosen=next(point for point in frontier if point.num_layers == passing),
    )


def _between(failing: int, passing: int, width: int) -> list[int]:
    """Return up to ``width`` numbers between two: powers of two at first, then evenly spaced."""
    if failing < 0 and width > 1:
        first = [0, *(2**i for i in range(width - 1))]
        return [k for k in first if k < passing]
    gap = passing - failing
    steps = min(width + 1, gap)
    return sorted({failing + gap * i // steps for i in range(1, steps)} - {failing}) or [
        failing + 1
    ]


def _nbytes(ranking: Iterable[Sensitivity], num_layers: int) -> int:
    """Count the bytes: 8 bits per weight, and 16 per weight of the first layers."""
    return sum(item.parameters * (2 if i < num_layers else 1) for i, item in enumerate(ranking))
