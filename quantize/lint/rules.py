"""The rules of explicit Q/DQ, in words: the requirement, why, and how to fix a violation.

Severities:

    error      a builder refuses the graph, or its numbers are wrong
    warning    it builds and runs, but not with the 8-bit kernel that the pair was placed for
    note       a condition to know about; a graph with only notes is clean

Where the GPU is named, a note on hardware becomes an error or is dropped; without a name, nothing
is assumed about the GPU.

The rules are TensorRT's ("Working with Quantized Types", its answers to issues 2981, 4084, 4167
and 4540 of NVIDIA/TensorRT) and those of ONNX's specification of QuantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from internvl_edge.quantize.lint.view import name_of

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A requirement on the graph, and how to fix a violation."""

    severity: Severity
    says: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One place where a graph breaks a rule."""

    rule: str  # a key of RULES
    severity: Severity
    node: str
    found: str

    def to_json(self) -> dict[str, Any]:
        """Return the finding and its rule's words as JSON types."""
        rule = RULES[self.rule]
        return {
            "rule": self.rule,
            "severity": self.severity,
            "node": self.node,
            "found": self.found,
            "says": rule.says,
            "fix": rule.fix,
        }


def finding(
    rule: str, node: ir.Node | str, found: str, severity: Severity | None = None
) -> Finding:
    """Make a finding at a node, with the rule's own severity unless another is given."""
    name = node if isinstance(node, str) else name_of(node)
    return Finding(rule=rule, severity=severity or RULES[rule].severity, node=name, found=found)


RULES: dict[str, Rule] = {
    # --- scales and types ---
    "opset": Rule(
        severity="error",
        says="Scales per channel came with opset 13, float8 and 16-bit scales with 19, INT4, "
        "blocks and QuantizeLinear's output_dtype with 21, FP4, DequantizeLinear's output_dtype "
        "and float32 scales of 16-bit values with 23.",
        fix="Raise the opset to the one that is named, or a newer one: export again, or convert "
        "with onnx.version_converter.",
    ),
    "specification": Rule(
        severity="error",
        says="Attributes and types are those that ONNX's specification has; this combination is in "
        "no opset, so that ONNX Runtime and builders refuse it.",
        fix="Give zero points the type of the quantized values, and scales a type of the table in "
        "the specification of the operator.",
    ),
    "operator-form": Rule(
        severity="error",
        says="8-bit kernels are asked for by QuantizeLinear and DequantizeLinear around ordinary "
        "operators; integer operators are not parsed.",
        fix="Quantize in the QDQ format (ONNX Runtime: quant_format=QuantFormat.QDQ).",
    ),
    "not-judged": Rule(
        severity="warning",
        says="This operator is a tool's own, and quantizes or reads what a pair rounded. No rule "
        "here judges it; runtimes other than that tool's refuse it or need a plugin.",
        fix="Convert to the QDQ format (QuantizeLinear, DequantizeLinear) where it shall run "
        "elsewhere; else judge it with its tool.",
    ),
    "fused-operator": Rule(
        severity="warning",
        says="ONNX Runtime's optimizer wrote this product for itself. It is judged as the product "
        "that it was, but builders do not parse it.",
        fix="Take the graph that was not optimized (without optimized_model_filepath).",
    ),
    "not-quantized": Rule(
        severity="note",
        says="Only quantized graphs can be judged; this one has no QuantizeLinear and no "
        "DequantizeLinear.",
        fix="Nothing, if it is meant to compute in 16 or 32 bits; else name the quantized file.",
    ),
    "unpaired": Rule(
        severity="error",
        says="Quantized values go through a DequantizeLinear, and come from a QuantizeLinear or "
        "from storage.",
        fix="Place a DequantizeLinear with the same scale after each QuantizeLinear.",
    ),
    "scale-mismatch": Rule(
        severity="error",
        says="A QuantizeLinear and the DequantizeLinear after it share one scale; two different "
        "scales multiply the tensor by their ratio.",
        fix="Give both nodes the same initializer.",
    ),
    "scale-constant": Rule(
        severity="error",
        says="Scales are constants of the graph, or follow from constants alone; there are no "
        "kernels for those that depend on the inputs.",
        fix="Calibrate to static scales and store them as initializers.",
    ),
    "scale-value": Rule(
        severity="error",
        says="A scale is a positive, finite, normal number.",
        fix="Calibrate again with finite data; give dead channels the smallest normal number.",
    ),
    "scale-type": Rule(
        severity="error",
        says="Scales are float32, or float16 or bfloat16. In float16, scales below 6.1e-5 are "
        "denormal, and only three digits are left.",
        fix="Store scales in bfloat16, or in float32, and quantize weights by the stored scale.",
    ),
    "wide-sums": Rule(
        severity="note",
        says="TensorRT-RTX's 8-bit products write their sums in the type of the scales. In float32 "
        "each is four bytes that a second kernel reads again, to multiply them by the weight's "
        "scales and to go on in 16 bits.",
        fix="Give both DequantizeLinears bfloat16 scales that the values were quantized by, let "
        "the product be in bfloat16, and cast its output where the graph computes in float16.",
    ),
    "product-type": Rule(
        severity="warning",
        says="An 8-bit product is in the type of its scales, or its scales are float32. With other "
        "16-bit scales TensorRT-RTX dequantizes both inputs and multiplies in 16 or 32 bits.",
        fix="Give the scales of both DequantizeLinears the type of the product, and cast its "
        "output where the graph goes on in another one.",
    ),
    "scale-shape": Rule(
        severity="error",
        says="There is one scale per tensor, one for each index of the axis, or one for each block "
        "along the axis and index of the others.",
        fix="Store as many scales as the axis is long, or has blocks.",
    ),
    "scale-rank": Rule(
        severity="error",
        says="A scale is a scalar, or a list along the axis; only scales of blocks have the rank "
        "of their tensor. Builders interpret shapes such as (N, 1) and (1, N) differently.",
        fix="Store it with the shape () or (N,), and set the axis.",
    ),
    "zero-point": Rule(
        severity="error",
        says="Quantization is symmetric: zero points are 0.",
        fix="Calibrate symmetrically (ONNX Runtime: ActivationSymmetric and WeightSymmetric).",
    ),
    "quantized-type": Rule(
        severity="error",
        says="Activations are INT8 or FP8 E4M3; weights are INT8, FP8 E4M3, INT4 or FP4.",
        fix="Quantize to int8 or float8e4m3fn (ONNX Runtime: QuantType.QInt8 for both).",
    ),
    "quantized-bias": Rule(
        severity="error",
        says="A bias has the type of the product's output; INT32 with a DequantizeLinear is "
        "refused.",
        fix="Leave biases in float (ONNX Runtime: QuantizeBias=False).",
    ),
    "activation-per-channel": Rule(
        severity="error",
        says="Activations have one scale per tensor: scales that vary along the axis that is "
        "summed over cannot be factored out of the sum.",
        fix="Quantize activations per tensor; move channel factors into weights (SmoothQuant).",
    ),
    "weight-axis": Rule(
        severity="error",
        says="A weight's scales belong to its output channels, the axis that the product keeps.",
        fix="MatMul (K, N): axis 1; Gemm with transB and Conv: axis 0.",
    ),
    "weight-in-float": Rule(
        severity="warning",
        says="A weight is stored in 8 bits and only read by a DequantizeLinear. Stored in float "
        "before a QuantizeLinear it takes four times the space, and each builder rounds it again.",
        fix="Store the quantized weight and remove its QuantizeLinear.",
    ),
    "fp8-hardware": Rule(
        severity="note",
        says="FP8 needs compute capability 8.9 or newer: Ada, Hopper, Blackwell.",
        fix="Also export int8 for older GPUs.",
    ),
    "fp8-target": Rule(
        severity="error",
        says="FP8 needs compute capability 8.9 or newer; builders refuse it for this GPU.",
        fix="Export int8 for this GPU.",
    ),
    # --- placement ---
    "missing-pair": Rule(
        severity="warning",
        says="Either both inputs of a product are quantized, or neither. With a pair on one input "
        "only, the product runs in 16 bits and still loses accuracy to the rounding.",
        fix="Quantize the other input too, or remove the pair.",
    ),
    "weight-only": Rule(
        severity="note",
        says="Only weights are quantized. That saves memory and the time to read it, which "
        "dominates decoding; products still run in 16 or 32 bits. TensorRT-RTX and ONNX Runtime "
        "accept INT8 and INT4, TensorRT INT4.",
        fix="Nothing for a decoder. Quantize the inputs too where products dominate the time.",
    ),
    "mixed-formats": Rule(
        severity="error",
        says="Both inputs of a product have one 8-bit format; no kernel multiplies INT8 by FP8.",
        fix="Quantize both to the same format.",
    ),
    "breaks-epilogue": Rule(
        severity="warning",
        says="Bias and activation are fused into the product before them. A pair between them "
        "prevents that, and rounds values that nothing reads in 8 bits.",
        fix="Remove the pair, or move it after the activation if a product reads its output.",
    ),
    "output-pair": Rule(
        severity="warning",
        says="A product's output carries a pair only where the next product reads it.",
        fix="Remove the pair.",
    ),
    "residual-trunk": Rule(
        severity="warning",
        says="The residual stream stays in 16 or 32 bits. If it is rounded at every addition, its "
        "outlier channels drown the others.",
        fix="Remove the pairs at additions of two activations.",
    ),
    "quantized-nonlinear": Rule(
        severity="warning",
        says="Norms, softmax and GELU read 16 or 32 bits. Queries and keys with a norm are "
        "quantized after it, not before.",
        fix="Move the pair after the norm or activation, where the products read it.",
    ),
    "pair-without-product": Rule(
        severity="warning",
        says="A pair serves a product that reads it. Without one it costs accuracy and gains "
        "nothing.",
        fix="Remove the pair.",
    ),
    "shared-pair": Rule(
        severity="warning",
        says="Readers of one tensor, such as q, k and v after a norm, share one pair. Different "
        "scales need one kernel each instead of one fused into the norm's epilogue.",
        fix="Calibrate one range for the tensor and let all readers read one DequantizeLinear. In "
        "INT8 graphs of float32 each may keep a pair of its own.",
    ),
    "narrow-product": Rule(
        severity="warning",
        says="Products with fewer than 16 inputs or outputs do not pay in 8 bits.",
        fix="Leave them in 16 bits.",
    ),
    "patch-embed": Rule(
        severity="note",
        says="The patch embedding reads pixels: its error reaches every layer, and it takes little "
        "time.",
        fix="Leave it in 16 bits.",
    ),
    "attention-int8": Rule(
        severity="warning",
        says="Fused INT8 attention exists for head sizes 16, 32 and 64 and up to 512 tokens.",
        fix="Leave q kᵀ and the product with v in 16 bits, or in FP8 on Hopper and newer.",
    ),
    "attention-incomplete": Rule(
        severity="warning",
        says="Quantized attention is fused only with pairs on q, k, v and on the softmax's output.",
        fix="Add the missing pairs, or remove the others.",
    ),
    "attention-softmax-scale": Rule(
        severity="warning",
        says="The softmax's output is at most 1; its FP8 scale is 1/448.",
        fix="Set it to 1/448.",
    ),
    "attention-scale-order": Rule(
        severity="warning",
        says="1/√d is multiplied into q, or its root into q and k, before q kᵀ; with a factor "
        "after q kᵀ, quantized attention is not fused.",
        fix="Move the factor before the pair of q.",
    ),
    "decomposed-norm": Rule(
        severity="note",
        says="Norms are LayerNormalization or RMSNormalization: written as Pow, ReduceMean and "
        "Sqrt they overflow float16, and the quantization after them is not fused.",
        fix="Export with opset 23 or newer and native norms.",
    ),
}
