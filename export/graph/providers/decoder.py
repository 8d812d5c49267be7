"""A decoder's graph for ONNX Runtime's CUDA provider: few launches a token, on the same weights.

A token of one row is over in microseconds, so that each kernel's start counts. The published graph
is of standard operators, 26 to 32 launches a layer. This one computes the same with 12, one of
them a memset:

    published                                                   here
    products of q, k and v                                      one product, of their columns
    their biases                                                one Add
    norms of q and k, rotary positions, writing, attention      GroupQueryAttention
    Add, RMSNormalization                                       SkipSimplifiedLayerNormalization
    gate · Sigmoid(gate) · up                                   GatedRMSNorm
    MatMul with Transpose(weight)                               FusedMatMul, which reads it as it is

(Gate and up are two products: of a joint one each half would have to be copied.)

**A norm that divides by a constant.** GatedRMSNorm computes x · s / √(mean(x²) + ε) · silu(gate),
in float32 and in one kernel. With ε = (s · divisor)², far above any mean(x²), that is
x · silu(gate) / divisor. The largest power of two in float16, s = 2¹⁵, makes ε 2³⁸: a mean(x²) of a
million takes two millionths off, a hundredth of what rounding to float16 does.

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

A graph is taken apart first (``pattern``). Where that is not possible there is no such graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from internvl_edge.export.graph.providers.pattern import (
    BLOCKS,
    Decoder,
    Layer,
    Linear,
    Norm,
    read_decoder,
    shape_of,
)

__all__ = ["DIVISOR", "GAINS", "cuda_decoder"]

CONTRIB = "com.microsoft"
DIVISOR = 16.0  # of the residual stream in float16
LEAST_SCALE = 2.0**-16  # that float16, without all of its digits, rounds no more than bfloat16
NORM_SCALES = {ir.DataType.FLOAT16: 2.0**15}  # of gated norms, whose ε is far above mean squares
WIDE_NORM_SCALE = 2.0**50  # of types with the exponents of float32
MAX_GROUP = 256  # values that a gated norm takes the mean of; one block of threads each
GAINS = 14  # where GroupQueryAttention's inputs have those of the norms of q and k


def cuda_decoder(
    model: ir.Model, dtype: ir.DataType, divisor: float | None = None
) -> ir.Model | None:
    """Write a decoder with its cache in place for ONNX Runtime's CUDA provider.

    Args:
        model: the published graph, bound to its weights, of any precision.
        dtype: float16 or bfloat16; float32 to compare it on a CPU.
        divisor: of the residual stream, a power of two; None: what ``dtype`` needs.

    Returns:
        The graph, or None where ``model`` is not exactly what is known, or
        its scales would round away.
    """
    if divisor is None:
        divisor = DIVISOR if dtype == ir.DataType.FLOAT16 else 1.0
    decoder = read_decoder(model.graph)
    if decoder is None or not _keeps_scales(decoder, dtype, divisor):
        return None
    return _Writer(model, dtype, divisor).write(decoder)


def _keeps_scales(decoder: Decoder, dtype: ir.DataType, divisor: float) -> bool:
    """Tell whether the scales of what is added to the residual stream can be divided as it is."""
    if dtype != ir.DataType.FLOAT16:
        return True
    added = (layer.o.scale for layer in decoder.layers)  # down reads what is divided already
    return all(_smallest(scale) >= divisor * LEAST_SCALE for scale in added if scale is not None)


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

    def write(self, decoder: Decoder) -> ir.Model:
        positions, outputs = self._inputs["position_ids"], list[ir.Value]()
        first, last = (
            self._add("Gather", (positions, self._integer(f"at_{at}", at)), f"at_{at}", axis=1)
            for at in (0, -1)
        )
        more = self._add("Sub", (last, first), "more")
        ends = self._add("Add", (self._inputs["write_indices"], more), "ends")
        self._ends = self._add("Cast", (ends,), "seqlens_k", to=int(ir.DataType.INT32))
        past = self._inputs[f"past_key_values.{decoder.layers[0].index}.key"].shape
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
        for layer, norm in zip(decoder.layers, after, strict=True):
            name = f"layers.{layer.index}"
            x, presents = self._attention(layer, x)
            outputs += presents
            x = self._product(x, (layer.o,), f"{name}.o", is_added=True)
            x, stream = self._skip(stream, x, layer.norms[1], f"{name}.middle")
            gate = self._product(x, (layer.gate,), f"{name}.gate")
            up = self._product(x, (layer.up,), f"{name}.up")
            x = self._gated(gate, up, layer.gate.width, name)
            x = self._product(x, (layer.down,), f"{name}.down")
            x, stream = self._skip(stream, x, norm, f"{name}.end")
        if decoder.taken:
            x = self._add("Slice", (x, *(self._kept(value) for value in decoder.taken)), "taken")
        logits = self._product(x, (decoder.head,), "head")
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

    def _attention(self, layer: Layer, x: ir.Value) -> tuple[ir.Value, tuple[ir.Value, ...]]:
        index = layer.index
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
        self, x: ir.Value, linears: Sequence[Linear], name: str, *, is_added: bool = False
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

    def _dequantized(self, linears: Sequence[Linear], name: str, is_added: bool) -> ir.Value:
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
        if is_added:  # in float32: products of float16 are not computed at opening
            if scale.dtype != ir.DataType.FLOAT:
                scale = self._add("Cast", (scale,), f"{name}.float", to=int(ir.DataType.FLOAT))
            scale = self._divided(scale, f"{name}.scale")
        if scale.dtype != self._dtype:
            scale = self._add("Cast", (scale,), f"{name}.narrow", to=int(self._dtype))
        if not block:
            rows = shape_of(linears[0].weight)[0]
            block = next(size for size in BLOCKS if rows % size == 0)
            columns = sum(shape_of(one.weight)[1] for one in linears)
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

    def _gated(self, gate: ir.Value, up: ir.Value, width: int, name: str) -> ir.Value:
        """Compute gate · sigmoid(gate) · up / divisor, as a norm of which nothing else is left."""
        size = math.gcd(width, MAX_GROUP)
        scale = NORM_SCALES.get(self._dtype, WIDE_NORM_SCALE)
        scales = self._constant(f"{name}.one", np.full(size, scale, self._dtype.numpy()))
        return self._add(
            *("GatedRMSNorm", (up, scales, gate), f"{name}.mlp"),
            domain=CONTRIB,
            epsilon=(scale * self._divisor) ** 2,
        )

    def _epsilon(self, norm: Norm) -> float:
        return norm.epsilon / self._divisor**2

    def _skip(
        self, stream: ir.Value, branch: ir.Value, norm: Norm, name: str
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
