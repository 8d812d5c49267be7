"""A decoder's graph for ONNX Runtime's CPU provider: fewer kernels, every result the same.

    x Wqᵀ + bq,  x Wkᵀ + bk,  x Wvᵀ + bv   =   split(x Wᵀ + b)      W: the columns side by side

A product of few bits is over in microseconds where one row is read, and each of them rounds x to
int8 and wakes the other threads before it begins. Gate and up stay two products: each is long, and
joined they are slower. Weights are joined by nodes on constants, which ONNX Runtime computes once,
at opening; it joins no INT4, so they take the way over INT8.

    Attention of (B, heads, T, d),             Attention of (B, T, heads·d), which has the cache
    its cache appended to by Concat     =      among its inputs

So appending is part of a kernel, and shared by its threads. A cache that is written in place stays
outside.

What is computed, and in which order, is the same: outputs are the published graph's bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common as passes

from internvl_edge.export.graph.providers.pattern import shape_of
from internvl_edge.export.graph.providers.tower import constant, is_stored, replace

__all__ = ["take_cpu_form"]

QKV = 3  # products of one tensor that are joined
WEIGHT_TYPES = (ir.DataType.INT8, ir.DataType.INT4)
HEADS_FIRST = (0, 2, 1, 3)  # (B, T, heads, d) → (B, heads, T, d), and back


def take_cpu_form(model: ir.Model) -> bool:
    """Rewrite a decoder's graph, bound to its weights, in place.

    Returns:
        False where no q, k and v have weights that alone are quantized; it is then unchanged.
    """
    graph, readers = model.graph, dict[ir.Value, list[_Linear]]()
    for linear in filter(None, map(_linear, graph)):
        readers.setdefault(linear.x, []).append(linear)
    groups = [linears for linears in readers.values() if _are_joinable(linears)]
    if not groups:
        return False
    for linears in groups:
        _join(graph, linears)
    for node in [node for node in graph if node.op_type == "Attention"]:
        _take_cache(graph, node)
    graph.sort()  # a scale may be cast further down
    passes.RemoveUnusedNodesPass()(model)
    return True


# --- products ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """A product of which the weight alone is quantized."""

    x: ir.Value
    weight: ir.Value  # (K, N)
    scale: ir.Value
    bias: ir.Value | None
    # DequantizeLinear, MatMul and, where there is a bias, Add
    nodes: tuple[ir.Node, ...]

    @property
    def block(self) -> int:
        return self.nodes[0].attributes.get_int("block_size", 0)


def _are_joinable(linears: Sequence[_Linear]) -> bool:
    kinds = {(one.weight.dtype, one.block, one.bias is None) for one in linears}
    return len(linears) == QKV and len(kinds) == 1


def _linear(product: ir.Node) -> _Linear | None:
    if product.op_type != "MatMul":
        return None
    x, factor = product.inputs
    dequantize = None if factor is None else factor.producer()
    if x is None or dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    weight, scale, *zero = dequantize.inputs
    if weight is None or scale is None or zero or not weight.is_initializer():
        return None
    if weight.dtype not in WEIGHT_TYPES or _is_rounded(x):
        return None
    readers = [use.node for use in product.outputs[0].uses()]
    last = readers[0] if len(readers) == 1 else product
    biases = [value for value in last.inputs if value is not None and is_stored(value)]
    has_bias = last.op_type == "Add" and len(biases) == 1
    return _Linear(
        x=x,
        weight=weight,
        scale=scale,
        bias=biases[0] if has_bias else None,
        nodes=(dequantize, product, last) if has_bias else (dequantize, product),
    )


def _is_rounded(x: ir.Value) -> bool:
    node = x.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _join(graph: ir.Graph, linears: Sequence[_Linear]) -> None:
    """Compute products of one tensor by one product and a Split."""
    tape, first = ir.tape.Tape(), linears[0]
    kind, weights = first.weight.dtype, [one.weight for one in linears]
    if kind == ir.DataType.INT4:
        weights = [tape.op("Cast", [one], {"to": int(ir.DataType.INT8)}) for one in weights]
    weight = tape.op("Concat", weights, {"axis": 1})
    if kind == ir.DataType.INT4:
        weight = tape.op("Cast", [weight], {"to": int(kind)})
    scale = tape.op("Concat", [one.scale for one in linears], {"axis": -1})
    dequantize, product, *_ = first.nodes
    factor = tape.op("DequantizeLinear", [weight, scale], dict(dequantize.attributes))
    y = tape.op("MatMul", [first.x, factor], name=f"{product.name}/joined")
    if first.bias is not None:
        bias = tape.op("Concat", [one.bias for one in linears], {"axis": 0})
        y = tape.op("Add", [y, bias])
    widths = [shape_of(one.weight)[1] for one in linears]
    sizes = constant(graph, f"{product.name}/widths", widths)
    parts = tape.op_multi_out("Split", [y, sizes], {"axis": -1}, num_outputs=len(linears))
    graph.insert_before(product, tape.nodes)
    for linear, part in zip(linears, parts, strict=True):
        replace(linear.nodes[-1].outputs[0], part)


# --- attention -----------------------------------------------------------------------------------


def _take_cache(graph: ir.Graph, node: ir.Node) -> None:
    """Let an attention append to its cache, if all that it reads and gives is as expected."""
    if len(node.inputs) != 4 or len(node.outputs) != 1:  # query, key, value, mask
        return
    query = _above(node.inputs[0], "Transpose", "Reshape")
    key, value = (_above(kept, "Concat", "Transpose", "Reshape") for kept in node.inputs[1:3])
    merged = _below(node.outputs[0], "Transpose", "Reshape")
    if not (query and key and value and merged):
        return
    x, k, v = (nodes[-1].inputs[0] for nodes in (query, key, value))
    heads, kv_heads = (_heads(nodes[-1]) for nodes in (query, key))
    made = ir.node(
        "Attention",
        [x, k, v, node.inputs[3], key[0].inputs[0], value[0].inputs[0]],
        {**node.attributes, "q_num_heads": heads, "kv_num_heads": kv_heads},
        num_outputs=3,
        name=node.name,
    )
    graph.insert_before(node, made)
    for old, new in zip((merged[-1], key[0], value[0]), made.outputs, strict=True):
        replace(old.outputs[0], new)


def _above(value: ir.Value | None, *op_types: str) -> list[ir.Node]:
    """Go back from a value: nodes of just these operators, or none."""
    found = list[ir.Node]()
    for op_type in op_types:
        node = None if value is None else value.producer()
        if node is None or node.op_type != op_type or not _is_expected(node):
            return []
        found.append(node)
        value = node.inputs[1 if op_type == "Concat" else 0]
    return found


def _below(value: ir.Value, *op_types: str) -> list[ir.Node]:
    """Go on from a value: nodes of just these operators, each the only one to read, or none."""
    found = list[ir.Node]()
    for op_type in op_types:
        readers = [use.node for use in value.uses()]
        if [node.op_type for node in readers] != [op_type] or not _is_expected(readers[0]):
            return []
        found += readers
        value = readers[0].outputs[0]
    return found


def _is_expected(node: ir.Node) -> bool:
    if node.op_type == "Transpose":
        return node.attributes.get_ints("perm", ()) == HEADS_FIRST
    if node.op_type == "Reshape":
        shape = node.inputs[1]
        return shape is not None and shape.const_value is not None
    return node.op_type != "Concat" or (node.attributes.get_int("axis", 0) == 2 == len(node.inputs))


def _heads(split: ir.Node) -> int:
    """Read how many heads a Reshape makes: its shape is (B, T, heads, d)."""
    shape = split.inputs[1]
    assert shape is not None and shape.const_value is not None
    return int(shape.const_value.numpy()[2])
