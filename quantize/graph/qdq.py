"""Explicit Q/DQ: the nodes that tell a builder which matrix products run in few bits.

A quantized linear layer y = x Wᵀ + b becomes

    x → QuantizeLinear(s_x) → DequantizeLinear(s_x) ─┐
                                                     MatMul → Add(b)
    W₈ (K, N) → DequantizeLinear(s_w, axis=1) ───────┘

with one activation scale per tensor and one weight scale per output channel, zero points 0.
TensorRT fuses the pattern into one 8-bit GEMM; ONNX Runtime's CPU provider does the same where
the weight is stored (K, N) and its DequantizeLinear feeds MatMul directly, which is why W₈ is
stored transposed and the exporter's Transpose is removed.

With weight-only quantization x has no pair, and x W is computed in floats. W₄ (K, N) has a scale
for each block of inputs:

    W₄ (K, N) → DequantizeLinear(s_w (K / block, N), axis=0, block_size) → MatMul

ONNX Runtime fuses both weight-only forms into MatMulNBits, at its extended optimisation level and
above, on the CPU and on GPUs; at its basic level every run dequantizes W again. The scales are
stored in float32 and cast to the type that the graph computes in: with weight-only quantization,
where ``output_dtype`` differs from the scale's type, TensorRT-RTX refuses INT4 and ONNX Runtime's
fusion breaks INT8.

Placement follows the vendor's rules:
- both inputs of each GEMM carry a pair, outputs never do (the residual stream stays 16/32-bit);
- readers of one tensor, such as q, k and v after a norm, share one pair, so that the
  quantization can fuse into the norm's epilogue; but in INT8 graphs of float32, which ONNX Runtime
  runs: its kernels take unsigned activations, and it turns a pair unsigned that has one reader;
- scales are symmetric, and numbers that bfloat16 holds (``numerics.formats``);
- GEMMs with K or N below 16, patch embedding and pools stay as they are, and so do heads unless
  the recipe has ``head``.

Where the graph computes in 16 bits, the product is one in bfloat16:

    x (16 bit) → QuantizeLinear(s_x) → DequantizeLinear(s_x, bfloat16) ─┐
                                                                       MatMul → Cast(16 bit) → …
                           W₈ → DequantizeLinear(s_w, bfloat16) ────────┘

TensorRT-RTX multiplies in 8 bits and writes the sums in the type of the scales of its
DequantizeLinears, to be multiplied by s_w in the next kernel. In float32 each value is four bytes
written and read again; float16 overflows, since what is written lacks s_w; and with scales of
another type than the product's it gives up the 8-bit product. The QuantizeLinear's scale stays
float32, so that the quotient is not rounded to 16 bits before it is rounded to 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.errors import InternVLError
from internvl_edge.quantize.calibration.attention import SOFTMAX_SCALE, AttentionScales

SCALE_SUFFIX = "_scale"  # of the names of float32 weight scales, after the weight's name
STORAGE = {
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int4": ir.DataType.INT4,
}
NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLinear:
    """The scales and format of one quantized linear layer, as the graph needs them."""

    weight: str  # the parameter's name; its initializer becomes (K, N) in 8 or 4 bits
    activation_scale: float | None  # None: the activation has no pair (weight-only)
    format: str  # "int8", "fp8" or "int4"
    block: int | None = None  # for int4: the number of inputs that share a scale


def insert_qdq(model: ir.Model, linears: Mapping[str, QuantizedLinear]) -> int:
    """Rewrite the MatMul of every listed weight that the graph has, in place.

    Args:
        model: a graph without pairs, in which a linear layer is Transpose(weight) → MatMul.
        linears: by weight name; weights the graph does not have are ignored.

    Returns:
        The number of MatMuls that were rewritten.

    Raises:
        InternVLError: a listed weight is used in another way than by one linear layer's MatMul.
    """
    shared: dict[tuple[str, float, str, str], ir.Value] = {}
    count = 0
    for name, linear in linears.items():
        weight = model.graph.initializers.get(name)
        if weight is not None:
            _rewrite(model.graph, weight, linear, shared)
            count += 1
    return count


def insert_attention_qdq(model: ir.Model, attentions: Mapping[str, AttentionScales]) -> int:
    """Decompose the listed Attention nodes in place, with a pair on each operand of a product.

    Args:
        model: a graph without pairs; an attention is the node ``<module>/Attention``, without a
            mask, its inputs (B, T, heads·d).
        attentions: by module name; those the graph does not have are ignored.

    Returns:
        The number of nodes that were rewritten.
    """
    names = {f"{name}/Attention": name for name in attentions}
    nodes = [node for node in model.graph if node.name in names]
    for node in nodes:
        _decompose(model.graph, node, attentions[names[str(node.name)]])
    return len(nodes)


def _decompose(graph: ir.Graph, node: ir.Node, scales: AttentionScales) -> None:
    """Write softmax((q / √d) kᵀ) v with four pairs, as drawn in ``calibration.attention``.

    Scales are float32: one kernel has both products, and writes no sums in between.
    """
    heads = node.attributes.get_int("q_num_heads", 0)
    if node.attributes.get_int("kv_num_heads", 0) != heads or any(node.inputs[3:]):
        raise InternVLError(f"{node.name}: expected as many heads of keys as of queries, no mask")
    query, key, value = node.inputs[:3]
    assert query is not None and key is not None and value is not None
    assert query.shape is not None and query.dtype is not None
    compute, (batch, length, width) = query.dtype, query.shape
    assert isinstance(width, int)
    head_dim, stem = width // heads, str(node.name).removesuffix("/Attention")

    def add(op: str, inputs: list[ir.Value], shape: list[Any], name: str, **more: Any) -> ir.Value:
        made = ir.node(op, inputs, more, name=f"{stem}.{name}/{op}")
        result = made.outputs[0]
        result.name, result.type = f"{stem}.{name}/{op}", ir.TensorType(compute)
        result.shape = ir.Shape(shape)
        graph.insert_before(node, made)
        return result

    def operand(x: ir.Value, name: str, scale: float, *order: int) -> ir.Value:
        """Split an operand's heads, (B, heads, T, d) or in another order, and add its pair."""
        apart = [batch, length, heads, head_dim]
        x = add("Reshape", [x, split], apart, name)
        x = add("Transpose", [x], [apart[i] for i in order], name, perm=list(order))
        return _activation_pair(graph, node, x, "fp8", scale, ir.DataType.FLOAT, compute)

    split = _shared(graph, "attention.heads", np.array([0, 0, heads, head_dim], np.int64))
    joined = _shared(graph, "attention.width", np.array([0, 0, width], np.int64))
    factor = _shared(graph, "attention.factor", compute.numpy().type(head_dim**-0.5))
    scaled = add("Mul", [query, factor], [batch, length, width], "query")
    q = operand(scaled, "query", scales.query, 0, 2, 1, 3)
    k = operand(key, "key", scales.key, 0, 2, 3, 1)
    v = operand(value, "value", scales.value, 0, 2, 1, 3)
    scores = [batch, heads, length, length]
    p = add("Softmax", [add("MatMul", [q, k], scores, "scores")], scores, "softmax", axis=-1)
    p = _activation_pair(graph, node, p, "fp8", SOFTMAX_SCALE, ir.DataType.FLOAT, compute)
    x = add("MatMul", [p, v], [batch, heads, length, head_dim], "mixed")
    x = add("Transpose", [x], [batch, length, heads, head_dim], "mixed", perm=[0, 2, 1, 3])
    x = add("Reshape", [x, joined], [batch, length, width], "mixed")
    out = node.outputs[0]
    out.replace_all_uses_with(x)
    graph.remove(node, safe=True)


def bypass_activations(model: ir.Model) -> int:
    """Let every reader of a quantized activation read the unquantized one, in place.

    Weights stay rounded, so that the remaining error is theirs. They are dequantized by a Cast and
    a Mul: if only a weight has a DequantizeLinear, ONNX Runtime rounds the activation by itself.

    Returns:
        The number of pairs that nothing reads any more.
    """
    graph = model.graph
    pairs = [node for node in graph if node.op_type == "QuantizeLinear"]
    for quantize in pairs:
        activation = quantize.inputs[0]
        assert activation is not None
        for use in list(quantize.outputs[0].uses()):
            read = use.node.outputs[0]
            if read.dtype not in (None, activation.dtype):
                cast = ir.node("Cast", [activation], {"to": int(read.dtype)})
                graph.insert_before(use.node, cast)
                activation = cast.outputs[0]
            read.replace_all_uses_with(activation)
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if weight is not None and weight.is_initializer():
            compute = node.outputs[0].dtype or ir.DataType.FLOAT
            wide, scale = (
                ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
                for value in (weight, node.inputs[1])
            )
            scaled = ir.node("Mul", [wide.outputs[0], scale.outputs[0]])
            result = ir.node("Cast", [scaled.outputs[0]], {"to": int(compute)})
            graph.insert_before(node, [wide, scale, scaled, result])
            node.outputs[0].replace_all_uses_with(result.outputs[0])
    return len(pairs)


def _rewrite(
    graph: ir.Graph,
    weight: ir.Value,
    linear: QuantizedLinear,
    shared: dict[tuple[str, float, str, str], ir.Value],
) -> None:
    transpose, matmul = _linear_nodes(weight)
    activation = matmul.inputs[0]
    assert activation is not None
    compute = activation.dtype or weight.dtype
    assert compute is not None and weight.shape is not None

    if linear.activation_scale is not None:
        product = _product_type(compute)
        is_alone = linear.format == "int8" and compute == ir.DataType.FLOAT
        reader = str(weight.name) if is_alone else ""
        key = (str(activation.name), linear.activation_scale, linear.format, reader)
        if key not in shared:
            shared[key] = _activation_pair(
                graph,
                matmul,
                activation,
                linear.format,
                linear.activation_scale,
                product,
                product,
                reader,
            )
        matmul.replace_input_with(0, shared[key])
        _multiply_in(graph, matmul, product, compute)
    dequantize = _weight_node(graph, weight, linear, compute)
    graph.insert_before(matmul, dequantize)
    matmul.replace_input_with(1, dequantize.outputs[0])
    graph.remove(transpose, safe=True)


def _weight_node(
    graph: ir.Graph, weight: ir.Value, linear: QuantizedLinear, compute: ir.DataType
) -> ir.Node:
    """Turn a weight (N, K) into (K, N) of its format; return the node that dequantizes it."""
    assert weight.shape is not None
    features_out, features_in = (int(n) for n in weight.shape.numpy())
    weight.type = ir.TensorType(STORAGE[linear.format])
    weight.shape = ir.Shape((features_in, features_out))  # (K, N)
    name = f"{weight.name}{SCALE_SUFFIX}"
    attributes: dict[str, Any]
    if linear.block is not None:
        shape = features_in // linear.block, features_out
        scale = _initializer(graph, name, shape, compute)
        attributes = {"axis": 0, "block_size": linear.block}
    elif linear.activation_scale is None:
        scale = _initializer(graph, name, (features_out,), compute)
        attributes = {"axis": 1}
    else:
        compute = _product_type(compute)
        scale = _initializer(graph, name, (features_out,), compute)
        attributes = {"axis": 1}
    node = ir.node(
        "DequantizeLinear", [weight, scale], attributes, name=f"{weight.name}/DequantizeLinear"
    )
    node.outputs[0].name = f"{weight.name}.dequantized"
    node.outputs[0].type = ir.TensorType(compute)
    node.outputs[0].shape = weight.shape
    return node


def _product_type(compute: ir.DataType) -> ir.DataType:
    """Choose the type of an 8-bit product in a graph that computes in another."""
    return ir.DataType.BFLOAT16 if compute in NARROW else compute


def _multiply_in(
    graph: ir.Graph, matmul: ir.Node, product: ir.DataType, compute: ir.DataType
) -> None:
    """Let a product give its own type, and its readers read the one that the graph computes in."""
    output = matmul.outputs[0]
    output.type = ir.TensorType(product)
    if product == compute:
        return
    cast = ir.node("Cast", [output], {"to": int(compute)}, name=f"{matmul.name}/Cast")
    result = cast.outputs[0]
    result.name, result.type = f"{output.name}.as_{compute.name.lower()}", ir.TensorType(compute)
    result.shape = output.shape
    for use in list(output.uses()):
        if use.node is not cast:
            use.node.replace_input_with(use.idx, result)
    graph.insert_after(matmul, cast)


def _linear_nodes(weight: ir.Value) -> tuple[ir.Node, ir.Node]:
    """Return the Transpose of a weight and the MatMul that reads it."""
    uses = list(weight.uses())
    transpose = uses[0].node if len(uses) == 1 else None
    if transpose is not None and transpose.op_type == "Transpose":
        readers = list(transpose.outputs[0].uses())
        if len(readers) == 1 and readers[0].node.op_type == "MatMul" and readers[0].idx == 1:
            return transpose, readers[0].node
    kinds = ", ".join(use.node.op_type for use in uses) or "nothing"
    raise InternVLError(f"{weight.name}: expected one Transpose → MatMul to read it, found {kinds}")


def _activation_pair(
    graph: ir.Graph,
    before: ir.Node,
    activation: ir.Value,
    fmt: str,
    activation_scale: float,
    scale_type: ir.DataType,
    result_type: ir.DataType,
    reader: str = "",
) -> ir.Value:
    """Quantize and dequantize an activation; return the value that its readers share.

    Args:
        graph: gets the nodes.
        before: the node that they are placed before.
        activation: what is quantized.
        fmt: the format.
        activation_scale: of the tensor; a number that ``scale_type`` holds.
        scale_type: of the DequantizeLinear's scale; the QuantizeLinear's is float32.
        result_type: of the value that is returned.
        reader: the weight of its only reader; empty: all readers share it.
    """
    stem = str(activation.name) if not reader else f"{reader.removesuffix('.weight')}.input"
    scale = narrow = _constant(graph, f"{stem}.scale", np.float32(activation_scale))
    if scale_type != ir.DataType.FLOAT:
        values = scale_type.numpy().type(activation_scale)
        narrow = _constant(graph, f"{stem}.scale.{scale_type.name.lower()}", values)
    zero = _constant(graph, f"{stem}.zero_point", STORAGE[fmt].numpy().type(0))
    quantize = ir.node("QuantizeLinear", [activation, scale, zero], name=f"{stem}/QuantizeLinear")
    quantize.outputs[0].name = f"{stem}.quantized"
    dequantize = ir.node(
        "DequantizeLinear",
        [quantize.outputs[0], narrow, zero],
        {} if result_type == scale_type else {"output_dtype": int(result_type)},
        name=f"{stem}/DequantizeLinear",
    )
    dequantize.outputs[0].name = f"{stem}.dequantized"
    for value, dtype in (
        (quantize.outputs[0], STORAGE[fmt]),
        (dequantize.outputs[0], result_type),
    ):
        value.type, value.shape = ir.TensorType(dtype), activation.shape
    graph.insert_before(before, [quantize, dequantize])
    return dequantize.outputs[0]


def _constant(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    constant = _initializer(graph, name, np.shape(value))
    constant.const_value = ir.tensor(np.asarray(value), name=name)
    constant.type = ir.TensorType(constant.const_value.dtype)
    return constant


def _shared(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    """Return the constant of this name, which all blocks read; add it if it is not there."""
    existing = graph.initializers.get(name)
    return _constant(graph, name, value) if existing is None else existing


def _initializer(
    graph: ir.Graph,
    name: str,
    shape: tuple[int, ...],
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    if name in graph.initializers:
        raise InternVLError(f"the graph already has an initializer {name!r}")
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.initializers[name] = value
    return value
