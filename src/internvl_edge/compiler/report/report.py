"""``report.html``: what a directory is, what quantization did to it, and what verification found.

One file without scripts and without anything fetched from elsewhere. Everything shown comes from
the manifest and from the figures of calibration (``quantize.statistics``), and is escaped. The
same compilation gives the same bytes: there is no time in it.

This module turns figures into marks: cells with a step of a colour scale, and points on axes in
pixels. The template (``report.html.jinja``) draws them.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from internvl_edge.artifact.open import Manifest
from internvl_edge.artifact.publish import record
from internvl_edge.compiler.report.plots import FrontierPlot, read_frontier
from internvl_edge.compiler.report.speed import SpeedFigures
from internvl_edge.quantize.numerics.statistics import LayerStatistics, read_statistics

REPORT_FILE = "report.html"
TEMPLATE = "report.html.jinja"
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy", "tensorrt-rtx")
STREAMS = {
    "image": "Vision tower",
    "queries": "QLLaMA: queries looking at the image",
    "text": "QLLaMA: texts",
    "match": "QLLaMA: queries and text, for matching",
    "caption": "QLLaMA: text about an image",
    "chat": "Language model of the chat",
}
ORDER = (  # of a block's layers, as it runs them
    *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    *(f"{attention}.{part}_proj" for attention in ("self_attn", "cross_attn") for part in "qkvo"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
STEPS_DB = (15, 20, 25, 30, 35, 40, 45)  # where the colour scale steps; below is worst
WORST = 5  # layers that are listed
CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH, HEADER_HEIGHT = 28, 15, 26, 62
PLOT_WIDTH, PLOT_HEIGHT, PLOT_LEFT, PLOT_MARGIN = 320, 130, 44, 18


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


@dataclass(frozen=True, slots=True, kw_only=True)
class RangePlot:
    """Largest |x| and clip of one kind of linear layer, block by block, on a logarithmic axis."""

    title: str
    width: int
    height: int
    ticks: tuple[tuple[float, str], ...]  # y, value
    marks: tuple[tuple[float, float, float, str], ...]  # x, y of the maximum, y of the clip, title
    ends: tuple[tuple[float, str], ...]  # x, block: the first and the last


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFigures:
    """Everything about one use of a tower."""

    title: str
    maps: tuple[HeatMap, ...]
    plots: tuple[RangePlot, ...]
    worst: tuple[tuple[int, str, LayerStatistics], ...]  # block, kind


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyFigures:
    """What one model does at several precisions, as measured on the same samples."""

    on: str  # the samples
    precisions: tuple[str, ...]
    tasks: tuple[tuple[str, tuple[float, ...]], ...]  # name, a share of 1 at each precision


def with_report(directory: Path, manifest: Manifest) -> Manifest:
    """Write the report of a directory that is about to be published; its manifest lists it."""
    text = render(manifest, read_statistics(directory), read_frontier(directory))
    (directory / REPORT_FILE).write_text(text, encoding="utf-8")
    files = {**manifest.files, REPORT_FILE: record(directory / REPORT_FILE)}
    return replace(manifest, files=dict(sorted(files.items())))


def report_with(
    directory: Path,
    manifest: Manifest,
    *,
    speed: SpeedFigures | None = None,
    accuracy: AccuracyFigures | None = None,
) -> str:
    """The report of a published directory with what was measured of it; the directory stays."""
    return render(manifest, read_statistics(directory), read_frontier(directory), speed, accuracy)


def render(
    manifest: Manifest,
    layers: Sequence[LayerStatistics],
    frontier: FrontierPlot | None = None,
    speed: SpeedFigures | None = None,
    accuracy: AccuracyFigures | None = None,
) -> str:
    """The report as HTML."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return (
        environment.from_string(source).render(
            manifest=manifest,
            streams=[_stream(name, layers) for name in STREAMS if _of(layers, name)],
            components=_components(manifest),
            weights=[(n, _megabytes(c.nbytes)) for n, c in manifest.components.items()],
            sizes=_sizes(manifest),
            frontier=frontier,
            speed=speed,
            accuracy=accuracy,
            recipe=_recipe(manifest.recipe),
            versions=_versions(manifest.tool_version),
            legend=_legend(),
            cell=(CELL_WIDTH, CELL_HEIGHT),
            label_width=LABEL_WIDTH,
            header_height=HEADER_HEIGHT,
        )
        + "\n"
    )


# --- figures of quantization ---------------------------------------------------------------------


def _of(layers: Iterable[LayerStatistics], stream: str) -> list[LayerStatistics]:
    return [layer for layer in layers if layer.stream == stream]


def _place(weight: str) -> tuple[int, str]:
    """Block and kind of a linear layer by its weight's name."""
    match = re.search(r"\.layers\.(\d+)\.(.+)\.weight$", weight)
    return (int(match[1]), match[2]) if match else (0, weight)


def _stream(name: str, layers: Sequence[LayerStatistics]) -> StreamFigures:
    found = {_place(layer.weight): layer for layer in _of(layers, name)}
    kinds = sorted({kind for _, kind in found}, key=_order)
    inputs = {place: layer.input_sqnr_db for place, layer in found.items()}
    weights = {place: layer.weight_sqnr_db for place, layer in found.items()}
    worst = sorted(found, key=lambda place: (found[place].input_sqnr_db, place))
    return StreamFigures(
        title=STREAMS[name],
        maps=(_heat_map("Inputs", kinds, inputs), _heat_map("Weights", kinds, weights)),
        plots=tuple(_range_plots(kinds, found)),
        worst=tuple((*place, found[place]) for place in worst[:WORST]),
    )


def _order(kind: str) -> tuple[int, str]:
    return (ORDER.index(kind) if kind in ORDER else len(ORDER)), kind


def _short(kind: str) -> str:
    """A name that fits a column."""
    return re.sub(r"^(mlp|attn|self_attn)\.", "", kind).replace("cross_attn.", "cross ")


def _heat_map(
    title: str, kinds: Sequence[str], figures: Mapping[tuple[int, str], float]
) -> HeatMap:
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


def _legend() -> list[tuple[int, str]]:
    first, last = STEPS_DB[0], STEPS_DB[-1]
    inner = [f"{low}–{high}" for low, high in pairwise(STEPS_DB)]
    return list(enumerate([f"below {first}", *inner, f"{last} and more"]))


def _range_plots(
    kinds: Sequence[str], found: Mapping[tuple[int, str], LayerStatistics]
) -> Iterable[RangePlot]:
    """One plot per activation: layers that read the same one share it."""
    shared: dict[tuple[tuple[int, float, float], ...], list[str]] = {}
    for kind in kinds:
        own = [(block, layer) for (block, other), layer in sorted(found.items()) if other == kind]
        key = tuple((block, layer.absmax, layer.clip) for block, layer in own)
        shared.setdefault(key, []).append(kind)
    for points, names in shared.items():
        yield _range_plot(", ".join(names), points)


def _range_plot(title: str, points: Sequence[tuple[int, float, float]]) -> RangePlot:
    values = [max(v, 1e-30) for _, *both in points for v in both]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    blocks = [block for block, _, _ in points]
    span = max(blocks[-1] - blocks[0], 1)
    inner = PLOT_WIDTH - PLOT_LEFT - PLOT_MARGIN

    def x(block: int) -> float:
        return round(PLOT_LEFT + PLOT_MARGIN / 2 + inner * (block - blocks[0]) / span, 1)

    def y(value: float) -> float:
        part = (math.log10(max(value, 1e-30)) - low) / (high - low)
        return round(PLOT_HEIGHT - PLOT_MARGIN - part * (PLOT_HEIGHT - 2 * PLOT_MARGIN), 1)

    exponents = range(low, high + 1, max((high - low) // 4, 1))
    return RangePlot(
        title=title,
        width=PLOT_WIDTH,
        height=PLOT_HEIGHT,
        ticks=tuple((y(10.0**e), f"{10.0**e:g}") for e in exponents),
        marks=tuple(
            (x(b), y(peak), y(clip), f"block {b}: largest {peak:.4g}, range to {clip:.4g}")
            for b, peak, clip in points
        ),
        ends=tuple((x(b), f"block {b}") for b in dict.fromkeys((blocks[0], blocks[-1]))),
    )


# --- what the manifest says ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRow:
    """A graph beside its reference."""

    name: str
    graph: str
    cosine: str
    sqnr: str
    max_abs: str
    against: str


def _components(manifest: Manifest) -> list[ComponentRow]:
    rows = []
    for name, component in manifest.components.items():
        figures = component.verification or {}
        rows.append(_component(name, component.file, figures))
        if isinstance(figures.get("engine_graph"), dict):
            rows.append(_component(name, "for engines", figures["engine_graph"]))
    return rows


def _component(name: str, graph: str, figures: Mapping[str, Any]) -> ComponentRow:
    if "cosine" not in figures:
        reason = str(figures.get("skipped", "not verified"))
        return ComponentRow(name=name, graph=graph, cosine="", sqnr="", max_abs="", against=reason)
    blocks = figures.get("blocks")
    where = f", blocks {', '.join(map(str, blocks))}" if blocks else ""
    return ComponentRow(
        name=name,
        graph=graph,
        cosine=f"{figures['cosine']:.6f}",
        sqnr=f"{figures['sqnr_db']:.1f}",
        max_abs=f"{figures['max_abs']:.2g}",
        against=f"{figures['against']}, {figures['samples']} samples{where}",
    )


def _sizes(manifest: Manifest) -> list[tuple[str, str, float]]:
    """Name, size and share of the largest in percent, largest first."""
    found = sorted(((f.nbytes, name) for name, f in manifest.files.items()), reverse=True)
    largest = max((nbytes for nbytes, _ in found), default=0) or 1
    return [(name, _megabytes(nbytes), round(100 * nbytes / largest, 2)) for nbytes, name in found]


def _megabytes(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"


def _recipe(recipe: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return [(key, _words(value)) for key, value in (recipe or {}).items()]


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _versions(tool: str) -> list[tuple[str, str]]:
    found = [("internvl-edge", tool)]
    for package in PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
