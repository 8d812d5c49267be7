"""Building engines: every branch with a scripted builder, then real TensorRT-RTX engines."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper
from support.disk import fill_disk
from support.gpu.fake_trt import (
    DataType,
    FakeTrt,
    Layer,
    LayerType,
    parser_error,
    tensor,
)

from internvl_edge.artifact.census import Census
from internvl_edge.artifact.manifest import EngineRecord, TensorSpec
from internvl_edge.artifact.sidecar import EngineInfo, ShapeRanges, check_engine, read_engine_info
from internvl_edge.errors import (
    ArtifactError,
    BuildError,
    HardwareError,
    MissingDependency,
    ResourceError,
    UsageError,
)
from internvl_edge.export.engine import build as engine
from internvl_edge.export.engine import targets
from internvl_edge.files.packages import PACKAGES
from internvl_edge.runtime.gpu.probe import Gpu
from internvl_edge.runtime.trt import vendor

X = TensorSpec(name="x", dtype="float32", shape=("batch", 17, 64))
PROFILE = ShapeRanges(batch=(1, 2, 4))


def build(tmp_path: Path, trt: Any, **changes: Any) -> EngineRecord:
    graph = tmp_path / "vision.onnx"
    graph.touch()  # the fake reads it only where it is marked
    arguments: dict[str, Any] = {
        "component": "vision",
        "profile": PROFILE,
        "precision": "fp16",
        "inputs": (X,),
        "onnx_sha256": "ab" * 32,
        "trt": trt,
    }
    return engine.build_engine(graph, tmp_path / "engines", **{**arguments, **changes}).record


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
        {"profile": ShapeRanges(batch=(1, 2, 8))},
        {"precision": "int8"},
        {"compute_capabilities": ("SM86",)},
    ]
    names = [build(tmp_path, trt, **change).file for change in changes]
    names.append(build(tmp_path, FakeTrt(version="1.8.0.1")).file)
    assert len(set(names)) == len(names)
    unused = ShapeRanges(batch=(1, 2, 4), length=(1, 2, 3), past=(1, 2, 3))
    assert build(tmp_path, trt, profile=unused).file == names[0]


def test_tensorrt_builds_for_the_gpu_it_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        targets, "gpus", lambda: [Gpu(index=0, name="H100", sm=90, memory_nbytes=1)]
    )
    trt = FakeTrt("tensorrt", "11.4.1.7")
    info = info_of(tmp_path, build(tmp_path, trt, target="tensorrt"))
    assert (info.compute_capabilities, info.minimum_sm, trt.capabilities) == (("SM90",), 90, {})
    with pytest.raises(HardwareError, match="another GPU: built for SM90"):
        check_engine(info, trt, sm=100)


# --- attention -------------------------------------------------------------------------------


def attention(name: str, dtype: DataType, *shape: int) -> Layer:
    return Layer(LayerType.ATTENTION_INPUT, tensor("q", dtype, *shape), f"{name}_AttentionInput")


def graph_of(tmp_path: Path, *names: str) -> None:
    """Write a graph with these attention nodes, and one that is named like none of them."""
    nodes = [helper.make_node("Attention", ["q", "k", "v"], [name], name=name) for name in names]
    nodes.append(helper.make_node("Softmax", ["q"], ["s"], name="a/Softmax"))
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    (tmp_path / "vision.onnx").write_bytes(model.SerializeToString())


def marked(data: bytes) -> list[str]:
    """The nodes that the parser is told it may decompose."""
    nodes = onnx.load_model_from_string(data).graph.node
    return [n.name for n in nodes for a in n.attribute if (a.name, a.i) == ("TRT_decomposable", 1)]


@pytest.mark.parametrize(
    ("target", "fused"),
    [
        ("tensorrt-rtx", {"half", "bf16", "odd head", "small head"}),
        ("tensorrt", {"half", "bf16", "one query"}),
    ],
)
def test_only_attention_without_a_kernel_is_decomposable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, fused: set[str]
) -> None:
    monkeypatch.setattr(targets, "gpus", lambda: [Gpu(index=0, name="", sm=90, memory_nbytes=1)])
    trt = FakeTrt(target.replace("-", "_"))
    shapes = {
        "half": (DataType.HALF, -1, 4, 65, 64),
        "bf16": (DataType.BF16, -1, 4, -1, 256),
        "float": (DataType.FLOAT, -1, 4, 65, 64),
        "one query": (DataType.HALF, -1, 4, 1, 64),
        "tiny head": (DataType.HALF, -1, 4, 65, 8),
        "small head": (DataType.HALF, -1, 4, 65, 12),
        "odd head": (DataType.HALF, -1, 4, 65, 20),
        "large head": (DataType.HALF, -1, 4, 65, 264),
    }
    trt.layers = [attention(name, *of) for name, of in shapes.items()] + [Layer(LayerType.CAST)]
    graph_of(tmp_path, *shapes)
    info = info_of(tmp_path, build(tmp_path, trt, target=target))
    (data,) = trt.parsed
    assert set(marked(data)) == shapes.keys() - fused
    assert (info.fused_attention, info.decomposed_attention) == (len(fused), 8 - len(fused))
    assert trt.num_builds == 1


def test_a_graph_without_such_layers_is_read_from_its_file(tmp_path: Path, trt: FakeTrt) -> None:
    trt.layers = [attention("a", DataType.HALF, -1, 4, 65, 64)]
    build(tmp_path, trt)
    assert trt.parsed == []


@pytest.mark.parametrize("words", ["CHECK(composite_op->is_decomposable()) failed.", "no kernel"])
def test_a_kernel_the_builder_does_not_have_is_decomposed_after_all(
    tmp_path: Path, trt: FakeTrt, words: str
) -> None:
    """Whatever it calls that: the words were found on one builder of several."""
    trt.layers = [attention(name, DataType.HALF, -1, 4, 65, 64) for name in ("a", "b")]
    graph_of(tmp_path, "a", "b")

    def build_decomposed(writer: Any, log: Any, monitor: Any) -> bool:
        if trt.parsed:
            return bool(writer.write(b"plan"))
        log(words)
        return False

    trt.build = build_decomposed
    info = info_of(tmp_path, build(tmp_path, trt))
    assert (info.fused_attention, info.decomposed_attention, trt.num_builds) == (0, 2, 2)
    assert marked(trt.parsed[-1]) == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "error"),
    [("std::bad_alloc", ResourceError), ("Cannot compile for target sm75", HardwareError)],
)
def test_no_second_build_for_what_decomposing_does_not_help(
    tmp_path: Path, trt: FakeTrt, words: str, error: type[Exception]
) -> None:
    trt.layers = [attention("a", DataType.HALF, -1, 4, 65, 64)]
    trt.build = lambda writer, log, monitor: bool(log(words))
    with pytest.raises(error):
        build(tmp_path, trt)
    assert trt.num_builds == 1


def test_a_second_build_that_fails_says_both_reasons(tmp_path: Path, trt: FakeTrt) -> None:
    trt.layers = [attention("a", DataType.HALF, -1, 4, 65, 64)]
    graph_of(tmp_path, "a")
    trt.build = lambda writer, log, monitor: bool(log(f"reason {trt.num_builds}"))
    with pytest.raises(BuildError, match=r"reason 1\n.*reason 2"):
        build(tmp_path, trt)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("in_place", [False, True])
def test_a_cache_that_cannot_be_written_in_place_is_written_apart(
    tmp_path: Path, trt: FakeTrt, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """The last thing that is tried: each step copies the cache, and attention stays fused."""
    read: list[str] = []
    trt.layers = [attention("a", DataType.HALF, -1, 4, 65, 64)]
    trt.parse = lambda path: read.append(Path(path).name)
    trt.inputs.append(tensor("write_indices", DataType.INT64, -1))
    trt.build = lambda writer, log, monitor: (
        bool(writer.write(b"plan")) if read[-1:] == ["apart.onnx"] else bool(log("Myelin"))
    )
    apart = nullcontext(tmp_path / "apart.onnx")
    monkeypatch.setattr("internvl_edge.export.engine.unaliased.unaliased_graph", lambda _: apart)
    graph_of(tmp_path, "a")
    first = TensorSpec(name="write_indices", dtype="int64", shape=("batch",))
    if not in_place:
        trt.inputs.pop()
        with pytest.raises(BuildError, match="Myelin"):
            build(tmp_path, trt)
        assert trt.num_builds == 2
        return
    info = info_of(tmp_path, build(tmp_path, trt, inputs=(X, first)))
    assert (info.fused_attention, info.decomposed_attention, trt.num_builds) == (1, 0, 3)
    assert read == ["vision.onnx", "vision.onnx", "apart.onnx"]


# --- layers ----------------------------------------------------------------------------------


def line(name: str, kind: str, factors: str, output: str) -> str:
    """A layer as a builder lists it."""
    one, two = (
        f"{{ Name: x, Dimensions: {size}, Format/Datatype: {of} }}"
        for size, of in zip(("[-1,64]", "[64,64]"), factors.split(), strict=True)
    )
    written = f"{{ Name: y, Dimensions: [-1,64], Format/Datatype: {output} }}"
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {one}], Constants: [ {two}], "
        f"Outputs: [ {written}], TacticName: , StreamId: 0, Metadata: [ONNX Layer: {name}]"
    )


FUSED = line("_gemm_mha_v2_myl0_8", "kgen", "Half Half", "Half")
NARROW = line("fc1/MatMul_U171_myl0_12", "gemm", "Int8 Int8", "BFloat16")
LOST = [  # what is listed, its precision, and the words of the refusal
    ([], "int8", "did not list its layers"),
    ([NARROW], "int8", "0 of 1 attention layers are one kernel"),
    (
        [FUSED, NARROW, line("fc2/MatMul_U1_myl0_2", "gemm", "Int8 Int8", "Float")],
        "int8",
        "1 products read or write Float, such as fc2/MatMul",
    ),
    (
        [FUSED, line("f_myl0_2", "runtime_fusion", "Half Float", "Half")],
        "fp16",
        "1 products read or write Float, such as f",
    ),
    (
        [FUSED, line("f_myl0_2", "runtime_fusion", "Int8 Half", "Half")],
        "int8",
        "0 products in 8 bits for 1 quantized inputs",
    ),
]


@pytest.mark.parametrize(("listed", "precision", "words"), LOST, ids=[w for *_, w in LOST])
def test_who_expects_fused_layers_gets_no_other_engine(
    tmp_path: Path, trt: FakeTrt, listed: list[str], precision: str, words: str
) -> None:
    trt.layers = [attention("a", DataType.HALF, -1, 4, 65, 64), Layer(LayerType.QUANTIZE)]
    trt.listed = "\n".join(listed)
    with pytest.raises(BuildError, match=f"expected fused layers: .*{re.escape(words)}"):
        build(tmp_path, trt, precision=precision, expect_fused=True)
    assert leftovers(tmp_path) == []
    assert build(tmp_path, trt, precision=precision).file  # it can be had


def test_a_tower_that_is_not_quantized_is_held_to_its_graphs_type(
    tmp_path: Path, trt: FakeTrt
) -> None:
    """At int4-wo the vision tower's graph for engines is in 16 bits."""
    trt.listed = "\n".join([FUSED, line("f_myl0_2", "gemm", "Float Float", "Float")])
    asked: dict[str, Any] = {"precision": "int4-wo", "expect_fused": True}
    assert build(tmp_path, trt, **asked).file  # of a graph in float32 that is no loss
    with pytest.raises(BuildError, match="1 products read or write Float"):
        build(tmp_path, trt, **asked, base="fp16", onnx_sha256="cd" * 32)


def test_the_layers_are_in_the_sidecar(tmp_path: Path, trt: FakeTrt) -> None:
    """A fusion that ends in a cast to float32 writes what the graph asks for."""
    trt.layers = [attention("a", DataType.HALF, -1, 4, 65, 64), Layer(LayerType.QUANTIZE)]
    output = line("__myl_FcAddCast_myl0_94", "runtime_fusion", "Half Half", "Float")
    trt.listed = "\n".join(["Engine Layer Information:", FUSED, NARROW, NARROW, output])
    census = info_of(tmp_path, build(tmp_path, trt, precision="int8", expect_fused=True)).census
    assert census == Census(
        precision="int8",
        layers={"gemm": 2, "kgen": 1, "runtime_fusion": 1},
        fused_attention=1,
        expected_attention=1,
        expected_8_bit=1,
        products={"Int8 · Int8 → BFloat16": 2, "Half · Half → Float": 1},
        wide_products=(),
        num_wide_products=0,
    )
    assert census.lines()[0] == "layers: 2 gemm, 1 kgen, 1 runtime_fusion; fused attentions: 1"
    assert info_of(tmp_path, build(tmp_path, FakeTrt())).census is None


def test_an_engine_that_is_there_is_judged_by_its_sidecar(tmp_path: Path, trt: FakeTrt) -> None:
    trt.layers, trt.listed = [attention("a", DataType.HALF, -1, 4, 65, 64)], FUSED
    record = build(tmp_path, trt)
    known = (record.file, record.sidecar)
    assert build(tmp_path, trt, known=known, expect_fused=True) == record
    sidecar = tmp_path / record.sidecar
    sidecar.write_text(sidecar.read_text().replace('"fused_attention": 1', '"fused_attention": 0'))
    with pytest.raises(BuildError, match="0 of 1 attention layers are one kernel"):
        build(tmp_path, trt, known=known, expect_fused=True)
    assert trt.num_builds == 1


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
    package = PACKAGES[name]
    monkeypatch.setitem(sys.modules, package.module, None)
    with pytest.raises(MissingDependency, match=rf"internvl-edge\[{package.extra}\]"):
        vendor.import_tensorrt(name)


def test_a_builder_whose_libraries_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(vendor.importlib, "import_module", fail)
    with pytest.raises(HardwareError, match=r"does not load: libcudart\.so\.13"):
        vendor.import_tensorrt("tensorrt-rtx")


def test_tensorrt_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "gpus", list)
    with pytest.raises(HardwareError, match="found no CUDA device; tensorrt-rtx builds without"):
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
    assert "MatMul node 'fc/MatMul': INVALID_NODE: must have same input types" in text
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


@pytest.mark.parametrize("pieces", [[b"abc", b"defg"], [b"abcdefg"]])
def test_a_full_disk(
    tmp_path: Path, trt: FakeTrt, monkeypatch: pytest.MonkeyPatch, pieces: list[bytes]
) -> None:
    def write(writer: Any, log: Any, monitor: Any) -> bool:
        for piece in [*pieces, b"!"]:
            writer.write(piece)
        return True  # as TensorRT does after a failed write

    trt.build = write
    fill_disk(monkeypatch, room=4)
    with pytest.raises(ResourceError, match=r"No space left.*free some disk space"):
        build(tmp_path, trt)
    assert leftovers(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path, trt: FakeTrt) -> None:
    (tmp_path / "engines").write_bytes(b"a file in the way")
    with pytest.raises(ResourceError, match="could not be written"):
        build(tmp_path, trt)
    assert trt.num_builds == 0


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


def test_the_sidecar_is_json_for_others_to_read(tmp_path: Path, trt: FakeTrt) -> None:
    raw = json.loads((tmp_path / build(tmp_path, trt).sidecar).read_text(encoding="utf-8"))
    assert raw["profile"]["batch"] == [1, 2, 4]
    assert raw["builder_version"] == "1.7.1.116"
