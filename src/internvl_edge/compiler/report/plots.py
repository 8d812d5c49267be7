"""Drawings of a report: figures as marks on axes, in pixels.

    heat map    what rounding costs, by block and linear layer
    ranges      the largest value of each layer's input, and where it is clipped
    frontier    the accuracy and size that a search measured
    latencies   of every measurement, from the fastest call to the 99th percentile
    roofline    operations per second of every measurement, below what the machine reaches

Axes of ranges, latencies and the roofline are logarithmic: what is compared there are factors.
The template (``report.html.jinja``) draws the marks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from internvl_edge.errors import ArtifactError
from internvl_edge.files.reading import read_json
from internvl_edge.quantize.numerics.statistics import LayerStatistics

__all__ = [
    "CELL_HEIGHT",
    "CELL_WIDTH",
    "HEADER_HEIGHT",
    "LABEL_WIDTH",
    "SEARCH_FILE",
    "FrontierPlot",
    "HeatMap",
    "LatencyPlot",
    "RangePlot",
    "RooflinePlot",
    "frontier_plot",
    "heat_map",
    "latency_plot",
    "legend",
    "range_plots",
    "read_frontier",
    "roofline_plot",
]

SEARCH_FILE = "search.json"
MAX_SEARCH_NBYTES = 64 << 20
STEPS_DB = (15, 20, 25, 30, 35, 40, 45)  # where the colour scale steps; below is worst
CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH, HEADER_HEIGHT = 28, 15, 26, 62
RANGE_WIDTH, RANGE_HEIGHT, RANGE_LEFT, RANGE_MARGIN = 320, 130, 44, 18
FRONTIER_WIDTH, FRONTIER_HEIGHT, FRONTIER_LEFT, FRONTIER_MARGIN = 520, 200, 70, 24
WIDTH, LATENCY_LEFT, MARGIN = 640, 200, 28
ROW_HEIGHT, AXIS_HEIGHT = 26, 22
ROOFLINE_HEIGHT, ROOFLINE_LEFT = 280, 62
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Scale = Callable[[float], float]
Tick = tuple[float, str]


# --- what quantization did -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A figure in a heat map, in pixels."""

    x: int
    y: int
    step: int  # of the colour scale: 0 is worst
    text: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """SQNR by block and linear layer."""

    title: str
    width: int
    height: int
    columns: tuple[tuple[int, str], ...]  # x, name
    rows: tuple[tuple[int, str], ...]  # y, block
    cells: tuple[Cell, ...]


def heat_map(title: str, kinds: Sequence[str], figures: Mapping[tuple[int, str], float]) -> HeatMap:
    """Draw a figure in dB of every linear layer, by block and kind."""
    blocks = sorted({block for block, _ in figures})
    columns = {kind: LABEL_WIDTH + i * CELL_WIDTH for i, kind in enumerate(kinds)}
    rows = {block: HEADER_HEIGHT + i * CELL_HEIGHT for i, block in enumerate(blocks)}
    return HeatMap(
        title=title,
        width=LABEL_WIDTH + len(kinds) * CELL_WIDTH + 28,  # the last column's name leans over
        height=HEADER_HEIGHT + len(blocks) * CELL_HEIGHT + 2,
        columns=tuple((x, _short(kind)) for kind, x in columns.items()),
        rows=tuple((y, str(block)) for block, y in rows.items()),
        cells=tuple(
            Cell(
                x=columns[kind],
                y=rows[block],
                step=_step(value),
                text=f"{value:.0f}",
                title=f"block {block}, {kind}: {value:.1f} dB",
            )
            for (block, kind), value in sorted(figures.items())
        ),
    )


def _step(value: float) -> int:
    return sum(value >= least for least in STEPS_DB)


def legend() -> list[tuple[int, str]]:
    """List the steps of the heat maps' colour scale, with their words."""
    first, last = STEPS_DB[0], STEPS_DB[-1]
    inner = [f"{low}–{high}" for low, high in pairwise(STEPS_DB)]
    return list(enumerate([f"below {first}", *inner, f"{last} and more"]))


def _short(kind: str) -> str:
    """Shorten a name to fit a column."""
    return re.sub(r"^(mlp|attn|self_attn)\.", "", kind).replace("cross_attn.", "cross ")


@dataclass(frozen=True, slots=True, kw_only=True)
class RangePlot:
    """Largest |x| and clip of one kind of linear layer, block by block, on a logarithmic axis."""

    title: str
    width: int
    height: int
    ticks: tuple[tuple[float, str], ...]  # y, value
    marks: tuple[tuple[float, float, float, str], ...]  # x, y of the maximum, y of the clip, title
    ends: tuple[tuple[float, str], ...]  # x, block: the first and the last


def range_plots(
    kinds: Sequence[str], layers: Mapping[tuple[int, str], LayerStatistics]
) -> Iterable[RangePlot]:
    """Draw each activation once: layers that read the same one share its plot."""
    shared: dict[tuple[tuple[int, float, float], ...], list[str]] = {}
    for kind in kinds:
        own = [(block, layer) for (block, other), layer in sorted(layers.items()) if other == kind]
        key = tuple((block, layer.absmax, layer.clip) for block, layer in own)
        shared.setdefault(key, []).append(kind)
    for points, names in shared.items():
        yield _range_plot(", ".join(names), points)


def _range_plot(title: str, points: Sequence[tuple[int, float, float]]) -> RangePlot:
    values = [value for _, *both in points for value in both]
    bottom, top = RANGE_HEIGHT - RANGE_MARGIN, RANGE_MARGIN
    y, powers = _log_axis(values, bottom, top, smallest=1e-30)
    blocks = [block for block, _, _ in points]
    span = max(blocks[-1] - blocks[0], 1)
    inner = RANGE_WIDTH - RANGE_LEFT - RANGE_MARGIN

    def x(block: int) -> float:
        return round(RANGE_LEFT + RANGE_MARGIN / 2 + inner * (block - blocks[0]) / span, 1)

    return RangePlot(
        title=title,
        width=RANGE_WIDTH,
        height=RANGE_HEIGHT,
        ticks=tuple((y(v), f"{v:g}") for v in powers[:: max((len(powers) - 1) // 4, 1)]),
        marks=tuple(
            (x(b), y(peak), y(clip), f"block {b}: largest {peak:.4g}, range to {clip:.4g}")
            for b, peak, clip in points
        ),
        ends=tuple((x(b), f"block {b}") for b in dict.fromkeys((blocks[0], blocks[-1]))),
    )


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


def read_frontier(directory: Path, listed: Container[str]) -> FrontierPlot | None:
    """Draw the search of a directory that ``--precision auto`` made; None for any other.

    Args:
        directory: where.
        listed: its files; what is not among them does not exist.

    Raises:
        ArtifactError: its file holds something else.
    """
    path = directory / SEARCH_FILE
    if SEARCH_FILE not in listed:
        return None
    try:
        return frontier_plot(read_json(path, MAX_SEARCH_NBYTES, ArtifactError))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ArtifactError(f"{path}: expected a search: {error!r}; export again") from error


def frontier_plot(search: dict[str, Any]) -> FrontierPlot:
    """Draw a search, given in JSON types (``quantize.sensitivity.Search``)."""
    frontier = search["frontier"]
    sizes: list[float] = [point["nbytes"] / 1e6 for point in frontier]
    top: float = max([point["drop"] for point in frontier] + [1e-9]) * 1.05
    low: float = min(sizes)
    span: float = max(max(sizes) - low, 1e-9)

    def x(megabytes: float) -> float:
        return round(
            FRONTIER_LEFT
            + FRONTIER_MARGIN
            + (FRONTIER_WIDTH - FRONTIER_LEFT - 2 * FRONTIER_MARGIN) * (megabytes - low) / span,
            1,
        )

    def y(drop: float) -> float:
        return round(
            FRONTIER_HEIGHT
            - FRONTIER_MARGIN
            - (FRONTIER_HEIGHT - 2 * FRONTIER_MARGIN) * max(drop, 0.0) / top,
            1,
        )

    return FrontierPlot(
        title=f"{search['metric']}: drop from float32, over MB of quantized layers' weights",
        width=FRONTIER_WIDTH,
        height=FRONTIER_HEIGHT,
        left=FRONTIER_LEFT,
        points=tuple(
            (
                x(size),
                y(point["drop"]),
                point == search["chosen"],
                f"{point['num_layers']} layers in 16 bits: {size:.1f} MB, drop {point['drop']:.3g}",
            )
            for size, point in zip(sizes, frontier, strict=True)
        ),
        y_ticks=tuple((y(part * top), f"{part * top:.2g}") for part in (0.0, 0.5, 1.0)),
        x_ticks=tuple((x(v), f"{v:.4g} MB") for v in dict.fromkeys((low, max(sizes)))),
        budget=y(search["max_drop"]) if search["max_drop"] <= top else None,
    )


# --- speed ---------------------------------------------------------------------------------------


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


def measurement_name(result: Mapping[str, Any]) -> str:
    """Name what a measurement is of."""
    return f"{result['out']} {result['component']}, batch {result['batch_size']}"


def latency_plot(latencies: Sequence[tuple[str, Mapping[str, Any]]]) -> LatencyPlot:
    """Draw a row for each (name, distribution): from the fastest to p99, p50 to p90 marked."""
    values = [latency[name] for _, latency in latencies for name in ("min", "p99")]
    x, ticks = _log_axis(values, LATENCY_LEFT, WIDTH - MARGIN)
    rows = []
    for i, (name, latency) in enumerate(latencies):
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
        height=AXIS_HEIGHT + len(latencies) * ROW_HEIGHT + 4,
        left=LATENCY_LEFT,
        ticks=tuple((x(value), f"{value:g} ms") for value in ticks),
        rows=tuple(rows),
    )


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


def roofline_plot(
    results: Sequence[Mapping[str, Any]], peaks: Mapping[str, Any]
) -> RooflinePlot | None:
    """Draw every result whose work is known, below what the machine reached."""
    points = []
    for result in results:
        roofline = result.get("roofline")
        if roofline is not None and roofline["operations"]:
            per_s = roofline["operations"] / (result["latency"]["p50"] / 1e3)
            name = measurement_name(result)
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


# --- axes and words ------------------------------------------------------------------------------


def _log_axis(
    values: Sequence[float], start: float, end: float, *, smallest: float = 1e-9
) -> tuple[Scale, tuple[float, ...]]:
    """Place values between powers of ten around them all.

    Args:
        values: what the axis has to hold.
        start: the pixel of the lowest power.
        end: that of the highest.
        smallest: stands for zero, which no such axis has.

    Returns:
        The pixel of a value, and the powers.
    """
    low = math.floor(math.log10(max(min(values), smallest)))
    high = max(math.ceil(math.log10(max(*values, smallest))), low + 1)

    def place(value: float) -> float:
        part = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return round(start + part * (end - start), 1)

    return place, tuple(10.0**exponent for exponent in range(low, high + 1))


def _prefixed(value: float) -> str:
    """Format a number with the prefix of its unit, such as ``1.5 T``."""
    for size, prefix in PREFIXES:
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _shortened(label: str, length: int = 36) -> str:
    """Keep the end of a label that is too long for its column: paths begin alike."""
    return label if len(label) <= length else f"…{label[1 - length :]}"
