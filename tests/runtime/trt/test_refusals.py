"""What is refused before any work: feeds, devices, options, engines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.gpu.fake_engine import PLAN
from support.gpu.trt_bench import Arrays, Bench, assert_same, feeds_of, wrong_values

from internvl_edge.errors import (
    ArtifactError,
    FeedError,
    HardwareError,
    InternVLError,
    ResourceError,
    UsageError,
)
from internvl_edge.runtime.trt import engine as plan_module
from internvl_edge.runtime.trt.options import TrtOptions


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

        def readinto(self, buffer: Any) -> int:
            raise OSError("I/O error")

    real = plan_module._reader
    monkeypatch.setattr(
        plan_module, "_reader", lambda trt, file, *rest: real(trt, Failing(file), *rest)
    )
    with pytest.raises(ArtifactError, match="loading the engine failed"):
        bench.open()


def test_the_plan_goes_through_page_locked_memory(bench: Bench) -> None:
    with bench.open():
        assert bench.trt.staged == {True}


def test_a_plan_is_read_where_no_memory_can_be_locked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        raise ResourceError("cudaHostAlloc: out of memory")

    monkeypatch.setattr(plan_module, "PinnedBuffer", refused)
    with bench.open():
        assert bench.trt.staged == {False}


def test_a_plan_that_a_link_leads_to_is_never_opened(bench: Bench) -> None:
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
