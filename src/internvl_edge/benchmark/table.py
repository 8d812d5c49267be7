"""Results of ``benchmark`` as a table for people, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["columns", "flat", "markdown", "peaks_line", "ratio_line", "row"]

COLUMNS = ("out", "component", "scenario", "batch", "p50", "p90", "p99", "items/s")
SERVER = ("calls/s", "p99 bound")
MEMORY = ("peak RSS", "GPU memory")
ROOFLINE = ("GFLOP", "MB", "MFU", "MBU")
PHASES = ("Enqueue Time", "H2D Latency", "GPU Compute Time", "D2H Latency")
EMPTY = "–"

Result = Mapping[str, Any]


def columns(results: Sequence[Result]) -> tuple[str, ...]:
    """Names of the columns; those that no result fills are left out."""
    found: tuple[str, ...] = COLUMNS
    found += SERVER if any("request_rate" in result for result in results) else ()
    for name in MEMORY:
        found += (name,) if any(name in _memory(result) for result in results) else ()
    found += ROOFLINE if any("roofline" in result for result in results) else ()
    return found + (PHASES if any("phases" in result for result in results) else ())


def row(result: Result, names: Sequence[str]) -> tuple[str, ...]:
    """A result's cells."""
    cells = _latency(result) | _server(result) | _memory(result) | _roofline(result)
    cells |= _phases(result)
    return tuple(cells.get(name, EMPTY) for name in names)


def _latency(result: Result) -> dict[str, str]:
    latency = result["latency"]
    return {
        "out": result["out"],
        "component": result["component"],
        "scenario": result["scenario"],
        "batch": str(result["batch_size"]),
        **{p: f"{latency[p]:.2f} ms" for p in ("p50", "p90", "p99")},
        "items/s": f"{result['throughput']['avg']:.1f}",
    }


def _server(result: Result) -> dict[str, str]:
    if "request_rate" not in result:
        return {}
    return {
        "calls/s": f"{result['request_rate']['avg']:.4g}",
        "p99 bound": f"{result['p99_bound']['max']:.2f} ms",
    }


def _memory(result: Result) -> dict[str, str]:
    """Of a process of its own (``footprint``)."""
    found = result.get("memory", {})
    nbytes = {"peak RSS": found.get("peak_rss_bytes"), "GPU memory": found.get("gpu_bytes")}
    return {name: f"{n / 1e6:.0f} MB" for name, n in nbytes.items() if n is not None}


def _roofline(result: Result) -> dict[str, str]:
    found = result.get("roofline")
    if found is None:
        return {}
    return {
        "GFLOP": f"{found['operations'] / 1e9:.3g}",
        "MB": f"{found['bytes'] / 1e6:.3g}",
        "MFU": EMPTY if found["mfu"] is None else f"{found['mfu']:.0%}",
        "MBU": f"{found['mbu']:.0%}",
    }


def _phases(result: Result) -> dict[str, str]:
    found = result.get("phases", {})
    return {name: f"{found[name]['p50']:.3f} ms" for name in PHASES if name in found}


def peaks_line(peaks: Mapping[str, Any]) -> str:
    """What the machine reached, in words."""
    found = [f"{kind} {count / 1e9:.0f} GFLOP/s" for kind, count in peaks["operations"].items()]
    found.append(f"memory {peaks['bytes'] / 1e9:.1f} GB/s")
    return f"peaks measured here: {', '.join(found)}"


def ratio_line(ratio: Result) -> str:
    """How long one contender takes beside another."""
    interval = ratio["reason"]
    if interval is None:
        interval = f"95 %: {ratio['low']:.2f} to {ratio['high']:.2f}, {ratio['rounds']} rounds"
    return (
        f"{ratio['component']} at batch {ratio['batch_size']}: {ratio['out']} takes "
        f"{ratio['median']:.2f} times {ratio['over']}'s latency ({interval})"
    )


def flat(card: Mapping[str, Any]) -> dict[str, str]:
    """What is known of the environment, in words."""
    return {key: _words(value) for key, value in card.items() if value}


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items() if version)
    return ", ".join(value) if isinstance(value, list) else str(value)


def markdown(found: Mapping[str, Any]) -> str:
    """The results as Markdown: a table, the ratios, the peaks, the environment.

    Args:
        found: what ``benchmark --json`` prints.
    """
    names = columns(found["results"])
    rows = [row(result, names) for result in found["results"]]
    lines = [
        _markdown_row(names),
        _markdown_row(["---"] * 3 + ["---:"] * (len(names) - 3)),
        *map(_markdown_row, rows),
        "",
        *[f"- {ratio_line(ratio)}" for ratio in found["ratios"]],
        *([f"- {peaks_line(found['peaks'])}"] if found["peaks"] else []),
        *[f"- {key}: {value}" for key, value in flat(found["environment"]).items()],
    ]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"
