"""A decoder's graph for ONNX Runtime's CUDA provider: few launches a token, on the same weights.

A token of one row is over in microseconds, so that each kernel's start counts. The published graph
is of standard operators, 26 to 32 launches a layer. This one computes the same with 12:

    published                                                   here
    products of q, k and v                                      one product, of their columns
    their biases                                                one Add
    norms of q and k, rotary positions, writing, attention      GroupQueryAttention
    Add, RMSNormalization                                       SkipSimplifiedLayerNormalization
    gate · Sigmoid(gate) · up                                   QuickGelu, Mul
    MatMul with Transpose(weight)                               FusedMatMul, which reads it as it is

(Gate and up are two products: of a joint one each half would have to be copied.)

**The residual stream is in 16 bits** like everything else. float16 ends at 65,504, and the stream
of a large model may have channels beyond it. So there it is kept divided by 16: what is added to it
is, tokens and the results of o and down, and the norms that read it divide by its size anyway, with
ε / 16². A power of two changes no digit. bfloat16 reaches as far as float32.

The weights are the published graph's: what is joined here, or divided, is so by nodes on constants,
which ONNX Runtime computes once, at opening. It joins no INT4; they take the way over INT8. Weights
in INT8 have one scale a column, and it has products only of those with scales of blocks: the scale
is repeated for every block.

GroupQueryAttention knows how many positions each row has, and no mask. So **the graph is for rows
without padding**: it takes ``attention_mask`` to have the published inputs, and does not read it.

A graph is taken apart first (``_read``), node by node. One node that is not expected, or left over,
and there is no such graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from internvl_edge.runtime.feeds import LOGITS_FROM

__all__ = ["cuda_decoder", "take_norms_apart"]

CONTRIB = "com.microsoft"
HEAD_MULTIPLE = 16  # of GroupQueryAttention's heads, with rotary positions
BLOCKS = (128, 64, 32, 16)  # of rows with one scale, as ONNX Runtime has products of
FLOATS = (int(ir.DataType.FLOAT), int(ir.DataType.FLOAT16), int(ir.DataType.BFLOAT16))
DIVISOR = 16.0  # of the residual stream in float16
LEAST_SCALE = 2.0**-16  # that float16, without all of its digits, rounds no more than bfloat16
GAINS = 14  # where GroupQueryAttention's inputs have those of the norms of q and k
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


def _smallest(value: ir.Value) -> float:
    """Return the smallest of stored numbers, read here: onnx-ir refuses a file of two names."""
    tensor = value.const_value
    if tensor is None:
        return math.inf
    if not isinstance(tensor, ir.ExternalTensor):
        return float(tensor.numpy().min())
    dtype, offset = tensor.dtype.numpy(), tensor.offset or 0
    count = math.prod(tensor.shape.numpy())
    return float(np.fromfile(tensor.path, dtype, count, offset=offset).min())


class _Unknown(Exception):
    """The graph is not what is expected."""


def _require(condition: bool) -> None:
    if not condition:
        raise _Unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class _Norm:
    gain: ir.Value
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    weight: ir.Value  # (N, K) as the checkpoint has it; quantized (K, N)
    scale: ir.Value | None = None  # (N,), or of blocks (K / block, N)
    block: int = 0  # 0: one scale a column
    bias: ir.Value | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    norms: tuple[_Norm, _Norm]  # before attention, before gate and up
    qkv: tuple[_Linear, _Linear, _Linear]
    head_norms: tuple[_Norm, _Norm] | None  # of q and k
    heads: tuple[int, int]  # of queries, of keys and values
    o: _Linear
    gate: _Linear
    up: _Linear
    down: _Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoder:
    table: ir.Value | None  # of token embeddings; None: they are the input
    layers: tuple[_Layer, ...]
    norm: _Norm
    head: ir.Value  # (V, D)
    taken: tuple[ir.Value, ...]  # of the positions that have logits: first, end and axis, if any
    rope: tuple[ir.Value, ir.Value]  # tables of cos and sin


def cuda_decoder(
    model: ir.Model, dtype: ir.DataType, divisor: float | None = None
) -> ir.Model | None:
    """Write a decoder with its cache in place for ONNX Runtime's CUDA provider.

    Args:
        model: the published graph, bound to its weights, of any precision.
        dtype: float16 or bfloat16; float32 to compare it on a CPU.
        divisor: of the residual stream, a power of two; None: what ``dtype`` needs.

    Returns:
        The graph, or None where ``model`` is not exactly what is known.
    """
    if divisor is None:
        divisor = DIVISOR if dtype == ir.DataType.FLOAT16 else 1.0
    try:
        return _Writer(model, dtype, divisor).write(_Reader(model.graph).read())
    except _Unknown:
        return None


def take_norms_apart(model: ir.Model) -> None:
    """Compute norms of heads by nodes of their own, in place: on a CPU attention has none."""
    graph = model.graph
    for node in [node for node in graph if node.op_type == "GroupQueryAttention"]:
        if len(node.inputs) <= GAINS:
            continue
        qkv, gains = node.inputs[0], node.inputs[GAINS:]
        heads, kv_heads = (node.attributes[n].as_int() for n in ("num_heads", "kv_num_heads"))
        past = node.inputs[3]
        assert past is not None and past.shape is not None
        size = int(past.shape[3])  # type: ignore[arg-type]

        def integers(*numbers: int) -> ir.Value:
            name = f"{node.name}.integers.{'_'.join(map(str, numbers))}"  # noqa: B023
            value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers), name=name))
            graph.initializers[name] = value
            return value

        made = [
            ir.node(
                "Split",
                [qkv, integers(*(n * size for n in (heads, kv_heads, kv_heads)))],
                {"axis": -1},
                num_outputs=3,
            )
        ]
        parts = list(made[0].outputs)
        epsilon = node.attributes.pop("qk_norm_epsilon").as_float()
        for at, (gain, count) in enumerate(zip(gains, (heads, kv_heads), strict=True)):
            made.append(ir.node("Reshape", [parts[at], integers(0, 0, count, size)]))
            made.append(
                ir.node("RMSNormalization", [made[-1].outputs[0], gain], {"epsilon": epsilon})
            )
            made.append(ir.node("Reshape", [made[-1].outputs[0], integers(0, 0, count * size)]))
            parts[at] = made[-1].outputs[0]
        made.append(ir.node("Concat", parts, {"axis": -1}))
        for number, one in enumerate(made):
            one.name = f"{node.name}.apart.{number}"
            for place, output in enumerate(one.outputs):
                output.name = f"{one.name}.{place}"
                output.type = qkv.type if qkv is not None else None
        graph.insert_before(node, made)
        node.replace_input_with(0, made[-1].outputs[0])
        node.resize_inputs(GAINS - 4)


# --- taking the published graph apart ------------------------------------------------------------


class _Reader:
    """Reads a graph from its logits back to its inputs; every node is seen or it is refused."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph, self._seen = graph, set[ir.Node]()
        self._inputs = {value.name: value for value in graph.inputs}
        self._outputs = {value.name: value for value in graph.outputs}
        self._masks, self._ropes = set[ir.Value](), set[tuple[ir.Value, ir.Value]]()

    def read(self) -> _Decoder:
        _require("write_indices" in self._inputs and "logits" in self._outputs)
        x, head = self._head(self._outputs["logits"])
        taken: tuple[ir.Value, ...] = ()
        if self._is(x, "Slice"):
            x, *bounds = _given(self._node(x, "Slice"), 4)
            taken = tuple(self._constant(value, rank=1) for value in bounds)
            _require(taken[0].name == LOGITS_FROM and self._integers(taken[2], 1) == [1])
        norm, x = self._norm(x)
        depth = sum(str(name).startswith("past_key_values.") for name in self._inputs) // 2
        layers = list[_Layer]()
        for index in reversed(range(depth)):
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
        return _Decoder(
            table=table,
            layers=tuple(layers),
            norm=norm,
            head=head,
            taken=taken,
            rope=self._ropes.pop(),
        )

    def _layer(self, x: ir.Value, index: int) -> tuple[_Layer, ir.Value]:
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
        _require(list(_shape(rope[0])) == list(_shape(rope[1])) and 2 * _shape(rope[0])[1] == size)
        capacity = self._inputs[f"past_key_values.{index}.key"].shape
        assert capacity is not None
        _require(isinstance(capacity[2], int) and capacity[2] <= _shape(rope[0])[0])
        (q, q_norm), (k, k_norm) = self._head_norm(q, size), self._head_norm(k, size)
        _require(getattr(q_norm, "epsilon", None) == getattr(k_norm, "epsilon", None))
        (h, q_linear), (h_k, k_linear) = self._biased(q), self._biased(k)
        h_v, v_linear = self._biased(sides[1][0])
        _require(self._source(h) is self._source(h_k) is self._source(h_v))
        first, entered = self._norm(h)
        _require(self._source(entered) is self._source(x))
        qkv = (q_linear, k_linear, v_linear)
        _require(len({(one.scale is None, one.bias is None, one.block) for one in qkv}) == 1)
        return _Layer(
            norms=(first, second),
            qkv=qkv,
            head_norms=None if q_norm is None or k_norm is None else (q_norm, k_norm),
            heads=(num_heads, num_kv_heads),
            o=o,
            gate=gate,
            up=up_linear,
            down=down,
        ), x

    def _gate(self, value: ir.Value) -> tuple[ir.Value, _Linear]:
        """Read g · sigmoid(g)."""
        g, sigmoid = self._pair(value, "Mul")
        if self._is(g, "Sigmoid"):
            g, sigmoid = sigmoid, g
        (inner,) = _given(self._node(sigmoid, "Sigmoid"), 1)
        _require(self._source(inner) is self._source(g))
        return self._linear(g)

    def _biased(self, value: ir.Value) -> tuple[ir.Value, _Linear]:
        if not self._is(value, "Add"):
            return self._linear(value)
        product, bias = self._pair(value, "Add")
        x, linear = self._linear(product)
        return x, _Linear(
            weight=linear.weight,
            scale=linear.scale,
            block=linear.block,
            bias=self._constant(bias, rank=1),
        )

    def _linear(self, value: ir.Value) -> tuple[ir.Value, _Linear]:
        """Read a product: its input and its weight."""
        x, factor = self._pair(value, "MatMul")
        if self._is(factor, "Transpose"):
            (stored,) = _given(self._node(factor, "Transpose", perm=[1, 0]), 1)
            return x, _Linear(weight=self._constant(stored, rank=2))
        node = self._node(factor, "DequantizeLinear")
        quantized, scales = _given(node, 2)
        weight, scale = self._constant(quantized, rank=2), self._constant(scales)
        block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
        if block:
            _require(_attribute(node, "axis") == 0 and block in BLOCKS)
            _require(weight.dtype in (ir.DataType.INT4, ir.DataType.INT8))
            _require(_shape(scale) == (-(-_shape(weight)[0] // block), _shape(weight)[1]))
        else:
            _require(_attribute(node, "axis") == 1 and weight.dtype == ir.DataType.INT8)
            _require(_shape(scale) == _shape(weight)[1:] and _shape(weight)[0] % BLOCKS[-1] == 0)
        return x, _Linear(weight=weight, scale=scale, block=block)

    def _head(self, logits: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Read the vocabulary's product, which is never quantized."""
        x, linear = self._linear(logits)
        _require(linear.scale is None)
        return x, linear.weight

    def _norm(self, value: ir.Value) -> tuple[_Norm, ir.Value]:
        node = self._node(value, "RMSNormalization", axis=-1, stash_type=1)
        x, gain = _given(node, 2)
        epsilon = node.attributes["epsilon"].as_float()
        return _Norm(gain=self._constant(gain, rank=1), epsilon=epsilon), x

    def _head_norm(self, value: ir.Value, size: int) -> tuple[ir.Value, _Norm | None]:
        """Read a norm of each head by itself, where there is one."""
        if not self._is(value, "Reshape"):
            return value, None
        split, shape = _given(self._node(value, "Reshape"), 2)
        _require(self._integers(shape, 3)[:2] == [0, 0])
        norm, split = self._norm(split)
        x, shape = _given(self._node(split, "Reshape"), 2)
        _require(self._integers(shape, 4)[-1] == size == _shape(norm.gain)[0])
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
        _require(value.const_value is not None and (rank is None or len(_shape(value)) == rank))
        return value

    def _integers(self, value: ir.Value, count: int) -> list[int]:
        constant = self._constant(value, rank=1).const_value
        assert constant is not None
        _require(_shape(value) == (count,))
        return [int(number) for number in constant.numpy()]


def _given(node: ir.Node, count: int) -> list[ir.Value]:
    """Return a node's inputs, as many as that and no fewer."""
    values = [value for value in node.inputs if value is not None]
    _require(len(values) == len(node.inputs) == count)
    return values


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(int(size) for size in value.const_value.shape)  # type: ignore[arg-type]


def _attribute(node: ir.Node, name: str) -> object:
    attribute = node.attributes.get(name)
    if attribute is None:
        return None
    value = attribute.value
    return list(value) if isinstance(value, list | tuple) else value


# --- writing the other one -----------------------------------------------------------------------


class _Writer:
    """Writes the graph of what was read."""

    def __init__(self, model: ir.Model, dtype: ir.DataType, divisor: float) -> None:
        self._model, self._dtype, self._divisor = model, dtype, divisor
        self._nodes, self._constants = list[ir.Node](), dict[str, ir.Value]()
        self._narrow = dict[ir.Value, ir.Value]()
        self._inputs = {
            str(value.name): _value(
                value, dtype if str(value.name).startswith("past_") else value.dtype
            )
            for value in model.graph.inputs
        }

    def write(self, decoder: _Decoder) -> ir.Model:
        positions, outputs = self._inputs["position_ids"], list[ir.Value]()
        first, last = (
            self._add("Gather", (positions, self._integer(f"at_{at}", at)), f"at_{at}", axis=1)
            for at in (0, -1)
        )
        more = self._add("Sub", (last, first), "more")
        ends = self._add("Add", (self._inputs["write_indices"], more), "ends")
        self._ends = self._add("Cast", (ends,), "seqlens_k", to=int(ir.DataType.INT32))
        past = self._inputs["past_key_values.0.key"].shape
        assert past is not None
        self._capacity = self._constant("capacity", np.array([past[2]], np.int32))
        self._rope = tuple(self._narrowed(table) for table in decoder.rope)
        if decoder.table is None:
            stream = self._inputs["inputs_embeds"]
            if stream.dtype != self._dtype:
                stream = self._add("Cast", (stream,), "inputs", to=int(self._dtype))
        else:
            ids = self._inputs["input_ids"]
            stream = self._add("Gather", (self._narrowed(decoder.table), ids), "tokens", axis=0)
        stream = self._divided(stream, "stream")
        norm = decoder.layers[0].norms[0]
        x = self._add(
            *("RMSNormalization", (stream, self._narrowed(norm.gain)), "entered"),
            epsilon=self._epsilon(norm),
            axis=-1,
        )
        after = [layer.norms[0] for layer in decoder.layers[1:]] + [decoder.norm]
        for index, (layer, norm) in enumerate(zip(decoder.layers, after, strict=True)):
            name = f"layers.{index}"
            x, presents = self._attention(layer, x, index)
            outputs += presents
            x = self._product(x, (layer.o,), f"{name}.o", is_added=True)
            x, stream = self._skip(stream, x, layer.norms[1], f"{name}.middle")
            gate = self._product(x, (layer.gate,), f"{name}.gate")
            up = self._product(x, (layer.up,), f"{name}.up")
            silu = self._add("QuickGelu", (gate,), f"{name}.silu", domain=CONTRIB, alpha=1.0)
            x = self._add("Mul", (silu, up), f"{name}.mlp")
            x = self._product(x, (layer.down,), f"{name}.down", is_added=True)
            x, stream = self._skip(stream, x, norm, f"{name}.end")
        if decoder.taken:
            x = self._add("Slice", (x, *(self._kept(value) for value in decoder.taken)), "taken")
        logits = self._product(x, (_Linear(weight=decoder.head),), "head")
        if logits.dtype != ir.DataType.FLOAT:
            logits = self._add("Cast", (logits,), "logits", to=int(ir.DataType.FLOAT))
        logits.name = "logits"
        return self._finished([logits, *outputs])

    def _finished(self, outputs: Sequence[ir.Value]) -> ir.Model:
        for old, new in zip(self._model.graph.outputs, outputs, strict=True):
            assert old.name == new.name
            new.shape = old.shape
            is_cache = str(new.name).startswith("present.")
            new.type = ir.TensorType(self._dtype if is_cache else ir.DataType.FLOAT)
        graph = ir.Graph(
            list(self._inputs.values()),
            list(outputs),
            nodes=self._nodes,
            initializers=list(self._constants.values()),
            opset_imports={**self._model.graph.opset_imports, CONTRIB: 1},
            name=self._model.graph.name,
        )
        return ir.Model(graph, ir_version=self._model.ir_version)

    def _attention(
        self, layer: _Layer, x: ir.Value, index: int
    ) -> tuple[ir.Value, tuple[ir.Value, ...]]:
        name = f"layers.{index}"
        past = (self._inputs[f"past_key_values.{index}.{kind}"] for kind in ("key", "value"))
        gains: tuple[ir.Value | None, ...] = ()
        more: dict[str, float] = {}
        if layer.head_norms is not None:
            gains = (
                *(None,) * (GAINS - 10),
                *(self._narrowed(norm.gain) for norm in layer.head_norms),
            )
            more = {"qk_norm_epsilon": layer.head_norms[0].epsilon}
        node = ir.node(
            "GroupQueryAttention",
            [
                *(self._product(x, layer.qkv, f"{name}.qkv"), None, None, *past),
                *(self._ends, self._capacity, *self._rope, self._inputs["position_ids"], *gains),
            ],
            {"num_heads": layer.heads[0], "kv_num_heads": layer.heads[1], "do_rotary": 1, **more},
            domain=CONTRIB,
            num_outputs=3,
            name=f"{name}.attention",
        )
        self._nodes.append(node)
        seen, key, value = node.outputs
        seen.name, key.name, value.name = (
            *(f"{name}.seen", f"present.{index}.key", f"present.{index}.value"),
        )
        return seen, (key, value)

    def _product(
        self, x: ir.Value, linears: Sequence[_Linear], name: str, *, is_added: bool = False
    ) -> ir.Value:
        """Multiply by one weight, or by those of several layers one after the other.

        What is added to the residual stream is divided as it is.
        """
        if linears[0].scale is None:
            weights = [self._narrowed(one.weight) for one in linears]
            whole = self._joined(weights, 0, f"{name}.weight")
            alpha = 1 / self._divisor if is_added else 1.0
            y = self._add(*("FusedMatMul", (x, whole), name), domain=CONTRIB, transB=1, alpha=alpha)
        else:
            y = self._add("MatMul", (x, self._dequantized(linears, name, is_added)), name)
        if linears[0].bias is None:
            return y
        biases = [self._narrowed(one.bias) for one in linears if one.bias is not None]
        return self._add("Add", (y, self._joined(biases, 0, f"{name}.bias")), f"{name}.biased")

    def _dequantized(self, linears: Sequence[_Linear], name: str, is_added: bool) -> ir.Value:
        """Join weights (K, N) in 8 or 4 bits, and their scales, for ONNX Runtime to take as one."""
        weights, kind = [self._kept(one.weight) for one in linears], linears[0].weight.dtype
        if len(weights) > 1 and kind == ir.DataType.INT4:
            wide = [
                self._add("Cast", (one,), f"{one.name}.wide", to=int(ir.DataType.INT8))
                for one in weights
            ]
            whole = self._joined(wide, 1, f"{name}.wide")
            whole = self._add("Cast", (whole,), f"{name}.weight", to=int(ir.DataType.INT4))
        else:
            whole = self._joined(weights, 1, f"{name}.weight")
        scales = [self._kept(one.scale) for one in linears if one.scale is not None]
        block, scale = linears[0].block, self._joined(scales, -1, f"{name}.scale")
        if is_added and self._dtype == ir.DataType.FLOAT16:
            _require(all(_smallest(one) >= self._divisor * LEAST_SCALE for one in scales))
        if is_added:  # in float32: products of float16 are not computed at opening
            if scale.dtype != ir.DataType.FLOAT:
                scale = self._add("Cast", (scale,), f"{name}.float", to=int(ir.DataType.FLOAT))
            scale = self._divided(scale, f"{name}.scale")
        if scale.dtype != self._dtype:
            scale = self._add("Cast", (scale,), f"{name}.narrow", to=int(self._dtype))
        if not block:
            rows = _shape(linears[0].weight)[0]
            block = next(size for size in BLOCKS if rows % size == 0)
            columns = sum(_shape(one.weight)[1] for one in linears)
            shape = np.array([rows // block, columns], np.int64)
            wanted = self._constant(f"{name}.blocks", shape)
            scale = self._add("Expand", (scale, wanted), f"{name}.repeated")
        return self._add(
            *("DequantizeLinear", (whole, scale), f"{name}.dequantized"), axis=0, block_size=block
        )

    def _divided(self, value: ir.Value, name: str) -> ir.Value:
        """Divide what is in the residual stream, or added to it."""
        if self._divisor == 1:
            return value
        dtype = self._dtype if value.dtype is None else value.dtype
        factor = self._constant(f"{name}.factor", np.array(1 / self._divisor, dtype.numpy()))
        return self._add("Mul", (value, factor), f"{name}.divided")

    def _epsilon(self, norm: _Norm) -> float:
        return norm.epsilon / self._divisor**2

    def _skip(
        self, stream: ir.Value, branch: ir.Value, norm: _Norm, name: str
    ) -> tuple[ir.Value, ir.Value]:
        """Add a branch to the residual stream: its norm, and the stream."""
        node = ir.node(
            "SkipSimplifiedLayerNormalization",
            [stream, branch, self._narrowed(norm.gain)],
            {"epsilon": self._epsilon(norm)},
            domain=CONTRIB,
            num_outputs=4,
            name=name,
        )
        self._nodes.append(node)
        normed, mean, deviation, total = node.outputs
        normed.name, mean.name, deviation.name, total.name = f"{name}.normed", "", "", name
        return normed, total

    def _joined(self, values: Sequence[ir.Value], axis: int, name: str) -> ir.Value:
        if len(values) == 1:
            return values[0]
        return self._add("Concat", values, name, axis=axis)

    def _narrowed(self, value: ir.Value) -> ir.Value:
        """Return a constant in the type that is computed in."""
        if value not in self._narrow:
            kept = self._kept(value)
            if kept.dtype != self._dtype:
                kept = self._add("Cast", (kept,), f"{value.name}.narrow", to=int(self._dtype))
            self._narrow[value] = kept
        return self._narrow[value]

    def _kept(self, value: ir.Value) -> ir.Value:
        name = str(value.name)
        if name not in self._constants:
            given = self._inputs.get(name)  # an input may have a value of its own
            self._constants[name] = _value(value, value.dtype) if given is None else given
            self._constants[name].const_value = value.const_value
        return self._constants[name]

    def _integer(self, name: str, number: int) -> ir.Value:
        return self._constant(f"{name}.index", np.array(number, np.int64))

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(array.shape),
            const_value=tensor,
        )
        self._constants[name] = value
        return value

    def _add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        *,
        domain: str = "",
        **attributes: float,
    ) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, domain=domain, name=name)
        self._nodes.append(node)
        (output,) = node.outputs
        output.name = f"{name}.value"
        if op_type == "Cast":
            output.type = ir.TensorType(ir.DataType(int(attributes["to"])))
        elif op_type in ("Concat", "Mul"):
            output.type = inputs[0].type
        return output


def _value(value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """Make a value of the same name and shape."""
    assert dtype is not None
    return ir.Value(name=value.name, type=ir.TensorType(dtype), shape=value.shape)
