"""Weights files: exact bytes, any order, and graphs that point into them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.errors import InternVLError
from internvl_edge.export.checkpoint.shards import DTYPES, read_header
from internvl_edge.export.graph.bind import bind, save
from internvl_edge.export.weights.writer import DATA_ALIGNMENT, StoredTensor, WeightsWriter
from internvl_edge.types import Array


def layout(tensors: dict[str, Array]) -> dict[str, tuple[Any, Any]]:
    return {name: (values.dtype, values.shape) for name, values in tensors.items()}


def test_exact_bytes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    tensors = {"b": np.arange(3, dtype=np.int8), "a": np.array([1.0, -2.0], np.float32)}
    with WeightsWriter(path, layout(tensors)) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length + 8 == DATA_ALIGNMENT
    assert raw[8 : 8 + length].rstrip(b" ") == (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"I8","shape":[3],"data_offsets":[8,11]}}'
    )
    assert raw[DATA_ALIGNMENT:] == b"\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x01\x02"


SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
# The other reader has no name for E4M3 in numpy.
# safetensors reads these with numpy; there are none of a part of a byte there
KINDS = st.sampled_from(sorted(code for code in DTYPES if code[:2] not in ("F8", "F6", "F4")))


@settings(max_examples=60, deadline=None)
@given(
    specs=st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(KINDS, SHAPES), max_size=6),
    seed=st.integers(0, 2**31),
)
def test_any_order_reads_back_with_both_readers(
    specs: dict[str, Any], seed: int, tmp_path_factory: Any
) -> None:
    specs.pop("__metadata__", None)
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.integers(0, 2, shape).astype(DTYPES[kind])
        for name, (kind, shape) in specs.items()
        if name.isprintable()
    }
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    with WeightsWriter(path, layout(tensors)) as writer:
        for name in rng.permutation(list(tensors)):
            writer.write(str(name), tensors[str(name)])
    stored = read_header(path)
    assert {n: (e.offset, e.nbytes, e.shape) for n, e in stored.items()} == {
        n: (e.offset, e.nbytes, e.shape) for n, e in writer.stored.items()
    }
    theirs = safetensors.numpy.load_file(path)
    for name, values in tensors.items():
        assert stored[name].offset % values.dtype.itemsize == 0
        np.testing.assert_array_equal(theirs[name], values)


def test_a_tensor_may_not_be_left_out(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path / "w", {"a": (np.dtype(np.float32), (2,))})
    with pytest.raises(InternVLError, match="never written"):
        writer.close()


@pytest.mark.parametrize(
    "values", [np.zeros(2, np.float64), np.zeros(3, np.float32), np.zeros((2, 1), np.float32)]
)
def test_only_what_was_announced(tmp_path: Path, values: Array) -> None:
    writer = WeightsWriter(tmp_path / "w", {"a": (np.dtype(np.float32), (2,))})
    with pytest.raises(InternVLError, match="expected float32"):
        writer.write("a", values)


def test_not_twice(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path / "w", {"a": (np.dtype(np.float32), (2,))})
    writer.write("a", np.zeros(2, np.float32))
    with pytest.raises(InternVLError, match="twice"):
        writer.write("a", np.zeros(2, np.float32))


def doubling_model(dtype: ir.DataType) -> ir.Model:
    """y = x + w for a w without data."""
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape([2]))
    w = ir.Value(name="w", type=ir.TensorType(dtype), shape=ir.Shape([2]))
    add = ir.node("Add", [x, w])
    add.outputs[0].name, add.outputs[0].type = "y", ir.TensorType(dtype)
    graph = ir.Graph([x], add.outputs, nodes=[add], opset_imports={"": 23}, name="g")
    graph.initializers["w"] = w
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize("held", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_bind_casts_where_the_stored_dtype_differs(tmp_path: Path, held: Any) -> None:
    values = np.array([0.5, -3.0], held)
    with WeightsWriter(tmp_path / "w.safetensors", layout({"w": values})) as writer:
        writer.write("w", values)
    model = doubling_model(ir.DataType.FLOAT)
    assert bind(model, writer.stored, tmp_path) == values.nbytes
    save(model, tmp_path / "m.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx")
    (y,) = session.run(None, {"x": np.array([1.0, 2.0], np.float32)})
    np.testing.assert_array_equal(y, [1.5, -1.0])
    casts = [node.op_type for node in ir.load(tmp_path / "m.onnx").graph]
    assert casts.count("Cast") == (held != np.float32)


def test_bind_refuses_another_shape(tmp_path: Path) -> None:
    place = StoredTensor(location="w", offset=0, nbytes=12, dtype=np.dtype(np.float32), shape=(3,))
    with pytest.raises(InternVLError, match=r"found .* stored"):
        bind(doubling_model(ir.DataType.FLOAT), {"w": place}, tmp_path)


@settings(max_examples=60, deadline=None)
@given(
    specs=st.lists(st.tuples(KINDS, SHAPES), max_size=6),
    align=st.integers(0, 13).map(lambda n: 2**n),
)
def test_aligned(specs: list[Any], align: int, tmp_path_factory: Any) -> None:
    """Every offset in the file is a multiple; both readers see the tensors, and only zeros else."""
    tensors = {
        f"t{i}": np.ones(shape).astype(DTYPES[kind]) for i, (kind, shape) in enumerate(specs)
    }
    path = tmp_path_factory.mktemp("w") / "w.safetensors"
    with WeightsWriter(path, layout(tensors), align=align) as writer:
        assert set(writer.pending) == set(tensors)
        for name, values in tensors.items():
            writer.write(name, values)
    assert set(writer.stored) == set(tensors)
    found, theirs = read_header(path), safetensors.numpy.load_file(path)
    for name, values in tensors.items():
        assert writer.stored[name].offset == found[name].offset
        assert found[name].offset % max(align, values.dtype.itemsize) == 0
        np.testing.assert_array_equal(theirs[name], values)
        np.testing.assert_array_equal(found[name].read(), values)
    for name in set(found) - set(tensors):
        assert name.startswith("__padding__.")
        assert not theirs[name].any()


def test_without_alignment_nothing_lies_between(tmp_path: Path) -> None:
    tensors = {"a": np.ones(3, np.float16), "b": np.ones(1, np.float32), "c": np.ones(1, np.int8)}
    with WeightsWriter(tmp_path / "w.safetensors", layout(tensors)) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
    assert set(read_header(tmp_path / "w.safetensors")) == {"a", "b", "c"}


@pytest.mark.parametrize("left", [None, 100])
def test_what_is_said_to_be_done_has_to_be_there(tmp_path: Path, left: int | None) -> None:
    """A hole reads as zeros, which would pass for weights."""
    tensors = {name: (np.dtype(np.float32), (64,)) for name in ("a", "b")}
    path = tmp_path / "w.safetensors"
    if left is not None:
        path.write_bytes(bytes(left))
    with pytest.raises(InternVLError, match="an earlier run has written; remove"):
        WeightsWriter(path, tensors, done={"a"})
