"""Real TensorRT-RTX engines of a tiny graph, built without a GPU, and the builder's real errors."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.disk import fill_disk

from internvl_edge.artifact.manifest import TensorSpec
from internvl_edge.artifact.sidecar import EngineInfo, ShapeRanges, check_engine, read_engine_info
from internvl_edge.errors import BuildError, HardwareError, ResourceError
from internvl_edge.export.engine import build, targets
from internvl_edge.files.disk import StreamedFile
from internvl_edge.types import Array

pytestmark = pytest.mark.rtx

WIDTH, HIDDEN, HEADS = 64, 2048, 2
BASES = {
    "fp32": (TensorProto.FLOAT, np.float32),
    "fp16": (TensorProto.FLOAT16, np.float16),
    "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
SCALES = {ml_dtypes.bfloat16: TensorProto.BFLOAT16, np.float32: TensorProto.FLOAT}


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def tiny_graph(
    directory: Path, precision: str, base: str | None = None, scales: Any = ml_dtypes.bfloat16
) -> Path:
    """Attention and two wide linear layers, Q/DQ on the latter where ``precision`` is 8-bit."""
    quantized = precision in ("int8", "fp8")
    onnx_type, dtype = BASES[base or ("fp16" if quantized else precision)]
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=onnx_type),
        helper.make_node("MatMul", ["h", "qkv"], ["p"]),
        helper.make_node("Split", ["p"], ["q", "k", "v"], axis=-1, num_outputs=3),
        helper.make_node(
            "Attention", ["q", "k", "v"], ["a"], q_num_heads=HEADS, kv_num_heads=HEADS
        ),
    ]
    qkv = rng.standard_normal((WIDTH, 3 * WIDTH)).astype(dtype)
    initializers = [_initializer("qkv", qkv, onnx_type)]
    for name, source, result, shape in (
        ("up", "a", "u", (WIDTH, HIDDEN)),
        ("down", "u", "d", (HIDDEN, WIDTH)),
    ):
        weight = rng.standard_normal(shape).astype(np.float32)
        operands = [source, name]
        if quantized:
            operands = _quantize(nodes, initializers, operands, weight, precision, scales)
        else:
            initializers.append(_initializer(name, weight.astype(dtype), onnx_type))
        nodes.append(helper.make_node("MatMul", operands, [result], name=f"{name}/MatMul"))
        if quantized:
            narrow = f"{name}.narrow"
            nodes[-1].output[0] = narrow
            nodes.append(helper.make_node("Cast", [narrow], [result], to=onnx_type))
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
    weight: Array,
    precision: str,
    scales: Any,
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
        _initializer(f"{name}.scale", scale.astype(scales), SCALES[scales]),
        numpy_helper.from_array(np.float32(0.0625), f"{name}.in_scale"),
        _initializer(f"{name}.out_scale", np.array(0.0625, scales), SCALES[scales]),
    ]
    pair = [f"{name}.in_scale", f"{name}.zero"]
    nodes += [
        helper.make_node("QuantizeLinear", [source, *pair], [f"{name}.q"]),
        helper.make_node(
            "DequantizeLinear", [f"{name}.q", f"{name}.out_scale", pair[1]], [f"{name}.x"]
        ),
        helper.make_node("DequantizeLinear", [name, f"{name}.scale"], [f"{name}.w"], axis=1),
    ]
    return [f"{name}.x", f"{name}.w"]


def _initializer(name: str, values: Array, onnx_type: int) -> Any:
    return helper.make_tensor(name, onnx_type, values.shape, values.tobytes(), raw=True)


def build_real(tmp_path: Path, graph: Path, precision: str, **changes: Any) -> EngineInfo:
    built = build.build_engine(
        graph,
        tmp_path / "engines",
        component="tiny",
        profile=ShapeRanges(batch=(1, 2, 4)),
        precision=precision,
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 17, WIDTH)),),
        onnx_sha256=hashlib.sha256(graph.read_bytes()).hexdigest(),
        **changes,
    )
    record = built.record
    plan = (tmp_path / record.file).read_bytes()
    info = read_engine_info(tmp_path / record.sidecar)
    assert (info.nbytes, info.sha256) == (len(plan), hashlib.sha256(plan).hexdigest())
    return info


PRODUCTS = {  # of the layer before attention and the two after it
    "fp32": {"Float · Float → Float": 5},  # two in its attention
    "fp16": {"Half · Half → Half": 3},
    "bf16": {"BFloat16 · BFloat16 → BFloat16": 3},
    "int8": {"Int8 · Int8 → BFloat16": 2, "Half · Half → Half": 1},
    "fp8": {"FP8 · FP8 → BFloat16": 2, "Half · Half → Half": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_a_real_engine(tmp_path: Path, rtx: Any, precision: str) -> None:
    phases: set[str] = set()
    info = build_real(
        tmp_path,
        tiny_graph(tmp_path, precision),
        precision,
        expect_fused=True,
        progress=lambda phase, done, steps: phases.add(phase),
    )
    assert info.census is not None
    assert info.census.products == PRODUCTS[precision]
    assert info.census.fused_attention == info.fused_attention
    fused = 0 if precision == "fp32" else 1
    assert (info.fused_attention, info.decomposed_attention) == (fused, 1 - fused)
    assert info.builder_version == rtx.__version__
    assert info.outputs == (TensorSpec(name="y", dtype="float32", shape=("batch", 17, WIDTH)),)
    assert "Building engine" in phases
    check_engine(info, rtx, sm=89)
    weights = 2 * WIDTH * HIDDEN * {"fp32": 4, "fp16": 2, "bf16": 2}.get(precision, 1)
    assert weights < info.nbytes < weights + (3 << 20)


def test_a_real_engine_with_weights_in_another_file(tmp_path: Path, rtx: Any) -> None:
    graph = tiny_graph(tmp_path, "fp16")
    model = onnx.load(graph)
    onnx.save(model, graph, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert graph.stat().st_size < 4096
    assert build_real(tmp_path, graph, "fp16").nbytes > 2 * WIDTH * HIDDEN * 2
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BuildError, match=r"cannot parse tiny.*\n.*initializer"):
        build_real(tmp_path, graph, "fp16")


@pytest.mark.slow
def test_a_real_fallback_to_decomposed_attention(
    tmp_path: Path, rtx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets.Target, "has_fused_kernel", lambda *_: True)
    graph = tiny_graph(tmp_path, "fp32")
    info = build_real(tmp_path, graph, "fp32")
    assert (info.fused_attention, info.decomposed_attention) == (0, 1)
    with pytest.raises(BuildError, match="0 of 1 attention layers are one kernel"):
        build_real(tmp_path, graph, "fp32", expect_fused=True)


def test_wide_products_are_a_real_regression(tmp_path: Path, rtx: Any) -> None:
    graph = tiny_graph(tmp_path, "int8", base="fp32", scales=np.float32)
    with pytest.raises(BuildError, match=r"5 products read or write Float, such as "):
        build_real(tmp_path, graph, "int8", expect_fused=True)
    assert list((tmp_path / "engines").iterdir()) == []


def test_a_real_type_error_names_its_node(tmp_path: Path, rtx: Any) -> None:
    graph = tiny_graph(tmp_path, "fp16")
    model = onnx.load(graph)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "down")
    weight.CopyFrom(numpy_helper.from_array(np.zeros((HIDDEN, WIDTH), np.float32), "down"))
    onnx.save(model, graph)
    with pytest.raises(
        BuildError, match=r"MatMul node 'down/MatMul'.*\n.*must have same input types"
    ):
        build_real(tmp_path, graph, "fp16")


@pytest.mark.slow
def test_a_real_graph_that_is_too_new_for_a_gpu(tmp_path: Path, rtx: Any) -> None:
    graph = tiny_graph(tmp_path, "int8", base="bf16")
    assert build_real(tmp_path, graph, "int8").compute_capabilities == ()
    with pytest.raises(HardwareError, match=r"Cannot compile for target.*sm75"):
        build_real(tmp_path, graph, "fp16", compute_capabilities=("SM75",))


def test_a_real_build_on_a_full_disk(
    tmp_path: Path, rtx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tiny_graph(tmp_path, "fp16")
    fill_disk(monkeypatch, room=4)
    with pytest.raises(ResourceError, match="No space left"):
        build_real(tmp_path, graph, "fp16")
    assert list((tmp_path / "engines").iterdir()) == []


def test_a_real_build_is_interrupted(tmp_path: Path, rtx: Any) -> None:
    def interrupted(phase: str, done: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_real(tmp_path, tiny_graph(tmp_path, "fp16"), "fp16", progress=interrupted)
    assert list((tmp_path / "engines").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["parse", "first", "last", "write"])
def test_a_signal_ends_a_build_without_an_engine(
    tmp_path: Path, rtx: Any, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    """Raised in a callback it would be lost: the builder goes on and reports success."""
    told: list[str] = []

    def once() -> None:
        if not told:
            told.append(where)
            os.kill(os.getpid(), number)

    def report(phase: str, done: int, steps: int) -> None:
        if where == "first" or (where == "last" and phase == "Building engine" and done == steps):
            once()

    def write(self: StreamedFile, data: bytes) -> int:
        if where == "write":
            once()
        return written(self, data)

    def parse(*args: Any) -> Any:
        if where == "parse":
            once()
        return parsed(*args)

    class Stopped(BaseException):
        pass

    def stop(*_: Any) -> None:
        raise Stopped

    written, parsed = StreamedFile.write, build._parse
    monkeypatch.setattr(StreamedFile, "write", write)
    monkeypatch.setattr(build, "_parse", parse)
    before = signal.signal(number, stop)
    try:
        with pytest.raises(Stopped):
            build_real(tmp_path, tiny_graph(tmp_path, "fp16"), "fp16", progress=report)
    finally:
        signal.signal(number, before)
    assert told == [where]
    assert list((tmp_path / "engines").iterdir()) == []
