"""ONNX Runtime on a GPU: what can be known of it without one."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import helper
from support.tiny_onnx import BFLOAT16, FLOAT, linear, open_directory, write_onnx

from internvl_edge.errors import HardwareError, ResourceError, UsageError
from internvl_edge.runtime.ort import cuda_graphs, opening
from internvl_edge.runtime.ort import options as ortoptions
from internvl_edge.runtime.ort import session as ort
from internvl_edge.runtime.ort.cuda_graphs import GRAPH_ID, Replays
from internvl_edge.runtime.ort.options import CPU, CUDA, OrtOptions, load_gpu_libraries
from internvl_edge.runtime.ort.session import OrtSession, open_component
from internvl_edge.runtime.ort.values import array_of, value_of
from internvl_edge.types import Array

PLACE = ("cpu", 0)
Arrays = dict[str, Array]


class Native:
    """ONNX Runtime's session on the CPU, which takes the options of one on a GPU.

    Args:
        path: the graph.
        captures: it can be captured; otherwise a provider that is told to refuses.
    """

    def __init__(self, path: Path, captures: bool = True) -> None:
        self.path, self.captures = path, captures
        self.opened: list[dict[str, str]] = []  # the options of CUDA's provider
        self.graph_ids: list[int] = []  # of every run
        self._session = onnxruntime.InferenceSession(path)

    def open(self, path: Any, options: Any, *, providers: Sequence[Any], **_: Any) -> Native:
        self.opened.append(providers[0][1])
        if not self.captures and providers[0][1]["enable_cuda_graph"] == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested")
        return self

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]

    def run(self, names: Any, feeds: Arrays, options: Any = None) -> Any:
        self._note(options)
        return self._session.run(names, feeds)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self._note(options)
        self._session.run_with_iobinding(binding)

    def _note(self, options: Any) -> None:
        if options is not None:
            self.graph_ids.append(int(options.get_run_config_entry(GRAPH_ID)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


@pytest.fixture
def native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Native:
    """What it gives are copies, as a GPU's are: on the CPU a value and its array share memory."""
    monkeypatch.setattr(cuda_graphs, "array_of", lambda value, place: value.numpy().copy())
    return Native(linear(tmp_path / "linear.onnx"))


@pytest.fixture
def halves(tmp_path: Path) -> Native:
    return Native(same(tmp_path / "same.onnx"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, native: Native) -> Native:
    """A machine with a GPU, whose sessions are on the CPU all the same."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ortoptions, "gpu_count", lambda: 1)
    monkeypatch.setattr(ort, "place_of", lambda providers: PLACE)
    monkeypatch.setattr(opening, "load_gpu_libraries", lambda: "")
    monkeypatch.setattr(onnxruntime, "InferenceSession", native.open)
    return native


def batch(rows: int, seed: int) -> Arrays:
    return {"x": np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32)}


# --- calls replayed as CUDA graphs ---------------------------------------------------------------


def test_a_shape_that_came_before_is_captured_and_computes_the_same(native: Native) -> None:
    replays, plain = Replays(native, PLACE), onnxruntime.InferenceSession(native.path)
    for seed, rows in enumerate((1, 2, 1, 1, 2, 3, 2, 1)):
        feeds = batch(rows, seed)
        found = replays.run(["total", "y"], feeds)
        wanted = dict(zip(["total", "y"], plain.run(["total", "y"], feeds), strict=True))
        assert list(found) == ["total", "y"]
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array)
    # an uncaptured run for each shape, another to know what comes out, and one id for each replay
    assert native.graph_ids == [-1, -1, -1, 1, 1, -1, 2, -1, 2, 1]


def test_shapes_beyond_the_limit_run_uncaptured(native: Native) -> None:
    replays = Replays(native, PLACE, limit=1)
    for _ in range(3):
        for rows in (1, 2):
            assert replays.run(["y"], batch(rows, rows))["y"].shape == (rows, 3)
    assert set(native.graph_ids) == {-1, 1}


def test_calls_of_several_threads_take_turns(native: Native) -> None:
    replays, plain = Replays(native, PLACE), onnxruntime.InferenceSession(native.path)
    wrong: list[object] = []

    def work(first: int) -> None:
        for seed in range(first, first + 40):
            feeds = batch(1 + seed % 3, seed)
            (wanted,) = plain.run(["y"], feeds)  # first: on the CPU a buffer shares its array
            if not np.array_equal(replays.run(["y"], feeds)["y"], wanted):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_session_on_a_gpu_replays(gpu: Native) -> None:
    with OrtSession(gpu.path, device="cuda") as session:
        for seed in range(3):
            assert session.run(batch(2, seed))["y"].shape == (2, 3)
    assert gpu.opened == [{"device_id": "0", "use_tf32": "0", "enable_cuda_graph": "1"}]
    assert gpu.graph_ids == [-1, -1, 1, 1]


def test_outputs_that_stay_on_the_device_outlive_the_next_call(gpu: Native) -> None:
    with OrtSession(gpu.path, device="cuda") as session:
        kept = [session.run_device(batch(2, seed)) for seed in range(3)]
        kept.append(session.run_device({"x": value_of(batch(2, 3)["x"], PLACE)}, outputs=["y"]))
    for seed, outputs in enumerate(kept):
        wanted = gpu._session.run(["y"], batch(2, seed))[0]
        np.testing.assert_array_equal(outputs["y"].numpy(), wanted)
    assert list(kept[3]) == ["y"]
    assert gpu.graph_ids == [-1, 1, 1, 1, 1, 1], "captured at once"


def test_a_call_on_the_device_that_cannot_be_captured_says_so(
    gpu: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_of_memory(binding: Any, options: Any = None) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 4")

    monkeypatch.setattr(gpu, "run_with_iobinding", short_of_memory)
    with OrtSession(gpu.path, device="cuda") as session, pytest.raises(ResourceError):
        session.run_device(batch(2, 0))


def test_what_cannot_be_captured_is_opened_without_graphs(gpu: Native) -> None:
    gpu.captures = False
    with OrtSession(gpu.path, device="cuda") as session:
        for seed in range(3):
            session.run(batch(2, seed))
        session.run_device(batch(2, 0))
    assert [options["enable_cuda_graph"] for options in gpu.opened] == ["1", "0"]
    assert gpu.graph_ids == []


def test_bfloat16_is_opened_without_graphs(
    halves: Native, gpu: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", halves.open)
    with OrtSession(halves.path, device="cuda") as session:
        found = session.run({"cache": HALVES})
    np.testing.assert_array_equal(found["next"], HALVES)
    assert [options["enable_cuda_graph"] for options in halves.opened] == ["1", "0"]


def test_a_call_that_cannot_be_captured_runs_all_the_same(
    native: Native, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_of_memory(binding: Any, options: Any = None) -> None:
        raise RuntimeError("out of memory")

    replays, plain = Replays(native, PLACE), onnxruntime.InferenceSession(native.path)
    monkeypatch.setattr(native, "run_with_iobinding", short_of_memory)
    for seed in range(4):
        found = replays.run(["y"], batch(2, seed))
        np.testing.assert_array_equal(found["y"], plain.run(["y"], batch(2, seed))[0])
    assert native.graph_ids == [-1, -1, -1, -1, -1]  # one of them to know what comes out


@pytest.mark.slow
def test_closing_lets_go_of_what_was_captured(gpu: Native) -> None:
    session = OrtSession(gpu.path, device="cuda")
    for seed in range(3):
        session.run(batch(2, seed))
    replays = weakref.ref(session._replays)
    session.close()
    gc.collect()
    assert replays() is None
    with pytest.raises(UsageError, match="closed"):
        session.run(batch(2, 0))


def test_only_towers_are_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: dict[str, bool] = {}

    def open_one(path: Path, *, options: OrtOptions, **_: Any) -> None:
        opened[path.stem] = options.graphs

    monkeypatch.setattr(ort, "OrtSession", open_one)
    names = ["vision", "image_embed", "chat_vision", "image_queries", "text_embed", "decoder"]
    for name in names:
        linear(tmp_path / f"{name}.onnx")
    artifact = open_directory(tmp_path, names)
    for name in names:
        open_component(artifact, name, "cpu")
    assert [name for name, graphs in opened.items() if graphs] == names[:3]


# --- types that NumPy has not --------------------------------------------------------------------

HALVES = np.arange(24, dtype=np.float32).reshape(2, 3, 4).astype(ml_dtypes.bfloat16) / 2


def same(path: Path) -> Path:
    """``next`` is ``cache``, bfloat16 [batch, n, 4]: what only moves data runs on the CPU."""
    return write_onnx(
        path,
        [helper.make_node("Identity", ["cache"], ["next"])],
        [("cache", BFLOAT16, ["batch", "n", 4])],
        [("next", BFLOAT16, ["batch", "n", 4])],
    )


@pytest.mark.parametrize(
    "array",
    [HALVES, HALVES[:, :0], HALVES.transpose(2, 0, 1), HALVES.astype(np.float16), np.arange(3)],
)
def test_values_of_every_dtype_come_back(array: Array) -> None:
    found = array_of(value_of(array, PLACE), PLACE)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_bfloat16_goes_through_a_session(tmp_path: Path) -> None:
    with OrtSession(same(tmp_path / "same.onnx")) as session:
        found = session.run({"cache": HALVES})
        assert found["next"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found["next"], HALVES)
        left = session.run_device({"cache": HALVES})
        again = session.run_device(left | {"cache": left.pop("next")})
        taken = session.take_rows([again["next"]], np.array([1, 1, 0]))
        np.testing.assert_array_equal(array_of(taken[0], PLACE), HALVES[[1, 1, 0]])


# --- libraries and releases ----------------------------------------------------------------------


def test_libraries_are_loaded_once_and_nothing_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def preload() -> None:
        calls.append(1)
        print("Failed to load libcudnn.so.9: not there\nPlease follow the instructions")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(onnxruntime, "set_default_logger_severity", lambda severity: None)
    load_gpu_libraries.cache_clear()
    told = load_gpu_libraries()
    assert load_gpu_libraries() == told
    load_gpu_libraries.cache_clear()
    assert told == "Failed to load libcudnn.so.9: not there; Please follow the instructions"
    assert calls == [1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_release_that_takes_fp8_for_int8_opens_without_that_fusion(
    gpu: Native, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """As 1.26 to 1.31 do, whoever opens the graph."""
    disabled: list[list[str]] = []

    def open_one(*args: Any, disabled_optimizers: list[str], **more: Any) -> Any:
        disabled.append(disabled_optimizers)
        if "QDQSelectorActionTransformer" not in disabled_optimizers:
            raise RuntimeError(
                "This is an invalid model. Type Error: Type 'tensor(float8e4m3fn)' of input "
                "parameter (q) of operator (MatMulIntegerToFloat) in node (qkv) is invalid."
            )
        return gpu if device == "cuda" else gpu._session

    monkeypatch.setattr(onnxruntime, "InferenceSession", open_one)
    with OrtSession(gpu.path, device=device) as session:
        assert session.run(batch(2, 0))["y"].shape == (2, 3)
    assert len(disabled) == 2


# --- what a GPU would run slowly -----------------------------------------------------------------


def rounds(path: Path, *, activations: bool) -> Path:
    """``y = x W`` whose weight, and maybe x, is in 8 bits."""
    nodes = [helper.make_node("DequantizeLinear", ["weight", "scale"], ["wide"])]
    if activations:
        nodes.insert(0, helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["narrow"]))
        nodes.append(helper.make_node("DequantizeLinear", ["narrow", "scale", "zero"], ["rounded"]))
    nodes.append(helper.make_node("MatMul", ["rounded" if activations else "x", "wide"], ["y"]))
    return write_onnx(
        path,
        nodes,
        [("x", FLOAT, ["batch", 4])],
        [("y", FLOAT, ["batch", 3])],
        {
            "weight": np.ones((4, 3), np.int8),
            "scale": np.array(0.1, np.float32),
            "zero": np.array(0, np.int8),
        },
    )


@pytest.mark.parametrize(
    ("device", "options", "activations", "is_refused"),
    [
        ("cuda", OrtOptions(), True, True),
        ("auto", OrtOptions(), True, True),
        ("cuda", OrtOptions(allow_slow=True), True, False),
        ("cuda", OrtOptions(), False, False),
        ("cuda", OrtOptions(gpu_provider="tensorrt"), True, False),
        ("cpu", OrtOptions(), True, False),
    ],
    ids=["cuda", "auto", "allowed", "weights alone", "tensorrt", "cpu"],
)
def test_8_bit_products_are_refused_by_the_cuda_provider(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    options: OrtOptions,
    activations: bool,
    is_refused: bool,
) -> None:
    """It dequantizes all weights in every call; another provider, or the CPU, does not."""
    rounds(tmp_path / "vision.onnx", activations=activations)
    artifact, opened = open_directory(tmp_path, ["vision"]), list[Path]()
    available = [*ortoptions.GPU_PROVIDERS.values(), CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(ortoptions, "gpu_count", lambda: 1)
    monkeypatch.setattr(ort, "OrtSession", lambda path, **_: opened.append(path))
    if is_refused:
        with pytest.raises(HardwareError, match=r"--precision bf16.* engine.*allow_slow=True"):
            open_component(artifact, "vision", device, options=options)
    else:
        open_component(artifact, "vision", device, options=options)
    assert len(opened) == (not is_refused)
