"""Arrays on the GPU as inputs and outputs: where they are, whose they are, how long they live."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.gpu.fake_engine import expected
from support.gpu.trt_bench import RESULT_SHAPES, Bench, assert_same, feeds_of, wrong_values

from internvl_edge.errors import FeedError, UsageError
from internvl_edge.runtime.gpu.device_array import DeviceArray
from internvl_edge.runtime.gpu.handles import Event
from internvl_edge.runtime.gpu.memory import find_overlap


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
    """The caller drops them at once; runs queue up after them, and nothing is waited for."""
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
