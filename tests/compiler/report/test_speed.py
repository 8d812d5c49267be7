"""What ``benchmark`` found, as a table, in Markdown, and as plots of the report."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any
from xml.etree import ElementTree

import pytest
from support.reports import HOSTILE, manifest, parsed

from internvl_edge.benchmark import table
from internvl_edge.benchmark.footprint import Footprint
from internvl_edge.benchmark.gpu_phases import METRICS
from internvl_edge.benchmark.limits.peaks import Peaks
from internvl_edge.benchmark.limits.roofline import Roofline
from internvl_edge.benchmark.run import Benchmark, Comparison, Measurement
from internvl_edge.benchmark.timing import Distribution, Ratio, Timing
from internvl_edge.compiler.report.plots import latency_plot, roofline_plot
from internvl_edge.compiler.report.report import SpeedFigures, render, speed_figures

PEAKS = Peaks(operations={"float32": 100e9, "int8": 400e9}, bytes=20e9)
ROOFLINE = Roofline(operations=10**9, bytes=10**7, intensity=100.0, mfu=0.5, mbu=0.025)


def result(out: str = "out", scale: float = 1.0, **more: Any) -> Measurement:
    samples = tuple(scale * i for i in range(1, 101))
    of_server = {name: more.pop(name) for name in ("rate", "bound_ms") if name in more}
    timing = Timing(samples_ms=samples, items=1, warmup_iterations=1, is_steady=True, **of_server)
    return Measurement(out=out, component="vision", scenario="single-stream", timing=timing, **more)


def found(*results: Measurement, peaks: Peaks | None = PEAKS, **more: Any) -> Benchmark:
    ratio = Ratio(**{"median": 2.0, "low": 1.9, "high": 2.1, "rounds": 20} | more)
    comparison = Comparison(out="b", over="a", component="vision", batch_size=1, ratio=ratio)
    return Benchmark(
        environment={"cpu": "some cpu", "gpus": [], "packages": {"numpy": "2"}},
        peaks=peaks,
        measurements=results,
        comparisons=(comparison,),
    )


def figures(of: Benchmark) -> SpeedFigures:
    names = table.columns(of.measurements)
    return speed_figures(
        of.to_json(),
        columns=names,
        rows=[table.row(entry, names) for entry in of.measurements],
        ratios=[table.comparison_line(comparison) for comparison in of.comparisons],
        environment=table.environment_words(of.environment),
    )


# --- the table -----------------------------------------------------------------------------------


def test_columns_that_nothing_fills_are_left_out() -> None:
    assert "MFU" not in table.columns([result()])
    with_roofline = table.columns([result(), result(roofline=ROOFLINE)])
    assert with_roofline[-4:] == ("GFLOP", "MB", "MFU", "MBU")
    phases = {name: Distribution.of([float(i)]) for i, name in enumerate(METRICS)}
    names = table.columns([result(phases=phases)])
    assert names[-4:] == ("Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency")
    assert table.row(result(phases=phases), names)[-4:] == (
        "1.000 ms",
        "2.000 ms",
        "3.000 ms",
        "4.000 ms",
    )


def test_a_row() -> None:
    names = table.columns([result(roofline=ROOFLINE)])
    assert table.row(result(roofline=ROOFLINE), names) == (
        *("out", "vision", "single-stream", "1", "50.50 ms", "90.10 ms", "99.01 ms", "19.8"),
        *("1", "10", "50%", "2%"),
    )
    unknown = replace(ROOFLINE, mfu=None)
    assert table.row(result(roofline=unknown), names)[-2] == "–"
    assert table.row(result(), names)[-4:] == ("–",) * 4


def test_what_only_some_measurements_have() -> None:
    server = {"rate": 31.25, "bound_ms": 30.0}
    memory = Footprint(peak_rss_bytes=2 * 10**9, before_rss_bytes=10**8)
    names = table.columns([result(), result(memory=memory, **server)])
    assert names[-3:] == ("calls/s", "p99 bound", "peak RSS")
    cells = table.row(result(memory=memory, **server), names)
    assert cells[-3:] == ("31.25", "30.00 ms", "2000 MB")
    on_gpu = result(memory=replace(memory, gpu_bytes=10**9))
    assert table.row(on_gpu, table.columns([on_gpu]))[-1] == "1000 MB"
    assert table.columns([result(memory=Footprint(failed="no room"))])[-1] == "items/s"


def test_a_ratio_without_an_interval_says_why() -> None:
    (comparison,) = found(low=None, high=None, reason="too few").comparisons
    assert table.comparison_line(comparison).endswith("takes 2.00 times a's latency (too few)")


def test_markdown() -> None:
    text = table.markdown(found(result("a|b", roofline=ROOFLINE), result("c\\d")))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {13}
    assert rows[2].startswith("| a\\|b | vision |")
    assert rows[3].startswith("| c\\\\d |")
    assert "- peaks measured here: float32 100 GFLOP/s, int8 400 GFLOP/s, memory 20.0 GB/s" in text
    assert "takes 2.00 times a's latency (95 %: 1.90 to 2.10, 20 rounds)" in text
    assert "- packages: numpy 2" in text
    assert "peaks" not in table.markdown(found(result(), peaks=None))


def test_a_component_above_the_peaks() -> None:
    rooflines = [replace(ROOFLINE, mfu=mfu) for mfu in (1.5, None)]
    (line,) = table.warnings([result("o", roofline=roofline) for roofline in rooflines])
    assert line.startswith("warning: o vision: MFU 150%")


# --- plots ---------------------------------------------------------------------------------------


def test_latencies_share_a_logarithmic_axis() -> None:
    plot = latency_plot(
        [(n, result(n, scale=s).to_json()["latency"]) for n, s in (("a", 1.0), ("b", 10.0))]
    )
    a, b = plot.rows
    assert a.fastest < a.p50 < a.p90 < a.p99
    decade = plot.ticks[1][0] - plot.ticks[0][0]
    assert b.p50 - a.p50 == pytest.approx(decade, abs=0.2)
    assert [words for _, words in plot.ticks] == ["1 ms", "10 ms", "100 ms", "1000 ms"]
    assert "p50 50.5 ms" in a.title


def test_a_point_at_the_peak_lies_on_its_roof() -> None:
    """10⁹ operations in 10 ms are 100 GFLOP/s: float32's peak; intensity is right of the ridge."""
    at_peak = result(roofline=ROOFLINE).to_json()
    at_peak["latency"]["p50"] = 10.0
    plot = roofline_plot([at_peak, result("pytorch").to_json()], asdict(PEAKS))
    assert plot is not None
    ((x, y, title),) = plot.points
    float32, int8 = (
        [tuple(map(float, corner.split(","))) for corner in line.split()] for line, _ in plot.roofs
    )
    assert float32[1][1] == float32[2][1] == y
    assert float32[1][0] < x <= float32[2][0]
    assert int8[1][0] > float32[1][0]
    assert int8[1][1] < float32[1][1]
    assert float32[0] == int8[0]  # one bandwidth
    assert "100 GFLOP/s" in title


def test_no_roofline_without_points_or_peaks() -> None:
    assert roofline_plot([result().to_json()], asdict(PEAKS)) is None
    without = {"operations": {}, "bytes": 1.0}
    assert roofline_plot([result(roofline=ROOFLINE).to_json()], without) is None
    assert figures(found(result(), peaks=None)).roofline is None


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [
        [result(roofline=ROOFLINE)],
        [result(), result("b", scale=1e-4, roofline=replace(ROOFLINE, intensity=0.01))],
        [result(scale=1e5, roofline=replace(ROOFLINE, intensity=1e5, mfu=None))],
    ],
)
def test_the_report_with_speed(entries: list[Measurement]) -> None:
    text = render(manifest(), [], None, figures(found(*entries)))
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        svg = ElementTree.fromstring(drawing)
        width, height = float(svg.get("width", 0)), float(svg.get("height", 0))
        for shape in svg.iter():
            corners = [corner.split(",") for corner in shape.get("points", "").split()]
            xs = [shape.get(key, "0") for key in ("x", "cx", "x1", "x2")] + [c[0] for c in corners]
            ys = [shape.get(key, "0") for key in ("y", "cy", "y1", "y2")] + [c[1] for c in corners]
            assert all(0 <= float(x) <= width for x in xs)
            assert all(0 <= float(y) <= height for y in ys)
    names = {tag for tag, _ in parsed(text).tags}
    assert not names & {"script", "link", "img", "iframe"}


def test_texts_are_escaped() -> None:
    of = found(result(HOSTILE, roofline=ROOFLINE))
    of = replace(of, environment={**of.environment, "cpu": HOSTILE})
    text = render(manifest(), [], None, figures(of))
    assert HOSTILE not in text
    assert parsed(text).text.count(HOSTILE) >= 3
