"""Pairs of linear layers that read one tensor, joined into one product to save builder memory.

An engine builder runs gate and up as one product:

    x Wgᵀ, x Wuᵀ  =  split(x Wᵀ)        W = the rows of Wg and Wu, (N, K) each

It assembles W in memory, in addition to the engine's own copy: 42 % of QLLaMA a second time. If W
is joined beforehand, it is in a file that the parser maps. Concatenating rows concatenates bytes,
so they are copied as they are stored and nothing is computed. A weight in 8 bits is stored as Wᵀ
with a scale for every column: columns are placed side by side and scales are concatenated. Keys
and values of the vision states are such a pair too.

The builder also makes one product of q, k and v, but splits it first if it is already joined
(TensorRT-RTX 1.7: four layers of QLLaMA took 3.33 GB for an engine of 2.04 GB either way, and
2.60 GB with gate and up joined). So only pairs are joined.

The joined graph exists only for the builder and is deleted afterwards; the published graph keeps
the checkpoint's tensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from internvl_edge.errors import ArtifactError
from internvl_edge.export.graph.bind import save
from internvl_edge.types import Array

__all__ = ["joined_graph"]

PAIR = 2
EIGHT_BITS = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN)
_CHUNK = 1 << 24  # bytes copied at a time
# The value that is read, K, dtype, and the operators between weight and product.
_Key = tuple[ir.Value, int, ir.DataType, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A product x Wᵀ whose weight is stored in a file and read by nothing else."""

    product: ir.Node
    # Transpose and, where the graph computes in another type, Cast; or DequantizeLinear
    between: tuple[ir.Node, ...]
    weight: ir.Value  # (N, K), or in 8 bits (K, N)
    stored: ir.ExternalTensor
    scales: Array | None = None  # (N,), for a weight in 8 bits

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        first, second = self.stored.shape.numpy()
        return (first, second) if self.scales is None else (second, first)


@contextlib.contextmanager
def joined_graph(path: Path) -> Iterator[Path]:
    """Write a graph with its pairs joined, and remove it afterwards; ``path`` if it has no pairs.

    Its files are next to ``path``, under hidden names that end in ``.partial``, until the ``with``
    block ends.

    Raises:
        ArtifactError: a file of weights became shorter.
        OSError: the disk is full or fails.
    """
    model = ir.load(path)
    groups = [layers for layers in _groups(model).values() if len(layers) == PAIR]
    if not groups:
        yield path
        return
    graph, data = (path.with_name(f".{path.stem}.{kind}.partial") for kind in ("joined", "rows"))
    try:
        with data.open("wb") as file:
            for layers in groups:
                offset = file.tell()
                if layers[0].scales is None:
                    for layer in layers:
                        _copy(layer.stored, file)
                else:
                    _copy_columns(layers, file)
                _join(model, layers, data, offset, file.tell() - offset)
        save(model, graph)
        yield graph
    finally:
        for partial in (graph, data):
            partial.unlink(missing_ok=True)


def _groups(model: ir.Model) -> dict[_Key, list[_Layer]]:
    """Group layers by the value they read, in the order of the graph."""
    groups: dict[_Key, list[_Layer]] = {}
    for node in model.graph:
        layer = _layer(node)
        if layer is not None:
            read, dtype = node.inputs[0], layer.stored.dtype
            assert read is not None
            between = tuple(f"{n.op_type} {n.attributes}" for n in layer.between)
            groups.setdefault((read, layer.shape[1], dtype, between), []).append(layer)
    return groups


def _layer(node: ir.Node) -> _Layer | None:
    last = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
    if last is None:
        return None
    between: tuple[ir.Node, ...] = (last,)
    weight, scales = last.inputs[0], None
    if last.op_type == "DequantizeLinear":
        scales = _scales(last)
        if scales is None:
            return None
    elif last.op_type != "Transpose":
        return None
    cast = None if weight is None else weight.producer()
    if scales is None and cast is not None and cast.op_type == "Cast":
        between, weight = (last, cast), cast.inputs[0]
    stored = None if weight is None else weight.const_value
    if weight is None or not isinstance(stored, ir.ExternalTensor) or len(stored.shape) != 2:
        return None
    if any(len(value.uses()) != 1 for value in (weight, *(n.outputs[0] for n in between))):
        return None
    return _Layer(product=node, between=between, weight=weight, stored=stored, scales=scales)


def _scales(dequantize: ir.Node) -> Array | None:
    """Read the column scales of a symmetric 8-bit weight; None for any other kind of weight."""
    weight, scale, *zero = dequantize.inputs
    attributes = dequantize.attributes
    is_by_column = attributes.get_int("axis", 1) == 1 and not attributes.get_int("block_size", 0)
    if weight is None or weight.dtype not in EIGHT_BITS or any(zero) or not is_by_column:
        return None
    cast = None if scale is None else scale.producer()
    if cast is not None and cast.op_type == "Cast":  # in a graph that computes in 16 bits
        scale = cast.inputs[0]
    if scale is None or scale.const_value is None or len(scale.const_value.shape) != 1:
        return None
    values = _values(scale.const_value)
    if cast is None:
        return values
    return values.astype(ir.DataType(cast.attributes["to"].as_int()).numpy())


def _values(tensor: ir.TensorProtocol) -> Array:
    """Read a tensor, also from a file with several hard links, which onnx-ir refuses."""
    if not isinstance(tensor, ir.ExternalTensor):
        return np.asarray(tensor.numpy())
    shape = tensor.shape.numpy()
    return _read(tensor, tensor.dtype.numpy(), math.prod(shape), 0).reshape(shape)


def _read(stored: ir.ExternalTensor, dtype: np.dtype[Any], count: int, start_nbytes: int) -> Array:
    """Read a number of values from a tensor's file, starting at a byte of the tensor."""
    values = np.fromfile(stored.path, dtype, count, offset=(stored.offset or 0) + start_nbytes)
    if values.size < count:
        raise ArtifactError(f"{stored.path}: it became shorter while it was read")
    return values


def _copy_columns(layers: Sequence[_Layer], target: BinaryIO) -> None:
    """Copy matrices of bytes with their columns side by side, a few rows at a time."""
    count, widths = layers[0].shape[1], [layer.shape[0] for layer in layers]
    step = max(1, _CHUNK // sum(widths))
    for start in range(0, count, step):
        rows = min(step, count - start)
        parts = [
            _read(layer.stored, np.dtype(np.uint8), rows * width, start * width)
            for layer, width in zip(layers, widths, strict=True)
        ]
        target.write(np.hstack([part.reshape(rows, -1) for part in parts]).data)


def _copy(stored: ir.ExternalTensor, target: BinaryIO) -> None:
    for start in range(0, stored.nbytes, _CHUNK):
        count = min(_CHUNK, stored.nbytes - start)
        target.write(_read(stored, np.dtype(np.uint8), count, start).data)


def _join(model: ir.Model, layers: Sequence[_Layer], data: Path, offset: int, nbytes: int) -> None:
    """Replace the layers' products by one product and a Split, in place."""
    first, graph = layers[0], model.graph
    sizes, inner = [layer.shape[0] for layer in layers], first.shape[1]
    shape = ir.Shape([sum(sizes), inner] if first.scales is None else [inner, sum(sizes)])
    name, dtype = "+".join(str(layer.weight.name) for layer in layers), first.stored.dtype
    weight = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
    weight.const_value = ir.ExternalTensor(
        data.name, offset, nbytes, dtype, shape=shape, name=name, base_dir=data.parent
    )
    graph.initializers[name] = weight
    between = _nodes_between(model, layers, weight)
    read = between[-1].outputs[0]
    product = ir.node("MatMul", [first.product.inputs[0], read], name=f"{name}/MatMul")
    split = ir.node(
        "Split",
        [product.outputs[0], _constant(model, f"{name}/sizes", np.array(sizes, np.int64))],
        {"axis": -1},
        num_outputs=len(layers),
        name=f"{name}/Split",
    )
    graph.insert_before(first.product, [*between, product, split])
    for layer, part in zip(layers, split.outputs, strict=True):
        old = layer.product.outputs[0]
        part.name, part.type, part.shape = f"{old.name}/rows", old.type, old.shape
        old.replace_all_uses_with(part, replace_graph_outputs=True)
    for layer in layers:
        inputs = [value for node in layer.between for value in node.inputs if value is not None]
        graph.remove([layer.product, *layer.between], safe=True)
        _drop_unused(graph, [layer.weight, *inputs])


def _nodes_between(model: ir.Model, layers: Sequence[_Layer], weight: ir.Value) -> list[ir.Node]:
    """Make the nodes between the joined weight and its product, like those of one layer."""
    first, name = layers[0], weight.name
    if first.scales is not None:
        scales = [layer.scales for layer in layers if layer.scales is not None]
        scale = _constant(model, f"{name}/scale", np.concatenate(scales))
        old = first.between[0]
        attributes = dict(old.attributes)
        return [ir.node(old.op_type, [weight, scale], attributes, name=f"{name}/{old.op_type}")]
    nodes, read = [], weight
    for old in reversed(first.between):  # a Cast comes before its Transpose
        attributes = dict(old.attributes)
        nodes.append(ir.node(old.op_type, [read], attributes, name=f"{name}/{old.op_type}"))
        read = nodes[-1].outputs[0]
    return nodes


def _drop_unused(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    """Remove initializers that nothing reads any more, and the Casts after them."""
    for value in values:
        producer = value.producer()
        if value.uses():
            continue
        if producer is not None and producer.graph is not None:
            inputs = [v for v in producer.inputs if v is not None]
            graph.remove([producer], safe=True)
            _drop_unused(graph, inputs)
        graph.initializers.pop(str(value.name), None)


def _constant(model: ir.Model, name: str, values: Array) -> ir.Value:
    """Add an initializer that is stored in the graph's own file."""
    tensor = ir.tensor(values)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape))
    value.const_value = tensor
    model.graph.initializers[name] = value
    return value
