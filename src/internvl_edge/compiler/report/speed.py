"""Figures of ``benchmark`` as plots for the report: latencies, and where they lie on the roofline.

All axes of latencies and of the roofline are logarithmic: what is compared there are factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["SpeedFigures", "speed_figures"]

WIDTH, LEFT, MARGIN = 640, 200, 28
ROW_HEIGHT, AXIS_HEIGHT = 26, 22
ROOFLINE_HEIGHT, ROOFLINE_LEFT = 280, 62
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Scale = Callable[[float], float]
Tick = tuple[float, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """The distribution of one measurement, in pixels."""

    y: float
    label: str
    fastest: float
    p50: float
    p90: float
    p99: float
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyPlot:
    """A row for each measurement on one axis."""

    width: int
    height: int
    left: int
    ticks: tuple[Tick, ...]  # x, latency
    rows: tuple[LatencyRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflinePlot:
    """Operations per second over operations per byte; roofs are lines, measurements points."""

    width: int
    height: int
    left: int
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    roofs: tuple[tuple[str, str], ...]  # points of a polyline, name
    labels: tuple[tuple[float, float, str], ...]  # x, y, name of a roof
    points: tuple[tuple[float, float, str], ...]  # x, y, title


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedFigures:
    """Everything the report says about speed."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ratios: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    latencies: LatencyPlot
    roofline: RooflinePlot | None


def speed_figures(
    found: Mapping[str, Any],
    *,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    ratios: Iterable[str],
    environment: Mapping[str, str],
) -> SpeedFigures:
    """The plots of what ``benchmark --json`` prints, beside the texts of its table."""
    results = found["results"]
    return SpeedFigures(
        columns=tuple(columns),
        rows=tuple(map(tuple, rows)),
        ratios=tuple(ratios),
        environment=tuple(environment.items()),
        latencies=latency_plot(results),
        roofline=roofline_plot(results, found["peaks"]) if found["peaks"] else None,
    )


def latency_plot(results: Sequence[Mapping[str, Any]]) -> LatencyPlot:
    """A row for each result: from the fastest call to p99, p50 to p90 marked."""
    values = [result["latency"][name] for result in results for name in ("min", "p99")]
    x, ticks = _log_axis(values, LEFT, WIDTH - MARGIN)
    rows = []
    for i, result in enumerate(results):
        latency = result["latency"]
        name = f"{result['out']} {result['component']}, batch {result['batch_size']}"
        figures = ", ".join(f"{key} {latency[key]:.3g} ms" for key in ("min", "p50", "p90", "p99"))
        rows.append(
            LatencyRow(
                y=AXIS_HEIGHT + (i + 0.5) * ROW_HEIGHT,
                label=_shortened(name),
                fastest=x(latency["min"]),
                p50=x(latency["p50"]),
                p90=x(latency["p90"]),
                p99=x(latency["p99"]),
                title=f"{name}: {figures}",
            )
        )
    return LatencyPlot(
        width=WIDTH,
        height=AXIS_HEIGHT + len(results) * ROW_HEIGHT + 4,
        left=LEFT,
        ticks=tuple((x(value), f"{value:g} ms") for value in ticks),
        rows=tuple(rows),
    )


def roofline_plot(
    results: Sequence[Mapping[str, Any]], peaks: Mapping[str, Any]
) -> RooflinePlot | None:
    """Every result whose work is known, below what the machine reached."""
    points = []
    for result in results:
        roofline = result.get("roofline")
        if roofline is not None and roofline["operations"]:
            per_s = roofline["operations"] / (result["latency"]["p50"] / 1e3)
            name = f"{result['out']} {result['component']}, batch {result['batch_size']}"
            points.append((roofline["intensity"], per_s, name))
    operations = peaks["operations"]
    if not points or not operations:
        return None
    ridges = [peak / peaks["bytes"] for peak in operations.values()]
    x, x_values = _log_axis([p[0] for p in points] + ridges, ROOFLINE_LEFT, WIDTH - MARGIN)
    low = min(p[1] for p in points)
    y, y_values = _log_axis([low, *operations.values()], ROOFLINE_HEIGHT - AXIS_HEIGHT, MARGIN)
    left, right = x_values[0], x_values[-1]
    roofs, labels = [], []
    for kind, peak in operations.items():
        start = max(left, y_values[0] / peaks["bytes"])
        ridge = min(max(peak / peaks["bytes"], start), right)
        corners = [(start, min(start * peaks["bytes"], peak)), (ridge, peak), (right, peak)]
        roofs.append((" ".join(f"{x(a)},{y(b)}" for a, b in corners), kind))
        labels.append((x(right), y(peak) - 5, f"{kind}: {_prefixed(peak)}FLOP/s"))
    return RooflinePlot(
        width=WIDTH,
        height=ROOFLINE_HEIGHT,
        left=ROOFLINE_LEFT,
        x_ticks=tuple((x(v), f"{v:g}") for v in x_values),
        y_ticks=tuple((y(v), f"{_prefixed(v)}FLOP/s") for v in y_values),
        roofs=tuple(roofs),
        labels=tuple(labels),
        points=tuple(
            (x(a), y(b), f"{name}: {a:.3g} FLOP per byte, {_prefixed(b)}FLOP/s")
            for a, b, name in points
        ),
    )


def _log_axis(values: Sequence[float], start: float, end: float) -> tuple[Scale, tuple[float, ...]]:
    """Pixels of a value between powers of ten around the values, and those powers."""
    low = math.floor(math.log10(max(min(values), 1e-9)))
    high = max(math.ceil(math.log10(max(*values, 1e-9))), low + 1)

    def place(value: float) -> float:
        part = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return round(start + part * (end - start), 1)

    return place, tuple(10.0**exponent for exponent in range(low, high + 1))


def _prefixed(value: float) -> str:
    """A number and the prefix of its unit, such as ``1.5 T``."""
    for size, prefix in PREFIXES:
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _shortened(label: str, length: int = 36) -> str:
    """The end of a label that is too long for its column: paths begin alike."""
    return label if len(label) <= length else f"…{label[1 - length :]}"
