"""CUDA graphs and contexts: which run is captured, which is replayed, and what bounds them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from support.gpu.fake_cuda import CAPTURE_INVALIDATED, ILLEGAL_ADDRESS
from support.gpu.fake_engine import GraphStrategy
from support.gpu.trt_bench import Bench, assert_same, feeds_of

from internvl_edge.errors import InternVLError, SessionDead
from internvl_edge.runtime.trt import contexts as contexts_module


def test_tensorrt_replays_a_shape_from_its_second_run_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with bench.open() as session:
        for run in range(5):
            for shape in [(1, 1), (8, 6)]:
                feeds = feeds_of(*shape, seed=run)
                assert_same(session.run(feeds), feeds)
        assert bench.cuda.num_launches == 2 * 4
        assert len(bench.cuda.executables) == 2
        assert len(bench.trt.contexts) == 2  # one per graph


def test_the_number_of_graphs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts_module, "MAX_GRAPHS", 3)
    bench = Bench(tmp_path)
    with bench.open() as session:
        for seed, batch in enumerate(itertools.chain(*[(n, n) for n in range(1, 9)] * 2)):
            feeds = feeds_of(batch, 2, seed)
            assert_same(session.run(feeds), feeds)
            assert len(bench.cuda.executables) <= 3
        assert len(bench.trt.contexts) == 3
    assert bench.cuda.num_live == 0


def test_rtx_captures_by_itself(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "tensorrt-rtx")
    with bench.open() as session:
        for batch in (1, 1, 2, 2):
            session.run(feeds_of(batch, 1))
    assert bench.cuda.num_launches == 0
    (context,) = bench.trt.contexts
    assert context.config.cuda_graph_strategy is GraphStrategy.WHOLE_GRAPH_CAPTURE
    with bench.open(graphs=False):
        assert bench.trt.contexts[-1].config.cuda_graph_strategy is GraphStrategy.DISABLED


def test_a_gpu_that_fails_in_a_capture_is_dead(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with bench.open() as session:
        session.run(feeds_of(2, 2))
        bench.cuda.fail["cudaGraphInstantiate"] = 0, ILLEGAL_ADDRESS
        with pytest.raises(SessionDead):
            session.run(feeds_of(2, 2))


@pytest.mark.parametrize("call", ["cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_what_cannot_be_captured_runs_without(tmp_path: Path, call: str) -> None:
    bench = Bench(tmp_path)
    with bench.open() as session:
        bench.cuda.fail[call] = 0, CAPTURE_INVALIDATED
        for seed in range(4):
            feeds = feeds_of(2, 2, seed)
            assert_same(session.run(feeds), feeds)
        assert bench.cuda.num_launches == 0


def test_a_call_that_fails_in_a_capture_leaves_no_graph(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with bench.open() as session:
        session.run(feeds_of(2, 2))
        bench.trt.refuses["execute_async_v3"] = "Error Code 4: the reason"
        with pytest.raises(InternVLError, match="the reason"):
            session.run(feeds_of(2, 2))
        assert not bench.cuda.graphs
        bench.trt.refuses.clear()
        assert_same(session.run(feeds_of(2, 2)), feeds_of(2, 2))
    assert bench.cuda.num_live == 0


def test_without_memory_for_another_context_one_is_used_again(bench: Bench) -> None:
    with bench.open() as session:
        for seed in range(2):
            assert_same(session.run(feeds_of(2, 2, seed)), feeds_of(2, 2, seed))
        bench.trt.refuses["create_execution_context"] = "Error Code 2: OutOfMemory"
        for batch in (1, 3, 1, 1, 1):
            assert_same(session.run(feeds_of(batch, 2)), feeds_of(batch, 2))
        found = session.run_device(feeds_of(2, 2))  # whose context is one more
        assert_same({name: array.numpy() for name, array in found.items()}, feeds_of(2, 2))
    assert len(bench.trt.contexts) == 1


def test_the_order_of_feeds_is_no_other_shape(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    feeds = feeds_of(2, 3)
    with bench.open() as session:
        for _ in range(2):
            assert_same(session.run(feeds), feeds)
            assert_same(session.run(dict(reversed(feeds.items()))), feeds)
        assert len(bench.cuda.executables) == 1


@pytest.mark.parametrize("batch", [3, 5, 8])
def test_buckets_that_the_engine_does_not_take_are_passed_over(bench: Bench, batch: int) -> None:
    """16 is above every profile; 4 serves a batch of 3."""
    feeds = feeds_of(batch, 2)
    with bench.open(batch_buckets=(16, 4)) as session:
        assert_same(session.run(feeds), feeds)
        ran = {c.shapes["x"][0] for c in bench.trt.contexts if c.shapes["ids"][1] == 2}
        assert ran == {4 if batch == 3 else batch}


def test_without_graphs_nothing_is_captured(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with bench.open(graphs=False) as session:
        for batch in (1, 1, 1, 2, 2):
            session.run(feeds_of(batch, 1))
    assert "cudaStreamBeginCapture" not in bench.cuda.calls
    assert len(bench.trt.contexts) == 1
