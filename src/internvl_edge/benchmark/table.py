"""Results of ``benchmark`` for people: a table, for the terminal and in Markdown, and words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from internvl_edge.benchmark.run import Benchmark, Comparison, Measurement

if TYPE_CHECKING:  # it needs onnx
    from internvl_edge.benchmark.limits.peaks import Peaks

__all__ = [
    "columns",
    "comparison_line",
    "environment_words",
    "markdown",
    "markdown_row",
    "peaks_line",
    "row",
    "warnings",
]

COLUMNS = ("out", "component", "scenario", "batch", "p50", "p90", "p99", "items/s")
SERVER = ("calls/s", "p99 bound")
MEMORY = ("peak RSS", "GPU memory")
ROOFLINE = ("GFLOP", "MB", "MFU", "MBU")
PHASES = ("Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency")
EMPTY = "–"
FEW_REQUESTS = 100  # below, p99 is nearly the slowest


def columns(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """Choose the columns; those that no measurement fills are left out."""
    filled = {name for measurement in measurements for name in _memory(measurement)}
    return (
        COLUMNS
        + (SERVER if any(each.timing.rate is not None for each in measurements) else ())
        + tuple(name for name in MEMORY if name in filled)
        + (ROOFLINE if any(each.roofline is not None for each in measurements) else ())
        + (PHASES if any(each.phases is not None for each in measurements) else ())
    )


def row(measurement: Measurement, names: Sequence[str]) -> tuple[str, ...]:
    """Return the cells of a measurement."""
    cells = _latency(measurement) | _server(measurement) | _memory(measurement)
    cells |= _roofline(measurement) | _phases(measurement)
    return tuple(cells.get(name, EMPTY) for name in names)


def _latency(measurement: Measurement) -> dict[str, str]:
    timing = measurement.timing
    return {
        "out": measurement.out,
        "component": measurement.component,
        "scenario": measurement.scenario,
        "batch": str(timing.items),
        **{f"p{q}": f"{timing.percentile_ms(q):.2f} ms" for q in (50, 90, 99)},
        "items/s": f"{timing.throughput:.1f}",
    }


def _server(measurement: Measurement) -> dict[str, str]:
    rate, bound_ms = measurement.timing.rate, measurement.timing.bound_ms
    if rate is None or bound_ms is None:
        return {}
    return {"calls/s": f"{rate:.4g}", "p99 bound": f"{bound_ms:.2f} ms"}


def _memory(measurement: Measurement) -> dict[str, str]:
    memory = measurement.memory
    if memory is None:
        return {}
    nbytes = {"peak RSS": memory.peak_rss_bytes, "GPU memory": memory.gpu_bytes}
    return {name: f"{n / 1e6:.0f} MB" for name, n in nbytes.items() if n is not None}


def _roofline(measurement: Measurement) -> dict[str, str]:
    roofline = measurement.roofline
    if roofline is None:
        return {}
    return {
        "GFLOP": f"{roofline.operations / 1e9:.3g}",
        "MB": f"{roofline.bytes / 1e6:.3g}",
        "MFU": EMPTY if roofline.mfu is None else f"{roofline.mfu:.0%}",
        "MBU": f"{roofline.mbu:.0%}",
    }


def _phases(measurement: Measurement) -> dict[str, str]:
    phases = measurement.phases or {}
    return {name: f"{phases[name].p50:.3f} ms" for name in PHASES if name in phases}


# --- words ---------------------------------------------------------------------------------------


def peaks_line(peaks: Peaks) -> str:
    """Say what peaks were measured."""
    words = [f"{kind} {count / 1e9:.0f} GFLOP/s" for kind, count in peaks.operations.items()]
    words.append(f"memory {peaks.bytes / 1e9:.1f} GB/s")
    return f"peaks measured here: {', '.join(words)}"


def comparison_line(comparison: Comparison) -> str:
    """Say how long one contender takes, compared with another."""
    ratio = comparison.ratio
    interval = ratio.reason
    if interval is None:
        interval = f"95 %: {ratio.low:.2f} to {ratio.high:.2f}, {ratio.rounds} rounds"
    return (
        f"{comparison.component} at batch {comparison.batch_size}: {comparison.out} takes "
        f"{ratio.median:.2f} times {comparison.over}'s latency ({interval})"
    )


def environment_words(card: Mapping[str, Any]) -> dict[str, str]:
    """Put what is known of the environment into words."""
    return {key: _words(value) for key, value in card.items() if value}


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items() if version)
    return ", ".join(value) if isinstance(value, list) else str(value)


def warnings(measurements: Iterable[Measurement]) -> list[str]:
    """Say which figures mean little: of few requests, without memory, above the peaks."""
    measured = list(measurements)
    return [line for each in measured for line in _doubts(each)] + [
        f"warning: {each.out} {each.component}: MFU {each.roofline.mfu:.0%}: the peaks were "
        "measured too low, most likely while other work ran; run again on an idle machine"
        for each in measured
        if each.roofline is not None and (each.roofline.mfu or 0) > 1
    ]


def _doubts(measurement: Measurement) -> list[str]:
    name, count = f"{measurement.out} {measurement.component}", len(measurement.timing.samples_ms)
    lines = []
    if measurement.timing.rate is not None and count < FEW_REQUESTS:
        lines.append(
            f"{name}: {count} requests, too few for a p99 that is not nearly the slowest; ask for "
            "more --seconds"
        )
    if measurement.memory is not None and measurement.memory.failed is not None:
        lines.append(f"{name}: no memory was measured: {measurement.memory.failed}")
    return lines


# --- Markdown ------------------------------------------------------------------------------------


def markdown(benchmark: Benchmark) -> str:
    """Write the results as Markdown: a table, the comparisons, the peaks, the environment."""
    names = columns(benchmark.measurements)
    lines = [
        markdown_row(names),
        markdown_row(["---"] * 3 + ["---:"] * (len(names) - 3)),
        *[markdown_row(row(measurement, names)) for measurement in benchmark.measurements],
        "",
        *[f"- {comparison_line(comparison)}" for comparison in benchmark.comparisons],
        *([f"- {peaks_line(benchmark.peaks)}"] if benchmark.peaks else []),
        *[f"- {key}: {value}" for key, value in environment_words(benchmark.environment).items()],
    ]
    return "\n".join(lines) + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    """Write a row of a table."""
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
