"""A float32 twin of a bfloat16 graph, to run it where bfloat16 kernels do not exist.

ONNX Runtime's CPU provider computes float32 and float16, not bfloat16. In the twin, every
operation with a bfloat16 result computes in float32, and two casts round its result to bfloat16
and back. That is the arithmetic of hardware whose bfloat16 products accumulate in float32, so the
twin has the rounding error of the real graph. It reads the same weights.

Where both factors of a product are dequantized, builders multiply the 8-bit values themselves: only
the sum is rounded, and so it is in the twin.
"""

from __future__ import annotations

import onnx_ir as ir

_BOOLEAN = frozenset(
    {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or"}
)
_INTEGER = frozenset({"ArgMax", "NonZero", "Shape", "Size"})
_TYPED_BY_SECOND_INPUT = frozenset({"Where", "CastLike"})


def infer_dtypes(graph: ir.Graph) -> None:
    """Infer the dtype of every value of a graph; knows only the operators that exports use."""
    for node in graph:
        dtype = _result_dtype(node)
        for output in node.outputs:
            if output.dtype is None and dtype is not None:
                output.type = ir.TensorType(dtype)


def _result_dtype(node: ir.Node) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in _BOOLEAN:
        return ir.DataType.BOOL
    if node.op_type in _INTEGER:
        return ir.DataType.INT64
    if node.op_type == "DequantizeLinear" and "output_dtype" in node.attributes:
        return ir.DataType(node.attributes["output_dtype"].as_int())
    index = 1 if node.op_type in (*_TYPED_BY_SECOND_INPUT, "DequantizeLinear") else 0
    source = node.inputs[2] if node.op_type == "QuantizeLinear" else node.inputs[index]
    return None if source is None else source.dtype


def widen(model: ir.Model) -> bool:
    """Turn a graph into its twin, in place; False if it has no bfloat16 to widen.

    The external data stays where it is; both graphs refer to it.
    """
    graph = model.graph
    infer_dtypes(graph)
    values = [output for node in graph for output in node.outputs if output.name]
    rounded = [value for value in values if value.dtype == ir.DataType.BFLOAT16]
    if not rounded:
        return False
    exact = _factors_in_8_bits(graph)
    stored = [v for v in graph.initializers.values() if v.dtype == ir.DataType.BFLOAT16]
    for value in stored:
        _insert_casts(graph, value, [ir.DataType.FLOAT])
    for value in graph.inputs:
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            _insert_casts(graph, value, [ir.DataType.BFLOAT16, ir.DataType.FLOAT])
    for value in rounded:
        node = value.producer()
        assert node is not None
        if node.op_type != "Cast":  # a Cast to bfloat16 stays; only a Cast back follows it
            value.type = ir.TensorType(ir.DataType.FLOAT)
            node.attributes.pop("output_dtype", None)
            if value not in exact:
                _insert_casts(graph, value, [ir.DataType.BFLOAT16, ir.DataType.FLOAT])
        else:
            _insert_casts(graph, value, [ir.DataType.FLOAT])
    return True


def _factors_in_8_bits(graph: ir.Graph) -> set[ir.Value]:
    """Find the dequantized values that only products of two such values read."""
    exact = set()
    for node in graph:
        output = node.outputs[0] if node.op_type == "DequantizeLinear" else None
        if output is not None and all(_is_in_8_bits(use.node) for use in output.uses()):
            exact.add(output)
    return exact


def _is_in_8_bits(node: ir.Node) -> bool:
    makers = [None if value is None else value.producer() for value in node.inputs]
    are_pairs = [maker is not None and maker.op_type == "DequantizeLinear" for maker in makers]
    return node.op_type == "MatMul" and all(are_pairs)


def compute_in_float32(model: ir.Model) -> None:
    """Let a 16-bit graph compute in float32, in place; what is stored in 16 bits stays rounded.

    Such a graph differs from the model by the rounding of its weights alone, however far 16 bits
    are from enough to compute it.
    """
    graph = model.graph
    infer_dtypes(graph)
    narrow = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    for node in list(graph):
        for name in ("to", "output_dtype"):
            attribute = node.attributes.get(name)
            if attribute is not None and attribute.as_int() in narrow:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        is_made = any(a.type == ir.AttributeType.TENSOR for a in node.attributes.values())
        for output in node.outputs:
            if output.dtype in narrow and is_made:
                _insert_casts(graph, output, [ir.DataType.FLOAT])
            elif output.dtype in narrow:
                output.type = ir.TensorType(ir.DataType.FLOAT)
    for value in [*graph.initializers.values()]:
        if value.dtype in narrow and value.uses():
            _insert_casts(graph, value, [ir.DataType.FLOAT])
    for value in graph.inputs:
        if value.dtype in narrow:
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _insert_casts(graph: ir.Graph, value: ir.Value, dtypes: list[ir.DataType]) -> None:
    """Cast ``value`` through ``dtypes`` and let all its readers read the result."""
    uses, producer, name = list(value.uses()), value.producer(), value.name
    result = value
    casts = []
    for i, dtype in enumerate(dtypes):
        cast = ir.node("Cast", [result], {"to": int(dtype)}, name=f"{name}/Round_{i}")
        result = cast.outputs[0]
        result.name, result.type, result.shape = (
            f"{name}.round_{i}",
            ir.TensorType(dtype),
            value.shape,
        )
        casts.append(cast)
    if producer is None:
        readers = {use.node for use in uses}
        graph.insert_before(next(node for node in graph if node in readers), casts)
    else:
        graph.insert_after(producer, casts)
    for node, index in uses:
        node.replace_input_with(index, result)
    for i, output in enumerate(graph.outputs):
        if output is value:
            value.name, result.name = f"{name}.raw", name
            graph.outputs[i] = result
