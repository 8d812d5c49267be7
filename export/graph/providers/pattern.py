"""A published decoder's graph, taken apart node by node: exactly what is expected, or nothing.

The graph is read from its logits back to its inputs. A node that is not expected, or left over, and
it is not known: what is rewritten from ``Decoder`` computes what the graph did, or is not written.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from internvl_edge.runtime.feeds import LOGITS_FROM

__all__ = ["BLOCKS", "Decoder", "Layer", "Linear", "Norm", "read_decoder", "shape_of"]

HEAD_MULTIPLE = 16  # of GroupQueryAttention's heads, with rotary positions
BLOCKS = (128, 64, 32, 16)  # of rows with one scale, as ONNX Runtime has products of
FLOATS = (int(ir.DataType.FLOAT), int(ir.DataType.FLOAT16), int(ir.DataType.BFLOAT16))
# Attributes whose values are looked at where a node is read; others have to be those expected.
FREE = {
    "DequantizeLinear": ("axis", "block_size"),
    "RMSNormalization": ("epsilon",),
    "RotaryEmbedding": ("num_heads",),
}
# Operators of the mask, from the graph's inputs on: causal, in place, without padding (``qllama``).
MASK = (
    *("Shape", "Squeeze", "Unsqueeze", "Range", "Add", "Unsqueeze", "LessOrEqual", "Cast"),
    *("Unsqueeze", "And", "Cast", "ReduceSum", "Equal", "Equal", "And", "Or", "Unsqueeze"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A root mean square norm."""

    gain: ir.Value
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """The weight of a product, its scales and its bias."""

    weight: ir.Value  # (N, K) as the checkpoint has it; quantized (K, N)
    scale: ir.Value | None = None  # (N,), or of blocks (K / block, N)
    block: int = 0  # 0: one scale a column
    bias: ir.Value | None = None

    @property
    def width(self) -> int:
        """The number of outputs, N."""
        return shape_of(self.weight)[0 if self.scale is None else 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The weights of a decoder's layer."""

    index: int
    norms: tuple[Norm, Norm]  # before attention, before gate and up
    qkv: tuple[Linear, Linear, Linear]
    head_norms: tuple[Norm, Norm] | None  # of q and k
    heads: tuple[int, int]  # of queries, of keys and values
    o: Linear
    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The weights of a decoder, and what it is asked."""

    table: ir.Value | None  # of token embeddings; None: they are the input
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear  # (V, D), or quantized (D, V)
    taken: tuple[ir.Value, ...]  # of the positions that have logits: first, end and axis, if any
    rope: tuple[ir.Value, ir.Value]  # tables of cos and sin


def read_decoder(graph: ir.Graph) -> Decoder | None:
    """Take apart a decoder with its cache in place, bound to its weights, of any precision.

    Returns:
        Its values, those of ``graph`` itself; None where it is not exactly what is known.
    """
    try:
        return _Reader(graph).read()
    except _Unknown:
        return None


class _Unknown(Exception):
    """The graph is not what is expected."""


def _require(condition: bool) -> None:
    if not condition:
        raise _Unknown


class _Reader:
    """Reads a graph from its logits back to its inputs; every node is seen or it is refused."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._seen = graph, set[ir.Node]()
        self._inputs = {value.name: value for value in graph.inputs}
        self._outputs = {value.name: value for value in graph.outputs}
        self._masks, self._ropes = set[ir.Value](), set[tuple[ir.Value, ir.Value]]()

    def read(self) -> Decoder:
        _require("write_indices" in self._inputs and "logits" in self._outputs)
        x, head = self._linear(self._outputs["logits"])
        taken: tuple[ir.Value, ...] = ()
        if self._is(x, "Slice"):
            x, *bounds = _given(self._node(x, "Slice"), 4)
            taken = tuple(self._constant(value, rank=1) for value in bounds)
            _require(taken[0].name == LOGITS_FROM and self._integers(taken[2], 1) == [1])
        norm, x = self._norm(x)
        names = (str(name).split(".") for name in self._inputs)
        indices = {int(parts[1]) for parts in names if parts[0] == "past_key_values"}
        layers = list[Layer]()
        for index in sorted(indices, reverse=True):  # of a part of a decoder, not from 0 on
            layer, x = self._layer(x, index)
            layers.insert(0, layer)
        _require(len(self._masks) == len(self._ropes) == 1)
        table = None
        if "input_ids" in self._inputs:
            table = self._constant(self._looked_up(x, "input_ids"), rank=2)
        else:
            _require(self._source(x) is self._inputs.get("inputs_embeds"))
        self._check_mask(self._masks.pop())
        _require(all(node in self._seen for node in self._graph))
        return Decoder(
            table=table,
            layers=tuple(layers),
            norm=norm,
            head=head,
            taken=taken,
            rope=self._ropes.pop(),
        )

    def _layer(self, x: ir.Value, index: int) -> tuple[Layer, ir.Value]:
        """Read a layer from its output; the other value is its input."""
        middle, branch = self._pair(x, "Add")
        if self._source(middle).producer() is not None and self._is(middle, "MatMul"):
            middle, branch = branch, middle
        product, down = self._linear(branch)
        gated, up = self._pair(product, "Mul")
        if self._is(gated, "MatMul"):
            gated, up = up, gated
        seen, gate = self._gate(gated)
        again, up_linear = self._linear(up)
        _require(self._source(seen) is self._source(again))
        second, middle = self._norm(seen)
        x, branch = self._pair(middle, "Add")
        if self._is(x, "MatMul") and not self._is(branch, "MatMul"):
            x, branch = branch, x
        merged, o = self._linear(branch)
        attention = self._node(self._merged(merged), "Attention")
        query, key, value, mask = _given(attention, 4)
        self._masks.add(mask)
        heads = self._split(query)
        q, num_heads, rope = self._rotated(heads[0])
        sides = list[tuple[ir.Value, int, int]]()
        for tensor, name in ((key, "key"), (value, "value")):
            present = self._outputs.get(f"present.{index}.{name}")
            past, new, place = _given(self._node(tensor, "TensorScatter", axis=2), 3)
            _require(tensor is present and past is self._inputs[f"past_key_values.{index}.{name}"])
            _require(place is self._inputs["write_indices"])
            sides.append(self._split(new))
        k, num_kv_heads, rope_of_k = self._rotated(sides[0][0])
        size = heads[2]
        self._ropes |= {rope, rope_of_k}
        _require((heads[1], sides[0][1], sides[1][1]) == (num_heads, num_kv_heads, num_kv_heads))
        _require(sides[0][2] == sides[1][2] == size and size % HEAD_MULTIPLE == 0)
        (places, half), sines = (shape_of(table) for table in rope)
        _require(sines == (places, half) and 2 * half == size)
        capacity = self._inputs[f"past_key_values.{index}.key"].shape
        assert capacity is not None
        _require(isinstance(capacity[2], int) and capacity[2] <= places)
        (q, q_norm), (k, k_norm) = self._head_norm(q, size), self._head_norm(k, size)
        _require(getattr(q_norm, "epsilon", None) == getattr(k_norm, "epsilon", None))
        (h, q_linear), (h_k, k_linear) = self._biased(q), self._biased(k)
        h_v, v_linear = self._biased(sides[1][0])
        _require(self._source(h) is self._source(h_k) is self._source(h_v))
        first, entered = self._norm(h)
        _require(self._source(entered) is self._source(x))
        qkv = (q_linear, k_linear, v_linear)
        _require(len({(one.scale is None, one.bias is None, one.block) for one in qkv}) == 1)
        return Layer(
            index=index,
            norms=(first, second),
            qkv=qkv,
            head_norms=None if q_norm is None or k_norm is None else (q_norm, k_norm),
            heads=(num_heads, num_kv_heads),
            o=o,
            gate=gate,
            up=up_linear,
            down=down,
        ), x

    def _gate(self, value: ir.Value) -> tuple[ir.Value, Linear]:
        """Read g · sigmoid(g)."""
        g, sigmoid = self._pair(value, "Mul")
        if self._is(g, "Sigmoid"):
            g, sigmoid = sigmoid, g
        (inner,) = _given(self._node(sigmoid, "Sigmoid"), 1)
        _require(self._source(inner) is self._source(g))
        return self._linear(g)

    def _biased(self, value: ir.Value) -> tuple[ir.Value, Linear]:
        if not self._is(value, "Add"):
            return self._linear(value)
        product, bias = self._pair(value, "Add")
        x, linear = self._linear(product)
        return x, Linear(
            weight=linear.weight,
            scale=linear.scale,
            block=linear.block,
            bias=self._constant(bias, rank=1),
        )

    def _linear(self, value: ir.Value) -> tuple[ir.Value, Linear]:
        """Read a product: its input and its weight."""
        x, factor = self._pair(value, "MatMul")
        if self._is(factor, "Transpose"):
            (stored,) = _given(self._node(factor, "Transpose", perm=[1, 0]), 1)
            return x, Linear(weight=self._constant(stored, rank=2))
        node = self._node(factor, "DequantizeLinear")
        quantized, scales = _given(node, 2)
        weight, scale = self._constant(quantized, rank=2), self._constant(scales)
        block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
        rows, columns = shape_of(weight)
        if block:
            _require(_attribute(node, "axis") == 0 and block in BLOCKS)
            _require(weight.dtype in (ir.DataType.INT4, ir.DataType.INT8))
            _require(shape_of(scale) == (-(-rows // block), columns))
        else:
            _require(_attribute(node, "axis") == 1 and weight.dtype == ir.DataType.INT8)
            _require(shape_of(scale) == (columns,) and rows % BLOCKS[-1] == 0)
        return x, Linear(weight=weight, scale=scale, block=block)

    def _norm(self, value: ir.Value) -> tuple[Norm, ir.Value]:
        node = self._node(value, "RMSNormalization", axis=-1, stash_type=1)
        x, gain = _given(node, 2)
        epsilon = node.attributes["epsilon"].as_float()
        return Norm(gain=self._constant(gain, rank=1), epsilon=epsilon), x

    def _head_norm(self, value: ir.Value, size: int) -> tuple[ir.Value, Norm | None]:
        """Read a norm of each head by itself, where there is one."""
        if not self._is(value, "Reshape"):
            return value, None
        split, shape = _given(self._node(value, "Reshape"), 2)
        _require(self._integers(shape, 3)[:2] == [0, 0])
        norm, split = self._norm(split)
        x, shape = _given(self._node(split, "Reshape"), 2)
        _require(self._integers(shape, 4)[-1] == size == shape_of(norm.gain)[0])
        return x, norm

    def _split(self, value: ir.Value) -> tuple[ir.Value, int, int]:
        """Read (B, heads, T, d): the tensor (B, T, heads·d), heads and d."""
        (split,) = _given(self._node(value, "Transpose", perm=[0, 2, 1, 3]), 1)
        x, shape = _given(self._node(split, "Reshape"), 2)
        zero, zero_too, heads, size = self._integers(shape, 4)
        _require(zero == zero_too == 0)
        return x, heads, size

    def _merged(self, value: ir.Value) -> ir.Value:
        x, shape = _given(self._node(value, "Reshape"), 2)
        _require(self._integers(shape, 3)[:2] == [0, 0])
        return _given(self._node(x, "Transpose", perm=[0, 2, 1, 3]), 1)[0]

    def _rotated(self, value: ir.Value) -> tuple[ir.Value, int, tuple[ir.Value, ir.Value]]:
        node = self._node(value, "RotaryEmbedding")
        x, *looked_up = _given(node, 3)
        cos, sin = (
            self._constant(self._looked_up(value, "position_ids"), rank=2) for value in looked_up
        )
        return x, node.attributes["num_heads"].as_int(), (cos, sin)

    def _looked_up(self, value: ir.Value, ids: str) -> ir.Value:
        table, given = _given(self._node(value, "Gather", axis=0), 2)
        _require(given is self._inputs[ids])
        return table

    def _check_mask(self, mask: ir.Value) -> None:
        """Compare the operators that the mask comes from, in their order."""
        above, nodes = [mask.producer()], set[ir.Node]()
        while above:
            node = above.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                above += [value.producer() for value in node.inputs if value is not None]
        _require(tuple(n.op_type for n in self._graph if n in nodes) == MASK)
        self._seen |= nodes

    def _source(self, value: ir.Value) -> ir.Value:
        """Return the value that Casts bring to ``value``."""
        node = value.producer()
        while node is not None and node.op_type == "Cast" and _attribute(node, "to") in FLOATS:
            self._seen.add(node)
            (value,) = _given(node, 1)
            node = value.producer()
        return value

    def _is(self, value: ir.Value, op_type: str) -> bool:
        node = self._source(value).producer()
        return node is not None and node.op_type == op_type

    def _node(self, value: ir.Value, op_type: str, **attributes: object) -> ir.Node:
        node = self._source(value).producer()
        if node is None or node.op_type != op_type or node.domain:
            raise _Unknown
        _require(set(node.attributes) <= {*attributes, *FREE.get(op_type, ())})
        _require(all(_attribute(node, name) == wanted for name, wanted in attributes.items()))
        self._seen.add(node)
        return node

    def _pair(self, value: ir.Value, op_type: str) -> tuple[ir.Value, ir.Value]:
        first, second = _given(self._node(value, op_type), 2)
        return first, second

    def _constant(self, value: ir.Value, rank: int | None = None) -> ir.Value:
        value = self._source(value)
        _require(value.const_value is not None and (rank is None or len(shape_of(value)) == rank))
        return value

    def _integers(self, value: ir.Value, count: int) -> list[int]:
        constant = self._constant(value, rank=1).const_value
        assert constant is not None
        _require(shape_of(value) == (count,))
        return [int(number) for number in constant.numpy()]


def _given(node: ir.Node, count: int) -> list[ir.Value]:
    """Return a node's inputs, as many as that and no fewer."""
    values = [value for value in node.inputs if value is not None]
    _require(len(values) == len(node.inputs) == count)
    return values


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Return the shape of a stored tensor."""
    assert value.const_value is not None
    return tuple(int(size) for size in value.const_value.shape)  # type: ignore[arg-type]


def _attribute(node: ir.Node, name: str) -> object:
    attribute = node.attributes.get(name)
    if attribute is None:
        return None
    value = attribute.value
    return list(value) if isinstance(value, list | tuple) else value
