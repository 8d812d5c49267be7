from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_onnx import linear, open_directory, spec

import internvl_edge
from internvl_edge.artifact.manifest import EngineRecord, TensorSpec
from internvl_edge.errors import FeedError, HardwareError, MissingDependency, UsageError
from internvl_edge.runtime import model as model_module
from internvl_edge.runtime import session as sessions
from internvl_edge.runtime.feeds import check_feeds, check_outputs
from internvl_edge.runtime.gpu import probe
from internvl_edge.runtime.ort import session as ort
from internvl_edge.runtime.session import DecoderSession, open_component, open_session
from internvl_edge.types import Array

TEXT = {
    "input_ids": spec("input_ids", "int64", "batch", "length"),
    "attention_mask": spec("attention_mask", "int64", "batch", "past+length"),
    "past": spec("past", "float32", "batch", 2, "past", 4),
}
PIXELS = {"pixel_values": spec("pixel_values", "float32", "batch", 3, 4, 4)}


def text_feeds(batch: int = 2, length: int = 3, past: int = 5) -> dict[str, Any]:
    return {
        "input_ids": np.ones((batch, length), np.int64),
        "attention_mask": np.ones((batch, past + length), np.int64),
        "past": np.zeros((batch, 2, past, 4), np.float32),
    }


def pixels(*shape: int) -> Array:
    return np.zeros(shape or (1, 3, 4, 4), np.float32)


def test_good_feeds_come_back_as_they_are() -> None:
    feeds = text_feeds()
    checked = check_feeds(TEXT, feeds)
    assert checked.keys() == feeds.keys()
    assert all(checked[name] is feeds[name] for name in feeds)


def test_an_empty_past_is_how_decoding_starts() -> None:
    check_feeds(TEXT, text_feeds(past=0))


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "missing pixel_values"),
        ({"pixel_value": pixels()}, "unknown pixel_value; did you mean 'pixel_values'"),
        ({"pixel_values": pixels(), "extra": pixels()}, "unknown extra"),
        ({"pixel_values": [[0.0]]}, "expected a NumPy array .* found list"),
        ({"pixel_values": pixels().astype(np.float64)}, "found float64 .* nothing is cast"),
        ({"pixel_values": pixels().astype(np.uint8)}, "found uint8"),
        ({"pixel_values": pixels().astype(">f4")}, "foreign byte order"),
        ({"pixel_values": pixels(3, 4, 4)}, "expected 4 dimensions"),
        ({"pixel_values": pixels(1, 3, 4, 5)}, "dimension 3 must be 4"),
        ({"pixel_values": pixels(1, 4, 4, 3)}, "dimension 1 must be 3"),
        ({"pixel_values": pixels(0, 3, 4, 4)}, "dimension 0 must be at least 1"),
        ({"pixel_values": pixels() + np.nan}, "found 48 of 48 that are NaN"),
        ({"pixel_values": pixels() - np.inf}, "NaN or infinite; check=False"),
    ],
)
def test_rejections(feeds: dict[str, Any], message: str) -> None:
    with pytest.raises(FeedError, match=message):
        check_feeds(PIXELS, feeds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past": np.zeros((3, 2, 5, 4), np.float32)}, "dimension 0 must be batch=2"),
        ({"attention_mask": np.ones((2, 7), np.int64)}, r"must be past\+length=8"),
        (
            {"input_ids": np.ones((2, 0), np.int64), "attention_mask": np.ones((2, 5), np.int64)},
            "dimension 1 must be at least 1",
        ),
    ],
)
def test_dimensions_must_agree_between_inputs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FeedError, match=message):
        check_feeds(TEXT, text_feeds() | change)


def test_sums_may_hold_numbers_and_terms_that_no_input_fixes() -> None:
    specs = {
        "a": spec("a", "int64", "n"),
        "b": spec("b", "int64", "96+n"),
        "c": spec("c", "int64", "n+free"),
        "d": spec("d", "int64", "n+free"),
    }
    sizes = {"a": 2, "b": 98, "c": 7, "d": 7}
    feeds = {name: np.ones(size, np.int64) for name, size in sizes.items()}
    check_feeds(specs, feeds)
    with pytest.raises(FeedError, match=r"96\+n=98"):
        check_feeds(specs, feeds | {"b": np.ones(97, np.int64)})
    with pytest.raises(FeedError, match=r"n\+free=7"):
        check_feeds(specs, feeds | {"d": np.ones(8, np.int64)})


def test_only_the_scan_can_be_skipped() -> None:
    bad = pixels() + np.nan
    assert check_feeds(PIXELS, {"pixel_values": bad}, False)["pixel_values"] is bad
    with pytest.raises(FeedError):
        check_feeds(PIXELS, {"pixel_values": pixels(0, 3, 4, 4)}, False)


def test_bfloat16_is_scanned_too() -> None:
    specs = {"kv": spec("kv", "bfloat16", "batch")}
    check_feeds(specs, {"kv": np.ones(2, ml_dtypes.bfloat16)})
    with pytest.raises(FeedError, match="1 of 2"):
        check_feeds(specs, {"kv": np.array([1, np.nan], ml_dtypes.bfloat16)})


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_one_wrong_size_is_always_found(data: st.DataObject) -> None:
    sizes = {name: data.draw(st.integers(1, 4)) for name in ("batch", "length", "past")}
    feeds = text_feeds(**sizes)
    check_feeds(TEXT, feeds)
    name = data.draw(st.sampled_from(sorted(feeds)))
    axis = data.draw(st.integers(0, feeds[name].ndim - 1))
    longer = np.concatenate([feeds[name], feeds[name].take([0], axis)], axis)
    with pytest.raises(FeedError):
        check_feeds(TEXT, feeds | {name: longer})


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_layout_becomes_its_contiguous_copy(data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(4)))
    steps = [data.draw(st.sampled_from([1, 2, -1])) for _ in range(4)]
    big = np.random.default_rng(0).standard_normal((8, 8, 8, 8)).astype(np.float32)
    view = big.transpose(order)[tuple(slice(None, None, step) for step in steps)][:2, :3, :4, :4]
    found = check_feeds(PIXELS, {"pixel_values": view})["pixel_values"]
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, view)


def test_unaligned_memory_is_copied() -> None:
    raw = np.zeros(48 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(1, 3, 4, 4)
    found = check_feeds(PIXELS, {"pixel_values": raw})["pixel_values"]
    assert raw.flags.aligned or found.flags.aligned


def test_outputs_that_are_asked_for() -> None:
    specs = {"y": spec("y", "float32", 1), "z": spec("z", "float32", 1)}
    assert check_outputs(specs, ("z",)) == ["z"]
    with pytest.raises(UsageError, match="expected some of y, z"):
        check_outputs(specs, ["x"])
    with pytest.raises(UsageError, match="no outputs"):
        check_outputs(specs, [])


# --- opening -------------------------------------------------------------------------------------


def test_an_unknown_component_names_those_present(tmp_path: Path) -> None:
    artifact = open_directory(tmp_path, ["vision", "text_embed"])
    with pytest.raises(UsageError, match="has vision, text_embed; did you mean 'vision'"):
        open_component(artifact, "vison")


def test_an_unknown_backend(tmp_path: Path) -> None:
    artifact = open_directory(tmp_path, ["vision"])
    with pytest.raises(UsageError, match="did you mean 'tensorrt'"):
        open_component(artifact, "vision", "tensorrtt")


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_opening_runs(tmp_path: Path, backend: str) -> None:
    linear(tmp_path / "vision.onnx")
    artifact = open_directory(tmp_path, ["vision"])
    with open_component(artifact, "vision", backend, "cpu") as session:
        assert session.run({"x": np.ones((2, 4), np.float32)})["y"].shape == (2, 3)


def test_options_reach_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = internvl_edge.OrtOptions(num_threads=1)
    given: list[Any] = []
    monkeypatch.setattr(ort, "OrtSession", lambda path, **how: given.append(how["options"]))
    linear(tmp_path / "vision.onnx")
    artifact = open_directory(tmp_path, ["vision"])
    monkeypatch.setattr(sessions, "open_artifact", lambda out: artifact)
    monkeypatch.setattr(model_module, "open_artifact", lambda out: artifact)
    open_session(tmp_path, "vision", options=options)
    internvl_edge.load(tmp_path, options=options).session("vision")
    open_session(tmp_path, "vision")
    assert given == [options, options, internvl_edge.OrtOptions()]


def test_not_a_directory_of_ours(tmp_path: Path) -> None:
    from internvl_edge.errors import ArtifactError

    with pytest.raises(ArtifactError):
        open_session(tmp_path, "vision")


def test_tensorrt_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineRecord(
        component="vision", target="tensorrt-rtx", file="e.plan", sidecar="e.json"
    )
    bare = open_directory(tmp_path, ["vision"])
    built = open_directory(tmp_path, ["vision"], engines=(engine,))
    found = {"package": False, "devices": 1}
    finding = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: finding if found["package"] else None
    )
    monkeypatch.setattr(sessions, "gpu_count", lambda: found["devices"])
    with pytest.raises(MissingDependency, match=r"tensorrt-rtx .*internvl-edge\[rtx\]"):
        open_component(built, "vision", "tensorrt-rtx")
    with pytest.raises(MissingDependency, match=r"internvl-edge\[trt\]"):
        open_component(built, "vision", "tensorrt")
    found["devices"] = 0  # of more use than a package for hardware that is not there
    with pytest.raises(HardwareError, match="no CUDA device"):
        open_component(built, "vision", "tensorrt-rtx")
    found |= {"devices": 1, "package": True}
    with pytest.raises(UsageError, match=r"internvl-edge build .* --target tensorrt-rtx"):
        open_component(bare, "vision", "tensorrt-rtx")


def test_counting_devices_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    assert probe.gpu_count() == 0
    assert probe.gpus() == []
    assert probe.cuda_version() is None


def test_counting_devices_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        status = 0

        def cuInit(self, flags: int) -> int:  # noqa: N802
            return self.status

        def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
            count._obj.value = 3
            return 0

        def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
            device._obj.value = 7 + index
            return 0

        def cuDeviceGetName(self, name: Any, nbytes: int, device: Any) -> int:  # noqa: N802
            assert nbytes == len(name)
            name.value = f"GPU {device.value}".encode()
            return 0

        def cuDeviceGetAttribute(self, value: Any, what: int, device: Any) -> int:  # noqa: N802
            value._obj.value = {75: device.value, 76: 6}[what]
            return 0

        def cuDeviceTotalMem_v2(self, nbytes: Any, device: Any) -> int:  # noqa: N802
            nbytes._obj.value = 1000 * device.value
            return 0

        def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
            version._obj.value = 12090
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert probe.gpu_count() == 3
    assert probe.gpus() == [
        probe.Gpu(index=0, name="GPU 7", sm=76, memory_nbytes=7000),
        probe.Gpu(index=1, name="GPU 8", sm=86, memory_nbytes=8000),
        probe.Gpu(index=2, name="GPU 9", sm=96, memory_nbytes=9000),
    ]
    assert probe.cuda_version() == "12.9"
    monkeypatch.setattr(Driver, "status", 100)  # CUDA_ERROR_NO_DEVICE
    assert probe.gpu_count() == 0


def test_a_session_says_what_it_can(tmp_path: Path) -> None:
    class RunsOnly:
        inputs: Mapping[str, TensorSpec] = {}
        outputs: Mapping[str, TensorSpec] = {}
        largest: Mapping[str, int] = {}

        def run(self, feeds: Any, *, check: bool = True, outputs: Any = None) -> dict[str, Array]:
            return {}

    linear(tmp_path / "vision.onnx")
    with open_component(open_directory(tmp_path, ["vision"]), "vision", device="cpu") as session:
        assert isinstance(session, DecoderSession)
        assert session.largest == {}
    assert not isinstance(RunsOnly(), DecoderSession)
