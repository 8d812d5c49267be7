"""The fewest layers in 16 bits that meet a budget: the order they are taken in, and how many.

Every quantized layer adds an error to the residual stream, and errors of different layers are
close to independent, so their energies add. The layer whose own error is largest is therefore the
one to leave in 16 bits first. Its sensitivity is the error that it alone brings into what its
block gives, relative to that:

    e = Σ |ŷ − y|² / Σ |y|²       ŷ: the block with this layer quantized and no other

What a set of layers costs is measured, never added up: the drop of a metric with the k most
sensitive layers in 16 bits. It falls with k but for noise, so the smallest k that meets the budget
is closed in on from both sides, a few k at a time where one pass over the weights can try several.
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
    """A linear layer, and what its quantization costs."""

    layer: str  # full name, without the ".weight"
    error: float  # e above, of the stream where it is largest
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of the frontier between accuracy and size."""

    num_layers: int  # in 16 bits
    nbytes: int  # of the weights of all layers that were ranked
    drop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search that found its recipe."""

    metric: str
    max_drop: float
    ranking: tuple[Sensitivity, ...]  # the most sensitive first
    frontier: tuple[Point, ...]  # every point that was measured, by number of layers
    chosen: Point

    def recipe(self, base: Recipe) -> Recipe:
        """The base recipe with the chosen layers left in 16 bits."""
        layers = [item.layer for item in self.ranking[: self.chosen.num_layers]]
        return replace(
            base, name=f"{base.name}-auto", exclude=(*base.exclude, *map(exactly, layers))
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def exactly(layer: str) -> str:
    """The pattern of a recipe that excludes one layer and no other."""
    return f"^{re.escape(layer)}$"


def fewest(
    measure: Measure, ranking: Sequence[Sensitivity], metric: str, max_drop: float, width: int
) -> Search:
    """The smallest number of the ranking's first layers in 16 bits that meets a budget.

    Args:
        measure: the drops of the metric for several numbers of layers, given in rising order.
        ranking: all layers that could be left in 16 bits, the most sensitive first.
        metric: its name, for the record.
        max_drop: the budget; with every layer in 16 bits the drop is taken to be none.
        width: how many numbers to measure at once.
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
    """Up to ``width`` numbers strictly between two: powers of two at first, then evenly spaced."""
    if failing < 0 and width > 1:
        first = [0, *(2**i for i in range(width - 1))]
        return [k for k in first if k < passing]
    gap = passing - failing
    steps = min(width + 1, gap)
    return sorted({failing + gap * i // steps for i in range(1, steps)} - {failing}) or [
        failing + 1
    ]


def _nbytes(ranking: Iterable[Sensitivity], num_layers: int) -> int:
    """8 bits for every weight, 16 for those of the first layers."""
    return sum(item.parameters * (2 if i < num_layers else 1) for i, item in enumerate(ranking))
