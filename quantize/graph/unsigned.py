"""INT8 products for CPUs that accumulate them in 16 bits: the same graph with unsigned weights.

x86 multiplies unsigned by signed bytes, and without VNNI it adds two neighbouring products in a
16-bit register that saturates (``vpmaddubsw``):

    255 · 127 + 255 · 127 = 64770 > 32767

ONNX Runtime makes a signed activation unsigned for this, x + 128, so that a pair of weights near
their maximum overflows. Products of two unsigned operands use 16-bit lanes instead, and are exact:

    W₈ → Cast(uint8) → BitwiseXor(128) → DequantizeLinear(s_w, zero point 128)

Flipping the highest bit of a signed byte gives W + 128 as an unsigned byte, and the zero point
subtracts 128 again, so the graph's results do not change. Both nodes read a constant, and ONNX
Runtime folds them when it opens the graph; the weights on disk stay those of the signed graph.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

MIDDLE = 128
NAME = "unsigned"


def take_unsigned_weights(model: ir.Model) -> int:
    """Let every INT8 product of float32 activations read its weight as unsigned, in place.

    Returns:
        The number of products; weight-only products and those in 16-bit graphs are unchanged.
    """
    graph = model.graph
    nodes = [node for node in graph if _is_weight_of_product(node)]
    for node in nodes:
        weight, scale = node.inputs[:2]
        assert weight is not None and scale is not None and scale.shape is not None
        cast = ir.node("Cast", [weight], {"to": int(ir.DataType.UINT8)})
        bit = _constant(graph, (), f"{NAME}.bit")
        flip = ir.node("BitwiseXor", [cast.outputs[0], bit])
        for made, name in ((cast, "cast"), (flip, "values")):
            made.name = made.outputs[0].name = f"{weight.name}.{NAME}.{name}"
            made.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
            made.outputs[0].shape = weight.shape
        shape = tuple(int(n) for n in scale.shape.numpy())
        zero = _constant(graph, shape, f"{NAME}.zero_point.{'x'.join(map(str, shape))}")
        graph.insert_before(node, [cast, flip])
        node.resize_inputs(3)
        node.replace_input_with(0, flip.outputs[0])
        node.replace_input_with(2, zero)
    return len(nodes)


def _is_weight_of_product(node: ir.Node) -> bool:
    """Tell whether a node dequantizes a weight whose product ONNX Runtime computes in INT8."""
    if node.op_type != "DequantizeLinear" or len(node.inputs) > 2:
        return False
    weight, output = node.inputs[0], node.outputs[0]
    is_stored = weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.INT8
    if not is_stored or output.dtype != ir.DataType.FLOAT:
        return False
    readers = [use.node.inputs[0] for use in output.uses() if use.node.op_type == "MatMul"]
    made = [None if x is None else x.producer() for x in readers]
    return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in made)


def _constant(graph: ir.Graph, shape: tuple[int, ...], name: str) -> ir.Value:
    """Return the constant 128 of a shape, shared by all its readers."""
    if name not in graph.initializers:
        values = ir.tensor(np.full(shape, MIDDLE, np.uint8), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(shape), type=ir.TensorType(values.dtype), const_value=values
        )
        graph.initializers[name] = value
    return graph.initializers[name]
