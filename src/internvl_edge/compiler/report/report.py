"""``report.html``: what a directory is, what quantization did to it, and what verification found.

One file without scripts and without anything fetched from elsewhere. Everything shown comes from
the manifest and from the figures of calibration (``quantize.numerics.statistics``), and is
escaped. The same compilation gives the same bytes: there is no time in it.

This module collects what the template (``report.html.jinja``) shows; ``plots`` draws.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from internvl_edge.artifact import Manifest
from internvl_edge.artifact.publish import record
from internvl_edge.artifact.sidecar import EngineInfo, read_engine_info
from internvl_edge.compiler.report.plots import (
    CELL_HEIGHT,
    CELL_WIDTH,
    HEADER_HEIGHT,
    LABEL_WIDTH,
    FrontierPlot,
    HeatMap,
    LatencyPlot,
    RangePlot,
    RooflinePlot,
    heat_map,
    latency_plot,
    legend,
    measurement_name,
    range_plots,
    read_frontier,
    roofline_plot,
)
from internvl_edge.files.packages import COMPILED_WITH, versions
from internvl_edge.quantize.numerics.statistics import LayerStatistics, read_statistics

REPORT_FILE = "report.html"
TEMPLATE = "report.html.jinja"
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
WORST = 5  # layers that are listed
WAITS = {  # of somebody who chats
    "time_to_first_token": "first token",
    "time_to_first_token_of_next_turn": "first token of the next turn",
    "vision": "vision",
    "prefill": "prefill",
    "inter_token_latency": "next token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFigures:
    """Everything about one use of a tower."""

    title: str
    maps: tuple[HeatMap, ...]
    plots: tuple[RangePlot, ...]
    worst: tuple[tuple[int, str, LayerStatistics], ...]  # block, kind


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedFigures:
    """Everything the report says about speed."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    ratios: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    latencies: LatencyPlot
    roofline: RooflinePlot | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyFigures:
    """The shares of tasks that one model gets right at each precision, on the same samples."""

    on: str  # the samples
    precisions: tuple[str, ...]
    tasks: tuple[tuple[str, tuple[float, ...]], ...]  # name, a share of 1 at each precision


def with_report(directory: Path, manifest: Manifest) -> Manifest:
    """Write the report of a directory that is about to be published; its manifest lists it."""
    text = _rendered(directory, manifest)
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
    """Render a published directory's report with new measurements; the directory stays."""
    return _rendered(directory, manifest, speed, accuracy)


def _rendered(
    directory: Path,
    manifest: Manifest,
    speed: SpeedFigures | None = None,
    accuracy: AccuracyFigures | None = None,
) -> str:
    files = manifest.files
    layers, frontier = read_statistics(directory, files), read_frontier(directory, files)
    engines = [read_engine_info(directory / engine.sidecar) for engine in manifest.engines]
    return render(manifest, layers, frontier, speed, accuracy, engines)


def render(
    manifest: Manifest,
    layers: Sequence[LayerStatistics],
    frontier: FrontierPlot | None = None,
    speed: SpeedFigures | None = None,
    accuracy: AccuracyFigures | None = None,
    engines: Sequence[EngineInfo] = (),
) -> str:
    """Render the report as HTML."""
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
            engines=[(info.component, info.target, info.layers_said) for info in engines],
            frontier=frontier,
            speed=speed,
            accuracy=accuracy,
            recipe=_recipe(manifest.recipe),
            versions=_versions(manifest.tool_version),
            legend=legend(),
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
    """Read the block and kind of a linear layer from its weight's name."""
    match = re.search(r"\.layers\.(\d+)\.(.+)\.weight$", weight)
    return (int(match[1]), match[2]) if match else (0, weight)


def _stream(name: str, layers: Sequence[LayerStatistics]) -> StreamFigures:
    by_place = {_place(layer.weight): layer for layer in _of(layers, name)}
    kinds = sorted({kind for _, kind in by_place}, key=_order)
    inputs = {place: layer.input_sqnr_db for place, layer in by_place.items()}
    weights = {place: layer.weight_sqnr_db for place, layer in by_place.items()}
    worst = sorted(by_place, key=lambda place: (by_place[place].input_sqnr_db, place))
    return StreamFigures(
        title=STREAMS[name],
        maps=(heat_map("Inputs", kinds, inputs), heat_map("Weights", kinds, weights)),
        plots=tuple(range_plots(kinds, by_place)),
        worst=tuple((*place, by_place[place]) for place in worst[:WORST]),
    )


def _order(kind: str) -> tuple[int, str]:
    return (ORDER.index(kind) if kind in ORDER else len(ORDER)), kind


def speed_figures(
    answer: Mapping[str, Any],
    *,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    ratios: Iterable[str],
    environment: Mapping[str, str],
) -> SpeedFigures:
    """Draw what ``benchmark --json`` prints, and keep the texts of its table."""
    results = answer["results"]
    return SpeedFigures(
        columns=tuple(columns),
        rows=tuple(map(tuple, rows)),
        ratios=tuple(ratios),
        environment=tuple(environment.items()),
        latencies=latency_plot([(measurement_name(one), one["latency"]) for one in results]),
        roofline=roofline_plot(results, answer["peaks"]) if answer["peaks"] else None,
    )


def chat_figures(
    answer: Mapping[str, Any],
    *,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    load: str,
    environment: Mapping[str, str],
) -> SpeedFigures:
    """Draw what ``benchmark --task chat --json`` prints, and keep the texts of its table."""
    latencies = [
        (f"{one['out']}, callers {one['callers']}: {words}", one[key])
        for one in answer["results"]
        for key, words in WAITS.items()
        if key in one
    ]
    return SpeedFigures(
        columns=tuple(columns),
        rows=tuple(map(tuple, rows)),
        ratios=(load,),
        environment=tuple(environment.items()),
        latencies=latency_plot(latencies),
        roofline=None,
    )


# --- what the manifest says ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentRow:
    """A graph, compared with its reference."""

    name: str
    graph: str
    cosine: str
    sqnr: str
    max_abs: str
    against: str
    costly: str  # the layers that lose most to rounding


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
        return ComponentRow(
            name=name, graph=graph, cosine="", sqnr="", max_abs="", against=reason, costly=""
        )
    blocks = figures.get("blocks")
    where = f", blocks {', '.join(map(str, blocks))}" if blocks else ""
    on = {"calibration": " of the calibration set", "noise": " of noise"}.get(
        str(figures.get("inputs")), ""
    )
    return ComponentRow(
        name=name,
        graph=graph,
        cosine=f"{figures['cosine']:.6f}",
        sqnr=f"{figures['sqnr_db']:.1f}",
        max_abs=f"{figures['max_abs']:.2g}",
        against=f"{figures['against']}, {figures['samples']} samples{on}{where}",
        costly=_costly(figures.get("costly_layers") or ()),
    )


def _costly(layers: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(str(layer.get("layer")) for layer in layers)


def _sizes(manifest: Manifest) -> list[tuple[str, str, float]]:
    """Name, size and share of the largest in percent, largest first."""
    sizes = sorted(((f.nbytes, name) for name, f in manifest.files.items()), reverse=True)
    largest = max((nbytes for nbytes, _ in sizes), default=0) or 1
    return [(name, _megabytes(nbytes), round(100 * nbytes / largest, 2)) for nbytes, name in sizes]


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
    installed = versions(COMPILED_WITH).items()
    return [("internvl-edge", tool), *((name, version) for name, version in installed if version)]
