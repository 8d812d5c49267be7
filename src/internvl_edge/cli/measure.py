"""``benchmark``: how fast, beside what, and how far from what the machine can do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.cli import speedtable
from internvl_edge.cli.against import AGAINST, contender_of
from internvl_edge.cli.console import Output
from internvl_edge.cli.options import DIRECTORY, answers, backend, names, one_of
from internvl_edge.errors import UsageError
from internvl_edge.runtime.bench import Timing, measure_many, ratio_of
from internvl_edge.runtime.environment import environment, peak_rss_nbytes
from internvl_edge.runtime.scenarios import SCENARIOS, run_scenario
from internvl_edge.runtime.session import (
    Array,
    Session,
    did_you_mean,
    open_component,
    require_backend,
)

FILE = click.Path(path_type=Path, dir_okay=False, writable=True)
DEFAULT_LENGTH = 32  # of texts, in tokens


@click.command()
@click.argument("outs", type=DIRECTORY, nargs=-1, required=True)
@click.option("--against", type=one_of(*AGAINST), help="Time this beside them, in turns.")
@click.option("--checkpoint", type=DIRECTORY, help="What PyTorch runs; default: the bundled demo.")
@click.option(
    "--scenario",
    type=one_of(*SCENARIOS),
    default="single-stream",
    show_default=True,
    help="How calls come in; all but the first measure each contender by itself.",
)
@click.option(
    "--streams", type=click.IntRange(min=1), default=2, show_default=True, help="Calls at once."
)
@click.option(
    "--p99",
    "p99_ms",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the server, in ms: what its highest rate keeps; default: 5 times a single call.",
)
@click.option("--components", callback=names, help="Comma-separated; default: all there are.")
@click.option("--batch", default="1", show_default=True, help="Batch sizes, comma-separated.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="Least time for each measurement.",
)
@click.option(
    "--roofline/--no-roofline",
    default=True,
    help="Measure this machine's peaks too, and say what share of them each component reaches.",
)
@click.option("--markdown", type=FILE, help="Write the table to this file too.")
@click.option(
    "--report", type=FILE, help="Write the first OUT's report to this file, with plots of speed."
)
@backend
@answers
def benchmark(
    output: Output,
    outs: tuple[Path, ...],
    against: str | None,
    checkpoint: Path | None,
    components: tuple[str, ...] | None,
    batch: str,
    seconds: float,
    backend: str,
    scenario: str,
    streams: int,
    p99_ms: float | None,
    roofline: bool,
    markdown: Path | None,
    report: Path | None,
) -> None:
    """Time every component of each OUT, all contenders taking turns.

    Latency is that of one call on the host: p50, p90 and p99 of the raw samples, after a warm-up
    that ends when the latency is steady. Ratios of latencies come with their 95 % interval. MFU
    and MBU are the shares of the operations and bytes per second that this machine reached when it
    was asked for nothing else. Of engines, the GPU's part is shown by trtexec's names.
    """
    if checkpoint is not None and against in (None, "openvino"):
        raise UsageError(f"--checkpoint {checkpoint} is what --against pytorch times; add that")
    if p99_ms is not None and scenario != "server":
        raise UsageError(f"--p99 {p99_ms:g} bounds --scenario server; add that")
    artifacts = {str(out): open_artifact(out) for out in outs}
    chosen = _components(artifacts, components)
    reference = contender_of(against, checkpoint, artifacts) if against else None
    load = {"streams": streams, "seconds": seconds, "p99_ms": p99_ms}
    results: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for component in chosen:
        for size in _batch_sizes(batch):
            with ExitStack() as stack:
                sessions = _sessions(stack, artifacts, component, backend)
                feeds = {n: seeded_feeds(a, component, size) for n, a in artifacts.items()}
                contenders = {name: _call(sessions[name], feeds[name]) for name in sessions}
                if reference is not None and against is not None:
                    contenders[against] = reference(component, next(iter(feeds.values())))
                timings = _timings(scenario, contenders, size, load)
                phases = _phases(sessions, feeds)
            if scenario == "single-stream":
                ratios += _ratios(component, size, timings)
            results += [
                {"out": name, "component": component, "scenario": scenario}
                | timing.to_json()
                | phases.get(name, {})
                for name, timing in timings.items()
            ]
    found = {
        "environment": environment() | {"peak_rss_bytes": peak_rss_nbytes()},
        "peaks": _add_rooflines(results, artifacts, backend) if roofline else None,
        "results": results,
        "ratios": ratios,
    }
    _show(output, found)
    if markdown is not None:
        markdown.write_text(speedtable.markdown(found), encoding="utf-8")
    if report is not None:
        report.write_text(_report(next(iter(artifacts.values())), found), encoding="utf-8")
    output.result(found)


def _show(output: Output, found: Mapping[str, Any]) -> None:
    names = speedtable.columns(found["results"])
    output.table(names, [speedtable.row(result, names) for result in found["results"]])
    output.lines(["  ".join(f"{k}: {v}" for k, v in speedtable.flat(found["environment"]).items())])
    output.lines([speedtable.peaks_line(found["peaks"])] if found["peaks"] else [])
    output.lines([speedtable.ratio_line(ratio) for ratio in found["ratios"]])


def _report(artifact: Artifact, found: Mapping[str, Any]) -> str:
    """The directory's report with a section on speed."""
    from internvl_edge.compiler.report import report_with
    from internvl_edge.compiler.speed import speed_figures

    names = speedtable.columns(found["results"])
    figures = speed_figures(
        found,
        columns=names,
        rows=[speedtable.row(result, names) for result in found["results"]],
        ratios=[speedtable.ratio_line(ratio) for ratio in found["ratios"]],
        environment=speedtable.flat(found["environment"]),
    )
    return report_with(artifact.path, artifact.manifest, speed=figures)


def _add_rooflines(
    results: list[dict[str, Any]], artifacts: Mapping[str, Artifact], backend: str
) -> dict[str, Any] | None:
    """Give each result of ours its place below the peaks of this machine; those peaks.

    None, and no result has one, where the package that reads graphs is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        return None
    from internvl_edge.compiler.peaks import measure_backend
    from internvl_edge.compiler.roofline import component_workload, locate

    chosen = require_backend(backend)
    workloads = []
    for result in results:
        if result["out"] in artifacts:
            artifact, component = artifacts[result["out"]], result["component"]
            feeds = seeded_feeds(artifact, component, result["batch_size"])
            workloads.append((result, component_workload(artifact, component, feeds, chosen)))
    peaks = measure_backend(
        sorted({kind for _, work in workloads for kind in work.operations}), chosen
    )
    for result, workload in workloads:
        call_ms = result["latency"]["p50"]
        if result["scenario"] != "single-stream":  # several at once share the machine
            call_ms = 1e3 * result["batch_size"] / result["throughput"]["avg"]
        result["roofline"] = asdict(locate(workload, peaks, call_ms))
    return asdict(peaks)


def _timings(
    scenario: str,
    contenders: Mapping[str, Callable[[], object]],
    batch: int,
    load: Mapping[str, Any],
) -> dict[str, Timing]:
    if scenario == "single-stream":
        return measure_many(contenders, items=batch, min_duration_s=load["seconds"])
    return {
        name: run_scenario(scenario, run, items=batch, **load) for name, run in contenders.items()
    }


def _sessions(
    stack: ExitStack, artifacts: Mapping[str, Artifact], component: str, backend: str
) -> dict[str, Session]:
    """One of each directory, open as long as the stack."""
    return {
        name: stack.enter_context(open_component(artifact, component, backend=backend))
        for name, artifact in artifacts.items()
    }


def _call(session: Session, feeds: Mapping[str, Array]) -> Callable[[], object]:
    return lambda: session.run(feeds)


def _phases(
    sessions: Mapping[str, Session], feeds: Mapping[str, Mapping[str, Array]]
) -> dict[str, dict[str, Any]]:
    """Of engines, the GPU's part of a call."""
    if not any(hasattr(session, "lease") for session in sessions.values()):
        return {}
    from internvl_edge.runtime.phases import measure_phases
    from internvl_edge.runtime.trt import TrtSession

    return {
        name: {"phases": measure_phases(session, feeds[name])}
        for name, session in sessions.items()
        if isinstance(session, TrtSession)
    }


def _ratios(component: str, batch: int, timings: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """Every contender's latency over that of the first one."""
    (base, first), *others = timings.items()
    return [
        {"out": label, "over": base, "component": component, "batch_size": batch}
        | asdict(ratio_of(timing, first))
        for label, timing in others
    ]


def _components(artifacts: Mapping[str, Any], chosen: tuple[str, ...] | None) -> tuple[str, ...]:
    """Components that every directory has, or those asked for."""
    shared = [
        name
        for name in next(iter(artifacts.values())).manifest.components
        if all(name in artifact.manifest.components for artifact in artifacts.values())
    ]
    unknown = [name for name in chosen or () if name not in shared]
    if unknown or not shared:
        hint = did_you_mean(unknown[0], shared) if unknown else ""
        raise UsageError(
            f"component {', '.join(unknown) or 'list'}: all of the directories have "
            f"{', '.join(shared) or 'none in common'}{hint}"
        )
    return chosen or tuple(shared)


def _batch_sizes(batch: str) -> list[int]:
    try:
        sizes = [int(part) for part in batch.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"--batch: expected positive numbers such as 1,8, found {batch!r}")
    return sizes


def seeded_feeds(artifact: Any, component: str, batch: int) -> dict[str, np.ndarray[Any, Any]]:
    """Seeded inputs of the right shapes; speed does not depend on the values."""
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray[Any, Any]] = {}
    for spec in artifact.manifest.components[component].inputs:
        sizes = {"batch": batch, "length": DEFAULT_LENGTH, "past": DEFAULT_LENGTH}
        sizes["past+length"] = 2 * DEFAULT_LENGTH
        shape = [n if isinstance(n, int) else sizes[n] for n in spec.shape]
        if spec.dtype == "uint8":
            feeds[spec.name] = rng.integers(0, 256, shape, np.uint8)
        elif spec.dtype.startswith("float"):
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif spec.name == "position_ids":
            feeds[spec.name] = np.broadcast_to(np.arange(shape[1]), shape) + DEFAULT_LENGTH
        elif spec.name == "attention_mask":
            feeds[spec.name] = np.ones(shape, np.int64)
        else:
            llama = artifact.manifest.language_model
            vocabulary = 2 if llama is None else llama["vocab_size"]
            feeds[spec.name] = rng.integers(1, vocabulary, shape)
    return feeds
