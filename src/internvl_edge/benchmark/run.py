"""A benchmark from its settings to its results; what ``internvl-edge benchmark`` does.

Of each component, sessions of every directory and another way to the same job are timed in turns;
then the memory of each directory's component is taken in a process of its own, and last the peaks
of the machine, which say what share of them was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from internvl_edge.artifact.components import embedder_of
from internvl_edge.benchmark.footprint import Footprint, measure_footprint
from internvl_edge.benchmark.inputs import (
    as_taken,
    from_picture,
    seeded_feeds,
    takes_levels,
)
from internvl_edge.benchmark.load import run_scenario
from internvl_edge.benchmark.machine import environment
from internvl_edge.benchmark.settings import Settings
from internvl_edge.benchmark.timing import Distribution, Ratio, Timing, measure_many, ratio_of
from internvl_edge.files.packages import is_installed
from internvl_edge.runtime.session import Session, open_component, require_backend, runs_engines
from internvl_edge.types import Array

if TYPE_CHECKING:  # both need onnx
    from internvl_edge.benchmark.limits.peaks import Peaks
    from internvl_edge.benchmark.limits.roofline import Roofline

__all__ = ["Benchmark", "Comparison", "Measurement", "run_benchmark"]

Run = Callable[[Mapping[str, Any]], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Figures of one contender on one component; None where one was not measured."""

    out: str  # a directory, or the name of another way to the same job
    component: str  # or more than it, such as the way from a picture
    scenario: str
    timing: Timing
    phases: Mapping[str, Distribution] | None = None  # of a GPU, by trtexec's names
    memory: Footprint | None = None
    roofline: Roofline | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything but the raw samples."""
        fields: dict[str, Any] = {
            "out": self.out,
            "component": self.component,
            "scenario": self.scenario,
            **self.timing.to_json(),
        }
        if self.phases is not None:
            fields["phases"] = {name: phase.to_json() for name, phase in self.phases.items()}
        if self.memory is not None:
            fields["memory"] = self.memory.to_json()
        if self.roofline is not None:
            fields["roofline"] = asdict(self.roofline)
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The latency of one contender over that of the first one."""

    out: str
    over: str
    component: str
    batch_size: int
    ratio: Ratio

    def to_json(self) -> dict[str, Any]:
        return {
            "out": self.out,
            "over": self.over,
            "component": self.component,
            "batch_size": self.batch_size,
            **asdict(self.ratio),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Results of a benchmark, and what is needed to compare them with others."""

    environment: Mapping[str, Any]  # of ``machine``
    peaks: Peaks | None
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "peaks": None if self.peaks is None else asdict(self.peaks),
            "results": [measurement.to_json() for measurement in self.measurements],
            "ratios": [comparison.to_json() for comparison in self.comparisons],
        }


def run_benchmark(settings: Settings) -> Benchmark:
    """Measure every component at every batch size."""
    measurements: list[Measurement] = []
    comparisons: list[Comparison] = []
    for component in settings.components:
        for batch in settings.batch_sizes:
            measured, compared = _measure_component(settings, component, batch)
            measurements += measured
            comparisons += compared
    if settings.has_memory:
        measurements = [_with_memory(settings, each) for each in measurements]
    card = environment()  # before the peaks, which load the machine
    peaks = None
    if settings.has_roofline and is_installed("onnx"):
        measurements, peaks = _with_rooflines(settings, measurements)
    return Benchmark(
        environment=card,
        peaks=peaks,
        measurements=tuple(measurements),
        comparisons=tuple(comparisons),
    )


# --- timing --------------------------------------------------------------------------------------


def _measure_component(
    settings: Settings, component: str, batch: int
) -> tuple[list[Measurement], list[Comparison]]:
    """Time a component from arrays, and what embeds a picture from a picture too."""
    comparisons: list[Comparison] = []
    with ExitStack() as stack:
        sessions = {
            name: stack.enter_context(
                open_component(
                    artifact, component, settings.backend, settings.device, options=settings.options
                )
            )
            for name, artifact in settings.artifacts.items()
        }
        runs: dict[str, Run] = {name: session.run for name, session in sessions.items()}
        feeds = {
            name: as_taken(seeded_feeds(artifact, component, batch), sessions[name].inputs)
            for name, artifact in settings.artifacts.items()
        }
        first = next(iter(feeds))
        if settings.reference is not None and settings.against is not None:
            runs[settings.against] = settings.reference(component)
        calls = {n: partial(run, feeds.get(n, feeds[first])) for n, run in runs.items()}
        timings = {component: _timings(settings, calls, batch)}
        phases = _phases(settings, sessions, feeds)
        if component == embedder_of(settings.components):
            whole = _from_pictures(settings, runs, batch)
            timings[f"{component} from a picture"] = _timings(settings, whole, batch)
    if settings.scenario == "single-stream":
        comparisons = [each for label in timings for each in _comparisons(label, timings[label])]
    measurements = [
        Measurement(
            out=name,
            component=label,
            scenario=settings.scenario,
            timing=timing,
            phases=phases.get(name) if label == component else None,
        )
        for label, contenders in timings.items()
        for name, timing in contenders.items()
    ]
    return measurements, comparisons


def _from_pictures(
    settings: Settings, runs: Mapping[str, Run], batch: int
) -> dict[str, Callable[[], object]]:
    """Make each contender's calls from a picture; others transform it as the first directory."""
    first = next(iter(settings.artifacts.values()))
    calls = {}
    for name, run in runs.items():
        artifact = settings.artifacts.get(name, first)
        as_levels = takes_levels(artifact) and name not in ("pytorch", "torch-compile")
        calls[name] = from_picture(run, artifact, settings.picture, batch, as_levels=as_levels)
    return calls


def _timings(
    settings: Settings, calls: Mapping[str, Callable[[], object]], batch: int
) -> dict[str, Timing]:
    if settings.scenario == "single-stream":
        return measure_many(calls, items=batch, min_duration_s=settings.seconds)
    return {
        name: run_scenario(
            settings.scenario,
            call,
            items=batch,
            streams=settings.streams,
            seconds=settings.seconds,
            p99_ms=settings.p99_ms,
        )
        for name, call in calls.items()
    }


def _phases(
    settings: Settings, sessions: Mapping[str, Session], feeds: Mapping[str, Mapping[str, Array]]
) -> dict[str, dict[str, Distribution]]:
    """Measure the GPU's part of a call, of engines."""
    if not runs_engines(settings.backend):
        return {}
    from internvl_edge.benchmark.gpu_phases import measure_phases
    from internvl_edge.runtime.trt.session import TrtSession

    return {
        name: measure_phases(session, feeds[name])
        for name, session in sessions.items()
        if isinstance(session, TrtSession)
    }


def _comparisons(component: str, timings: Mapping[str, Timing]) -> list[Comparison]:
    """Compare every contender with the first one."""
    (base, first), *others = timings.items()
    return [
        Comparison(
            out=name,
            over=base,
            component=component,
            batch_size=timing.items,
            ratio=ratio_of(timing, first),
        )
        for name, timing in others
    ]


# --- memory and peaks ----------------------------------------------------------------------------


def _is_ours(settings: Settings, measurement: Measurement) -> bool:
    """Tell whether it is of a directory's component alone."""
    artifact = settings.artifacts.get(measurement.out)
    return artifact is not None and measurement.component in artifact.manifest.components


def _with_memory(settings: Settings, measurement: Measurement) -> Measurement:
    if not _is_ours(settings, measurement):
        return measurement
    options = settings.options
    memory = measure_footprint(
        measurement.out,
        measurement.component,
        settings.backend,
        measurement.timing.items,
        device=settings.device,
        threads=None if options is None else options.num_threads,
    )
    return replace(measurement, memory=memory)


def _with_rooflines(
    settings: Settings, measurements: Sequence[Measurement]
) -> tuple[list[Measurement], Peaks]:
    """Measure the peaks of this machine, and place each measurement of ours below them."""
    from internvl_edge.benchmark.limits.peaks import measure_backend
    from internvl_edge.benchmark.limits.roofline import component_workload, locate

    backend = require_backend(settings.backend)
    workloads = {}
    for i, each in enumerate(measurements):
        if _is_ours(settings, each):
            artifact = settings.artifacts[each.out]
            feeds = seeded_feeds(artifact, each.component, each.timing.items)
            workloads[i] = component_workload(artifact, each.component, feeds, backend)
    kinds = {kind for workload in workloads.values() for kind in workload.operations}
    peaks = measure_backend(sorted(kinds), backend, settings.device)
    placed = list(measurements)
    for i, workload in workloads.items():
        roofline = locate(workload, peaks, _call_ms(measurements[i]))
        placed[i] = replace(measurements[i], roofline=roofline)
    return placed, peaks


def _call_ms(measurement: Measurement) -> float:
    """Return the time of a call by itself; of several at once, their share of the machine."""
    timing = measurement.timing
    if measurement.scenario == "single-stream":
        return timing.percentile_ms(50)
    return 1e3 * timing.items / timing.throughput
