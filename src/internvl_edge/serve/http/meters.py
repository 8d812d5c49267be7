"""Metrics of the whole server, and the stages of one request.

A label is a route of ours, the name of a model that is served, a status: never what a client sent.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from internvl_edge._version import __version__

__all__ = ["Meters", "Stages"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)


class Stages:
    """How long the stages of one request took, in seconds, in the order in which they began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._began = time.perf_counter()

    def add(self, stage: str, seconds: float) -> None:
        """Count a stage, or more of one; what runs at the same time is counted each."""
        self.seconds[stage] += seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    @property
    def total(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self._began

    @property
    def header(self) -> str:
        """The value of ``Server-Timing``, in milliseconds."""
        parts = [*self.seconds.items(), ("total", self.total)]
        return ", ".join(f"{name};dur={seconds * 1e3:.2f}" for name, seconds in parts)


class Meters:
    """What ``/metrics`` tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def named(name: str) -> str:
            return f"internvl_edge_{name}"

        self.requests = Counter(
            named("requests"),
            "Requests answered.",
            ["route", "model", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            named("request_seconds"),
            "From the first byte of a request to the last of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.stage_seconds = Histogram(
            named("stage_seconds"),
            "A stage of a request.",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            named("batch_rows"),
            "Rows of a batch that ran.",
            ["model", "component"],
            buckets=ROWS,
            registry=self.registry,
        )
        self.queue_length = Gauge(
            named("queue_length"), "Requests that wait.", ["model", "queue"], registry=self.registry
        )
        self.streams = Gauge(
            named("streams"), "Answers that are being streamed.", registry=self.registry
        )
        self.tokens = Counter(
            named("tokens"),
            "Tokens read (prompt) and made (completion).",
            ["kind"],
            registry=self.registry,
        )
        self.ready = Gauge(named("ready"), "1 where /health says so.", registry=self.registry)
        self._info = Info(
            "internvl_edge",
            "What is served.",
            ["model"],
            registry=self.registry,
        )

    def serves(self, model: str, backend: str, precision: str) -> None:
        """Say what a model is."""
        values = {"version": __version__, "backend": backend, "precision": precision}
        self._info.labels(model=model).info(values)

    def watches_queue(self, model: str, queue: str, length: Callable[[], int]) -> None:
        """Ask for a queue's length whenever somebody wants to know."""
        self.queue_length.labels(model=model, queue=queue).set_function(length)

    def answered(self, route: str, model: str, status: int, stages: Stages) -> None:
        """Count a request and its stages."""
        self.requests.labels(route=route, model=model, status=str(status)).inc()
        self.request_seconds.labels(route=route).observe(stages.total)
        for stage, seconds in stages.seconds.items():
            self.stage_seconds.labels(stage=stage).observe(seconds)

    def text(self) -> bytes:
        """Write everything in Prometheus' format."""
        return generate_latest(self.registry)
