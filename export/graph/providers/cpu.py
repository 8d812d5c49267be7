"""A decoder's graph in the form that ONNX Runtime's CPU provider computes in the least time.

    x Wqᵀ + bq,  x Wkᵀ + bk,  x Wvᵀ + bv   =   split(x Wᵀ + b)      W: the columns side by side

A product of few bits is over in microseconds where one row is read, and each of them rounds x to
int8 and wakes the other threads before it begins. Gate and up stay two products: each is long, and
joined they are slower. Weights are joined by nodes on constants, which ONNX Runtime computes once,
at opening; it joins no INT4, so they take the way over INT8.

    Attention of (B, heads, T, d),             Attention of (B, T, heads·d), which has the cache
    its cache appended to by Concat     =      among its inputs

So appending is part of a kernel. A cache that is written in place stays outside.

    Attention of (B, heads, T, d)       =      Attention of (B, kv heads, heads / kv heads · T, d)

The kernel reads keys and values once for each head of the query, rearranges keys for each, and has
one thread append to the cache, unless the query has as many heads as they. So where few tokens are
new, heads that share keys are rows of one head: the same memory under another shape, which the
graph chooses by itself. Where many are new they stay heads, since threads share heads out.

With more threads than heads of keys, heads are better in both cases. So how many tokens are few is
an input, ``rows_up_to``, with a value of its own as ``logits_from`` has; a session with so many
threads gives 0. In such graphs q, k and v are split into heads at once.

What is computed is the same, bit by bit the published graph's; but for the attention of a single
token whose heads share keys, which is added up in another order, as that of several tokens is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import onnx_ir as ir
from onnx_ir.passes import common as passes

from internvl_edge.export.graph.providers.pattern import shape_of
from internvl_edge.export.graph.providers.tower import constant, is_stored, replace
from internvl_edge.runtime.feeds import POSITIONS, ROWS_UP_TO

__all__ = ["FEW", "take_cpu_form"]

QKV = 3  # products of one tensor that are joined
WEIGHT_TYPES = (ir.DataType.INT8, ir.DataType.INT4)
HEADS_FIRST = (0, 2, 1, 3)  # (B, T, heads, d) → (B, heads, T, d), and back
FEW = 16  # new tokens


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
    found = [one for one in map(_attention, graph) if one is not None]
    for attention in found:
        if attention.grows and not attention.is_grouped:
            _take_cache(graph, attention)
    grouped = [attention for attention in found if attention.is_grouped]
    if grouped:
        _share_keys(graph, grouped)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    """An attention to a cache, of which all that it reads and gives is as expected."""

    node: ir.Node
    # Reshapes to (B, T, heads, d) of the query, of new keys and of new values
    splits: tuple[ir.Node, ir.Node, ir.Node]
    caches: tuple[ir.Node, ir.Node]  # what appends keys and values: Concat, or TensorScatter
    merge: ir.Node  # Reshape to (B, T, heads·d)

    @property
    def heads(self) -> tuple[int, int]:
        """Of the query, and of keys and values."""
        query, key, _ = map(_sizes_of, self.splits)
        return query[2], key[2]

    @property
    def is_grouped(self) -> bool:
        heads, kv_heads = self.heads
        return heads != kv_heads

    @property
    def grows(self) -> bool:
        return self.caches[0].op_type == "Concat"


def _attention(node: ir.Node) -> _Attention | None:
    # query, key, value, mask
    if node.op_type != "Attention" or len(node.inputs) != 4 or len(node.outputs) != 1:
        return None
    query = _above(node.inputs[0], "Transpose", "Reshape")
    key, value = (
        _above(kept, "Concat", "Transpose", "Reshape")
        or _above(kept, "TensorScatter", "Transpose", "Reshape")
        for kept in node.inputs[1:3]
    )
    merged = _below(node.outputs[0], "Transpose", "Reshape")
    if not (query and key and value and merged):
        return None
    return _Attention(
        node=node,
        splits=(query[-1], key[-1], value[-1]),
        caches=(key[0], value[0]),
        merge=merged[-1],
    )


def _take_cache(graph: ir.Graph, found: _Attention) -> None:
    """Let an attention append to its cache."""
    node, (heads, kv_heads) = found.node, found.heads
    pasts = [appended.inputs[0] for appended in found.caches]
    made = ir.node(
        "Attention",
        [*(split.inputs[0] for split in found.splits), node.inputs[3], *pasts],
        {**node.attributes, "q_num_heads": heads, "kv_num_heads": kv_heads},
        num_outputs=3,
        name=node.name,
    )
    graph.insert_before(node, made)
    for old, new in zip((found.merge, *found.caches), made.outputs, strict=True):
        replace(old.outputs[0], new)


def _share_keys(graph: ir.Graph, attentions: Sequence[_Attention]) -> None:
    """Let heads of a query that share keys be rows of one head, where few tokens are new."""
    tape = ir.tape.Tape()
    (positions,) = (value for value in graph.inputs if value.name == POSITIONS)
    length = tape.op("Shape", [positions], {"start": 1, "end": 2})

    @cache
    def sizes(*values: int) -> ir.Value:
        return constant(graph, f"sizes/{'x'.join(map(str, values))}", values)

    few_tokens = constant(graph, ROWS_UP_TO, [FEW])
    graph.inputs.append(few_tokens)
    is_few = tape.op("LessOrEqual", [length, few_tokens])

    @cache
    def chosen(few: ir.Value, many: ir.Value) -> ir.Value:
        return tape.op("Where", [is_few, few, many])

    @cache
    def repeated(mask: ir.Value, times: int) -> ir.Value:
        return tape.op("Tile", [mask, chosen(sizes(1, 1, times, 1), sizes(1, 1, 1, 1))])

    for found in attentions:
        _split_heads(found, tape, sizes)
        node, (heads, kv_heads) = found.node, found.heads
        query, key, value, mask = node.inputs
        assert mask is not None
        as_heads = sizes(0, heads, -1, _sizes_of(found.splits[0])[3])
        as_rows = sizes(0, kv_heads, -1, _sizes_of(found.splits[0])[3])
        query = tape.op("Reshape", [query, chosen(as_rows, as_heads)])
        inputs = [query, key, value, repeated(mask, heads // kv_heads)]
        if found.grows:
            pasts, news = zip(*(appended.inputs for appended in found.caches), strict=True)
            inputs = [query, *news, inputs[-1], *pasts]
        outputs = tape.op_multi_out(
            "Attention",
            inputs,
            dict(node.attributes),
            num_outputs=3 if found.grows else 1,
            name=node.name,
        )
        replace(node.outputs[0], tape.op("Reshape", [outputs[0], as_heads]))
        for appended, grown in zip(found.caches, outputs[1:], strict=False):
            replace(appended.outputs[0], grown)
    graph.insert_before(attentions[0].node, tape.nodes)


def _split_heads(found: _Attention, tape: ir.tape.Tape, sizes: Callable[..., ir.Value]) -> None:
    """Split the heads of query, keys and values at once, where they come of one product."""
    xs = [split.inputs[0] for split in found.splits]
    rotations = [x.producer() if x is not None else None for x in xs[:2]]
    query, key = (
        node if node is not None and node.op_type == "RotaryEmbedding" else None
        for node in rotations
    )
    if query is None or key is None:
        return
    parts = [query.inputs[0], key.inputs[0], xs[2]]
    joined = parts[0].producer() if parts[0] is not None else None
    if joined is None or joined.op_type != "Split" or [*joined.outputs] != parts:
        return
    heads, kv_heads = found.heads
    shape = sizes(0, 0, heads + 2 * kv_heads, _sizes_of(found.splits[0])[3])
    split = tape.op("Reshape", [joined.inputs[0], shape])
    split = tape.op("Transpose", [split], {"perm": HEADS_FIRST})
    counts = sizes(heads, kv_heads, kv_heads)
    q, k, v = tape.op_multi_out("Split", [split, counts], {"axis": 1}, num_outputs=QKV)
    q, k = (
        tape.op(
            "RotaryEmbedding",
            [x, *node.inputs[1:]],
            {name: kept for name, kept in node.attributes.items() if name != "num_heads"},
        )
        for x, node in ((q, query), (k, key))
    )
    news = [appended.inputs[1] for appended in found.caches]
    for old, new in zip((found.node.inputs[0], *news), (q, k, v), strict=True):
        assert old is not None
        replace(old, new)


def _above(value: ir.Value | None, *op_types: str) -> list[ir.Node]:
    """Go back from a value: nodes of just these operators, or none."""
    found = list[ir.Node]()
    for op_type in op_types:
        node = None if value is None else value.producer()
        if node is None or node.op_type != op_type or not _is_expected(node):
            return []
        found.append(node)
        value = node.inputs[op_type in ("Concat", "TensorScatter")]
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
    if node.op_type == "Concat":
        return node.attributes.get_int("axis", 0) == 2 == len(node.inputs)
    return True


def _sizes_of(split: ir.Node) -> list[int]:
    """Read the shape that a Reshape makes: (B, T, heads, d)."""
    shape = split.inputs[1]
    assert shape is not None and shape.const_value is not None
    return [int(size) for size in shape.const_value.numpy()]
