"""``benchmark``: how fast, beside what, and how far from what the machine can do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from internvl_edge.artifact.open import Artifact, open_artifact
from internvl_edge.benchmark import table
from internvl_edge.benchmark.contenders import Contender, contender_of, rival
from internvl_edge.benchmark.footprint import measure_footprint
from internvl_edge.benchmark.inputs import (
    embedding_component,
    seeded_feeds,
    seeded_picture,
)
from internvl_edge.benchmark.load import SCENARIOS
from internvl_edge.benchmark.machine import environment
from internvl_edge.benchmark.run import Question, Results, measure_component
from internvl_edge.cli.console import Output
from internvl_edge.cli.options import DIRECTORY, NEW_FILE, answers, backend, names, one_of
from internvl_edge.errors import InputError, UsageError, did_you_mean
from internvl_edge.files.cores import usable_cores
from internvl_edge.files.packages import is_installed
from internvl_edge.runtime.session import require_backend

STREAMS = 2  # calls at once, unless asked otherwise
FEW_REQUESTS = 100  # below, p99 is nearly the slowest


@click.command()
@click.argument("outs", type=DIRECTORY, nargs=-1, required=True)
@click.option(
    "--against",
    callback=rival,
    help="Time this beside them, in turns: pytorch, torch-compile, openvino, or another OUT.",
)
@click.option("--checkpoint", type=DIRECTORY, help="What PyTorch runs; default: the bundled demo.")
@click.option(
    "--scenario",
    type=one_of(*SCENARIOS),
    default="single-stream",
    show_default=True,
    help="How calls come in; all but the first measure each contender by itself.",
)
@click.option(
    "--streams",
    type=click.IntRange(min=1),
    help=f"Calls at once, of every scenario but the first; {STREAMS} by default.",
)
@click.option(
    "--p99",
    "p99_ms",
    type=click.FloatRange(min=0, min_open=True),
    help="Of the server, in ms: what its highest rate keeps; default: 5 times a single call.",
)
@click.option("--components", callback=names, help="Comma-separated; default: all there are.")
@click.option(
    "--image",
    type=DIRECTORY,
    help="The picture that is timed from its file's bytes to its embedding; default: a JPEG of "
    "640 by 480.",
)
@click.option("--batch", default="1", show_default=True, help="Batch sizes, comma-separated.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=3.0,
    show_default=True,
    help="Least time for each measurement; of the server, the time of each rate.",
)
@click.option(
    "--roofline/--no-roofline",
    default=True,
    help="Measure this machine's peaks too, and say what share of them each component reaches.",
)
@click.option(
    "--memory/--no-memory",
    default=True,
    help="Open each component in a process of its own too, and say what memory that took.",
)
@click.option("--markdown", type=NEW_FILE, help="Write the table to this file too.")
@click.option(
    "--report",
    type=NEW_FILE,
    help="Write the first OUT's report to this file, with plots of speed.",
)
@backend
@answers
def benchmark(
    output: Output,
    outs: tuple[Path, ...],
    against: str | Path | None,
    checkpoint: Path | None,
    components: tuple[str, ...] | None,
    image: Path | None,
    batch: str,
    seconds: float,
    backend: str,
    scenario: str,
    streams: int | None,
    p99_ms: float | None,
    roofline: bool,
    memory: bool,
    markdown: Path | None,
    report: Path | None,
) -> None:
    """Time every component of each OUT, all contenders taking turns.

    Latency is that of one call on the host: p50, p90 and p99 of the raw samples, after a warm-up
    that ends when the latency is steady. What embeds a picture is timed from arrays, and from the
    file's bytes too: decode, resize, normalise, run. Ratios of latencies come with their 95 %
    interval. Memory is that of a process that opens the component alone. MFU and MBU are the shares
    of the operations and bytes per second that this machine reached when it was asked for nothing
    else. Of engines, the GPU's part is shown by trtexec's names.
    """
    if isinstance(against, Path):
        outs, against = (*outs, against), None
    if checkpoint is not None and against in (None, "openvino"):
        raise UsageError(f"--checkpoint {checkpoint} is what --against pytorch times; add that")
    if p99_ms is not None and scenario != "server":
        raise UsageError(f"--p99 {p99_ms:g} bounds --scenario server; add that")
    if streams is not None and scenario == SCENARIOS[0]:
        raise UsageError(
            f"--streams {streams}: one call at a time is --scenario {scenario}; choose "
            f"{', '.join(SCENARIOS[1:])}, or leave --streams out"
        )
    artifacts = _opened(outs)
    chosen = _components(artifacts, components)
    if image is not None and embedding_component(chosen) is None:
        raise UsageError(f"--image {image}: none of {', '.join(chosen)} embeds a picture")
    question = Question(
        artifacts=artifacts,
        against=against,
        reference=_reference(against, checkpoint, artifacts, backend),
        backend=backend,
        scenario=scenario,
        streams=streams or STREAMS,
        seconds=seconds,
        p99_ms=p99_ms,
    )
    picture, sizes = _picture(image), _batch_sizes(batch)
    _warn_of_load(output)
    results: Results = []
    ratios: Results = []
    for component in chosen:
        whole = picture if component == embedding_component(chosen) else None
        for size in sizes:
            measured, compared = measure_component(question, component, size, whole)
            results += measured
            ratios += compared
    if memory:
        _add_memory(results, artifacts, backend)
    found = {
        "environment": environment(),
        "peaks": _add_rooflines(results, artifacts, backend) if roofline else None,
        "results": results,
        "ratios": ratios,
    }
    _show(output, found)
    warn_of_peaks(output, results)
    if markdown is not None:
        markdown.write_text(table.markdown(found), encoding="utf-8")
    if report is not None:
        report.write_text(_report(next(iter(artifacts.values())), found), encoding="utf-8")
    output.result(found)


def _warn_of_load(output: Output) -> None:
    """What else runs on the machine makes every figure worse."""
    load, cores = os.getloadavg()[0], usable_cores()
    if load > cores:
        output.say(
            f"warning: other work is under way, a load of {load:.1f} on {cores} core(s): figures "
            "will be worse than this machine's; wait until it is idle"
        )


def warn_of_peaks(output: Output, results: Results) -> None:
    """No component is faster than the machine: then the peaks are wrong."""
    for result in results:
        if (share := result.get("roofline", {}).get("mfu") or 0) > 1:
            output.say(
                f"warning: {result['out']} {result['component']}: MFU {share:.0%}: the peaks were "
                "measured too low, most likely beside other work; run again on an idle machine"
            )


def _opened(outs: tuple[Path, ...]) -> dict[str, Artifact]:
    if len({out.resolve() for out in outs}) < len(outs):
        raise UsageError(f"expected different directories, found {', '.join(map(str, outs))}")
    return {str(out): open_artifact(out) for out in outs}


def _reference(
    against: str | None, checkpoint: Path | None, artifacts: Mapping[str, Artifact], backend: str
) -> Contender | None:
    """The other way to the same job, on the GPU where the directories run on one."""
    if against is None:
        return None
    device = "cuda" if _runs_on_gpu(backend) else "cpu"
    return contender_of(against, checkpoint, artifacts, device=device)


def _runs_on_gpu(backend: str) -> bool:
    if require_backend(backend) != "onnxruntime":
        return True
    from internvl_edge.runtime.ort.options import CPU, choose_providers

    return choose_providers("auto") != [CPU]


def _picture(path: Path | None) -> bytes:
    if path is None:
        return seeded_picture()
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"--image {path}: cannot be read: {error.strerror}") from error


def _add_memory(results: Results, artifacts: Mapping[str, Artifact], backend: str) -> None:
    """Give each result of a component of ours the memory that it takes by itself."""
    for result in results:
        name, component = result["out"], result["component"]
        if name in artifacts and component in artifacts[name].manifest.components:
            result["memory"] = measure_footprint(name, component, backend, result["batch_size"])


def _show(output: Output, found: Mapping[str, Any]) -> None:
    names = table.columns(found["results"])
    output.table(names, [table.row(result, names) for result in found["results"]])
    output.lines(["  ".join(f"{k}: {v}" for k, v in table.flat(found["environment"]).items())])
    output.lines([table.peaks_line(found["peaks"])] if found["peaks"] else [])
    output.lines([table.ratio_line(ratio) for ratio in found["ratios"]])
    for result in found["results"]:
        count = result["latency"]["count"]
        if "request_rate" in result and count < FEW_REQUESTS:
            output.say(
                f"{result['out']} {result['component']}: {count} requests, too few for a p99 that "
                "is not nearly the slowest; ask for more --seconds"
            )
        if reason := result.get("memory", {}).get("failed"):
            output.say(f"{result['out']} {result['component']}: no memory was measured: {reason}")


def _report(artifact: Artifact, found: Mapping[str, Any]) -> str:
    """The directory's report with a section on speed."""
    from internvl_edge.compiler.report.report import report_with, speed_figures

    names = table.columns(found["results"])
    figures = speed_figures(
        found,
        columns=names,
        rows=[table.row(result, names) for result in found["results"]],
        ratios=[table.ratio_line(ratio) for ratio in found["ratios"]],
        environment=table.flat(found["environment"]),
    )
    return report_with(artifact.path, artifact.manifest, speed=figures)


def _add_rooflines(
    results: list[dict[str, Any]], artifacts: Mapping[str, Artifact], backend: str
) -> dict[str, Any] | None:
    """Give each result of ours its place below the peaks of this machine; those peaks.

    None, and no result has one, where the package that reads graphs is not installed.
    """
    if not is_installed("onnx"):
        return None
    from internvl_edge.benchmark.peaks import measure_backend
    from internvl_edge.benchmark.roofline import component_workload, locate

    chosen = require_backend(backend)
    workloads = []
    for result in results:
        artifact, component = artifacts.get(result["out"]), result["component"]
        if artifact is not None and component in artifact.manifest.components:
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
