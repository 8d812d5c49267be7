"""Rules of Q/DQ that depend on a node's neighbours: misplaced pairs, and missing ones."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from internvl_edge.quantize.lint.rules import Finding, Severity, finding
from internvl_edge.quantize.lint.specification import is_about_quantization, is_unknown
from internvl_edge.quantize.lint.view import (
    ATTENTIONS,
    FUSED,
    MAX_SCORE_STEPS,
    MOVES,
    PRODUCTS,
    SCORE_STEPS,
    STANDARD_DOMAINS,
    AttentionCore,
    Operand,
    Product,
    View,
    constant,
    dtype_of,
    is_constant,
    name_of,
    origin,
    readers,
    size_of,
)

MIN_FEATURES = 16
INT8_HEAD_SIZES = (16, 32, 64)
INT8_MAX_LENGTH = 512
SOFTMAX_SCALE = 1 / 448
NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
NORMS |= {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "GroupNormalization"}
NORMS |= {"InstanceNormalization", "BatchNormalization", "ReduceMean", "Pow", "Sqrt"}
ACTIVATIONS = {"Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Relu", "Erf", "Tanh", "Sigmoid"}
ACTIVATIONS |= {"Swish", "HardSwish", "LeakyRelu", "Clip", "Elu", "Mish"}
NONLINEAR = NORMS | ACTIVATIONS | {"Softmax", "LogSoftmax"}
# Operators that multiply in 8 bits themselves, and which of their inputs is the weight.
WEIGHT_INPUTS = {"QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3, "QAttention": 1}
WEIGHT_INPUTS |= {"MatMulInteger": 1, "ConvInteger": 1, "MatMulIntegerToFloat": 1}
WEIGHT_INPUTS |= {"DynamicQuantizeMatMul": 1, "QOrderedMatMul": 2}


def check_products(view: View) -> Iterator[Finding]:
    bare = [p for p in view.products if _is_weight_only(p)]
    paired = {_family(p) for p in view.products if p.is_quantized and p.weight and p not in bare}
    bare = [p for p in bare if _family(p) not in paired or _is_int4(p)]
    if bare:
        yield finding("weight-only", bare[0].node, f"{len(bare)} product(s)")
    for product in view.products:
        if not product.is_quantized:
            continue
        without = [] if product in bare else [o for o in product.operands if o.dequantize is None]
        for operand in without:
            kind = "weight" if operand.is_constant else "input"
            yield finding("missing-pair", product.node, f"{kind} {operand.value.name!r} has none")
        formats = {o.element.name for o in product.operands if o.element is not None}
        if len(formats) > 1 and not without:
            yield finding("mixed-formats", product.node, " with ".join(sorted(formats)))
        weight = product.weight
        if weight is not None:
            outputs, inputs = _features(product.node, weight)
            if min(outputs, inputs) < MIN_FEATURES:
                size = f"{inputs} inputs and {outputs} outputs"
                yield finding("narrow-product", product.node, size)
            if product.node.op_type == "Conv" and _reads_pixels(product.operands):
                yield finding("patch-embed", product.node, "a quantized Conv of the graph's input")


def check_operators(view: View) -> Iterator[Finding]:
    """Report operators of others that read pairs, and narrow ones that multiply in 8 bits."""
    for node in view.nodes:
        is_pair = any(map(_is_dequantized, node.inputs))
        if is_pair and is_unknown(node, view.functions):
            name = f"{node.domain or 'ai.onnx'}.{node.op_type}"
            if node.op_type in FUSED:
                yield finding("fused-operator", node, name)
            elif node.op_type not in ATTENTIONS | NONLINEAR and not is_about_quantization(node):
                yield finding("not-judged", node, name)
        sizes = _sizes_of_operator(node)
        if sizes is not None and min(sizes) < MIN_FEATURES:
            size = f"{sizes[0]} inputs and {sizes[1]} outputs"
            yield finding("narrow-product", node, size)


def _is_dequantized(value: ir.Value | None) -> bool:
    maker = None if value is None else origin(value).producer()
    return maker is not None and maker.op_type == "DequantizeLinear"


def _sizes_of_operator(node: ir.Node) -> tuple[int, int] | None:
    """Count inputs and outputs of an operator that multiplies in 8 bits or fewer, where known."""
    if node.op_type.startswith("MatMulNBits") and {"K", "N"} <= set(node.attributes):
        return node.attributes["K"].as_int(), node.attributes["N"].as_int()
    index = WEIGHT_INPUTS.get(node.op_type, len(node.inputs))
    weight = node.inputs[index] if index < len(node.inputs) else None
    if weight is None or weight.shape is None or not is_constant(weight):
        return None
    sizes = [d if isinstance(d, int) else MIN_FEATURES for d in weight.shape]
    if "Conv" in node.op_type and sizes:
        return int(np.prod(sizes[1:])), sizes[0]
    if len(sizes) < 2:
        return None
    attribute = node.attributes.get("transB")
    is_transposed = attribute is not None and bool(attribute.value)
    return (sizes[-1], sizes[-2]) if is_transposed else (sizes[-2], sizes[-1])


def _is_weight_only(product: Product) -> bool:
    weight = product.weight
    others = [o for o in product.operands if o is not weight]
    is_stored = weight is not None and weight.dequantize is not None
    return is_stored and all(o.dequantize is None for o in others)


def _family(product: Product) -> str:
    """Return the stack of layers a product belongs to: its weight's name up to the first index."""
    name = "" if product.weight is None else str(product.weight.source.name)
    match = re.match(r"(.*?)[./]\d+[./]", name)
    return "" if match is None else match[1]


def _is_int4(product: Product) -> bool:
    """Tell whether a product's weight has 4 bits; then its input needs no pair."""
    return product.weight is not None and product.weight.element == ir.DataType.INT4


def _features(node: ir.Node, weight: Operand) -> tuple[int, int]:
    """Count a product's outputs, and the inputs summed for each; unknown ones count as wide."""
    shape = weight.source.shape
    if shape is None or weight.output_axis is None:
        return MIN_FEATURES, MIN_FEATURES
    outputs = size_of(weight.source, weight.output_axis) or MIN_FEATURES
    if node.op_type not in ("Conv", "ConvTranspose"):
        return outputs, size_of(weight.source, weight.input_axis) or MIN_FEATURES
    rest = [d for i, d in enumerate(shape) if i != weight.output_axis]
    return outputs, int(np.prod([d for d in rest if isinstance(d, int)]))


def _reads_pixels(operands: tuple[Operand, ...]) -> bool:
    source = origin(operands[0].source)
    return source.producer() is None and not is_constant(source)


def check_pairs(view: View) -> Iterator[Finding]:
    """Check each pair's readers, and the node whose output it rounds."""
    for quantize in view.quantizers:
        source = quantize.inputs[0]
        if source is None or is_constant(origin(source)):
            continue
        pairs = [n for n in readers(quantize.outputs[0]) if n is not None]
        reads = [r for n in pairs if n.op_type == "DequantizeLinear" for r in readers(n.outputs[0])]
        if not any(n.op_type == "DequantizeLinear" for n in pairs):
            continue  # check_pairing reports it
        yield from _check_readers(quantize, source, reads)


def _check_readers(
    quantize: ir.Node, source: ir.Value, reads: list[ir.Node | None]
) -> Iterator[Finding]:
    """Report each kind of reader that cannot use 8 bits, once."""
    maker = origin(source).producer()
    kinds = {_kind_of_reader(maker, node) for node in reads}
    for kind, rule in (
        ("epilogue", "breaks-epilogue"),
        ("addition", "residual-trunk"),
        ("nonlinear", "quantized-nonlinear"),
    ):
        if kind in kinds:
            names = [n for n in reads if n is not None and _kind_of_reader(maker, n) == kind]
            yield finding(rule, quantize, f"{names[0].op_type} {name_of(names[0])!r} reads it")
    if kinds <= {"other", "output"}:
        is_output = maker is not None and (maker.op_type in PRODUCTS or _is_bias(maker))
        rule = "output-pair" if is_output else "pair-without-product"
        yield finding(rule, quantize, "no product reads it")


def _kind_of_reader(maker: ir.Node | None, node: ir.Node | None) -> str:
    if node is None:
        return "output"
    if node.op_type in PRODUCTS | ATTENTIONS or node.op_type == "QuantizeLinear":
        return "product"
    is_product = maker is not None and maker.op_type in PRODUCTS
    is_biased = maker is not None and _is_bias(maker)
    if (is_product and _is_bias(node)) or (
        (is_product or is_biased) and node.op_type in ACTIVATIONS
    ):
        return "epilogue"
    if node.op_type in NONLINEAR:
        return "nonlinear"
    if node.op_type == "Add" and not _is_bias(node):
        return "addition"
    return "other" if node.domain in STANDARD_DOMAINS else "product"  # a tool's own may be one


def _is_bias(node: ir.Node) -> bool:
    """Tell whether a node adds a constant, with or without a pair."""
    return node.op_type == "Add" and any(
        v is not None and is_constant(origin(v, MOVES | {"QuantizeLinear", "DequantizeLinear"}))
        for v in node.inputs
    )


def check_shared(view: View) -> Iterator[Finding]:
    """Report several pairs on one tensor, but those that ONNX Runtime's INT8 kernels need.

    In float32 it fuses a product of INT8 only where the pair has no other reader (``graph.qdq``).
    """
    groups: dict[ir.Value, list[ir.Node]] = {}
    for node in view.quantizers:
        if node.inputs[0] is not None:
            groups.setdefault(node.inputs[0], []).append(node)
    for tensor, nodes in groups.items():
        if len(nodes) == 1:
            continue
        scales = [constant(node.inputs[1]) for node in nodes]
        known = [float(s.ravel()[0]) for s in scales if s is not None and s.size == 1]
        differ = len(set(known)) > 1
        if not differ and all(_is_int8_in_float32(node) for node in nodes):
            continue
        severity: Severity = "warning" if differ else "note"
        values = f"scales {', '.join(f'{s:g}' for s in known[:4])}" if differ else "of one scale"
        pairs = f"{len(nodes)} pairs of {tensor.name!r}, {values}"
        yield finding("shared-pair", nodes[0], pairs, severity)


def _is_int8_in_float32(quantize: ir.Node) -> bool:
    """Tell whether a pair is of INT8, and its DequantizeLinear writes float32."""
    values = quantize.outputs[0]
    return values.dtype == ir.DataType.INT8 and all(
        dtype_of(use.node.inputs[1]) == ir.DataType.FLOAT for use in values.uses()
    )


def check_attention(view: View) -> Iterator[Finding]:
    for core in view.attentions:
        paired = [o for o in core.operands if o.dequantize is not None]
        if not paired:
            continue
        formats = {o.element for o in paired}
        if ir.DataType.INT8 in formats:
            yield from _check_int8_attention(core)
        missing = [str(o.value.name) for o in core.operands if o.dequantize is None]
        if missing:
            yield finding("attention-incomplete", core.name, f"no pair on {', '.join(missing)}")
        yield from _check_softmax_scale(core)
        yield from _check_scale_order(core)


def _check_int8_attention(core: AttentionCore) -> Iterator[Finding]:
    if core.head_size is not None and core.head_size not in INT8_HEAD_SIZES:
        yield finding("attention-int8", core.name, f"head size {core.head_size}")
    elif core.length is not None and core.length > INT8_MAX_LENGTH:
        yield finding("attention-int8", core.name, f"{core.length} tokens")


def _check_softmax_scale(core: AttentionCore) -> Iterator[Finding]:
    pair = core.probabilities
    if pair is None or pair.dequantize is None or pair.element != ir.DataType.FLOAT8E4M3FN:
        return
    scale = constant(pair.dequantize.inputs[1])
    if scale is not None and abs(float(scale.ravel()[0]) / SOFTMAX_SCALE - 1) > 0.01:
        yield finding("attention-softmax-scale", core.name, f"scale {float(scale.ravel()[0]):g}")


def _check_scale_order(core: AttentionCore) -> Iterator[Finding]:
    """Report a factor between q kᵀ and the softmax."""
    softmax = None if core.probabilities is None else origin(core.probabilities.source).producer()
    if softmax is None or softmax.op_type != "Softmax":
        return
    value = softmax.inputs[0]
    for _ in range(MAX_SCORE_STEPS):
        node = None if value is None else value.producer()
        if node is None or node.op_type not in MOVES | SCORE_STEPS:
            return
        if node.op_type in ("Mul", "Div") and any(is_constant(v) for v in node.inputs):
            yield finding("attention-scale-order", core.name, f"{name_of(node)!r} after q kᵀ")
            return
        value = node.inputs[0]


def check_norms(view: View) -> Iterator[Finding]:
    """Report norms written as several nodes, in graphs that have pairs."""
    if not view.quantizers:
        return
    for node in view.nodes:
        if node.op_type != "Sqrt" or not node.inputs or node.inputs[0] is None:
            continue
        mean = origin(node.inputs[0], MOVES | {"Add"}).producer()
        if mean is not None and mean.op_type == "ReduceMean" and mean.inputs[0] is not None:
            square = mean.inputs[0].producer()
            if square is not None and square.op_type in ("Pow", "Mul"):
                yield finding("decomposed-norm", node, f"{square.op_type}, ReduceMean, Sqrt")


CHECKS = (
    check_products,
    check_operators,
    check_pairs,
    check_shared,
    check_attention,
    check_norms,
)
