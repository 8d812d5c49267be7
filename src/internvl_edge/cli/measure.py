"""``benchmark`` and ``doctor``: how fast, and on what."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from internvl_edge._version import __version__
from internvl_edge.cli.against import AGAINST, contender_of
from internvl_edge.cli.console import Output
from internvl_edge.cli.options import DIRECTORY, answers, backend, names, one_of
from internvl_edge.errors import UsageError
from internvl_edge.runtime.bench import Timing, measure_many, ratio_of
from internvl_edge.runtime.environment import environment, peak_rss_nbytes
from internvl_edge.runtime.scenarios import SCENARIOS, run_scenario
from internvl_edge.runtime.session import did_you_mean, open_component

# Package → what it unlocks, and the extra that installs it.
PACKAGES = {
    "torch": ("export", "export"),
    "onnx": ("export", "export"),
    "onnx-ir": ("export", "export"),
    "onnxscript": ("export", "export"),
    "safetensors": ("export", "export"),
    "onnxruntime": ("run on the CPU, verify", "ort"),
    "onnxruntime-gpu": ("run on an NVIDIA GPU", "ort-gpu"),
    "tensorrt-rtx": ("build RTX engines, without a GPU", "rtx"),
    "tensorrt": ("build TensorRT engines, on a GPU", "trt"),
    "cuda-core": ("run engines", "rtx"),
    "scikit-image": ("the default calibration photographs", "quantize"),
    "scikit-learn": ("the demo's digits", "demo"),
}
DEFAULT_LENGTH = 32  # of texts, in tokens
COLUMNS = ("out", "component", "batch", "p50", "p90", "p99", "items/s")


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
) -> None:
    """Time every component of each OUT, all contenders taking turns.

    Latency is that of one call on the host: p50, p90 and p99 of the raw samples, after a warm-up
    that ends when the latency is steady. Ratios of latencies come with their 95 % interval.
    """
    from internvl_edge.artifact import open_artifact

    if checkpoint is not None and against in (None, "openvino"):
        raise UsageError(f"--checkpoint {checkpoint} is what --against pytorch times; add that")
    if p99_ms is not None and scenario != "server":
        raise UsageError(f"--p99 {p99_ms:g} bounds --scenario server; add that")
    artifacts = {str(out): open_artifact(out) for out in outs}
    chosen = _components(artifacts, components)
    reference = contender_of(against, checkpoint, artifacts) if against else None
    results: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for component in chosen:
        for size in _batch_sizes(batch):
            with ExitStack() as stack:
                contenders = _contenders(stack, artifacts, component, size, backend)
                if reference is not None and against is not None:
                    feeds = seeded_feeds(next(iter(artifacts.values())), component, size)
                    contenders[against] = reference(component, feeds)
                if scenario == "single-stream":
                    timings = measure_many(contenders, items=size, min_duration_s=seconds)
                    ratios += _ratios(component, size, timings)
                else:
                    load = {"streams": streams, "items": size, "seconds": seconds, "p99_ms": p99_ms}
                    timings = {
                        label: run_scenario(scenario, run, **load)  # type: ignore[arg-type]
                        for label, run in contenders.items()
                    }
            results += [
                {"out": label, "component": component, "scenario": scenario, **timing.to_json()}
                for label, timing in timings.items()
            ]
    card = environment() | {"peak_rss_bytes": peak_rss_nbytes()}
    output.table(COLUMNS, [_row(result) for result in results])
    output.lines(["  ".join(f"{key}: {value}" for key, value in _flat(card).items())])
    output.lines([_ratio_line(ratio) for ratio in ratios])
    output.result({"environment": card, "results": results, "ratios": ratios})


def _contenders(
    stack: ExitStack, artifacts: Mapping[str, Any], component: str, batch: int, backend: str
) -> dict[str, Callable[[], object]]:
    """One call of each directory's component; sessions stay open as long as the stack."""
    contenders: dict[str, Callable[[], object]] = {}
    for label, artifact in artifacts.items():
        session = stack.enter_context(open_component(artifact, component, backend=backend))
        feeds = seeded_feeds(artifact, component, batch)
        contenders[label] = lambda s=session, f=feeds: s.run(f)  # type: ignore[misc]
    return contenders


def _ratios(component: str, batch: int, timings: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """Every contender's latency over that of the first one."""
    (base, first), *others = timings.items()
    return [
        {"out": label, "over": base, "component": component, "batch_size": batch}
        | asdict(ratio_of(timing, first))
        for label, timing in others
    ]


def _ratio_line(ratio: Mapping[str, Any]) -> str:
    return (
        f"{ratio['component']} at batch {ratio['batch_size']}: {ratio['out']} takes "
        f"{ratio['median']:.2f} times {ratio['over']}'s latency "
        f"(95 %: {ratio['low']:.2f} to {ratio['high']:.2f})"
    )


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
        if spec.dtype.startswith("float"):
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        elif spec.name == "position_ids":
            feeds[spec.name] = np.broadcast_to(np.arange(shape[1]), shape) + DEFAULT_LENGTH
        elif spec.name == "attention_mask":
            feeds[spec.name] = np.ones(shape, np.int64)
        else:
            vocabulary = artifact.manifest.model["internvl"]["qllama"]["vocab_size"]
            feeds[spec.name] = rng.integers(1, vocabulary, shape)
    return feeds


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    latency = result["latency"]
    return (
        result["out"],
        result["component"],
        str(result["batch_size"]),
        *(f"{latency[p]:.2f} ms" for p in ("p50", "p90", "p99")),
        f"{result['throughput']['avg']:.1f}",
    )


def _flat(card: Mapping[str, Any]) -> dict[str, str]:
    """What is known of the environment, in words."""
    return {key: _words(value) for key, value in card.items() if value}


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items() if version)
    return ", ".join(value) if isinstance(value, list) else str(value)


@click.command()
@backend
@answers
def doctor(output: Output, backend: str) -> None:
    """Say what is installed, what this machine has, and what each missing piece would unlock."""
    from internvl_edge.runtime.session import cuda_device_count

    rows, missing = [], {}
    for package, (unlocks, extra) in PACKAGES.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = ""
            missing[package] = f'pip install "internvl-edge[{extra}]"'
        rows.append((package, version or "missing", unlocks, missing.get(package, "")))
    machine = _machine() | {"cuda_devices": cuda_device_count()}
    output.table(("package", "version", "unlocks", "install"), rows)
    output.lines([f"{key}: {value}" for key, value in machine.items()])
    output.result(
        {
            "version": __version__,
            "machine": machine,
            "packages": {name: version for name, version, _, _ in rows},
            "missing": missing,
            "execution_providers": _providers(),
        }
    )


def _machine() -> dict[str, Any]:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free",
        "disk": f"{shutil.disk_usage('.').free / 1e9:.1f} GB free here",
    }


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return list(onnxruntime.get_available_providers())
