"""Scenarios on a clock of our own, held against what queueing theory says."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
from support.runs.fake_time import MS, FakeTime, timing

from internvl_edge.benchmark import load as scenarios
from internvl_edge.benchmark.load import highest_rate, run_closed_loop, run_scenario, run_server
from internvl_edge.benchmark.timing import NS_PER_S, Timing
from internvl_edge.errors import UsageError


class Server(FakeTime):
    """Calls of a fixed time, on a clock that sleeping moves too."""

    def __init__(self, service_ms: float) -> None:
        super().__init__()
        self.service_ns = round(service_ms * MS)

    def run(self) -> None:
        self.now_ns += self.service_ns

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_ns += round(seconds * NS_PER_S)

    def serve(self, rate: float, requests: int = 40_000) -> Timing:
        return run_server(
            self.run, rate=rate, seconds=requests / rate, clock=self, sleep=self.sleep, seed=3
        )


def test_one_caller_begins_when_the_last_call_ended() -> None:
    server = Server(2.0)
    found = run_closed_loop(server.run, items=4, seconds=1.0, clock=server)
    assert found.samples_ms == (2.0,) * 500
    assert found.throughput == pytest.approx(4 * 500)


def test_callers_at_once_share_the_wall_time() -> None:
    barrier = threading.Barrier(4)
    found = run_closed_loop(lambda: (barrier.wait(5), time.sleep(0.2)), streams=4, seconds=0.1)
    assert len(found.samples_ms) == 4  # 4 began together, and none again
    assert found.throughput > 1.5 * 1e3 * 4 / sum(found.samples_ms)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waiting_is_that_of_an_md1_queue(load: float) -> None:
    """Pollaczek and Khinchine: with fixed service s, the mean wait is s · load / 2 (1 − load)."""
    server = Server(10.0)
    found = server.serve(rate=load / 0.010)
    expected = 10.0 + 10.0 * load / (2 * (1 - load))
    assert found.to_json()["latency"]["avg"] == pytest.approx(expected, rel=0.07)
    assert min(found.samples_ms) >= 10.0
    assert found.throughput == pytest.approx(load / 0.010, rel=0.03)


def test_an_overloaded_server_only_gets_later() -> None:
    found = Server(10.0).serve(rate=200, requests=1000)
    assert found.throughput == pytest.approx(100, rel=0.01)
    assert found.samples_ms[-1] > 4000


def test_several_servers_take_what_waits() -> None:
    found = run_server(lambda: time.sleep(0.02), rate=1000, seconds=0.04, streams=8)
    assert len(found.samples_ms) == 40
    assert min(found.samples_ms) >= 20
    assert found.wall_s is not None
    assert found.wall_s < 40 * 0.02 / 2


def test_the_highest_rate_within_a_bound() -> None:
    """Of an M/D/1 queue of load r, P(wait ≤ 2 s) = (1 − r) (e^2r − r e^r); 0.99 at r = 0.318."""
    server = Server(10.0)
    found = highest_rate(lambda rate: server.serve(rate, 20_000), bound_ms=30.0, ceiling=100)
    assert (1 - 0.318) * (math.exp(0.636) - 0.318 * math.exp(0.318)) == pytest.approx(
        0.99, abs=1e-3
    )
    assert found is not None
    assert found.rate == pytest.approx(31.8, rel=0.08)
    assert found.percentile_ms(99) <= 30
    assert found.to_json()["p99_bound"] == {"unit": "ms", "max": 30.0}
    assert found.to_json()["request_rate"] == {"unit": "requests/s", "avg": found.rate}


def test_the_reported_p99_is_within_the_bound_however_noisy_runs_are() -> None:
    rng = np.random.default_rng(5)
    for _ in range(30):
        found = highest_rate(lambda rate: timing(rng.exponential(rate, 500)), 200.0, ceiling=100)
        assert found is not None
        assert found.percentile_ms(99) <= 200


@pytest.mark.parametrize(("service_ms", "rate"), [(1.0, 700.0), (184.0, 4.0), (184.0, 1e-4)])
def test_arrivals_last_as_long_as_asked(service_ms: float, rate: float) -> None:
    server = Server(service_ms)
    found = run_server(server.run, rate=rate, seconds=3.0, clock=server, sleep=server.sleep)
    assert len(found.samples_ms) == max(round(3 * rate), 1)
    assert found.wall_s is not None
    assert found.wall_s <= 3 + 2 * service_ms / 1e3


def test_a_bound_that_cannot_be_met() -> None:
    assert highest_rate(Server(10.0).serve, bound_ms=9.0, ceiling=100) is None


def test_the_search_halves_the_range() -> None:
    found = highest_rate(lambda rate: timing([rate]), bound_ms=70.0, ceiling=100)
    assert found is not None
    assert 69 < found.percentile_ms(50) <= 70


def test_rejections() -> None:
    with pytest.raises(UsageError, match="positive streams"):
        run_closed_loop(lambda: None, streams=0)
    with pytest.raises(UsageError, match="positive rate"):
        run_server(lambda: None, rate=0)
    with pytest.raises(UsageError, match="positive rate, seconds"):
        run_server(lambda: None, rate=1, seconds=0)


def test_there_is_a_call_in_the_shortest_time() -> None:
    server = Server(2.0)
    found = run_closed_loop(server.run, seconds=1e-9, clock=server)
    assert found.to_json()["latency"]["count"] == 1
    assert not found.is_steady


def test_arrivals_are_those_of_the_seed() -> None:
    first, second = (Server(1.0).serve(100, 50).samples_ms for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_scenarios_by_name() -> None:
    def call() -> None:
        time.sleep(0.002)

    load: dict[str, int | float] = {"streams": 2, "items": 3, "seconds": 0.05}
    for scenario in ("single-stream", "multi-stream", "offline"):
        found = run_scenario(scenario, call, **load)  # type: ignore[arg-type]
        assert found.items == 3
        assert min(found.samples_ms) >= 2
    with pytest.raises(UsageError, match="scenario 'burst': expected single-stream"):
        run_scenario("burst", call, **load)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_steady", [True, False])
def test_it_is_steady_where_the_warm_up_said_so(
    monkeypatch: pytest.MonkeyPatch, is_steady: bool
) -> None:
    monkeypatch.setattr(scenarios, "warm_up", lambda run, seconds: ([1, 2, 3], is_steady))
    found = run_scenario("offline", lambda: None, streams=1, items=1, seconds=0.01)
    assert (found.is_steady, found.warmup_iterations) == (is_steady, 3)


def test_the_server_by_name() -> None:
    load = {"streams": 2, "items": 1, "seconds": 0.05}
    start = time.monotonic()
    found = run_scenario("server", lambda: time.sleep(0.002), p99_ms=1000, **load)  # type: ignore[arg-type]
    assert time.monotonic() - start < 5
    assert found.percentile_ms(99) <= 1000
    assert found.wall_s is not None
    assert found.rate is not None
    assert found.bound_ms == 1000
    with pytest.raises(
        UsageError, match=r"--p99 0\.01 ms cannot be kept at any rate: a single call"
    ):
        run_scenario("server", lambda: time.sleep(0.002), p99_ms=0.01, **load)  # type: ignore[arg-type]
