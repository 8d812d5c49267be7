"""Building engines: every branch with a scripted builder, then real TensorRT-RTX engines."""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from fake_trt import DataType, FakeTrt, IAttentionInputLayer, Layer, LayerType, parser_error, tensor
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.artifact import EngineRecord, TensorSpec
from internvl_edge.engineinfo import EngineInfo, Profile, check_engine, read_engine_info
from internvl_edge.errors import (
    ArtifactError,
    BuildError,
    HardwareError,
    MissingDependency,
    ResourceError,
    UsageError,
)
from internvl_edge.export import engine, targets
from internvl_edge.export.callbacks import Monitor, StreamedFile, decisive_lines

X = TensorSpec(name="x", dtype="float32", shape=("batch", 17, 64))
PROFILE = Profile(batch=(1, 2, 4))


def build(tmp_path: Path, trt: Any, **changes: Any) -> EngineRecord:
    graph = tmp_path / "vision.onnx"
    graph.write_bytes(b"a graph that the fake does not read")
    arguments: dict[str, Any] = {
        "component": "vision",
        "profile": PROFILE,
        "precision": "fp16",
        "inputs": (X,),
        "onnx_sha256": "ab" * 32,
        "trt": trt,
    }
    return engine.build_engine(graph, tmp_path / "engines", **{**arguments, **changes})


def info_of(tmp_path: Path, record: EngineRecord) -> EngineInfo:
    return read_engine_info(tmp_path / record.sidecar)


def leftovers(tmp_path: Path) -> list[str]:
    engines = tmp_path / "engines"
    return sorted(path.name for path in engines.iterdir()) if engines.exists() else []


@pytest.fixture
def trt() -> FakeTrt:
    return FakeTrt()


# --- what is built ---------------------------------------------------------------------------


def test_the_plan_and_its_sidecar(tmp_path: Path, trt: FakeTrt) -> None:
    pieces = [b"abc", b"defg", b""]
    trt.build = lambda writer, log, monitor: [writer.write(p) for p in pieces] == [3, 4, 0]
    record = build(tmp_path, trt)
    info = info_of(tmp_path, record)
    assert (tmp_path / record.file).read_bytes() == b"abcdefg"
    assert (info.nbytes, info.sha256) == (7, hashlib.sha256(b"abcdefg").hexdigest())
    assert record.file.startswith("engines/vision.tensorrt-rtx-")
    assert leftovers(tmp_path) == sorted(Path(n).name for n in (record.file, record.sidecar))
    assert info.inputs == (X,)
    assert info.outputs == (TensorSpec(name="y", dtype="float32", shape=("batch", 64)),)
    assert (info.compute_capabilities, info.minimum_sm) == ((), 80)
    check_engine(info, trt, sm=86)


def test_strong_types_no_tf32_and_the_profile(tmp_path: Path, trt: FakeTrt) -> None:
    build(tmp_path, trt)
    assert trt.network_flags == 1 << 1
    assert trt.cleared == ["TF32"]
    assert trt.shapes == {"x": ((1, 17, 64), (2, 17, 64), (4, 17, 64))}


def test_named_compute_capabilities(tmp_path: Path, trt: FakeTrt) -> None:
    record = build(tmp_path, trt, compute_capabilities=("SM89", "SM120"), precision="fp8")
    info = info_of(tmp_path, record)
    assert trt.capabilities == {0: "SM89", 1: "SM120"}
    assert (info.compute_capabilities, info.minimum_sm) == (("SM89", "SM120"), 89)


@pytest.mark.parametrize(
    ("precision", "sm"), [("fp16", 80), ("int8", 80), ("bf16", 80), ("fp8", 89)]
)
def test_a_portable_engine_says_where_it_starts(
    tmp_path: Path, trt: FakeTrt, precision: str, sm: int
) -> None:
    info = info_of(tmp_path, build(tmp_path, trt, precision=precision))
    assert (info.minimum_sm, trt.capabilities) == (sm, {})


def test_the_name_changes_with_what_decides_the_engine(tmp_path: Path, trt: FakeTrt) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"onnx_sha256": "cd" * 32},
        {"profile": Profile(batch=(1, 2, 8))},
        {"precision": "int8"},
        {"compute_capabilities": ("SM86",)},
        {"trt": FakeTrt(version="1.8.0.1")},
    ]
    names = [
        build(tmp_path, trt, **change).file if "trt" not in change else None for change in changes
    ]
    names[-1] = build(tmp_path, changes[-1]["trt"]).file
    assert len(set(names)) == len(changes)
    unused = Profile(batch=(1, 2, 4), length=(1, 2, 3), past=(1, 2, 3))
    assert build(tmp_path, trt, profile=unused).file == names[0]


def test_tensorrt_builds_for_the_gpu_it_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimpleNamespace(compute_capability=SimpleNamespace(major=9, minor=0))
    _install_cuda(monkeypatch, lambda: device)
    trt = FakeTrt("tensorrt", "11.4.1.7")
    info = info_of(tmp_path, build(tmp_path, trt, target="tensorrt"))
    assert (info.compute_capabilities, info.minimum_sm, trt.capabilities) == (("SM90",), 90, {})
    with pytest.raises(HardwareError, match="another GPU: built for SM90"):
        check_engine(info, trt, sm=100)


# --- attention -------------------------------------------------------------------------------


def attention(dtype: DataType, *shape: int) -> Layer:
    return Layer(LayerType.ATTENTION_INPUT, tensor("q", dtype, *shape))


def test_only_attention_without_a_kernel_is_decomposable(tmp_path: Path, trt: FakeTrt) -> None:
    trt.layers = [
        attention(DataType.HALF, -1, 4, 65, 64),
        attention(DataType.BF16, -1, 4, -1, 256),
        attention(DataType.FLOAT, -1, 4, 65, 64),
        attention(DataType.HALF, -1, 4, 1, 64),
        attention(DataType.HALF, -1, 4, 65, 8),
        attention(DataType.HALF, -1, 4, 65, 264),
        Layer(LayerType.CAST),
    ]
    info = info_of(tmp_path, build(tmp_path, trt))
    marked = [isinstance(layer, IAttentionInputLayer) for layer in trt.layers]
    assert marked == [False, False, True, True, True, True, False]
    assert all(
        layer._attention.decomposable == yes for layer, yes in zip(trt.layers, marked, strict=True)
    )
    assert (info.fused_attention, info.decomposed_attention) == (2, 4)


def test_a_kernel_the_builder_does_not_have_is_decomposed_after_all(
    tmp_path: Path, trt: FakeTrt
) -> None:
    trt.layers = [attention(DataType.HALF, -1, 4, 65, 64)]

    def build_decomposed(writer: Any, log: Any, monitor: Any) -> bool:
        if trt.layers[0]._attention.decomposable:
            return bool(writer.write(b"plan"))
        log("CHECK(composite_op->is_decomposable()) failed.")
        return False

    trt.build = build_decomposed
    info = info_of(tmp_path, build(tmp_path, trt))
    assert (info.fused_attention, info.decomposed_attention, trt.num_builds) == (0, 1, 2)


# --- refused before any work -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": "openvino"}, UsageError, "target must be one of tensorrt-rtx, tensorrt"),
        (
            {"inputs": (TensorSpec(name="x", dtype="float32", shape=("frames", 17, 64)),)},
            UsageError,
            "'frames'",
        ),
        ({"compute_capabilities": ("SM90",)}, UsageError, "SM90.*knows SM75, SM80"),
        ({"compute_capabilities": ("CURRENT",)}, UsageError, "CURRENT"),
        (
            {"compute_capabilities": ("SM75", "SM80"), "precision": "bf16"},
            HardwareError,
            "bf16 needs SM80 or later, asked for SM75;",
        ),
        (
            {"compute_capabilities": ("SM86",), "precision": "fp8"},
            HardwareError,
            "fp8 needs SM89 or later, asked for SM86",
        ),
        (
            {"target": "tensorrt", "compute_capabilities": ("SM89",)},
            UsageError,
            "the GPU it runs on",
        ),
    ],
)
def test_what_cannot_be_asked_for(
    tmp_path: Path, trt: FakeTrt, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(tmp_path, trt, **changes)
    assert trt.num_builds == 0
    assert leftovers(tmp_path) == []


def test_a_graph_that_is_not_there(tmp_path: Path, trt: FakeTrt) -> None:
    with pytest.raises(ArtifactError, match=r"none\.onnx"):
        engine.build_engine(
            tmp_path / "none.onnx",
            tmp_path / "engines",
            component="vision",
            profile=PROFILE,
            precision="fp16",
            inputs=(X,),
            onnx_sha256="ab",
            trt=trt,
        )


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_a_builder_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    target = targets.TARGETS[name]
    monkeypatch.setitem(sys.modules, target.module, None)
    with pytest.raises(MissingDependency, match=rf"internvl-edge\[{target.extra}\]"):
        targets.load_builder(target)


def test_a_builder_whose_libraries_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(targets.importlib, "import_module", fail)
    with pytest.raises(HardwareError, match=r"does not load: libcudart\.so\.13"):
        targets.load_builder(targets.TARGETS["tensorrt-rtx"])


def _install_cuda(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    core = ModuleType("cuda.core")
    core.Device = device  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.core", core)


def test_tensorrt_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device() -> None:
        raise RuntimeError("CUDA_ERROR_NO_DEVICE")

    _install_cuda(monkeypatch, no_device)
    with pytest.raises(HardwareError, match="CUDA_ERROR_NO_DEVICE; tensorrt-rtx builds without"):
        build(tmp_path, FakeTrt("tensorrt"), target="tensorrt")


def test_tensorrt_without_cuda_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingDependency, match="cuda-core"):
        build(tmp_path, FakeTrt("tensorrt"), target="tensorrt")


# --- refused by the builder ------------------------------------------------------------------


def test_a_builder_that_does_not_start(tmp_path: Path, trt: FakeTrt) -> None:
    trt.starts = False
    with pytest.raises(HardwareError, match="CUDA initialization failure"):
        build(tmp_path, trt)


def test_a_capability_the_builder_turns_down(tmp_path: Path, trt: FakeTrt) -> None:
    trt.accepts_capability = False
    with pytest.raises(HardwareError, match="refuses to build for SM89"):
        build(tmp_path, trt, compute_capabilities=("SM89",))


def test_a_parser_error_names_the_node_and_drops_the_noise(tmp_path: Path, trt: FakeTrt) -> None:
    trt.errors = [
        parser_error("must have same input types\nCUDA driver version is insufficient for"),
        parser_error("false", "SplitToSequence", "", "UNSUPPORTED_NODE"),
    ]
    with pytest.raises(BuildError) as caught:
        build(tmp_path, trt)
    text = str(caught.value)
    assert "MatMul node fc/MatMul: INVALID_NODE: must have same input types" in text
    assert "SplitToSequence node 3: UNSUPPORTED_NODE: the operator is not supported" in text
    assert "driver" not in text
    assert leftovers(tmp_path) == []


def test_a_graph_without_outputs(tmp_path: Path, trt: FakeTrt) -> None:
    trt.outputs = []
    with pytest.raises(BuildError, match="no outputs"):
        build(tmp_path, trt)


@pytest.mark.parametrize(
    "found",
    [
        [],
        [tensor("z", DataType.FLOAT, -1, 17, 64)],
        [tensor("x", DataType.HALF, -1, 17, 64)],
        [tensor("x", DataType.FLOAT, 2, 17, 64)],
        [tensor("x", DataType.FLOAT, -1, 17)],
    ],
)
def test_a_graph_with_other_inputs(tmp_path: Path, trt: FakeTrt, found: list[Any]) -> None:
    trt.inputs = found
    with pytest.raises(ArtifactError, match="expected inputs"):
        build(tmp_path, trt)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 999)", ResourceError),
        ("Cannot compile for target(s) sm75: HW-specific datatypes: b16", HardwareError),
        ("Myelin: something else", BuildError),
        ("CHECK(composite_op->is_decomposable()) failed.", BuildError),
    ],
)
def test_a_build_that_fails(
    tmp_path: Path, trt: FakeTrt, line: str, error: type[Exception]
) -> None:
    def fail(writer: Any, log: Any, monitor: Any) -> bool:
        log(line)
        log("CUDA driver version is insufficient for CUDA runtime version")
        return False

    trt.build = fail
    with pytest.raises(error, match="vision: ") as caught:
        build(tmp_path, trt)
    assert line in str(caught.value)
    assert "driver" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_build_that_fails_without_a_word(tmp_path: Path, trt: FakeTrt) -> None:
    trt.build = lambda writer, log, monitor: False
    with pytest.raises(BuildError, match="logged no reason"):
        build(tmp_path, trt)


def test_success_without_a_plan_is_none(tmp_path: Path, trt: FakeTrt) -> None:
    trt.build = lambda writer, log, monitor: True
    with pytest.raises(BuildError, match="wrote nothing"):
        build(tmp_path, trt)
    assert leftovers(tmp_path) == []


# --- disk and interruption -------------------------------------------------------------------


class FullDisk:
    """A file on a disk that takes ``room`` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def open_full(path: Path, mode: str = "r") -> Any:
        return FullDisk(opened(path, mode), 4) if mode == "wb" else opened(path, mode)

    monkeypatch.setattr(Path, "open", open_full)


@pytest.mark.parametrize("pieces", [[b"abc", b"defg"], [b"abcdefg"]])
def test_a_full_disk(tmp_path: Path, trt: FakeTrt, full_disk: None, pieces: list[bytes]) -> None:
    (tmp_path / "engines").mkdir()

    def write(writer: Any, log: Any, monitor: Any) -> bool:
        for piece in [*pieces, b"!"]:
            writer.write(piece)
        return True  # as TensorRT does after a failed write

    trt.build = write
    with StreamedFile(tmp_path / "x") as probe:
        assert (probe.write(b"12345"), probe.write(b"1")) == (0, 0)  # nothing after the first loss
    trt_graph = tmp_path / "vision.onnx"
    trt_graph.touch()
    with pytest.raises(ResourceError, match=r"No space left.*free some disk space"):
        engine.build_engine(
            trt_graph,
            tmp_path / "engines",
            component="vision",
            profile=PROFILE,
            precision="fp16",
            inputs=(X,),
            onnx_sha256="ab",
            trt=trt,
        )
    assert leftovers(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path, trt: FakeTrt) -> None:
    (tmp_path / "engines").write_bytes(b"a file in the way")
    with pytest.raises(ResourceError, match="could not be written"):
        build(tmp_path, trt)
    assert trt.num_builds == 0


def test_a_streamed_file_replaces_another_only_when_published(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_bytes(b"old")
    with StreamedFile(path) as file:
        file.write(b"new")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
    with StreamedFile(path) as file:
        file.write(b"new")
        file.publish()
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"new", [path])


def test_progress_is_told_in_steps() -> None:
    told: list[tuple[str, int, int]] = []
    monitor = Monitor(lambda *progress: told.append(progress))
    monitor.phase_start("Building", None, 2)
    assert monitor.step_complete("Building", 0)
    monitor.phase_finish("Building")
    assert told == [("Building", 0, 2), ("Building", 1, 2), ("Building", 2, 2)]


def test_an_interrupt_stops_the_build_and_comes_back(tmp_path: Path, trt: FakeTrt) -> None:
    def interrupted(phase: str, done: int, steps: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    def cancelled(writer: Any, log: Any, monitor: Any) -> bool:
        monitor.phase_start("Building", None, 3)
        assert not monitor.step_complete("Building", 0)
        log("Build canceled by user")
        return False

    trt.build = cancelled
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, trt, progress=interrupted)
    assert leftovers(tmp_path) == []


def test_decisive_lines_are_few_and_never_empty_of_reason() -> None:
    noise = "Error Code 1: CUDA driver version is insufficient"
    assert decisive_lines([noise]) == noise  # where it is all there is
    assert decisive_lines(["a\nb", "b", noise]) == "a\n  b"
    assert decisive_lines([str(i) for i in range(99)]).count("\n") < 9
    assert decisive_lines([]) == ""


# --- real engines ----------------------------------------------------------------------------

WIDTH, HIDDEN, HEADS = 64, 2048, 2
BASES = {
    "fp32": (TensorProto.FLOAT, np.float32),
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def tiny_graph(directory: Path, precision: str, base: str | None = None) -> Path:
    """Attention and two wide linear layers, Q/DQ on the latter where ``precision`` is 8-bit."""
    quantized = precision in ("int8", "fp8")
    onnx_type, dtype = BASES[base or ("fp16" if quantized else precision)]
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=onnx_type),
        helper.make_node("Attention", ["h"] * 3, ["a"], q_num_heads=HEADS, kv_num_heads=HEADS),
    ]
    initializers = []
    for name, source, result, shape in (
        ("up", "a", "u", (WIDTH, HIDDEN)),
        ("down", "u", "d", (HIDDEN, WIDTH)),
    ):
        weight = rng.standard_normal(shape).astype(np.float32)
        operands = [source, name]
        if quantized:
            operands = _quantize(nodes, initializers, operands, weight, precision, onnx_type)
        else:
            initializers.append(_initializer(name, weight.astype(dtype), onnx_type))
        nodes.append(helper.make_node("MatMul", operands, [result], name=f"{name}/MatMul"))
    nodes.append(helper.make_node("Cast", ["d"], ["y"], to=TensorProto.FLOAT))
    shape = ["batch", 17, WIDTH]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializers,
    )
    path = directory / f"{precision}.onnx"
    opset = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=11), path)
    return path


def _quantize(
    nodes: list[Any],
    initializers: list[Any],
    operands: list[str],
    weight: np.ndarray[Any, Any],
    precision: str,
    onnx_type: int,
) -> list[str]:
    source, name = operands
    eight = TensorProto.INT8 if precision == "int8" else TensorProto.FLOAT8E4M3FN
    dtype = np.int8 if precision == "int8" else ml_dtypes.float8_e4m3fn
    top = 127 if precision == "int8" else 448
    scale = np.abs(weight).max(axis=0) / top
    stored = np.round(weight / scale).astype(dtype)
    initializers += [
        _initializer(name, stored, eight),
        _initializer(f"{name}.zero", np.zeros((), dtype), eight),
        numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"),
        numpy_helper.from_array(np.float32(0.05), f"{name}.in_scale"),
    ]
    pair = [f"{name}.in_scale", f"{name}.zero"]
    out = {"output_dtype": onnx_type}
    nodes += [
        helper.make_node("QuantizeLinear", [source, *pair], [f"{name}.q"]),
        helper.make_node("DequantizeLinear", [f"{name}.q", *pair], [f"{name}.x"], **out),
        helper.make_node("DequantizeLinear", [name, f"{name}.scale"], [f"{name}.w"], axis=1, **out),
    ]
    return [f"{name}.x", f"{name}.w"]


def _initializer(name: str, values: np.ndarray[Any, Any], onnx_type: int) -> Any:
    return helper.make_tensor(name, onnx_type, values.shape, values.tobytes(), raw=True)


def build_real(tmp_path: Path, graph: Path, precision: str, **changes: Any) -> EngineInfo:
    record = engine.build_engine(
        graph,
        tmp_path / "engines",
        component="tiny",
        profile=PROFILE,
        precision=precision,
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 17, WIDTH)),),
        onnx_sha256=hashlib.sha256(graph.read_bytes()).hexdigest(),
        **changes,
    )
    plan = (tmp_path / record.file).read_bytes()
    info = read_engine_info(tmp_path / record.sidecar)
    assert (info.nbytes, info.sha256) == (len(plan), hashlib.sha256(plan).hexdigest())
    return info


@pytest.mark.rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_a_real_engine(tmp_path: Path, rtx: Any, precision: str) -> None:
    phases: set[str] = set()
    info = build_real(
        tmp_path,
        tiny_graph(tmp_path, precision),
        precision,
        progress=lambda phase, done, steps: phases.add(phase),
    )
    fused = 0 if precision == "fp32" else 1
    assert (info.fused_attention, info.decomposed_attention) == (fused, 1 - fused)
    assert info.builder_version == rtx.__version__
    assert info.outputs == (TensorSpec(name="y", dtype="float32", shape=("batch", 17, WIDTH)),)
    assert "Building engine" in phases
    check_engine(info, rtx, sm=89)
    weights = 2 * WIDTH * HIDDEN * {"fp32": 4, "fp16": 2, "bf16": 2}.get(precision, 1)
    assert weights < info.nbytes < weights + (3 << 20)


@pytest.mark.rtx
def test_a_real_engine_with_weights_in_another_file(tmp_path: Path, rtx: Any) -> None:
    graph = tiny_graph(tmp_path, "fp16")
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert graph.stat().st_size < 4096
    assert build_real(tmp_path, graph, "fp16").nbytes > 2 * WIDTH * HIDDEN * 2
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BuildError, match=r"cannot parse tiny.*\n.*initializer"):
        build_real(tmp_path, graph, "fp16")


@pytest.mark.rtx
def test_a_real_fallback_to_decomposed_attention(
    tmp_path: Path, rtx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_has_fused_kernel", lambda query: True)
    info = build_real(tmp_path, tiny_graph(tmp_path, "fp32"), "fp32")
    assert (info.fused_attention, info.decomposed_attention) == (0, 1)


@pytest.mark.rtx
def test_a_real_type_error_names_its_node(tmp_path: Path, rtx: Any) -> None:
    graph = tiny_graph(tmp_path, "fp16")
    model = onnx.load(graph)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "down")
    weight.CopyFrom(numpy_helper.from_array(np.zeros((HIDDEN, WIDTH), np.float32), "down"))
    onnx.save(model, graph)
    with pytest.raises(
        BuildError, match=r"MatMul node down/MatMul.*\n.*must have same input types"
    ):
        build_real(tmp_path, graph, "fp16")


@pytest.mark.rtx
def test_a_real_graph_that_is_too_new_for_a_gpu(tmp_path: Path, rtx: Any) -> None:
    graph = tiny_graph(tmp_path, "int8", base="bf16")
    assert build_real(tmp_path, graph, "int8").compute_capabilities == ()
    with pytest.raises(HardwareError, match="Cannot compile for target.*sm75"):
        build_real(tmp_path, graph, "int8", compute_capabilities=("SM75",))


@pytest.mark.rtx
def test_a_real_build_on_a_full_disk(tmp_path: Path, rtx: Any, full_disk: None) -> None:
    graph = tiny_graph(tmp_path, "fp16")
    with pytest.raises(ResourceError, match="No space left"):
        build_real(tmp_path, graph, "fp16")
    assert leftovers(tmp_path) == []


@pytest.mark.rtx
def test_a_real_build_is_interrupted(tmp_path: Path, rtx: Any) -> None:
    def interrupted(phase: str, done: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_real(tmp_path, tiny_graph(tmp_path, "fp16"), "fp16", progress=interrupted)
    assert leftovers(tmp_path) == []


def test_the_sidecar_is_json_for_others_to_read(tmp_path: Path, trt: FakeTrt) -> None:
    raw = json.loads((tmp_path / build(tmp_path, trt).sidecar).read_text(encoding="utf-8"))
    assert raw["profile"]["batch"] == [1, 2, 4]
    assert raw["builder_version"] == "1.7.1.116"
