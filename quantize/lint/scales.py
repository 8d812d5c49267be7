"""Rules of Q/DQ that depend on one node and its constants: types, scales, zero points, axes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from internvl_edge.quantize.lint.rules import Finding, finding
from internvl_edge.quantize.lint.specification import (
    first_opset,
    is_about_quantization,
    is_integer_operator,
    is_unknown,
    violation,
)
from internvl_edge.quantize.lint.view import (
    KEEPS,
    MAX_CONSTANT_STEPS,
    Operand,
    View,
    constant,
    dtype_of,
    is_constant,
    name_of,
    origin,
    size_of,
)
from internvl_edge.types import Array

FP8 = ir.DataType.FLOAT8E4M3FN
ACTIVATION_TYPES = {ir.DataType.INT8, FP8}
WEIGHT_TYPES = ACTIVATION_TYPES | {ir.DataType.INT4, ir.DataType.FLOAT4E2M1}
SCALE_TYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
FP8_SM = 89
DEFAULT_AXIS = 1  # of QuantizeLinear and DequantizeLinear


def check_specification(view: View) -> Iterator[Finding]:
    """Report nodes that the specification has in a later opset only, or in none."""
    for node in (*view.quantizers, *view.dequantizers):
        wrong = violation(node, view.opset)
        if wrong is None:
            continue
        needed = first_opset(node, view.opset)
        if needed is None:
            yield finding("specification", node, wrong)
        else:
            yield finding("opset", node, f"{wrong} in opset {view.opset}; it needs {needed}")


def check_operator_form(view: View) -> Iterator[Finding]:
    for node in view.nodes:
        name = f"{node.domain or 'ai.onnx'}.{node.op_type}"
        if is_integer_operator(node):
            yield finding("operator-form", node, name)
        elif is_unknown(node, view.functions) and is_about_quantization(node):
            yield finding("not-judged", node, name)


def check_quantized(view: View) -> Iterator[Finding]:
    """Report a graph in which there is nothing to judge."""
    if not (view.quantizers or view.dequantizers) and not any(check_operator_form(view)):
        yield finding("not-quantized", "the model", f"none in {len(view.nodes)} nodes")


def check_pairing(view: View) -> Iterator[Finding]:
    for node in view.quantizers:
        reads = {use.node.op_type for use in node.outputs[0].uses()}
        for other in sorted(reads - {"DequantizeLinear"}):
            yield finding("unpaired", node, f"{other} reads the quantized values")
        if not reads:
            yield finding("unpaired", node, "nothing reads the quantized values")
    for node in view.dequantizers:
        source = origin(node.inputs[0]) if node.inputs and node.inputs[0] else None
        producer = None if source is None else source.producer()
        if producer is not None and producer.op_type == "QuantizeLinear":
            yield from _check_same_scale(producer, node)
        elif not is_constant(source):
            maker = "an input of the graph" if producer is None else producer.op_type
            yield finding("unpaired", node, f"it dequantizes the output of {maker}")


def _check_same_scale(quantize: ir.Node, dequantize: ir.Node) -> Iterator[Finding]:
    first, second = (constant(_input(node, 1)) for node in (quantize, dequantize))
    if first is None or second is None:
        return
    wide, other = first.astype(np.float64), second.astype(np.float64)
    if wide.size != other.size or not np.array_equal(wide.ravel(), other.ravel(), equal_nan=True):
        both = f"quantized with {_first(wide)}, dequantized with {_first(other)}"
        yield finding("scale-mismatch", dequantize, both)


def check_scales(view: View) -> Iterator[Finding]:
    seen: set[ir.Value] = set()
    for node in (*view.quantizers, *view.dequantizers):
        scale = _input(node, 1)
        if scale is not None and scale not in seen:  # a pair shares its scale
            seen.add(scale)
            yield from _check_scale(node, scale)
            if scale.shape is not None and len(scale.shape) > 1 and not _is_blocked(node):
                yield finding("scale-rank", node, f"{scale.name!r} is of shape {scale.shape}")
        yield from _check_scale_shape(node, scale)


def _check_scale(node: ir.Node, given: ir.Value) -> Iterator[Finding]:
    scale = origin(given, KEEPS)  # what is stored: a cast to 16 bits is folded or fused
    if not is_constant(scale):
        inner = scale.producer()  # scales of NVFP4 blocks are stored quantized
        if inner is None or inner.op_type != "DequantizeLinear" or not is_constant(inner.inputs[0]):
            found = f"{given.name!r} is computed from the inputs, or one of them"
            yield finding("scale-constant", node, found)
        return
    dtype, is_half = dtype_of(scale), ir.DataType.FLOAT16 in _types_of_casts(given)
    if dtype == ir.DataType.FLOAT16:
        yield finding("scale-type", node, f"{scale.name!r} is float16", "note")
    elif is_half:
        yield finding("scale-type", node, f"{scale.name!r} is cast to float16", "note")
    elif dtype is not None and dtype not in SCALE_TYPES and not _is_block_scale(dtype):
        yield finding("scale-type", node, f"{scale.name!r} is {dtype.name}")
    values = constant(given)  # as the node has it: a cast to 16 bits may leave nothing of it
    if values is None:
        return
    wide = values.astype(np.float64).ravel()
    is_half = is_half or dtype == ir.DataType.FLOAT16
    smallest = float(np.finfo(np.float16 if is_half else np.float32).tiny)
    for kind, wrong in (
        ("NaN or infinite", ~np.isfinite(wide)),
        ("zero or negative", wide <= 0),
        ("denormal", (wide > 0) & (wide < smallest)),
    ):
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            count = f"{int(wrong.sum())} of {wide.size} {kind}, the first {wide[first]} at {first}"
            yield finding("scale-value", node, f"{scale.name!r}: {count}")


def _types_of_casts(value: ir.Value) -> set[ir.DataType]:
    """Collect the types that a stored value is cast to on its way."""
    types = set()
    for _ in range(MAX_CONSTANT_STEPS):
        node = value.producer()
        if node is None or node.op_type not in KEEPS or not node.inputs or node.inputs[0] is None:
            break
        if node.op_type == "Cast" and "to" in node.attributes:
            types.add(ir.DataType(node.attributes["to"].as_int()))
        value = node.inputs[0]
    return types


def _is_block_scale(dtype: ir.DataType) -> bool:
    """Tell whether MXFP8 or NVFP4 store the scales of their blocks in this type."""
    return dtype in (ir.DataType.FLOAT8E8M0, FP8)


def _check_scale_shape(node: ir.Node, scale: ir.Value | None) -> Iterator[Finding]:
    if scale is None or scale.shape is None:
        return
    if _is_blocked(node):
        yield from _check_block_scales(node, scale)
        return
    count = _count(scale.shape)
    length = size_of(_input(node, 0), axis_of(node))
    if count > 1 and length is not None and count != length:
        counts = f"{count} scales for axis {axis_of(node)}, which is {length} long"
        yield finding("scale-shape", node, counts)


def _check_block_scales(node: ir.Node, scale: ir.Value) -> Iterator[Finding]:
    """Check that there is one scale for each block along the axis, and index of the other axes."""
    source, block = _input(node, 0), node.attributes["block_size"].as_int()
    if source is None or source.shape is None or scale.shape is None:
        return
    if any(not isinstance(d, int) for d in (*source.shape, *scale.shape)):
        return
    wanted = [int(d) for d in source.shape]  # type: ignore[arg-type]
    axis = axis_of(node)
    if -len(wanted) <= axis < len(wanted):
        wanted[axis] = -(-wanted[axis] // block)
    if list(scale.shape) != wanted:
        shapes = f"{scale.name!r} is of shape {scale.shape}; blocks of {block} along axis {axis}"
        yield finding("scale-shape", node, f"{shapes} need {wanted}")


def check_zero_points(view: View) -> Iterator[Finding]:
    seen: set[ir.Value] = set()
    for node in (*view.quantizers, *view.dequantizers):
        zero = _input(node, 2)
        if zero is None or zero in seen:
            continue
        seen.add(zero)
        values = constant(zero)
        if not is_constant(zero):
            found = f"{zero.name!r} is computed from the inputs, or one of them"
            yield finding("zero-point", node, found)
        elif values is not None and np.any(values.astype(np.float64) != 0):
            yield finding("zero-point", node, f"{zero.name!r} is {_first(values)}")


def check_types(view: View) -> Iterator[Finding]:
    for node in (*view.quantizers, *view.dequantizers):
        dtype = _quantized_type(node)
        source = _input(node, 0)
        is_stored = node.op_type == "DequantizeLinear" and is_constant(source)
        is_in_pair = node.op_type == "DequantizeLinear" and not is_stored
        if dtype is None or is_in_pair:  # reported at the pair's QuantizeLinear
            continue
        if is_stored and dtype == ir.DataType.INT32:
            yield finding("quantized-bias", node, f"{source.name!r} is INT32")  # type: ignore[union-attr]
        elif dtype not in (WEIGHT_TYPES if is_stored else ACTIVATION_TYPES):
            kind = "a weight" if is_stored else "an activation"
            yield finding("quantized-type", node, f"{kind} in {dtype.name}")


def check_activation_scales(view: View) -> Iterator[Finding]:
    for node in view.quantizers:
        scale = _input(node, 1)
        count = 1 if scale is None or scale.shape is None else _count(scale.shape)
        if count > 1 and not is_constant(origin(node.inputs[0])) and not _is_blocked(node):  # type: ignore[arg-type]
            yield finding("activation-per-channel", node, f"{count} scales")


def check_weights(view: View) -> Iterator[Finding]:
    seen: set[ir.Node] = set()
    for product in view.products:
        weight = product.weight
        if weight is None or weight.dequantize is None or weight.dequantize in seen:
            continue
        seen.add(weight.dequantize)
        if weight.quantize is not None:
            stored = f"{weight.source.name!r} is {weight.source.dtype}"
            yield finding("weight-in-float", weight.quantize, stored)
        yield from _check_axis(weight)


def _check_axis(weight: Operand) -> Iterator[Finding]:
    node = weight.quantize or weight.dequantize
    assert node is not None
    scale = _input(node, 1)
    if scale is None or scale.shape is None or _count(scale.shape) == 1 or _is_blocked(node):
        return
    rank = None if weight.source.shape is None else len(weight.source.shape)
    axis = axis_of(node)
    axis = axis + rank if axis < 0 and rank is not None else axis
    if weight.output_axis is not None and axis != weight.output_axis:
        axes = f"axis {axis} of {weight.source.name!r} {weight.source.shape}"
        axes += f"; its outputs are axis {weight.output_axis}"
        yield finding("weight-axis", node, axes)


def check_product_types(view: View) -> Iterator[Finding]:
    """Report products in 8 bits whose sums are wide, or that are given up for their types."""
    wide: list[ir.Node] = []
    for product in view.products:
        pairs = [o.dequantize for o in product.operands if o.element in ACTIVATION_TYPES]
        types = [_types(node) for node in pairs if node is not None]
        if len(types) != 2 or any(scale is None or out is None for scale, out in types):
            continue
        if all(scale == ir.DataType.FLOAT for scale, _ in types):
            if any(out != ir.DataType.FLOAT for _, out in types):
                wide.append(product.node)
        elif any(scale not in (out, ir.DataType.FLOAT) for scale, out in types):
            names = ", ".join(f"{s.name} scales for {o.name}" for s, o in types if s and o)
            yield finding("product-type", product.node, names)
    if wide:
        count = f"{len(wide)} products in 16 bits with float32 scales, the first {name_of(wide[0])}"
        yield finding("wide-sums", "the model", count)


def _types(node: ir.Node) -> tuple[ir.DataType | None, ir.DataType | None]:
    """Return the types of a DequantizeLinear's scale and output."""
    scale, declared = dtype_of(_input(node, 1)), node.attributes.get("output_dtype")
    is_declared = declared is not None and bool(declared.value)
    return scale, ir.DataType(declared.as_int()) if declared is not None and is_declared else scale


def check_hardware(view: View) -> Iterator[Finding]:
    nodes = [node for node in view.dequantizers if dtype_of(_input(node, 0)) == FP8]
    count = f"{len(nodes)} tensors in FP8 E4M3"
    if not nodes or (view.sm is not None and view.sm >= FP8_SM):
        return
    if view.sm is None:
        yield finding("fp8-hardware", "the model", count)
    else:
        yield finding("fp8-target", "the model", f"{count}; SM{view.sm} has no kernels for it")


def axis_of(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return DEFAULT_AXIS if attribute is None else int(attribute.value)


def _quantized_type(node: ir.Node) -> ir.DataType | None:
    """Return the 8-bit type of a node, which a QuantizeLinear can declare in three ways."""
    if node.op_type == "DequantizeLinear":
        return dtype_of(_input(node, 0))
    zero, attribute = _input(node, 2), node.attributes.get("output_dtype")
    if zero is not None:
        return dtype_of(zero)
    if attribute is not None and int(attribute.value):
        return ir.DataType(int(attribute.value))
    return dtype_of(node.outputs[0]) or ir.DataType.UINT8  # the specification's default


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_blocked(node: ir.Node) -> bool:
    attribute = node.attributes.get("block_size")
    return attribute is not None and int(attribute.value) > 0


def _count(shape: ir.Shape) -> int:
    return int(np.prod([d for d in shape if isinstance(d, int)]))


def _first(values: Array) -> str:
    text = ", ".join(f"{float(v):g}" for v in values.ravel()[:3])
    return f"{text}, …" if values.size > 3 else text


CHECKS = (
    check_specification,
    check_operator_form,
    check_quantized,
    check_pairing,
    check_scales,
    check_zero_points,
    check_types,
    check_activation_scales,
    check_weights,
    check_product_types,
    check_hardware,
)
