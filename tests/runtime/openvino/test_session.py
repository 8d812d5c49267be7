from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.checkpoints import write_internvl
from support.tiny_onnx import linear, open_directory, publish_linear, spec

import internvl_edge
from internvl_edge import OpenVinoOptions, OrtOptions
from internvl_edge.artifact import TensorSpec, open_artifact
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.errors import (
    ArtifactError,
    FeedError,
    HardwareError,
    InternVLError,
    MissingDependency,
    ResourceError,
    UsageError,
)
from internvl_edge.runtime.openvino import opening
from internvl_edge.runtime.openvino.opening import open_component
from internvl_edge.runtime.openvino.session import OpenVinoSession, fastest_dtype
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.types import Array

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def session(tmp_path: Path) -> Any:
    with opened(linear(tmp_path / "linear.onnx")) as session:
        yield session


def opened(path: Path, **options: Any) -> OpenVinoSession:
    outputs = spec("y", "float32", "batch", 3), spec("total", "float32", "batch")
    return OpenVinoSession(path, path, [spec("x", "float32", "batch", 4)], outputs, **options)


def weight(session: OpenVinoSession) -> Array:
    return session.run({"x": np.eye(4, dtype=np.float32)})["y"]


def test_computes_what_numpy_computes(session: OpenVinoSession) -> None:
    outputs = session.run({"x": X})
    np.testing.assert_allclose(outputs["y"], X @ weight(session), atol=1e-5)
    np.testing.assert_allclose(outputs["total"], X.sum(axis=1))


def test_only_the_outputs_asked_for(session: OpenVinoSession) -> None:
    assert list(session.run({"x": X}, outputs=["total"])) == ["total"]
    with pytest.raises(UsageError, match="expected some of y, total"):
        session.run({"x": X}, outputs=["z"])


def test_feeds_are_checked(session: OpenVinoSession) -> None:
    with pytest.raises(FeedError, match="float64"):
        session.run({"x": X.astype(np.float64)})
    with pytest.raises(FeedError, match="NaN"):
        session.run({"x": X * np.nan})


def test_results_are_the_callers_own(session: OpenVinoSession) -> None:
    first = session.run({"x": X})["y"]
    before = first.copy()
    session.run({"x": 7 * X})
    np.testing.assert_array_equal(first, before)


def test_threads_get_what_one_thread_gets(session: OpenVinoSession) -> None:
    rng = np.random.default_rng(0)
    requests = [rng.standard_normal((1 + i % 5, 4)).astype(np.float32) for i in range(200)]
    alone = [session.run({"x": x})["y"] for x in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda x: session.run({"x": x})["y"], requests))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_closed_while_it_runs_and_again(session: OpenVinoSession) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            while True:
                session.run({"x": X})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    session.close()
    session.close()
    for thread in threads:
        thread.join(30)
    assert [type(error) for error in failures] == [UsageError] * 3
    assert all("closed" in str(error) for error in failures)


def test_not_across_a_fork(session: OpenVinoSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(UsageError, match="before a fork"):
        session.run({"x": X})


# --- opening -------------------------------------------------------------------------------------


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"OpenVINO cannot open .*graph\.onnx: .*") as caught:
        opened(path)
    assert "src/" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError(), ResourceError, "not enough memory to run .*smaller batch"),
        (RuntimeError("std::bad_alloc"), ResourceError, "not enough memory to run .*bad_alloc"),
        (
            RuntimeError("Exception from src/inference/src/cpp.cpp:79:\nCheck 'x' failed\nno"),
            InternVLError,
            "OpenVINO failed to run .*linear.onnx: no$",
        ),
    ],
)
def test_failures_in_our_words(
    session: OpenVinoSession,
    error: Exception,
    kind: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing:
        def start_async(self, *args: Any, **kwargs: Any) -> None:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(session, "_compiled", SimpleNamespace(create_infer_request=Failing))
        with pytest.raises(kind, match=message):
            session.run({"x": X})
    session.run({"x": X})


def test_weights_that_are_written_to_reach_no_caller(tmp_path: Path) -> None:
    out = publish_linear(tmp_path / "out")
    with internvl_edge.open_session(out, "vision", "openvino") as session:
        session.run({"x": X})
        with (out / "vision.bin").open("r+b") as file:
            file.write(b"\0")
        with pytest.raises(ArtifactError, match=r"vision\.bin was written to"):
            session.run({"x": X})


def test_what_it_does_not_compute_on(tmp_path: Path) -> None:
    out = publish_linear(tmp_path / "out")
    with pytest.raises(HardwareError, match="openvino computes on the CPU; use device 'cpu'"):
        internvl_edge.open_session(out, "vision", "openvino", "cuda")


def test_options_of_another_backend(tmp_path: Path) -> None:
    linear(tmp_path / "vision.onnx")
    wrong: Any = OrtOptions()
    with pytest.raises(UsageError, match="openvino: expected OpenVinoOptions, found OrtOptions"):
        open_component(open_directory(tmp_path, ["vision"]), "vision", options=wrong)
    with pytest.raises(UsageError, match=r"options: expected OpenVinoOptions\(...\)"):
        internvl_edge.load(publish_linear(tmp_path / "out"), "openvino", options=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_threads": 0}, "num_threads 0: expected a whole number from 1"),
        ({"language": 3}, r"language: expected OrtOptions\(...\) or None, found int"),
        ({"dtype": "float16"}, "dtype 'float16': expected float32, bfloat16 or None"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OpenVinoOptions(**options)


# --- compiled directories ------------------------------------------------------------------------


def images(side: int, count: int = 2) -> Array:
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, 3, side, side)).astype(np.float32)


def cosine(one: Array, other: Array) -> float:
    products = (one * other).sum(axis=-1)
    return float((products / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)).min())


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Callable[[str], Path]:
    """Compile a small checkpoint at a precision, once each."""
    root = tmp_path_factory.mktemp("openvino")
    checkpoint = write_internvl(root / "checkpoint", seed=5).path

    def out_of(precision: str) -> Path:
        out = root / precision
        if not out.exists():
            options = ExportOptions(
                checkpoint=checkpoint,
                out=out,
                precision=precision,
                components=("image_embed",),
                calibration=None if precision in ("fp32", "fp16", "bf16") else pictures,
                verify="none",
            )
            export(options)
        return out

    return out_of


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "fp8"])
def test_agrees_with_onnx_runtime(quantized: Callable[[str], Path], precision: str) -> None:
    out = quantized(precision)
    side = open_artifact(out).manifest.image_size
    results = {}
    for name, options in (
        ("onnxruntime", None),
        ("openvino", OpenVinoOptions(dtype="float32", num_threads=1)),
    ):
        with internvl_edge.open_session(out, "image_embed", name, "cpu", options=options) as one:
            results[name] = one.run({"pixel_values": images(side)})["image_embeds"]
    assert cosine(*results.values()) > (0.99999 if precision == "fp32" else 0.999)


@pytest.mark.skipif(
    fastest_dtype() == "float32",
    reason="this CPU does not multiply bfloat16",
)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_bfloat16_is_the_default_of_what_is_rounded(
    quantized: Callable[[str], Path], precision: str
) -> None:
    side = open_artifact(quantized("fp32")).manifest.image_size
    results: dict[str, Array] = {}
    for name, out, dtype in (
        ("exact", quantized("fp32"), None),
        ("default", quantized(precision), None),
        ("bfloat16", quantized(precision), "bfloat16"),
        ("float32", quantized(precision), "float32"),
    ):
        options = OpenVinoOptions(dtype=dtype)
        with internvl_edge.open_session(out, "image_embed", "openvino", options=options) as one:
            results[name] = one.run({"pixel_values": images(side)})["image_embeds"]
    np.testing.assert_array_equal(results["default"], results["bfloat16"])
    assert not np.array_equal(results["default"], results["float32"])
    assert cosine(results["exact"], results["default"]) > 0.999


def test_int8_products_that_would_saturate(
    quantized: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantized("int8")
    monkeypatch.setattr(opening, "products_saturate", lambda: True)
    with pytest.raises(HardwareError, match=r"VNNI or AMX.*use backend 'onnxruntime'"):
        internvl_edge.open_session(out, "image_embed", "openvino")
    internvl_edge.open_session(quantized("fp32"), "image_embed", "openvino").close()


def test_language_models_stay_with_onnx_runtime(compiled: Path, compiled_chat: Path) -> None:
    options = OpenVinoOptions(num_threads=1)
    for out, component, kind in (
        (compiled, "image_embed", OpenVinoSession),
        (compiled, "text_embed", OrtSession),
        (compiled, "decoder", OrtSession),
        (compiled_chat, "chat_vision", OpenVinoSession),
        (compiled_chat, "chat_decoder", OrtSession),
    ):
        with internvl_edge.open_session(out, component, "openvino", options=options) as session:
            assert type(session) is kind


def test_a_model_answers_and_embeds_as_with_onnx_runtime(
    compiled: Path, compiled_chat: Path
) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
    answers, embedded = [], []
    for backend in ("onnxruntime", "openvino"):
        with internvl_edge.load(compiled_chat, backend) as model:
            answers.append(model.chat([picture], "what is it?", max_new_tokens=8))
        with internvl_edge.load(compiled, backend) as model:
            embedded.append([model.encode_image([picture], mode=mode) for mode in "cg"])
    assert answers[0].text == answers[1].text
    for one, other in zip(*embedded, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


# --- what OpenVINO itself would not say ----------------------------------------------------------


def in_a_new_process(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.strip()


OPENED = """
import gc, os, resource, signal, sys
from pathlib import Path
import numpy as np
from internvl_edge.errors import ResourceError, UsageError
from internvl_edge.artifact import TensorSpec
from internvl_edge.runtime.openvino.session import OpenVinoSession

spec = lambda name, *shape: TensorSpec(name=name, dtype="float32", shape=("batch", *shape))
path, outputs = Path(sys.argv[1]), (spec("y", 3), spec("total"))
opened = lambda: OpenVinoSession(path, path, [spec("x", 4)], outputs, num_threads=1)
ones = lambda rows: {"x": np.ones((rows, 4), np.float32)}
"""


def test_memory_that_runs_out_in_a_call_is_an_error_not_the_call_before(tmp_path: Path) -> None:
    """With one thread, where ``infer`` returned the outputs of the call before."""
    script = """
session = opened()
session.run(ones(1))
feeds, pages = ones(20_000_000), int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + 2**24
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    print(session.run(feeds, check=False)["y"].shape)
except ResourceError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(session.run(ones(3))["total"])
"""
    said = in_a_new_process(OPENED + script, str(linear(tmp_path / "linear.onnx")))
    assert said.startswith("not enough memory to run linear.onnx"), said
    assert said.endswith("[4. 4. 4.]")


def test_a_child_opens_nothing_where_it_would_wait_for_ever(tmp_path: Path) -> None:
    script = """
opened().close()
gc.collect()
pid = os.fork()
if pid == 0:
    signal.alarm(10)
    try:
        opened()
    except UsageError as error:
        print(error, flush=True)
    sys.exit(0)
print(os.waitpid(pid, 0)[1])
"""
    said = in_a_new_process(OPENED + script, str(linear(tmp_path / "linear.onnx")))
    assert said.startswith("OpenVINO was opened before a fork")
    assert said.endswith("\n0")


@pytest.mark.parametrize(
    "promised",
    [
        spec("x", "uint8", "batch", 4),
        spec("x", "float32", "batch", 5),
        spec("x", "float32", "batch"),
        spec("z", "float32", "batch", 4),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_promises(
    tmp_path: Path, promised: TensorSpec
) -> None:
    path = linear(tmp_path / "linear.onnx")
    with pytest.raises(ArtifactError, match=rf"promises {promised.name} .*export again"):
        OpenVinoSession(path, path, [promised], [spec("y", "float32", "batch", 3)])


def test_nothing_of_a_call_is_kept(session: OpenVinoSession) -> None:
    x = X.copy()
    given = weakref.ref(x)
    session.run({"x": x})
    del x
    assert given() is None


def test_an_openvino_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", ModuleType("openvino"))
    monkeypatch.delitem(sys.modules, "internvl_edge.runtime.openvino.session")
    with pytest.raises(MissingDependency, match=r"internvl-edge\[openvino\]"):
        importlib.import_module("internvl_edge.runtime.openvino.session")
