"""What ONNX's specification says of a node: the opsets that have it, and operators that none has.

Types, attributes and what has to be of one type come from the schemas in the ``onnx`` package, one
for each version of an operator, so that nothing here repeats them: a node is held against the
version that its opset gives, and if it violates that one, against those of later opsets.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet

import onnx
import onnx_ir as ir

from internvl_edge.quantize.lint.view import STANDARD_DOMAINS, dtype_of, is_constant

INTEGER_OPERATORS = {"MatMulInteger", "ConvInteger", "DynamicQuantizeLinear", "QGemm", "QAttention"}
INTEGER_OPERATORS |= {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
# Names that tools gave their operators: QONNX and FINN, Brevitas, ModelOpt's for TensorRT, ONNX
# Runtime's MatMulNBits, MatMulBnb4 and QMoE, Quark's BFP, PyTorch's quantized namespace.
QUANTIZATION = re.compile(
    r"quant|qonnx|brevitas|finn|qlinear|qordered|nbits|bnb|fpq|bfp|gptq|awq|marlin"
    r"|u?int[2-8](?![0-9])|fp[468](?![0-9])|float[48]|(?-i:\bQ[A-Z])",
    re.IGNORECASE,
)
NARROW_BITS = 8


def violation(node: ir.Node, opset: int) -> str | None:
    """Say how a node violates its operator's specification; None: it does not, or has none."""
    if node.domain not in STANDARD_DOMAINS:
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        return f"no {node.op_type}"
    for name, attribute in node.attributes.items():
        if name not in schema.attributes:
            return f"no attribute {name}"
        if name == "output_dtype" and attribute.as_int():
            declared, zero = ir.DataType(attribute.as_int()), dtype_of(_zero_point(node))
            if zero is not None and zero != declared and node.op_type == "QuantizeLinear":
                return f"output_dtype {declared.name} with a zero point in {zero.name}"
    return _wrong_type(node, schema) or _wrong_output(node, schema)


def first_opset(node: ir.Node, after: int) -> int | None:
    """Find the first opset after one that has a node; None: there is none."""
    opsets = range(after + 1, onnx.defs.onnx_opset_version() + 1)
    return next((opset for opset in opsets if violation(node, opset) is None), None)


def _wrong_type(node: ir.Node, schema: onnx.defs.OpSchema) -> str | None:
    """Say which input has a type that is not allowed, or not that of another one."""
    allowed = {t.type_param_str: t.allowed_type_strs for t in schema.type_constraints}
    bound: dict[str, tuple[str, ir.DataType]] = {}
    for formal, value in zip(schema.inputs, node.inputs, strict=False):
        dtype = dtype_of(value)
        if dtype is None:
            continue
        if _spelled(dtype) not in allowed.get(formal.type_str, [formal.type_str]):
            return f"no {formal.name} in {dtype.name}"
        if formal.type_str in allowed:
            name, other = bound.setdefault(formal.type_str, (formal.name, dtype))
            if other != dtype:
                return f"no {name} in {other.name} with {formal.name} in {dtype.name}"
    return None


def _wrong_output(node: ir.Node, schema: onnx.defs.OpSchema) -> str | None:
    """Say which type output_dtype names that is not allowed."""
    declared = node.attributes.get("output_dtype")
    if declared is None or not declared.as_int():
        return None
    allowed = {t.type_param_str: t.allowed_type_strs for t in schema.type_constraints}
    dtype = ir.DataType(declared.as_int())
    is_known = _spelled(dtype) in allowed[schema.outputs[0].type_str]
    return None if is_known else f"no output_dtype {dtype.name}"


def _spelled(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"


def _zero_point(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def is_integer_operator(node: ir.Node) -> bool:
    """Tell whether an operator takes quantized values without a DequantizeLinear."""
    return node.op_type in INTEGER_OPERATORS or node.op_type.startswith("QLinear")


def is_unknown(node: ir.Node, functions: AbstractSet[tuple[str, str]]) -> bool:
    """Tell whether an operator is neither ONNX's, nor defined in the model, nor read as a pair."""
    if (node.domain, node.op_type) in functions:
        return False
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return False
    return node.domain not in STANDARD_DOMAINS or not onnx.defs.has(node.op_type)


def is_about_quantization(node: ir.Node) -> bool:
    """Tell whether an operator that is not known quantizes, or reads what was quantized.

    Its name or domain says so, or it reads a constant of 8 bits or fewer.
    """
    called = node.attributes.get("operator")  # PyTorch's fallback to ATen
    aten = "" if called is None else str(called.value)
    if QUANTIZATION.search(" ".join((node.domain, node.op_type, aten))):
        return True
    types = {dtype_of(value) for value in node.inputs if is_constant(value)}
    known = types - {None, ir.DataType.BOOL, ir.DataType.STRING}
    return any(dtype.bitwidth <= NARROW_BITS for dtype in known if dtype is not None)
