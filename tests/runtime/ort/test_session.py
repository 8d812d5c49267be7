from __future__ import annotations

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from support.tiny_onnx import BFLOAT16, FLOAT, INT64, linear, open_directory, spec, write_onnx

from internvl_edge.errors import (
    ArtifactError,
    FeedError,
    HardwareError,
    InternVLError,
    MissingDependency,
    ResourceError,
    UsageError,
)
from internvl_edge.runtime.ort import opening
from internvl_edge.runtime.ort import options as ortoptions
from internvl_edge.runtime.ort.options import CPU, CUDA, OrtOptions, choose_providers
from internvl_edge.runtime.ort.session import OrtSession, open_component
from internvl_edge.types import Array

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def session(tmp_path: Path) -> Any:
    with OrtSession(linear(tmp_path / "linear.onnx")) as opened:
        yield opened


def weight(session: OrtSession) -> Array:
    return session.run({"x": np.eye(4, dtype=np.float32)})["y"]


def test_computes_what_numpy_computes(session: OrtSession) -> None:
    outputs = session.run({"x": X})
    np.testing.assert_allclose(outputs["y"], X @ weight(session), atol=1e-5)
    np.testing.assert_allclose(outputs["total"], X.sum(axis=1))


def test_specs_are_the_graphs(session: OrtSession) -> None:
    assert session.inputs == {"x": spec("x", "float32", "batch", 4)}
    assert session.outputs["y"] == spec("y", "float32", "batch", 3)


def test_dimensions_without_a_name_are_free(tmp_path: Path) -> None:
    path = write_onnx(
        tmp_path / "g.onnx",
        [helper.make_node("Identity", ["ids"], ["same"])],
        [("ids", INT64, [None, None])],
        [("same", INT64, [None, None])],
    )
    with OrtSession(path) as session:
        assert session.inputs["ids"] == spec("ids", "int64", "ids.0", "ids.1")
        session.run({"ids": np.ones((2, 5), np.int64)})


def test_only_the_outputs_asked_for(session: OrtSession) -> None:
    outputs = session.run({"x": X}, outputs=["total"])
    assert list(outputs) == ["total"]
    with pytest.raises(UsageError, match="expected some of y, total"):
        session.run({"x": X}, outputs=["z"])


def test_feeds_are_checked(session: OrtSession) -> None:
    with pytest.raises(FeedError, match="float64"):
        session.run({"x": X.astype(np.float64)})
    with pytest.raises(FeedError, match="NaN"):
        session.run({"x": X * np.nan})
    assert np.isnan(session.run({"x": X * np.nan}, check=False)["y"]).all()


def test_what_is_no_plain_feed_is_refused(session: OrtSession) -> None:
    nothing: Any = None
    for run in (session.run, session.run_device):
        with pytest.raises(FeedError, match="expected a mapping of the inputs x, found NoneType"):
            run(nothing)
        with pytest.raises(FeedError, match=r"'x': a masked array.*use .filled"):
            run({"x": np.ma.masked_array(X, mask=X > 3)})


def test_rows_of_a_cache(session: OrtSession) -> None:
    y = session.run_device({"x": X})["y"]
    (taken,) = session.take_rows([y], np.array([1, 0, 1]))
    np.testing.assert_array_equal(taken.numpy(), y.numpy()[[1, 0, 1]])


def test_a_strided_array_gives_the_same_result(session: OrtSession) -> None:
    wide = np.arange(16, dtype=np.float32).reshape(8, 2).T[:, ::2]
    strided = session.run({"x": wide})["y"]
    np.testing.assert_array_equal(strided, session.run({"x": wide.copy(order="C")})["y"])


def test_closed_is_closed_and_may_be_closed_again(tmp_path: Path) -> None:
    session = OrtSession(linear(tmp_path / "linear.onnx"))
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run({"x": X})


def test_not_across_a_fork(session: OrtSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(UsageError, match="before a fork"):
        session.run({"x": X})


def test_threads_get_what_one_thread_gets(session: OrtSession) -> None:
    rng = np.random.default_rng(0)
    requests = [rng.standard_normal((1 + i % 5, 4)).astype(np.float32) for i in range(200)]
    expected = [session.run({"x": x})["y"] for x in requests]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: session.run({"x": x})["y"], requests))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_closing_lets_runs_end(session: OrtSession) -> None:
    """A run that has begun gives its result; a later one says that the session is closed."""
    expected = session.run({"x": X})["y"]
    inner, begun, closed = session._session, threading.Event(), threading.Event()

    class Slow:
        def run(self, names: list[str], feeds: dict[str, Any]) -> Any:
            begun.set()
            assert closed.wait(10)
            return inner.run(names, feeds)

    session._session = Slow()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(session.run, {"x": X})
        assert begun.wait(10)
        session.close()
        closed.set()
        np.testing.assert_array_equal(future.result()["y"], expected)


# --- what ONNX Runtime refuses -------------------------------------------------------------------


def half_linear(path: Path, dtype: int) -> Path:
    return write_onnx(
        path,
        [
            helper.make_node("Cast", ["x"], ["h"], to=dtype),
            helper.make_node("MatMul", ["h", "h"], ["m"], name="layer/MatMul"),
            helper.make_node("Cast", ["m"], ["y"], to=FLOAT),
        ],
        [("x", FLOAT, ["batch", "batch"])],
        [("y", FLOAT, ["batch", "batch"])],
    )


def test_bfloat16_needs_a_gpu(tmp_path: Path) -> None:
    path = half_linear(tmp_path / "g.onnx", BFLOAT16)
    with pytest.raises(HardwareError, match=r"no CPU kernel for MatMul.*layer/MatMul.*bfloat16"):
        OrtSession(path)


def test_float16_does_not(tmp_path: Path) -> None:
    path = half_linear(tmp_path / "g.onnx", onnx.TensorProto.FLOAT16)
    with OrtSession(path) as session:
        found = session.run({"x": np.eye(2, dtype=np.float32)})["y"]
    np.testing.assert_array_equal(found, np.eye(2, dtype=np.float32))


def test_float8_quantization_runs(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    zero = helper.make_tensor("zero", onnx.TensorProto.FLOAT8E4M3FN, [], [0.0])
    scale = onnx.numpy_helper.from_array(np.array(0.5, np.float32), "scale")
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "fp8",
        [helper.make_tensor_value_info("x", FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", FLOAT, ["n"])],
        [scale, zero],
    )
    opset = helper.make_opsetid("", 23)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    with OrtSession(path) as session:
        found = session.run({"x": np.array([0.5, 8.6, 1e4], np.float32)})["y"]
    np.testing.assert_array_equal(found, [0.5, 9.0, 224.0])  # 17.2 → 18; 448 is the largest


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 40])
def test_not_an_onnx_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "g.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot open"):
        OrtSession(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=re.escape(str(tmp_path / "none.onnx"))):
        OrtSession(tmp_path / "none.onnx")


def test_an_id_outside_the_vocabulary(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_onnx(
        tmp_path / "g.onnx",
        [helper.make_node("Gather", ["table", "ids"], ["y"])],
        [("ids", INT64, ["n"])],
        [("y", FLOAT, ["n", 2])],
        {"table": np.zeros((5, 2), np.float32)},
    )
    with OrtSession(path) as session, pytest.raises(FeedError, match="bounds"):
        session.run({"ids": np.array([5])})
    assert capfd.readouterr() == ("", "")  # the exception says it, nothing is printed


def test_more_memory_than_there_is(tmp_path: Path) -> None:
    path = write_onnx(
        tmp_path / "g.onnx",
        [helper.make_node("Expand", ["one", "shape"], ["y"])],
        [("shape", INT64, [2])],
        [("y", FLOAT, [None, None])],
        {"one": np.ones((1, 1), np.float32)},
    )
    with OrtSession(path) as session, pytest.raises(ResourceError, match="smaller batch"):
        session.run({"shape": np.array([2**22, 2**22])})


def test_any_other_fault_is_ours(session: OrtSession) -> None:
    class Broken:
        def run(self, names: list[str], feeds: dict[str, Any]) -> Any:
            raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : boom\n  twice")

    session._session = Broken()
    with pytest.raises(InternVLError, match=r": boom twice$") as raised:
        session.run({"x": X})
    assert raised.value.exit_code == 7


# --- devices -------------------------------------------------------------------------------------


def test_unknown_device(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected 'auto', 'cpu', 'cuda'"):
        OrtSession(linear(tmp_path / "g.onnx"), device="tpu")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    machine: dict[str, Any] = {"providers": [CPU], "devices": 2}
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(machine["providers"]))
    monkeypatch.setattr(ortoptions, "gpu_count", lambda: machine["devices"])
    assert choose_providers("auto") == choose_providers("cpu") == [CPU]
    with pytest.raises(MissingDependency, match="ort-gpu"):
        choose_providers("cuda")
    machine["providers"] = [CUDA, CPU]
    assert choose_providers("cpu") == [CPU]
    exact = {"use_tf32": "0", "enable_cuda_graph": "1"}
    assert choose_providers("auto") == [(CUDA, {"device_id": "0", **exact}), CPU]
    assert choose_providers("cuda:1") == [(CUDA, {"device_id": "1", **exact}), CPU]
    fast = {"use_tf32": "1", "enable_cuda_graph": "0"}
    found = choose_providers("auto", OrtOptions(tf32=True, graphs=False))
    assert found == [(CUDA, {"device_id": "0", **fast}), CPU]
    with pytest.raises(HardwareError, match="found 2 CUDA devices"):
        choose_providers("cuda:2")
    rtx = ortoptions.GPU_PROVIDERS["tensorrt-rtx"]
    machine["providers"] = [rtx, CPU]  # a build with nothing else
    options = OrtOptions(gpu_provider="tensorrt-rtx")
    assert choose_providers("cuda", options) == [(rtx, {"device_id": "0"}), CPU]
    with pytest.raises(MissingDependency, match="ort-gpu"):
        choose_providers("cuda")
    machine["devices"] = 0
    assert choose_providers("auto") == [CPU]


def test_a_provider_that_does_not_start_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = onnxruntime.InferenceSession(
        linear(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"]
    )
    monkeypatch.setattr(opening, "choose_providers", lambda device, name: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: opened)
    with pytest.raises(HardwareError, match="could not start its GPU provider"):
        OrtSession(tmp_path / "g.onnx", device="cuda")


def test_open_component(tmp_path: Path) -> None:
    linear(tmp_path / "vision.onnx")
    with open_component(open_directory(tmp_path, ["vision"]), "vision", "cpu") as session:
        assert set(session.outputs) == {"y", "total"}
    wrong: Any = object()
    with pytest.raises(UsageError, match="onnxruntime: expected OrtOptions, found object"):
        open_component(open_directory(tmp_path, ["vision"]), "vision", "cpu", options=wrong)
