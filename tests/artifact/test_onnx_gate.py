"""The gate before native parsers: every rule refuses, every sound model passes."""

from __future__ import annotations

import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from internvl_edge.artifact import onnx_gate, onnx_wire
from internvl_edge.artifact.onnx_gate import BITS, OnnxSummary, scan
from internvl_edge.errors import ArtifactError

FILES = {"w.bin": 4096, "manifest-less.txt": 10}
FLOATS = TensorProto.FLOAT


def external(name: str = "w", dims: tuple[int, ...] = (4, 8), **entries: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=FLOATS, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    given = {"location": "w.bin", "offset": "0", "length": str(math.prod(dims) * 4), **entries}
    for key, value in given.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model_of(*tensors: TensorProto, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", FLOATS, ["batch", 4])
    y = helper.make_tensor_value_info("y", FLOATS, ["batch", 8])
    nodes = nodes or [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "tiny", [x], [y], initializer=tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def scan_model(model: onnx.ModelProto) -> OnnxSummary:
    return scan(model.SerializeToString(), files=FILES)


def scan_tensor(tensor: TensorProto) -> OnnxSummary:
    return scan_model(model_of(tensor))


# --- sound models --------------------------------------------------------------------------------


def test_summary() -> None:
    bias = helper.make_tensor("b", FLOATS, [8], np.arange(8, dtype=np.float32))
    summary = scan_model(model_of(external(), bias))
    assert summary == OnnxSummary(
        ir_version=11,
        opset=23,
        domains={"": 23},
        node_count=2,
        op_types=Counter(MatMul=1, Relu=1),
        inputs=("x",),
        outputs=("y",),
        external_locations=("w.bin",),
        data_types=frozenset({FLOATS}),
    )


def test_subgraphs_functions_and_domains_are_walked() -> None:
    branch = helper.make_graph([helper.make_node("Abs", ["x"], ["a"])], "then", [], [])
    branch.initializer.append(external("inner", offset="128"))
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    custom = helper.make_node("Fancy", ["x"], ["y"], domain="com.example")
    model = model_of(external(), nodes=[node, custom])
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    inner = [helper.make_node("Neg", ["x"], ["y"])]
    opsets = [helper.make_opsetid("", 23)]
    model.functions.append(
        helper.make_function("com.example", "Fancy", ["x"], ["y"], inner, opsets)
    )
    summary = scan_model(model)
    assert summary.op_types == Counter({"If": 1, "com.example.Fancy": 1, "Abs": 2, "Neg": 1})
    assert summary.domains == {"": 23, "com.example": 1}
    branch.initializer[0].external_data[0].value = "../secret"
    hidden = model_of(nodes=[helper.make_node("If", ["c"], ["y"], then_branch=branch)])
    with pytest.raises(ArtifactError, match="plain name"):
        scan_model(hidden)


def test_initializers_are_no_inputs() -> None:
    model = model_of(external())
    model.graph.input.append(helper.make_tensor_value_info("w", FLOATS, [4, 8]))
    assert scan_model(model).inputs == ("x",)


def test_two_tensors_may_be_the_same_bytes() -> None:
    scan_model(model_of(external("w"), external("v")))


def test_empty_tensors_and_missing_offset() -> None:
    tensor = external(dims=(0, 5))
    del tensor.external_data[1]
    scan_model(model_of(tensor, helper.make_tensor("e", FLOATS, [0], [])))


INLINE = sorted(set(BITS) - {27, 28}) + [TensorProto.STRING]


@pytest.mark.parametrize("data_type", INLINE)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_values_of_every_type_as_a_list(data_type: int, count: int) -> None:
    values: Any = [b"s"] * count if data_type == TensorProto.STRING else [1] * count
    tensor = helper.make_tensor("w", data_type, [count], values)
    scan_tensor(tensor)
    tensor.dims[0] += 4
    with pytest.raises(ArtifactError, match="its dims and type ask for"):
        scan_tensor(tensor)


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float16", "int64", "bool", "bfloat16", "float8_e4m3fn", "int4", "uint4"],
)
def test_raw_values_as_numpy_has_them(dtype: str) -> None:
    scalar = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    tensor = onnx.numpy_helper.from_array(np.ones((3, 5), scalar), "w")
    assert tensor.raw_data
    scan_tensor(tensor)
    tensor.raw_data += b"\0"
    with pytest.raises(ArtifactError, match="its dims and type ask for"):
        scan_tensor(tensor)


def test_unpacked_lists_count_alike() -> None:
    """Protobuf lets a list of numbers stand packed, entry by entry, or both."""
    tensor = bytes([0x08, 3, 0x10, 7])  # dims 3, int64
    tensor += bytes([0x38, 1, 0x3A, 3, 0x80, 0x01, 5]) + b"\x42\x01w"  # int64_data 1, [128, 5]
    parsed = TensorProto.FromString(tensor)
    assert list(parsed.int64_data) == [1, 128, 5]
    scan_tensor(parsed)
    model = onnx_wire.read_message(tensor, "Tensor")
    assert model == {"dims": [3], "data_type": 7, "int64_data": 3, "name": "w"}


# --- external data: one test for each way to be hostile -------------------------------------------

HOSTILE: dict[str, Callable[[], TensorProto]] = {
    "parent": lambda: external(location="../secret"),
    "nested parent": lambda: external(location="sub/../../secret"),
    "absolute": lambda: external(location="/etc/passwd"),
    "device": lambda: external(location="/dev/zero"),
    "backslash": lambda: external(location="..\\w.bin"),
    "NUL": lambda: external(location="w.bin\0x"),
    "not listed": lambda: external(location="other.bin"),
    "folder": lambda: external(location="./w.bin"),
    "empty": lambda: external(location=""),
    "huge length": lambda: external(length=str(2**50)),
    "length beyond 64 bits": lambda: external(length="1" * 30),
    "short length": lambda: external(length="64"),
    "negative offset": lambda: external(offset="-8"),
    "huge offset": lambda: external(offset=str(2**60)),
    "offset past the end": lambda: external(offset="4000"),
    "offset in words": lambda: external(offset="zero"),
    "offset with a sign": lambda: external(offset="+8"),
    "offset with a separator": lambda: external(offset="1_0"),
    "offset in other digits": lambda: external(offset="٨"),
    "offset with a space": lambda: external(offset=" 8"),
    "unknown key": lambda: external(__class__="evil"),
    "base path": lambda: external(basepath="/"),
    "dims overflow": lambda: external(dims=(2**40, 2**40)),
    "dims overflow beside zero": lambda: external(dims=(2**40, 2**40, 0), length="0"),
    "dims negative": lambda: external(dims=(-32, 32), length="4096"),
    "two negative dims": lambda: external(dims=(-4, -8), length="128"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_external_data(case: str) -> None:
    with pytest.raises(ArtifactError):
        scan_tensor(HOSTILE[case]())


def _changed(change: Callable[[TensorProto], object]) -> TensorProto:
    tensor = external()
    change(tensor)
    return tensor


AMBIGUOUS: dict[str, Callable[[TensorProto], object]] = {
    "no location": lambda t: t.external_data.pop(0),
    "no length": lambda t: t.external_data.pop(2),
    "key twice": lambda t: t.external_data.add(key="location", value="w.bin"),
    "data inside too": lambda t: setattr(t, "raw_data", bytes(128)),
    "said to be inside": lambda t: setattr(t, "data_location", 0),
    "said to be outside, is not": lambda t: t.ClearField("external_data"),
    "segment": lambda t: setattr(t.segment, "begin", 1),
    "unknown type": lambda t: setattr(t, "data_type", 99),
    "no type": lambda t: t.ClearField("data_type"),
    "strings": lambda t: setattr(t, "data_type", TensorProto.STRING),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_ambiguous_tensors(case: str) -> None:
    with pytest.raises(ArtifactError, match="tensor 'w'"):
        scan_tensor(_changed(AMBIGUOUS[case]))


def test_partial_overlap() -> None:
    with pytest.raises(ArtifactError, match=r"overlap in w\.bin at byte 64"):
        scan_model(model_of(external("w"), external("v", offset="64")))
    with pytest.raises(ArtifactError, match="overlap"):
        scan_model(model_of(external("w"), external("v", dims=(4,))))


def test_tensors_in_attributes_and_sparse_ones_are_checked() -> None:
    bad = external(location="../secret")
    sparse = onnx.SparseTensorProto(values=external(), indices=bad, dims=[4, 8])
    for attribute in ({"value": bad}, {"sparse_value": sparse}):
        node = helper.make_node("Constant", [], ["y"], **attribute)
        with pytest.raises(ArtifactError, match="plain name"):
            scan_model(model_of(nodes=[node]))
    model = model_of(external())
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=external(), dims=[8]))
    with pytest.raises(ArtifactError, match="without indices"):
        scan_model(model)


# --- models that are none ------------------------------------------------------------------------

UNSOUND: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "no ir_version": (lambda m: m.ClearField("ir_version"), "ir_version"),
    "negative ir_version": (lambda m: setattr(m, "ir_version", -1), "ir_version"),
    "no opset": (lambda m: m.ClearField("opset_import"), "no opset of the default domain"),
    "opset 0": (lambda m: setattr(m.opset_import[0], "version", 0), "version above 0"),
    "opset twice": (lambda m: m.opset_import.add(domain="ai.onnx", version=22), "one version"),
    "no graph": (lambda m: m.ClearField("graph"), "no nodes or no outputs"),
    "no nodes": (lambda m: m.graph.ClearField("node"), "no nodes or no outputs"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "no nodes or no outputs"),
    "no op_type": (lambda m: m.graph.node[0].ClearField("op_type"), "without op_type"),
    "training": (lambda m: m.training_info.add(), "training"),
    "nameless weight": (lambda m: m.graph.initializer[0].ClearField("name"), "without a name"),
    "name twice": (lambda m: m.graph.initializer.append(external("w")), "of one name"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_models(case: str) -> None:
    change, message = UNSOUND[case]
    model = model_of(external())
    change(model)
    with pytest.raises(ArtifactError, match=message):
        scan_model(model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ir_version, found 0"),
        (b"\x80", "inside a number"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "64 bits"),
        (b"\x00\x00", "ir_version"),  # field 0 as a varint is unknown, and leads nowhere
        (b"\x02\x00", "field 0"),
        (b"\x0b\x0c", "wire type 3"),  # groups
        (b"\x0f", "wire type 7"),
        (b"\x3a\x7f\x00", "127 bytes announced, 1 are left"),
        (b"\x0a\x01x", "ir_version of wire type 2"),
        (b"\x38\x01", "graph of wire type 0"),
        (b"\x08\x01\x08\x02", "stands twice"),
        (b"\x3a\x00\x3a\x00", "Model.graph stands twice"),
        (b"\x42\x03\x0a\x01\xff", "not UTF-8"),
        (b"not a model at all", "ONNX"),
        (b"\x89PNG\r\n\x1a\n", "ONNX"),
    ],
)
def test_wire_format_rules(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        scan(data, files=FILES)


def test_lists_of_numbers_cut_off() -> None:
    for data in (b"\x22\x03abc", b"\x52\x04abcd", b"\x20\x01"):  # float_data, double_data
        with pytest.raises(ArtifactError):
            onnx_wire.read_message(data, "Tensor")


def test_nesting_is_bounded() -> None:
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "leaf", [], [])
    for _ in range(8):
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "outer", [], [])
    scan_model(model_of(nodes=list(graph.node)))
    for _ in range(4):
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "outer", [], [])
    with pytest.raises(ArtifactError, match="inside one another"):
        scan_model(model_of(nodes=list(graph.node)))


def test_fields_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_wire, "MAX_FIELDS", 200)
    scan_model(model_of(external()))
    nodes = b"\x0a\x00" * 60  # 60 empty nodes
    bomb = b"\x3a\x78" + nodes  # a graph of them
    repeated = b"\x08\x01" + b"\x70\x00" * 200
    packed = b"\x0a\xac\x02" + b"\x01" * 300
    with pytest.raises(ArtifactError, match="ir_version"):
        scan(bomb, files=FILES)
    for kind, data in (("Model", repeated), ("Tensor", packed), ("Graph", nodes * 4)):
        with pytest.raises(ArtifactError, match="more than 200 fields"):
            onnx_wire.read_message(data, kind)


def chain(count: int) -> list[onnx.NodeProto]:
    return [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(count)]


def test_long_chains_are_refused_before_a_parser_takes_hours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnx_gate, "MAX_NODES", 50)
    assert scan_model(model_of(external(), nodes=chain(50))).node_count == 50
    with pytest.raises(ArtifactError, match="more than 50 nodes"):
        scan_model(model_of(external(), nodes=chain(51)))


def with_functions(depth: int, calls: int, *, recursive: bool = False) -> onnx.ModelProto:
    """``depth`` functions, each of which calls the next ``calls`` times."""
    model = model_of(external(), nodes=[helper.make_node("f0", ["x"], ["y"], domain="f")])
    model.opset_import.append(helper.make_opsetid("f", 1))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("f", 1)]
    for level in range(depth):
        called = f"f{level + 1}" if level + 1 < depth else "f0" if recursive else "Relu"
        domain = "" if called == "Relu" else "f"
        nodes = [
            helper.make_node(called, [f"v{i}"], [f"v{i + 1}"], domain=domain) for i in range(calls)
        ]
        function = helper.make_function("f", f"f{level}", ["v0"], [f"v{calls}"], nodes, opsets)
        model.functions.append(function)
    return model


def test_functions_count_wherever_they_are_called() -> None:
    """Twenty small functions, each calling the next twice, are a million nodes to a parser."""
    scan_model(with_functions(depth=8, calls=2))
    with pytest.raises(ArtifactError, match="nodes, functions counted at every call"):
        scan_model(with_functions(depth=20, calls=2))


def test_functions_that_call_themselves_are_refused() -> None:
    with pytest.raises(ArtifactError, match="'f0' calls itself"):
        scan_model(with_functions(depth=3, calls=1, recursive=True))
    with pytest.raises(ArtifactError, match="calls are too deep"):
        scan_model(with_functions(depth=200, calls=1))


def test_fifty_thousand_dimensions_are_not_multiplied() -> None:
    tensor = TensorProto(name="w", data_type=FLOATS, dims=[2**62] * 50_000)
    tensor.raw_data = b"1234"
    started = time.perf_counter()
    with pytest.raises(ArtifactError, match="50000 dimensions, at most 64"):
        scan_tensor(tensor)
    assert time.perf_counter() - started < 5  # the product alone took 40 s


def test_weights_cost_nothing() -> None:
    """64 MiB inside the file are stepped over, not copied."""
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[1 << 26])
    tensor.raw_data = bytes(1 << 26)
    data = model_of(tensor).SerializeToString()
    start = time.perf_counter()
    scan(data, files=FILES)
    assert time.perf_counter() - start < 0.1


# --- damaged models ------------------------------------------------------------------------------


def _scan_or_refuse(data: bytes) -> OnnxSummary | None:
    try:
        return scan(data, files=FILES)
    except ArtifactError:
        return None


def _check_against_protobuf(data: bytes) -> bool:
    """Whatever passes means to protobuf what it means to us, or protobuf refuses it."""
    summary = _scan_or_refuse(data)
    if summary is None:
        return False
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return True
    assert summary.ir_version == model.ir_version
    assert summary.outputs == tuple(value.name for value in model.graph.output)
    assert summary.node_count == len(model.graph.node)
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location == 1:
            end = int(entries.get("offset", "0")) + int(entries["length"])
            assert end <= FILES[entries["location"]]
    return True


def _tiny() -> bytes:
    bias = helper.make_tensor("b", FLOATS, [8], np.arange(8, dtype=np.float32))
    return bytes(model_of(external(), bias).SerializeToString())


def test_truncated_at_every_byte() -> None:
    data = _tiny()
    accepted = [n for n in range(len(data)) if _check_against_protobuf(data[:n])]
    assert not accepted  # the opset comes last
    assert _check_against_protobuf(data)


def test_every_bit_flipped() -> None:
    data = _tiny()
    refused = 0
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        refused += not _check_against_protobuf(bytes(flipped))
    assert refused > len(data)  # names and bias values may be anything, the rest may not


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    _check_against_protobuf(data)


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_spliced_models(seed: int, cuts: int) -> None:
    random_ = random.Random(seed)
    data = _tiny()
    for _ in range(cuts):
        a, b = sorted(random_.randrange(len(data)) for _ in range(2))
        at = random_.randrange(len(data))
        data = data[:at] + data[a:b] + data[at:] if random_.random() < 0.5 else data[:a] + data[b:]
        if not data:
            return
    _check_against_protobuf(data)


# --- files ---------------------------------------------------------------------------------------


def test_file_and_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_tiny())
    assert scan(path, files=FILES).opset == 23
    (tmp_path / "link.onnx").symlink_to(path)
    os.mkfifo(tmp_path / "pipe.onnx")
    start = time.monotonic()
    for name in ("link.onnx", "pipe.onnx", "absent.onnx", "."):
        with pytest.raises(ArtifactError, match=r"not a regular file|cannot be read"):
            scan(tmp_path / name, files=FILES)
    assert time.monotonic() - start < 1


def test_too_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert onnx_wire.MAX_NBYTES == 2**31 - 1
    (tmp_path / "model.onnx").write_bytes(_tiny())
    monkeypatch.setattr(onnx_wire, "MAX_NBYTES", len(_tiny()) - 1)
    for source in (tmp_path / "model.onnx", _tiny()):
        with pytest.raises(ArtifactError, match="more than"):
            scan(source, files=FILES)


def test_errors_name_the_file() -> None:
    with pytest.raises(ArtifactError, match=r"^out/vision\.onnx: not ONNX"):
        scan(b"", files={}, where="out/vision.onnx")
