"""How ``benchmark`` times one component: sessions of each directory, and another way, in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from internvl_edge.artifact.open import Artifact
from internvl_edge.benchmark.contenders import Contender
from internvl_edge.benchmark.inputs import as_taken, from_picture, seeded_feeds, takes_levels
from internvl_edge.benchmark.load import run_scenario
from internvl_edge.benchmark.timing import Timing, measure_many, ratio_of
from internvl_edge.runtime.session import Session, open_component
from internvl_edge.types import Array

__all__ = ["Question", "measure_component"]

Results = list[dict[str, Any]]
Run = Callable[[Mapping[str, Any]], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of every component."""

    artifacts: Mapping[str, Artifact]  # by the path that was given
    against: str | None
    reference: Contender | None  # of that name
    backend: str
    scenario: str
    streams: int
    seconds: float
    p99_ms: float | None


def measure_component(
    question: Question, component: str, batch: int, picture: bytes | None
) -> tuple[Results, Results]:
    """Results and ratios of a component, from arrays and, where there is one, from a picture.

    Args:
        question: what is asked.
        component: a name in every directory.
        batch: of a call.
        picture: a file's bytes.
    """
    results, ratios = [], []
    with ExitStack() as stack:
        sessions = _sessions(stack, question.artifacts, component, question.backend)
        runs: dict[str, Run] = {name: session.run for name, session in sessions.items()}
        feeds = {
            name: as_taken(seeded_feeds(artifact, component, batch), sessions[name].inputs)
            for name, artifact in question.artifacts.items()
        }
        first = next(iter(feeds))
        if question.reference is not None and question.against is not None:
            runs[question.against] = question.reference(component)
        calls = {n: partial(run, feeds.get(n, feeds[first])) for n, run in runs.items()}
        measured = {component: _timings(question, calls, batch)}
        phases = _phases(sessions, feeds)
        if picture is not None:
            whole = _from_pictures(question, runs, picture, batch)
            measured[f"{component} from a picture"] = _timings(question, whole, batch)
    for label, timings in measured.items():
        if question.scenario == "single-stream":
            ratios += _ratios(label, batch, timings)
        results += [
            {"out": name, "component": label, "scenario": question.scenario}
            | timing.to_json()
            | (phases.get(name, {}) if label == component else {})
            for name, timing in timings.items()
        ]
    return results, ratios


def _from_pictures(
    question: Question,
    runs: Mapping[str, Run],
    picture: bytes,
    batch: int,
) -> dict[str, Callable[[], object]]:
    """Each contender's way from a picture; another's transform is that of the first directory."""
    first = next(iter(question.artifacts.values()))
    calls = {}
    for name, run in runs.items():
        artifact = question.artifacts.get(name, first)
        as_levels = takes_levels(artifact) and name not in ("pytorch", "torch-compile")
        calls[name] = from_picture(run, artifact, picture, batch, as_levels=as_levels)
    return calls


def _timings(
    question: Question, calls: Mapping[str, Callable[[], object]], batch: int
) -> dict[str, Timing]:
    if question.scenario == "single-stream":
        return measure_many(calls, items=batch, min_duration_s=question.seconds)
    return {
        name: run_scenario(
            question.scenario,
            call,
            items=batch,
            streams=question.streams,
            seconds=question.seconds,
            p99_ms=question.p99_ms,
        )
        for name, call in calls.items()
    }


def _sessions(
    stack: ExitStack, artifacts: Mapping[str, Artifact], component: str, backend: str
) -> dict[str, Session]:
    """One of each directory, open as long as the stack."""
    return {
        name: stack.enter_context(open_component(artifact, component, backend=backend))
        for name, artifact in artifacts.items()
    }


def _phases(
    sessions: Mapping[str, Session], feeds: Mapping[str, Mapping[str, Array]]
) -> dict[str, dict[str, Any]]:
    """Of engines, the GPU's part of a call."""
    if not any(hasattr(session, "lease") for session in sessions.values()):
        return {}
    from internvl_edge.benchmark.gpu_phases import measure_phases
    from internvl_edge.runtime.trt.session import TrtSession

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
