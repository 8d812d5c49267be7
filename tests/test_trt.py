"""The TensorRT session on a stand-in GPU: what it computes, and every way in which it can fail."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import itertools
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_engine
import numpy as np
import pytest
from artifacts import manifest_of
from fake_cuda import CAPTURE_INVALIDATED, ILLEGAL_ADDRESS, MEMORY, FakeCuda
from fake_engine import (
    DECODER,
    INPUTS,
    KEY,
    LINEAR,
    OUTPUTS,
    PLAN,
    Computation,
    FakeRuntimeTrt,
    GraphStrategy,
    KernelStrategy,
    expected,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.artifact.open import Artifact, ComponentRecord, EngineRecord
from internvl_edge.artifact.sidecar import EngineInfo, ShapeRanges
from internvl_edge.errors import (
    ArtifactError,
    FeedError,
    HardwareError,
    InternVLError,
    ResourceError,
    SessionDead,
    UsageError,
)
from internvl_edge.runtime import session as session_module
from internvl_edge.runtime.generation.cache import DeviceDecoding, HostDecoding, empty_cache, start
from internvl_edge.runtime.generation.loop import Generation, Prompt, generate, stream
from internvl_edge.runtime.gpu.device_array import DeviceArray
from internvl_edge.runtime.gpu.handles import Event
from internvl_edge.runtime.gpu.memory import find_overlap
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.trt import contexts as contexts_module
from internvl_edge.runtime.trt import engine as plan_module
from internvl_edge.runtime.trt.session import TrtOptions, TrtSession, open_component
from internvl_edge.types import Array

ALLOCATIONS = (
    "cudaMalloc",
    "cudaHostAlloc",
    "cudaStreamCreateWithFlags",
    "cudaEventCreateWithFlags",
)
RESULT_SHAPES = {"y": (2, 3), "part": (2, 3)}  # of 2 rows and 3 ids
TARGETS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}
Arrays = dict[str, Array]


class Bench:
    """A directory with an engine, a GPU and a TensorRT."""

    def __init__(
        self, path: Path, target: str = "tensorrt", computation: Computation = LINEAR, **cuda: Any
    ) -> None:
        self.target, self.data = target, computation.plan
        self.cuda = FakeCuda(**cuda)
        self.trt = FakeRuntimeTrt(self.cuda, target.replace("-", "_"), TARGETS[target], computation)
        inputs, outputs = computation.inputs, computation.outputs
        name = f"engines/vision.{target}-1a2b3c4d"
        self.files = {f"{name}.plan": self.data, f"{name}.json": b"{}"}
        self.path, self.plan = path, path / f"{name}.plan"
        self.info = EngineInfo(
            component="vision",
            target=target,
            precision="fp16",
            builder_version=TARGETS[target],
            tool_version="0",
            compute_capabilities=(),
            minimum_sm=80,
            profile=ShapeRanges(),
            onnx_sha256="0" * 64,
            nbytes=len(self.data),
            sha256=hashlib.sha256(self.data).hexdigest(),
            fused_attention=0,
            decomposed_attention=0,
            build_seconds=1.0,
            inputs=inputs,
            outputs=outputs,
        )
        record = ComponentRecord(
            file="vision.onnx", inputs=inputs, outputs=outputs, nbytes=0, verification=None
        )
        engine = EngineRecord(
            component="vision", target=target, file=f"{name}.plan", sidecar=f"{name}.json"
        )
        self.manifest = manifest_of(self.files, engines=(engine,), components={"vision": record})
        self.write()

    def write(self) -> None:
        self.plan.parent.mkdir(exist_ok=True)
        self.plan.write_bytes(self.data)
        self.plan.with_suffix(".json").write_text(json.dumps(self.info.to_json()))

    def open(self, device: str = "cuda", **options: Any) -> TrtSession:
        return open_component(
            Artifact(path=self.path, manifest=self.manifest),
            "vision",
            device,
            self.target,
            options=TrtOptions(**options),
            trt=self.trt,
            cudart=self.cuda,
        )

    def on_gpu(self, array: Array, offset: int = 0, **changed: Any) -> Any:
        """An array of another library, by ``__cuda_array_interface__``."""
        data = array.tobytes()
        address = self.cuda.cudaMalloc(len(data) + offset)[1] + offset
        self.cuda.bytes_at(address, len(data))[:] = np.frombuffer(data, np.uint8)
        told = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (address, False),
            "version": 3,
        }
        return SimpleNamespace(__cuda_array_interface__=told | changed)

    def owned(self, session: TrtSession, name: str, array: Array) -> DeviceArray:
        """An array of the session's, with these values."""
        owned = session.empty(name, array.shape)
        data = np.frombuffer(array.tobytes(), np.uint8)
        self.cuda.bytes_at(owned.pointer, len(data))[:] = data
        return owned

    def fetch(self, array: DeviceArray) -> Array:
        """What the GPU holds once the array's stream got there."""
        if array.stream is not None:
            self.cuda.cudaStreamSynchronize(array.stream)
        data = self.cuda.bytes_at(array.pointer, array.nbytes).copy()
        return data.view(array.dtype).reshape(array.shape)


def feeds_of(batch: int, length: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((batch, 4)).astype(np.float32),
        "ids": rng.integers(0, 100, (batch, length)),
    }


def assert_same(found: Arrays, feeds: Arrays) -> None:
    wanted = expected(feeds)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture(params=list(TARGETS))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path, request.param)


# --- what it computes ----------------------------------------------------------------------------


def test_it_computes_what_the_engine_does(bench: Bench) -> None:
    with bench.open() as session:
        assert list(session.inputs) == ["x", "ids"]
        assert list(session.outputs) == ["y", "part"]
        for seed, (batch, length) in enumerate([(1, 1), (8, 6), (1, 1), (3, 2), (4, 1), (5, 1)]):
            feeds = feeds_of(batch, length, seed)
            assert_same(session.run(feeds), feeds)
    assert bench.cuda.num_live == 0
    assert not bench.trt.runtimes[0].engine_host_code_allowed


@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 6)), min_size=1, max_size=12),
    buckets=st.sets(st.sampled_from([1, 2, 3, 4, 8])),
    graphs=st.booleans(),
    target=st.sampled_from(list(TARGETS)),
)
def test_any_calls_in_any_order(
    tmp_path_factory: pytest.TempPathFactory,
    calls: list[tuple[int, int]],
    buckets: set[int],
    graphs: bool,
    target: str,
) -> None:
    bench = Bench(tmp_path_factory.mktemp("out"), target)
    with bench.open(graphs=graphs, batch_buckets=tuple(buckets)) as session:
        for seed, (batch, length) in enumerate(calls * 3):
            feeds = feeds_of(batch, length, seed)
            assert_same(session.run(feeds), feeds)
    assert bench.cuda.num_live == 0


def test_a_strided_array_is_as_good(bench: Bench) -> None:
    feeds = feeds_of(3, 4)
    strided = {"x": np.asfortranarray(feeds["x"]), "ids": feeds["ids"][:, ::-1][:, ::-1]}
    with bench.open() as session:
        assert_same(session.run(strided), feeds)


@pytest.mark.parametrize("batch", [9, 16, 21])
def test_a_larger_batch_runs_in_several_calls(bench: Bench, batch: int) -> None:
    feeds = feeds_of(batch, 3)
    with bench.open() as session:
        assert_same(session.run(feeds), feeds)
        with pytest.raises(FeedError, match="batch"):
            session.run(feeds | {"x": feeds["x"][:-1]})
        with session.lease() as slot, pytest.raises(FeedError, match=r"x \[.*the engine takes"):
            slot.run(feeds)


def test_only_the_wanted_outputs_are_copied(bench: Bench) -> None:
    feeds = feeds_of(2, 3)
    with bench.open() as session:
        bench.cuda.calls.clear()
        found = session.run(feeds, outputs=["part"])
        assert bench.cuda.calls.count("cudaMemcpyAsync") == 3
        np.testing.assert_array_equal(found["part"], expected(feeds)["part"])
        assert list(found) == ["part"]


def test_outputs_outlive_the_next_run(bench: Bench) -> None:
    first, second = feeds_of(2, 3, 1), feeds_of(2, 3, 2)
    with bench.open() as session:
        found = session.run(first)
        session.run(second)
        assert_same(found, first)


def test_views_are_of_the_slot_until_its_next_run(bench: Bench) -> None:
    first, second = feeds_of(2, 3, 1), feeds_of(2, 3, 2)
    with bench.open() as session, session.lease() as slot:
        views = slot.run(first)
        assert_same(views, first)
        slot.run(second)
        assert_same(views, second)


def test_rows_of_other_requests_are_not_in_the_filled_up_batch(bench: Bench) -> None:
    """A canary in a large batch, then a small one in the same bucket: the engine sees zeros."""
    seen = []
    compute = fake_engine.expected

    def spy(feeds: Arrays) -> Arrays:
        seen.append({name: array.copy() for name, array in feeds.items()})
        return compute(feeds)

    canary = {"x": np.full((8, 4), 1e6, np.float32), "ids": np.full((8, 2), 777, np.int64)}
    with pytest.MonkeyPatch.context() as patch, bench.open(batch_buckets=(8,)) as session:
        patch.setattr(fake_engine, "expected", spy)
        session.run(canary)
        small = feeds_of(3, 2)
        assert_same(session.run(small), small)
    assert [len(feeds["x"]) for feeds in seen] == [8, 8]
    assert all((array[3:] == 0).all() for array in seen[1].values())


def test_a_first_dimension_of_another_name_is_never_filled_up(bench: Bench) -> None:
    renamed = {
        field: tuple(replace(spec, shape=("rows", *spec.shape[1:])) for spec in specs)
        for field, specs in (("inputs", INPUTS), ("outputs", OUTPUTS))
    }
    record = replace(bench.manifest.components["vision"], **renamed)
    bench.manifest = replace(bench.manifest, components={"vision": record})
    feeds = feeds_of(3, 2)
    with bench.open(batch_buckets=(8,)) as session:
        assert_same(session.run(feeds), feeds)
        with pytest.raises(FeedError, match="the engine takes"):
            session.run(feeds_of(9, 2))


def test_the_narrowest_profile_is_chosen(bench: Bench) -> None:
    with bench.open() as session:
        for batch, length, profile in [(4, 1, 1), (5, 1, 0), (4, 2, 0), (1, 1, 1)]:
            session.run(feeds_of(batch, length))
            ran = [
                context for context in bench.trt.contexts if context.shapes.get("x") == (batch, 4)
            ]
            assert ran[-1].active_optimization_profile == profile


# --- CUDA graphs ---------------------------------------------------------------------------------


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


# --- arrays on the GPU ---------------------------------------------------------------------------


def test_arrays_on_the_gpu_are_bound_where_they_are(bench: Bench) -> None:
    feeds = feeds_of(3, 2)
    device_feeds = {name: bench.on_gpu(array) for name, array in feeds.items()}
    with bench.open(batch_buckets=(8,)) as session:
        assert_same(session.run(device_feeds), feeds)
        address = device_feeds["x"].__cuda_array_interface__["data"][0]
        assert any(context.addresses["x"] == address for context in bench.trt.contexts)


def test_a_misaligned_array_is_copied_on_the_gpu(bench: Bench) -> None:
    feeds = feeds_of(3, 2)
    with bench.open() as session:
        moved = feeds | {"x": bench.on_gpu(feeds["x"], offset=16)}
        assert_same(session.run(moved), feeds)


def test_another_stream_is_waited_for(bench: Bench) -> None:
    feeds = feeds_of(3, 2)
    array = bench.on_gpu(np.zeros((3, 4), np.float32))
    stream = bench.cuda.cudaStreamCreateWithFlags(1)[1]
    told = array.__cuda_array_interface__
    told["stream"] = stream
    data = np.frombuffer(feeds["x"].tobytes(), np.uint8)
    bench.cuda.queue(
        stream,
        lambda: bench.cuda.bytes_at(told["data"][0], len(data)).__setitem__(slice(None), data),
    )
    with bench.open() as session:
        assert_same(session.run(feeds | {"x": array}), feeds)


def test_outputs_stay_on_the_gpu(bench: Bench) -> None:
    feeds = feeds_of(3, 2)
    with bench.open() as session, session.lease() as slot:
        out = {"y": session.empty("y", (3, 3))}
        found = slot.run_device(feeds, out=out)
        assert found["y"].pointer == out["y"].pointer
        assert found["y"].__cuda_array_interface__["shape"] == (3, 3)
        assert_same({name: bench.fetch(array) for name, array in found.items()}, feeds)


def test_runs_that_are_not_awaited_do_not_share_staging(bench: Bench) -> None:
    """The second call writes pinned memory that the first one's copies still read."""
    calls = [feeds_of(2, 2, seed) for seed in range(4)]
    with bench.open() as session, session.lease() as slot:
        outs = [
            {name: session.empty(name, expected(c)[name].shape) for name in ("y", "part")}
            for c in calls
        ]
        founds = [slot.run_device(feeds, out=out) for feeds, out in zip(calls, outs, strict=True)]
        for feeds, found in zip(calls, founds, strict=True):
            assert_same({name: bench.fetch(array) for name, array in found.items()}, feeds)


def test_an_output_of_one_run_is_an_input_of_the_next(bench: Bench) -> None:
    feeds = feeds_of(2, 3)
    with bench.open() as session, session.lease() as slot:
        x = session.empty("x", (2, 4))
        bench.cuda.bytes_at(x.pointer, x.nbytes)[:] = np.frombuffer(feeds["x"].tobytes(), np.uint8)
        found = slot.run_device({"x": x, "ids": feeds["ids"]})
        assert_same({name: bench.fetch(array) for name, array in found.items()}, feeds)


def test_arrays_live_until_the_gpu_is_done_with_them(bench: Bench) -> None:
    """The caller drops them at once; runs queue up behind, and nothing is waited for."""
    calls = [feeds_of(2, 3, seed) for seed in range(6)]
    with bench.open() as session, session.lease() as slot:
        for feeds in calls:
            slot.run_device(
                {"x": bench.owned(session, "x", feeds["x"]), "ids": feeds["ids"]},
                out={"y": session.empty("y", (2, 3)), "part": session.empty("part", (2, 3))},
            )
        live = bench.cuda.num_live
        assert_same(slot.run(calls[0]), calls[0])
        assert bench.cuda.num_live < live  # and no longer
    assert bench.cuda.num_live == 0


def test_closing_waits_for_what_was_queued(bench: Bench) -> None:
    feeds = feeds_of(2, 3)
    for closes_within in (True, False):
        session = bench.open()
        with session.lease() as slot:
            out = {name: session.empty(name, shape) for name, shape in RESULT_SHAPES.items()}
            slot.run_device(feeds, out=out)
            if closes_within:
                session.close()
        session.close()
        assert_same({name: bench.fetch(array) for name, array in out.items()}, feeds)


def test_a_consumer_of_dlpack_waits_for_the_engine(bench: Bench) -> None:
    feeds = feeds_of(2, 3)
    consumer = bench.cuda.cudaStreamCreateWithFlags(1)[1]
    with bench.open() as session, session.lease() as slot:
        seen = []
        y = slot.run_device(feeds)["y"]
        for stream in (-1, consumer):
            y.__dlpack__(stream=stream)
            bench.cuda.queue(
                consumer, lambda: seen.append(bench.cuda.bytes_at(y.pointer, y.nbytes).copy())
            )
            bench.cuda.cudaStreamSynchronize(consumer)
    early, late = (data.view(np.float32).reshape(2, 3) for data in seen)
    np.testing.assert_array_equal(late, expected(feeds)["y"])
    assert not np.array_equal(early, late)  # -1 is the consumer's word that it waits by itself


def test_another_slot_waits_for_the_first(bench: Bench) -> None:
    """By an event of the run: the first slot's stream may be in use by another thread."""
    feeds = feeds_of(2, 3)
    with bench.open(slots=2) as session, session.lease() as first, session.lease() as second:
        x = bench.owned(session, "x", np.zeros((2, 4), np.float32))
        ready = Event(session.device)
        data = np.frombuffer(feeds["x"].tobytes(), np.uint8)
        bench.cuda.queue(
            first.stream.handle,
            lambda: bench.cuda.bytes_at(x.pointer, x.nbytes).__setitem__(slice(None), data),
        )
        ready.record(first.stream.handle)
        late = replace(x, stream=first.stream.handle, ready=ready)
        assert_same(second.run(feeds | {"x": late}), feeds)
        np.testing.assert_array_equal(late.numpy(), feeds["x"])
        with pytest.raises(UsageError, match="did not come from a run"):
            x.numpy()


def test_memory_of_an_array_is_freed_with_it(bench: Bench) -> None:
    with bench.open() as session:
        before = bench.cuda.num_live
        array = session.empty("y", (8, 3))
        assert bench.cuda.num_live == before + 1
        del array
        assert bench.cuda.num_live == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": (0x1234, False)}, "is not memory of cuda:0"),
        ({"strides": (4, 16)}, "strides"),
        ({"mask": object()}, "masked"),
        ({"typestr": "<f8"}, "expected float32"),
        ({"shape": (3, 5)}, "dimension 1 must be 4"),
        ({"data": None}, "SimpleNamespace on a GPU"),
    ],
)
def test_wrong_arrays_on_the_gpu(bench: Bench, changed: dict[str, Any], message: str) -> None:
    feeds = feeds_of(3, 2)
    with bench.open() as session:
        wrong = feeds | {"x": bench.on_gpu(feeds["x"], **changed)}
        with pytest.raises(FeedError, match=message):
            session.run(wrong)
        assert_same(session.run(feeds), feeds)


def test_wrong_targets(bench: Bench) -> None:
    feeds = feeds_of(3, 2)
    with bench.open() as session, session.lease() as slot:
        whole = session.empty("y", (3, 3))
        for out, message in [
            ({"z": session.empty("y", (3, 3))}, "output 'z'"),
            ({"y": session.empty("y", (2, 3))}, r"expected \[3, 3\], found \[2, 3\]"),
            ({"y": session.empty("part", (3, 3))}, "found float16"),
            ({"y": replace(whole, pointer=whole.pointer + 16)}, "aligned to 256"),
            ({"y": np.zeros((3, 3), np.float32)}, "expected an array on the GPU"),
        ]:
            with pytest.raises((FeedError, UsageError), match=message):
                slot.run_device(feeds, out=out)
        shared = session.empty("x", (3, 4))
        y = replace(shared, shape=(3, 3))
        with pytest.raises(FeedError, match="input 'x' is where this run writes output 'y'"):
            slot.run_device({"x": shared, "ids": feeds["ids"]}, out={"y": y})
        assert_same(slot.run(feeds), feeds)


def test_outputs_share_no_memory(bench: Bench) -> None:
    feeds = feeds_of(8, 6)
    with bench.open() as session, session.lease() as slot:
        memory = session.empty("y", (200, 3))
        y = replace(memory, shape=(8, 3))
        part = DeviceArray(pointer=y.pointer, shape=(8, 6), dtype=np.dtype("f2"))
        x = replace(memory, pointer=y.pointer, shape=(8, 4))
        with pytest.raises(FeedError, match=r"output '\w+' is where this run writes output '\w+'"):
            slot.run_device(feeds, out={"y": y, "part": part})
        with pytest.raises(FeedError, match="input 'x' is where this run writes output 'y'"):
            slot.run_device(feeds | {"x": x}, out={"y": y})
        first = slot.run_device(feeds)  # in the slot's memory
        y_as_x = replace(first["y"], shape=(6, 4))
        with pytest.raises(FeedError, match="input 'x' is where this run writes output 'y'"):
            slot.run_device({"x": y_as_x, "ids": feeds["ids"][:6]})
        apart = replace(part, pointer=y.pointer + 256)  # y takes 96 bytes
        found = slot.run_device(feeds, out={"y": y, "part": apart})
        assert_same({name: bench.fetch(array) for name, array in found.items()}, feeds)


def test_spans_that_overlap() -> None:
    def found(written: list[tuple[int, int]], read: list[tuple[int, int]]) -> Any:
        return find_overlap([(*w, f"w{w[0]}") for w in written], [(*r, f"r{r[0]}") for r in read])

    assert found([(0, 4), (4, 8)], [(8, 9), (8, 8), (2, 2)]) is None
    assert found([(4, 8), (0, 5)], []) == ("w0", "w4")
    assert found([(0, 4), (6, 8)], [(4, 6), (3, 4)]) == ("w0", "r3")
    assert found([(0, 9)], [(-5, 1)]) == ("w0", "r-5")
    assert found([(0, 1), (2, 3)], [(-5, 20)]) == ("w2", "r-5")


def test_what_is_read_only_is_not_written(bench: Bench) -> None:
    feeds = feeds_of(3, 2)
    y = bench.on_gpu(np.zeros((3, 3), np.float32))
    told = y.__cuda_array_interface__
    told["data"] = told["data"][0], True
    with bench.open() as session, session.lease() as slot:
        with pytest.raises(FeedError, match="found read-only float32"):
            slot.run_device(feeds, out={"y": y})
        x = bench.on_gpu(feeds["x"])
        x.__cuda_array_interface__["data"] = x.__cuda_array_interface__["data"][0], True
        assert_same(slot.run(feeds | {"x": x}), feeds)  # but it may be read
        assert_same(slot.run(feeds), feeds)


def test_outputs_in_memory_of_their_own(bench: Bench) -> None:
    calls = [feeds_of(2, 3, seed) for seed in range(3)]
    with bench.open() as session:
        live = bench.cuda.num_live
        found = [session.run_device(feeds) for feeds in calls]
        for feeds, arrays in zip(calls, found, strict=True):
            assert_same({name: array.numpy() for name, array in arrays.items()}, feeds)
        assert list(session.run_device(calls[0], outputs=["part"])) == ["part"]
        with pytest.raises(FeedError, match="NaN"):
            session.run_device(wrong_values())
        with pytest.raises(UsageError, match="output 'z'"):
            session.run_device(calls[0], outputs=["z"])
        del found, arrays
        assert bench.cuda.num_live == live


# --- a decoder's cache ---------------------------------------------------------------------------


@pytest.fixture(params=list(TARGETS))
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path, request.param, DECODER)


def on_gpu_and_on_host(bench: Bench, num_beams: int) -> tuple[Any, Any]:
    """The ids of three prompts with the cache on the GPU, and with it handed through the host."""
    prompt = Prompt(rows=[[3, 1, 4], [5, 2], [3]])
    how = Generation(max_new_tokens=20, num_beams=num_beams, stop_ids=(2,))
    with bench.open() as session:
        cache = empty_cache(session, rows=3)
        on_gpu = start(session, cache)
        assert isinstance(on_gpu, DeviceDecoding)
        found = generate(on_gpu, prompt, how)
        past = {KEY: next(iter(cache.values()))}
        return found, generate(HostDecoding(session, past), prompt, how)


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_a_decoder_says_the_same_with_its_cache_on_the_gpu(decoder: Bench, num_beams: int) -> None:
    """Rows end at different tokens, beams change places, and 9 are more than the engine takes."""
    found, expected = on_gpu_and_on_host(decoder, num_beams)
    np.testing.assert_array_equal(found, expected)
    assert len(set(map(len, (row[row > 0] for row in found)))) > 1  # of different lengths
    assert decoder.cuda.num_live == 0


def test_the_cache_never_crosses_to_the_host(decoder: Bench) -> None:
    with decoder.open() as session:
        decoding = start(session, empty_cache(session, rows=8))
        decoding.run(np.ones((8, 1), np.int64), np.ones((8, 1), np.int64), np.zeros((8, 1), int))
        allocated = []
        for past in range(1, 48):
            before = list(decoder.cuda.calls)
            mask, positions = np.ones((8, past + 1), np.int64), np.full((8, 1), past)
            decoding.run(np.full((8, 1), past % 7), mask, positions)
            calls = decoder.cuda.calls[len(before) :]
            assert calls.count("cudaMemcpyAsync") == 4  # ids, mask, positions; logits
            assert "cudaMemcpy" not in calls
            allocated.append(calls.count("cudaMalloc"))
        assert 4 <= sum(allocated) < 20  # blocks take turns
    contexts = [context for context in decoder.trt.contexts if context.shapes]
    assert len(contexts) <= 2  # shapes change at every step and pile nothing up
    assert decoder.cuda.num_launches == 0
    if decoder.target == "tensorrt-rtx":
        passing = contexts[-1].config
        assert passing.cuda_graph_strategy is GraphStrategy.DISABLED
        assert passing.dynamic_shapes_kernel_specialization_strategy is KernelStrategy.NONE
        first = decoder.trt.contexts[0].config
        assert first.dynamic_shapes_kernel_specialization_strategy is KernelStrategy.LAZY


def test_generations_share_a_slot(decoder: Bench) -> None:
    """Step by step in turns, in one thread: none holds the slot between its steps."""
    with decoder.open() as session:
        prompts = [Prompt(rows=[[i]]) for i in (3, 4)]
        how = Generation(max_new_tokens=12, stop_ids=())
        alone = [generate(start(session, empty_cache(session, 1)), p, how) for p in prompts]
        streams = [stream(start(session, empty_cache(session, 1)), p, how) for p in prompts]
        together = [list(tokens) for tokens in zip(*streams, strict=True)]
    np.testing.assert_array_equal(np.reshape(together, (12, 2)).T, np.concatenate(alone))


def test_a_step_without_memory_leaves_the_cache(decoder: Bench) -> None:
    def step(past: int) -> Any:
        mask, positions = np.ones((8, past + 1), np.int64), np.full((8, 1), past)
        return decoding.run(np.full((8, 1), past % 7), mask, positions)

    with decoder.open() as session:
        decoding = start(session, empty_cache(session, rows=8))
        found = [step(past) for past in range(3)]
        decoder.cuda.fail["cudaMalloc"] = 0, MEMORY
        past = 3
        with pytest.raises(ResourceError):
            for past in range(3, 48):
                found.append(step(past))
        decoder.cuda.fail.clear()
        found += [step(past) for past in range(past, 48)]
        decoding = start(session, empty_cache(session, rows=8))
        np.testing.assert_array_equal(found, [step(past) for past in range(48)])


# --- refusals ------------------------------------------------------------------------------------


def test_feeds_are_refused_as_everywhere(bench: Bench) -> None:
    feeds = feeds_of(3, 2)
    with bench.open() as session:
        for wrong, message in [
            ({"x": feeds["x"]}, "missing ids"),
            (feeds | {"x": feeds["x"].astype(np.float64)}, "expected float32"),
            (feeds | {"x": np.full((3, 4), np.nan, np.float32)}, "NaN"),
            (feeds | {"x": feeds["x"][:2]}, "batch=2"),
            (feeds_of(9, 7), r"found x \[8, 4\].* the engine takes x \[1, 4\] to"),
            (feeds_of(8, 7), r"ids \[1, 1\] to \[8, 6\]"),
            (None, "expected a mapping of the inputs x, ids, found NoneType"),
            (feeds | {"x": np.ma.masked_array(feeds["x"], mask=True)}, "a masked array"),
            (feeds | {"x": Unplaced()}, "'x': Unplaced has no device: on a meta device"),
            (last_row_is_nan(21), r"1 of 84 that are NaN"),
        ]:
            with pytest.raises(FeedError, match=message):
                session.run(wrong)
            ran = [name for name in bench.cuda.calls if name == "cudaMemcpyAsync"]
            assert not ran  # before any work
        with pytest.raises(UsageError, match="output 'z'"):
            session.run(feeds, outputs=["z"])
        assert np.isnan(session.run(wrong_values(), check=False)["y"]).all()
        assert_same(session.run(feeds), feeds)


class Unplaced:
    """A tensor that has no memory."""

    def __dlpack_device__(self) -> tuple[int, int]:
        raise BufferError("on a meta device")


def last_row_is_nan(batch: int) -> Arrays:
    feeds = feeds_of(batch, 2)
    feeds["x"][-1, -1] = np.nan
    return feeds


def wrong_values() -> Arrays:
    return feeds_of(3, 2) | {"x": np.full((3, 4), np.nan, np.float32)}


@pytest.mark.parametrize("device", ["cpu", "gpu", "cuda:x"])
def test_a_device_that_is_none(bench: Bench, device: str) -> None:
    with pytest.raises(UsageError, match="runs on 'cuda'"):
        bench.open(device)


def test_options_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="found 0 slots"):
        TrtOptions(slots=0)
    with pytest.raises(UsageError, match="batch buckets"):
        TrtOptions(batch_buckets=(0,))


def test_no_engine_was_built(bench: Bench) -> None:
    bench.manifest = replace(bench.manifest, engines=())
    with pytest.raises(UsageError, match="internvl-edge build"):
        bench.open()


def test_an_engine_of_another_gpu_or_release_is_not_touched(bench: Bench) -> None:
    bench.cuda.sm = 75
    with pytest.raises(HardwareError, match="this one is SM75"):
        bench.open()
    bench.cuda.sm = 89
    bench.trt.__version__ = "12.0"
    with pytest.raises(HardwareError, match="another version"):
        bench.open()
    assert not bench.trt.runtimes


@pytest.mark.parametrize("data", [PLAN[:-1], PLAN[:-1] + b"!", b""])
def test_a_changed_plan_is_never_deserialized(bench: Bench, data: bytes) -> None:
    bench.plan.write_bytes(data)
    bench.trt._deserialize = None  # type: ignore[assignment]
    with pytest.raises(ArtifactError, match="not loaded: build again"):
        bench.open()


def test_a_disk_that_fails_while_the_plan_is_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, file: Any) -> None:
            self.file, self.tell, self.seek = file, file.tell, file.seek

        def read(self, count: int) -> bytes:
            raise OSError("I/O error")

    real = plan_module._reader
    monkeypatch.setattr(plan_module, "_reader", lambda trt, file, n: real(trt, Failing(file), n))
    with pytest.raises(ArtifactError, match="loading the engine failed"):
        bench.open()


def test_a_plan_behind_a_link_is_never_opened(bench: Bench) -> None:
    elsewhere = bench.path / "elsewhere"
    bench.plan.rename(elsewhere)
    bench.plan.symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="expected an engine"):
        bench.open()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": "HALF"}, "promises output y float32, the engine has output y float16"),
        ({"ids": "INT32"}, "input ids int64"),
        ({"part": "FP4"}, "the engine has output part None"),
        ({"host": "ids"}, "ids in host memory"),
    ],
)
def test_an_engine_of_other_tensors(bench: Bench, changes: dict[str, str], message: str) -> None:
    bench.trt.changes = changes
    with pytest.raises(ArtifactError, match=message):
        bench.open()
    assert bench.cuda.num_live == 0


def test_an_output_whose_size_depends_on_values(bench: Bench) -> None:
    bench.trt.changes = {"shape": True}
    with pytest.raises(InternVLError, match="depends on values"):
        bench.open()
    assert bench.cuda.num_live == 0


# --- faults --------------------------------------------------------------------------------------


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
    assert "cudaHostAlloc" not in tight.cuda.calls
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


# --- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3])
def test_eight_threads_and_serial_give_the_same(bench: Bench, slots: int) -> None:
    def work(thread: int) -> None:
        rng = np.random.default_rng(thread)
        for call in range(200):
            feeds = feeds_of(int(rng.integers(1, 9)), int(rng.integers(1, 7)), 1000 * thread + call)
            assert_same(session.run(feeds), feeds)

    with bench.open(slots=slots, batch_buckets=(2, 4, 8)) as session, ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, thread) for thread in range(8)]:
            future.result()
    assert bench.cuda.num_live == 0


def test_close_during_a_run_lets_it_end(bench: Bench) -> None:
    session = bench.open()
    with session.lease() as slot:
        waiting = threading.Thread(target=lambda: errors.append(closed_run(session)))
        errors: list[str] = []
        waiting.start()
        session.close()
        waiting.join()
        assert "is closed" in errors[0]
        assert_same(slot.run(feeds_of(2, 2)), feeds_of(2, 2))
        assert bench.cuda.num_live > 0
    assert bench.cuda.num_live == 0
    session.close()
    with pytest.raises(UsageError, match="is closed"):
        session.run(feeds_of(1, 1))
    with pytest.raises(UsageError, match="is closed"):
        session.submit(feeds_of(1, 1))


@pytest.mark.parametrize("slots", [1, 2])
def test_a_thread_does_not_wait_for_itself(bench: Bench, slots: int) -> None:
    feeds = feeds_of(2, 2)
    with bench.open(slots=slots) as session:
        for _ in range(2):
            with contextlib.ExitStack() as stack:
                for _ in range(slots):
                    slot = stack.enter_context(session.lease())
                with pytest.raises(UsageError, match=r"every slot .*would wait for itself"):
                    session.run(feeds)
                assert_same(slot.run(feeds), feeds)
        assert_same(session.run(feeds), feeds)


def test_a_session_that_is_dropped_is_closed(bench: Bench) -> None:
    feeds = feeds_of(2, 3)
    session = bench.open(slots=2)
    out = {name: session.empty(name, shape) for name, shape in RESULT_SHAPES.items()}
    session.submit(feeds).result()
    with session.lease() as slot:
        slot.run_device(feeds, out=out)
    del session, slot
    gc.collect()
    assert_same({name: bench.fetch(array) for name, array in out.items()}, feeds)
    del out
    assert bench.cuda.num_live == 0


def closed_run(session: TrtSession) -> str:
    with pytest.raises(UsageError) as caught:
        session.run(feeds_of(1, 1))
    return str(caught.value)


def test_runs_can_be_awaited(bench: Bench) -> None:
    calls = [feeds_of(2, 2, seed) for seed in range(20)]

    async def main() -> list[Arrays]:
        return await asyncio.gather(*(session.run_async(feeds) for feeds in calls))

    with bench.open(slots=2) as session:
        for feeds, found in zip(calls, asyncio.run(main()), strict=True):
            assert_same(found, feeds)
        with pytest.raises(FeedError):
            session.submit({}).result()
        assert list(session.submit(calls[0], outputs=["y"]).result()) == ["y"]


def test_open_and_close_leave_nothing(bench: Bench) -> None:
    for _ in range(100):
        with bench.open() as session:
            session.run(feeds_of(1, 1))
            session.run(feeds_of(1, 1))
    assert bench.cuda.num_live == 0


# --- the cache of TensorRT-RTX -------------------------------------------------------------------


def cache_of(bench: Bench) -> Path:
    return bench.plan.with_name(f"{bench.plan.name}.SM89.cache")


@pytest.fixture
def rtx(tmp_path: Path) -> Bench:
    return Bench(tmp_path, "tensorrt-rtx")


def test_compiled_kernels_are_kept_and_read_again(rtx: Bench) -> None:
    rtx.open().close()
    data = cache_of(rtx).read_bytes()
    assert data == hashlib.sha256(b"kernels").digest() + b"kernels"
    assert stat.S_IMODE(cache_of(rtx).stat().st_mode) == 0o600
    before = cache_of(rtx).stat().st_mtime_ns
    with rtx.open(slots=2):
        assert rtx.trt.caches[-1].loaded == b"kernels"
        assert len({id(context.config.cache) for context in rtx.trt.contexts[-2:]}) == 1
    assert cache_of(rtx).stat().st_mtime_ns == before  # nothing new
    rtx.trt.cache = b"kernels and more"
    rtx.open().close()
    assert cache_of(rtx).read_bytes().endswith(b"kernels and more")


def test_kernels_are_kept_once_the_engine_is_open(rtx: Bench) -> None:
    """A server may be killed."""
    with rtx.open():
        assert cache_of(rtx).read_bytes().endswith(b"kernels")


def test_a_gpu_that_failed_keeps_no_kernels(rtx: Bench) -> None:
    session = rtx.open()
    rtx.trt.cache = b"kernels of a broken context"
    rtx.cuda.fail["cudaStreamSynchronize"] = 0, ILLEGAL_ADDRESS
    with pytest.raises(SessionDead):
        session.run(feeds_of(2, 2))
    session.close()
    assert cache_of(rtx).read_bytes().endswith(b"kernels")


def test_a_cache_that_is_not_taken_is_no_error(
    rtx: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    rtx.trt.refuses["set_runtime_cache"] = "no"
    with caplog.at_level("INFO"), rtx.open() as session:
        assert_same(session.run(feeds_of(1, 1)), feeds_of(1, 1))
    assert "each context compiles its own kernels" in caplog.text


@pytest.mark.parametrize("data", [b"", b"x" * 40, hashlib.sha256(b"k").digest() + b"kernels"])
def test_a_broken_cache_reaches_no_parser(rtx: Bench, data: bytes) -> None:
    cache_of(rtx).write_bytes(data)
    rtx.open().close()
    assert rtx.trt.caches[0].loaded is None
    assert cache_of(rtx).read_bytes().endswith(b"kernels")


def test_a_cache_that_others_may_write_reaches_no_parser(rtx: Bench) -> None:
    rtx.open().close()
    cache_of(rtx).chmod(0o666)
    rtx.open().close()
    assert rtx.trt.caches[-1].loaded is None


def test_a_cache_of_another_gpu_is_ignored(rtx: Bench) -> None:
    data = b"of another driver"
    cache_of(rtx).write_bytes(hashlib.sha256(data).digest() + data)
    cache_of(rtx).chmod(0o600)
    with rtx.open() as session:
        assert_same(session.run(feeds_of(1, 1)), feeds_of(1, 1))
    assert cache_of(rtx).read_bytes().endswith(b"kernels")


def test_a_directory_that_cannot_be_written_is_no_error(
    rtx: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise UsageError(f"{path}: read-only")

    monkeypatch.setattr("internvl_edge.runtime.trt.engine.write_atomically", refuse)
    rtx.open().close()
    assert not cache_of(rtx).exists()


# --- the door ------------------------------------------------------------------------------------


def test_open_session_leads_here(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "require_backend", lambda backend: backend)
    artifact = Artifact(path=bench.path, manifest=bench.manifest)
    opened = []
    monkeypatch.setattr(
        "internvl_edge.runtime.trt.session.open_component",
        lambda *args, **options: opened.append((args, options)),
    )
    session_module.open_component(artifact, "vision", bench.target)
    options = TrtOptions(slots=2)
    session_module.open_component(artifact, "vision", bench.target, options=options)
    args = artifact, "vision", "auto", bench.target
    assert opened == [(args, {}), (args, {"options": options})]


def test_options_of_another_backend(bench: Bench) -> None:
    artifact = Artifact(path=bench.path, manifest=bench.manifest)
    options: Any = OrtOptions()
    with pytest.raises(UsageError, match="expected TrtOptions, found OrtOptions"):
        open_component(artifact, "vision", "cuda", bench.target, options=options)
