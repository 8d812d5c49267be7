"""Pairs of linear layers that read one tensor, joined into one product for a builder of engines.

A builder runs gate and up as one product:

    x Wgᵀ, x Wuᵀ  =  split(x Wᵀ)        W = the rows of Wg and Wu, (N, K) each

It makes W in memory, beside the engine's own copy: 42 % of QLLaMA once more. Joined before, W lies
in a file that the parser maps. Rows behind rows are bytes behind bytes: they are copied as they are
stored, and nothing is computed. Keys and values of the vision states are such a pair too.

Of q, k and v the builder makes one product too, but takes it apart first where it finds it joined
(TensorRT-RTX 1.7: four layers of QLLaMA took 3.33 GB for an engine of 2.04 GB either way, and
2.60 GB with gate and up joined). So only pairs are.

The joined graph is for the builder and is gone after it; the published one keeps the checkpoint's
tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from internvl_edge.errors import ArtifactError
from internvl_edge.export.bind import save

__all__ = ["joined_graph"]

PAIR = 2
_CHUNK = 1 << 24  # bytes copied at once
_Key = tuple[ir.Value, int, ir.DataType]  # what is read, K, dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """x Wᵀ of a weight that lies in a file, and that nothing else reads."""

    product: ir.Node
    between: tuple[ir.Node, ...]  # Transpose and, where the graph computes in another type, Cast
    weight: ir.Value
    stored: ir.ExternalTensor


@contextlib.contextmanager
def joined_graph(path: Path) -> Iterator[Path]:
    """A graph as a builder takes it with the least memory; ``path`` itself if it has no pairs.

    Its files lie beside ``path``, under hidden names that end in ``.partial``, until the block
    ends.

    Raises:
        ArtifactError: a file of weights is not what it was.
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
                for layer in layers:
                    _copy(layer.stored, file)
                _join(model, layers, data, offset, file.tell() - offset)
        save(model, graph)
        yield graph
    finally:
        for partial in (graph, data):
            partial.unlink(missing_ok=True)


def _groups(model: ir.Model) -> dict[_Key, list[_Layer]]:
    """Layers by what they read, in the order of the graph."""
    found: dict[_Key, list[_Layer]] = {}
    for node in model.graph:
        layer = _layer(node)
        if layer is not None:
            read, dtype = node.inputs[0], layer.stored.dtype
            assert read is not None
            found.setdefault((read, layer.stored.shape.numpy()[1], dtype), []).append(layer)
    return found


def _layer(node: ir.Node) -> _Layer | None:
    transpose = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] else None
    if transpose is None or transpose.op_type != "Transpose":
        return None
    between: tuple[ir.Node, ...] = (transpose,)
    weight = transpose.inputs[0]
    cast = None if weight is None else weight.producer()
    if cast is not None and cast.op_type == "Cast":
        between, weight = (transpose, cast), cast.inputs[0]
    stored = None if weight is None else weight.const_value
    if weight is None or not isinstance(stored, ir.ExternalTensor) or len(stored.shape) != 2:
        return None
    if any(len(value.uses()) != 1 for value in (weight, *(n.outputs[0] for n in between))):
        return None
    return _Layer(product=node, between=between, weight=weight, stored=stored)


def _copy(stored: ir.ExternalTensor, target: BinaryIO) -> None:
    with open(stored.path, "rb") as source:
        source.seek(stored.offset or 0)
        left = stored.nbytes
        while left:
            data = source.read(min(left, _CHUNK))
            if not data:
                raise ArtifactError(f"{stored.path}: it became shorter while it was read")
            target.write(data)
            left -= len(data)


def _join(model: ir.Model, layers: list[_Layer], data: Path, offset: int, nbytes: int) -> None:
    """Put one product and a Split where the layers' products were, in place."""
    first, graph = layers[0], model.graph
    rows = [layer.stored.shape.numpy()[0] for layer in layers]
    shape, dtype = ir.Shape([sum(rows), first.stored.shape.numpy()[1]]), first.stored.dtype
    name = "+".join(str(layer.weight.name) for layer in layers)
    weight = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
    weight.const_value = ir.ExternalTensor(
        data.name, offset, nbytes, dtype, shape=shape, name=name, base_dir=data.parent
    )
    sizes = ir.Value(name=f"{name}/rows", type=ir.TensorType(ir.DataType.INT64))
    sizes.shape, sizes.const_value = ir.Shape([len(rows)]), ir.tensor(np.array(rows, np.int64))
    for value in (weight, sizes):
        graph.initializers[str(value.name)] = value
    read, casts = weight, [node for node in first.between if node.op_type == "Cast"]
    for cast in casts:
        casts = [ir.node("Cast", [weight], dict(cast.attributes), name=f"{name}/Cast")]
        read = casts[0].outputs[0]
    turned = ir.node("Transpose", [read], {"perm": [1, 0]}, name=f"{name}/Transpose")
    product = ir.node("MatMul", [first.product.inputs[0], turned.outputs[0]], name=f"{name}/MatMul")
    split = ir.node(
        "Split",
        [product.outputs[0], sizes],
        {"axis": -1},
        num_outputs=len(layers),
        name=f"{name}/Split",
    )
    graph.insert_before(first.product, [*casts, turned, product, split])
    for layer, part in zip(layers, split.outputs, strict=True):
        old = layer.product.outputs[0]
        part.name, part.type, part.shape = f"{old.name}/rows", old.type, old.shape
        old.replace_all_uses_with(part, replace_graph_outputs=True)
    for layer in layers:
        graph.remove([layer.product, *layer.between], safe=True)
        del graph.initializers[str(layer.weight.name)]
