"""The frontier between accuracy and size that a search measured, as a plot for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEARCH_FILE = "search.json"
WIDTH, HEIGHT, LEFT, MARGIN = 520, 200, 70, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPlot:
    """Drop of the metric over megabytes of the ranked layers' weights."""

    title: str
    width: int
    height: int
    left: int
    points: tuple[tuple[float, float, bool, str], ...]  # x, y, whether it was chosen, title
    y_ticks: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    budget: float | None  # y; None: above the plot


def read_frontier(directory: Path) -> FrontierPlot | None:
    """The plot of a directory that ``--precision auto`` made; None for any other."""
    path = directory / SEARCH_FILE
    return plot(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def plot(search: dict[str, Any]) -> FrontierPlot:
    """The plot of a search in JSON types; see ``quantize.search.Search``."""
    found = search["frontier"]
    sizes: list[float] = [point["nbytes"] / 1e6 for point in found]
    top: float = max([point["drop"] for point in found] + [1e-9]) * 1.05
    low: float = min(sizes)
    span: float = max(max(sizes) - low, 1e-9)

    def x(megabytes: float) -> float:
        return round(LEFT + MARGIN + (WIDTH - LEFT - 2 * MARGIN) * (megabytes - low) / span, 1)

    def y(drop: float) -> float:
        return round(HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * max(drop, 0.0) / top, 1)

    return FrontierPlot(
        title=f"{search['metric']}: drop beside float32, over MB of quantized layers' weights",
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        points=tuple(
            (
                x(size),
                y(point["drop"]),
                point == search["chosen"],
                f"{point['num_layers']} layers in 16 bits: {size:.1f} MB, drop {point['drop']:.3g}",
            )
            for size, point in zip(sizes, found, strict=True)
        ),
        y_ticks=tuple((y(part * top), f"{part * top:.2g}") for part in (0.0, 0.5, 1.0)),
        x_ticks=tuple((x(v), f"{v:.4g} MB") for v in dict.fromkeys((low, max(sizes)))),
        budget=y(search["max_drop"]) if search["max_drop"] <= top else None,
    )
