"""The work of one call of a graph: operations of its products, bytes that must move.

Operations are those of matrix products and convolutions, a multiplication and an addition each:

    MatMul, Gemm   2 · M · N · K                    of [M, K] by [K, N], times leading dimensions
    Conv           2 · outputs · K                  K = input channels per group · kernel positions
    Attention      2 · B · H · T · S · (d + e)      T queries see S keys of d, values of e channels;
                                                    a mask spares nothing

Norms, softmax and the like are not counted, as is usual for the utilisation of a model's
operations (MFU): they bound no machine that can do products. Each product is counted under what it
is computed in: ``int8`` and ``float8`` where both factors come out of a DequantizeLinear of that
type, else the type of its factors.

Bytes are the least that any implementation moves: every weight once in the type it is stored in,
of a table that is looked up in only the rows that are, every input and output once, of a key/value
cache that is written in place only what is written. Intermediate tensors may stay in a cache and
are not counted.

Shapes come from ONNX's own inference at the sizes of one call. Before, the integers that graphs
compute from the shapes of their inputs are replaced by their values, which inference loses track
of; no weight is read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from internvl_edge.artifact.onnx_gate import BITS
from internvl_edge.errors import ArtifactError

__all__ = ["CONVERSIONS", "COUNTS", "Graph", "Shapes", "Workload", "read_graph", "read_workload"]

EIGHT_BITS = {"int8": "int8", "uint8": "int8", "float8_e4m3fn": "float8", "float8_e5m2": "float8"}
CONVERSIONS = ("Transpose", "Cast", "DequantizeLinear", "Reshape", "Unsqueeze")
SMALL = 64  # elements of a tensor that holds a shape
LOOKUPS = ("Gather", "GatherElements", "GatherND")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Of one call."""

    operations: dict[str, int]  # by what they are computed in: "int8", "float8", "float32", …
    weight_nbytes: int
    io_nbytes: int  # of inputs and outputs

    @property
    def nbytes(self) -> int:
        return self.weight_nbytes + self.io_nbytes

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return sum(self.operations.values()) / self.nbytes


def read_graph(path: Path, shapes: Shapes) -> tuple[onnx.GraphProto, Graph]:
    """Read a graph with every shape inferred; its external data need not be there.

    Raises:
        ArtifactError: a shape does not follow from those of the inputs.
    """
    try:
        proto = _inferred(onnx.load(path, load_external_data=False), shapes).graph
    except (ArtifactError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    return proto, Graph(proto)


def read_workload(path: Path, shapes: Shapes) -> Workload:
    """Read the work of a graph.

    Args:
        path: the ONNX file; its external data need not be there.
        shapes: of its inputs.

    Raises:
        ArtifactError: the shape of a product does not follow from those of the inputs.
    """
    model = onnx.load(path, load_external_data=False)
    try:
        return _workload(_inferred(model, shapes).graph)
    except (ArtifactError, onnx.shape_inference.InferenceError) as error:
        raise ArtifactError(f"{path}: {error}") from error


# --- shapes --------------------------------------------------------------------------------------


def _inferred(model: onnx.ModelProto, shapes: Shapes) -> onnx.ModelProto:
    """Infer every shape of the model at fixed sizes."""
    graph = model.graph
    del graph.value_info[:]
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    del graph.input[:]  # those that may be left out are constants here
    graph.input.extend(inputs)
    for value in graph.input:
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    _evaluate_shapes(model, shapes)
    return onnx.shape_inference.infer_shapes(model, data_prop=True, strict_mode=True)


def _evaluate_shapes(model: onnx.ModelProto, shapes: Shapes) -> None:
    """Replace what depends on shapes of inputs alone by its values."""
    graph = model.graph
    known = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.DEFAULT
        and tensor.data_type == onnx.TensorProto.INT64
        and math.prod(tensor.dims) <= SMALL
    }
    kept = []
    for node in graph.node:
        feeds = {name: known[name] for name in node.input if name in known}
        if node.op_type == "Shape" and node.input[0] in shapes:  # a view without memory
            feeds = {node.input[0]: np.broadcast_to(np.int64(0), shapes[node.input[0]])}
        if not feeds or len(feeds) < len({name for name in node.input if name}):
            kept.append(node)
            continue
        values = ReferenceEvaluator(node).run(None, feeds)
        known |= dict(zip(node.output, values, strict=True))
        graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name)
            for name, value in zip(node.output, values, strict=True)
        )
    del graph.node[:]
    graph.node.extend(kept)


def _dims(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """Return the shape, where all of it is known."""
    dims = value.type.tensor_type.shape.dim
    known = value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims)
    return tuple(int(d.dim_value) for d in dims) if known else None


# --- counting ------------------------------------------------------------------------------------


class Graph:
    """Shapes, types and producers of a graph's values by name."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._shapes: dict[str, tuple[int, ...] | None] = {}
        self._types: dict[str, int] = {}
        for value in (*graph.value_info, *graph.input, *graph.output):
            self._shapes[value.name] = _dims(value)
            self._types[value.name] = value.type.tensor_type.elem_type
        for tensor in graph.initializer:
            self._shapes[tensor.name] = tuple(tensor.dims)
            self._types[tensor.name] = tensor.data_type
        self._stored = {tensor.name for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}

    def producer(self, name: str) -> onnx.NodeProto | None:
        return self._producers.get(name)

    def is_stored(self, name: str) -> bool:
        """Tell whether a value is an initializer, or made of one by nodes that only convert it."""
        while (node := self._producers.get(name)) is not None:
            if node.op_type not in CONVERSIONS:
                return False
            name = node.input[0]
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._shapes.get(name)
        if shape is None:
            raise ArtifactError(f"the shape of {name!r} does not follow from the inputs' shapes")
        return shape

    def nbytes(self, name: str) -> int:
        return -(-math.prod(self.shape(name)) * BITS[self._types[name]] // 8)

    def type_name(self, name: str) -> str:
        """Return a name such as ``float32``."""
        return str(helper.tensor_dtype_to_np_dtype(self._types[name]).name)

    def product_type(self, factors: Sequence[str]) -> str:
        """Name the type that a product of these is computed in."""
        kinds = {self._quantized_type(name) for name in factors}
        if len(kinds) == 1 and (kind := kinds.pop()) is not None:
            return kind
        return self.type_name(factors[0])

    def _quantized_type(self, name: str) -> str | None:
        """Name the family of 8-bit types that a factor is stored in; None for any other."""
        node = self._producers.get(name)
        while node is not None and node.op_type in ("Transpose", "Reshape", "Cast"):
            node = self._producers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return None
        return EIGHT_BITS.get(self.type_name(node.input[0]))


def _workload(proto: onnx.GraphProto) -> Workload:
    graph = Graph(proto)
    operations: Counter[str] = Counter()
    for node in proto.node:
        count = COUNTS.get(node.op_type)
        if count is not None:
            operations[graph.product_type(node.input[:2])] += count(graph, node)
    values = [value.name for value in (*proto.input, *proto.output)]
    # what a cache in place gets anew, in place of the whole of it
    written = {n.output[0]: n.input[1] for n in proto.node if n.op_type == "TensorScatter"}
    return Workload(
        operations=dict(operations),
        weight_nbytes=_weight_nbytes(proto, graph),
        io_nbytes=sum(graph.nbytes(written.get(name, name)) for name in values),
    )


def _weight_nbytes(proto: onnx.GraphProto, graph: Graph) -> int:
    """Count every initializer that is read; of one that is only looked up in, what comes out."""
    readers: dict[str, list[onnx.NodeProto]] = {tensor.name: [] for tensor in proto.initializer}
    for node in proto.node:
        for name in node.input:
            if name in readers:
                readers[name].append(node)
    total = 0
    for name, nodes in readers.items():
        if nodes and all(n.op_type in LOOKUPS and n.input[0] == name for n in nodes):
            total += min(graph.nbytes(name), sum(graph.nbytes(n.output[0]) for n in nodes))
        elif nodes:
            total += graph.nbytes(name)
    return total


def _matmul(graph: Graph, node: onnx.NodeProto) -> int:
    return 2 * math.prod(graph.shape(node.output[0])) * graph.shape(node.input[0])[-1]


def _gemm(graph: Graph, node: onnx.NodeProto) -> int:
    rows, columns = graph.shape(node.input[0])
    inner = rows if _attribute(node, "transA", 0) else columns
    return 2 * math.prod(graph.shape(node.output[0])) * inner


def _conv(graph: Graph, node: onnx.NodeProto) -> int:
    kernel = graph.shape(node.input[1])  # (outputs, inputs per group, *positions)
    return 2 * math.prod(graph.shape(node.output[0])) * math.prod(kernel[1:])


def _attention(graph: Graph, node: onnx.NodeProto) -> int:
    query, key, value = (graph.shape(name) for name in node.input[:3])
    if len(query) == 3:  # (B, T, H · d)
        heads = _attribute(node, "q_num_heads", 1)
        kv_heads = _attribute(node, "kv_num_heads", 1)
        batch, queries, keys = query[0], query[1], key[1]
        channels = query[2] // heads + value[2] // kv_heads
    else:  # (B, H, T, d)
        batch, heads, queries, keys = *query[:3], key[2]
        channels = query[3] + value[3]
    if len(node.input) > 4 and node.input[4]:  # a cache comes before the keys
        keys += graph.shape(node.input[4])[2]
    return 2 * batch * heads * queries * keys * channels


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


COUNTS: dict[str, Any] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
}
