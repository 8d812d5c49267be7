"""A clock that calls advance, and timings made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from internvl_edge.benchmark.timing import TURN_CALLS, Timing

MS = 1_000_000


class FakeTime:
    """A clock that advances when a call says so."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def call(self, durations_ms: Iterable[float]) -> Callable[..., None]:
        durations = iter(durations_ms)

        def run(*feeds: object) -> None:
            self.now_ns += round(next(durations) * MS)

        return run


def timing(
    samples_ms: Iterable[float], items: int = 1, turn_calls: int | None = TURN_CALLS
) -> Timing:
    return Timing(
        samples_ms=tuple(samples_ms),
        items=items,
        warmup_iterations=10,
        is_steady=True,
        turn_calls=turn_calls,
    )
