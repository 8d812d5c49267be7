"""A GPU and a TensorRT that fail, at any call."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path

import pytest
from support.gpu.fake_cuda import ILLEGAL_ADDRESS, MEMORY
from support.gpu.fake_engine import PLAN
from support.gpu.trt_bench import Bench, assert_same, feeds_of

from internvl_edge.errors import (
    ArtifactError,
    HardwareError,
    InternVLError,
    ResourceError,
    SessionDead,
    UsageError,
)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("Runtime", HardwareError),
        ("deserialize", ArtifactError),
        ("create_execution_context", InternVLError),
        ("set_optimization_profile_async", InternVLError),
        ("set_input_shape", InternVLError),
    ],
)
def test_tensorrt_fails_at_open(bench: Bench, call: str, error: type[InternVLError]) -> None:
    bench.trt.refuses[call] = "Error Code 4: the reason"
    with pytest.raises(error, match="the reason"):
        bench.open()
    assert bench.cuda.num_live == 0
    bench.trt.refuses = {call: "Error Code 2: OutOfMemory (no room)"}
    if call != "Runtime":
        with pytest.raises(ResourceError, match="no room"):
            bench.open()


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_tensorrt_fails_in_a_run_and_recovers(bench: Bench, call: str) -> None:
    with bench.open() as session:
        session.run(feeds_of(3, 3))
        bench.trt.refuses[call] = "Error Code 4: the reason"
        with pytest.raises(InternVLError, match=rf"{call}.*the reason"):
            session.run(feeds_of(2, 2))
        bench.trt.refuses.clear()
        for seed in range(3):
            assert_same(session.run(feeds_of(2, 2, seed)), feeds_of(2, 2, seed))
    assert bench.cuda.num_live == 0


def test_memory_runs_out_at_any_allocation(bench: Bench) -> None:
    """Everything taken before is freed, and the next attempt works."""
    for call in (
        "cudaMalloc",
        "cudaHostAlloc",
        "cudaStreamCreateWithFlags",
        "cudaEventCreateWithFlags",
    ):
        for count in itertools.count():
            bench.cuda.fail = {call: (count, MEMORY)}
            try:
                session = bench.open(slots=2)
            except ResourceError as error:
                host = call == "cudaHostAlloc"
                assert ("not enough page-locked host" if host else "not enough GPU") in str(error)
                assert bench.cuda.num_live == 0
            else:
                bench.cuda.fail = {}
                session.close()
                break
        assert count >= 2


def test_what_does_not_fit_is_said_before(tmp_path: Path) -> None:
    small = Bench(tmp_path, total=len(PLAN) - 1)
    with pytest.raises(ResourceError, match=r"loading the engine needs .* GB are free"):
        small.open()
    assert not small.trt.runtimes
    middle = Bench(tmp_path, total=len(PLAN) + 100)
    with pytest.raises(ResourceError, match=r"slots=4, each of .* needs .* are free"):
        middle.open(slots=4)
    assert middle.cuda.num_live == 0


def test_all_memory_of_a_slot_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte less than a slot takes is refused, with nothing allocated for one."""
    bench = Bench(tmp_path)
    monkeypatch.setattr("internvl_edge.runtime.trt.session.GB", 1)
    with caplog.at_level("INFO"), bench.open():
        held = sum(map(len, bench.cuda.memory.values()))
    assert f"{held}.00 GB of GPU memory, {bench.cuda.total - held}.00 GB free" in caplog.text
    tight = Bench(tmp_path, total=held - 1)
    with pytest.raises(ResourceError, match=r"slots=1, each of .* GB are free"):
        tight.open()
    assert tight.cuda.calls.count("cudaHostAlloc") == 1  # of the plan, while it was read
    Bench(tmp_path, total=max(held, len(PLAN))).open().close()


def test_memory_that_runs_out_says_which_and_how_much(bench: Bench) -> None:
    bench.cuda.fail = {"cudaMalloc": (3, MEMORY)}
    with pytest.raises(
        ResourceError, match=r"not enough GPU memory for 0\.00 GB, 1\.07 GB are free"
    ):
        bench.open()
    bench.cuda.fail = {"cudaHostAlloc": (1, MEMORY)}
    with pytest.raises(ResourceError, match=r"not enough page-locked host memory for 0\.00 GB"):
        bench.open()
    bench.cuda.fail = {"cudaMalloc": (0, MEMORY), "cudaMemGetInfo": (3, MEMORY)}
    with pytest.raises(ResourceError, match=r"0\.00 GB are free"):
        bench.open()


def test_a_sticky_error_ends_the_session(bench: Bench) -> None:
    session = bench.open()
    session.run(feeds_of(2, 2))
    bench.cuda.fail["cudaStreamSynchronize"] = 0, ILLEGAL_ADDRESS
    with pytest.raises(SessionDead, match=r"illegal memory access.*700"):
        session.run(feeds_of(2, 2))
    bench.cuda.fail.clear()
    before = len(bench.cuda.calls)
    for call in (lambda: session.run(feeds_of(2, 2)), lambda: session.empty("y", (1, 3))):
        with pytest.raises(SessionDead, match=r"failed before.*restart the process"):
            call()
    assert len(bench.cuda.calls) == before  # it does not touch the GPU again
    session.close()


def test_an_address_that_was_freed_is_the_gpus_end(bench: Bench) -> None:
    """What no check can see before: memory that goes while it is in use."""
    feeds = feeds_of(2, 2)
    with bench.open() as session, session.lease() as slot:
        out = session.empty("y", (2, 3))
        slot.run_device(feeds, out={"y": out})
        bench.cuda.cudaFree(out.owner.handle)
        out.owner.handle = None
        with pytest.raises(SessionDead):
            slot.run(feeds)


def test_a_fork_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    session = bench.open()
    session.submit(feeds_of(1, 1)).result()  # its thread does not come along
    live = bench.cuda.num_live
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        for call in (session.run, session.submit):
            with pytest.raises(UsageError, match="before a fork"):
                call(feeds_of(1, 1))
        with pytest.raises(UsageError, match="before a fork"):
            asyncio.run(session.run_async(feeds_of(1, 1)))
        session.close()
        assert bench.cuda.num_live == live  # it is the parent's
    assert_same(session.run(feeds_of(1, 1)), feeds_of(1, 1))
    session.close()
    assert bench.cuda.num_live == 0
