"""The rules of explicit Q/DQ, in words: what each asks, why, and what to do.

Severities:

    error      a builder refuses the graph, or its numbers are wrong
    warning    it builds and runs, but not as the 8-bit kernel that the pair was placed for
    note       a condition to know of; a graph with notes alone is clean

Where the GPU is named, a note on hardware becomes an error or goes; nothing is assumed of it else.

The rules are TensorRT's ("Working with Quantized Types", its answers to issues 2981, 4084, 4167
and 4540 of NVIDIA/TensorRT) and ONNX's specification of QuantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

from internvl_edge.quantize.lint.view import name_of

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is asked of a graph, and what to do where it is not so."""

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
        """Everything there is to know of it, the rule's words included."""
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
    """A finding at a node, of the rule's own severity unless another is given."""
    name = node if isinstance(node, str) else name_of(node)
    return Finding(rule=rule, severity=severity or RULES[rule].severity, node=name, found=found)


RULES: dict[str, Rule] = {
    # --- scales and types ---
    "opset": Rule(
        severity="error",
        says="Scales per channel came with opset 13, float8 with 19, float32 scales in 16-bit "
        "graphs (output_dtype) with 23.",
        fix="Export with opset 23 or newer.",
    ),
    "operator-form": Rule(
        severity="error",
        says="8-bit kernels are asked for by QuantizeLinear and DequantizeLinear around ordinary "
        "operators; integer operators are not parsed.",
        fix="Quantize in the QDQ format (ONNX Runtime: quant_format=QuantFormat.QDQ).",
    ),
    "unpaired": Rule(
        severity="error",
        says="Quantized values go through a DequantizeLinear, and come from a QuantizeLinear or "
        "from storage.",
        fix="Place a DequantizeLinear behind each QuantizeLinear, of the same scale.",
    ),
    "scale-mismatch": Rule(
        severity="error",
        says="A QuantizeLinear and the DequantizeLinear behind it have one scale; two of them "
        "multiply the tensor by their ratio.",
        fix="Give both nodes the same initializer.",
    ),
    "scale-constant": Rule(
        severity="error",
        says="Scales are constants of the graph; there are no kernels for computed ones.",
        fix="Calibrate to static scales and store them as initializers.",
    ),
    "scale-value": Rule(
        severity="error",
        says="A scale is a positive, finite, normal number.",
        fix="Calibrate again with finite data; give dead channels the smallest normal number.",
    ),
    "scale-type": Rule(
        severity="error",
        says="Scales are float32, or float16 or bfloat16. In float16 what is below 6.1e-5 is "
        "denormal, and three digits are left.",
        fix="Store scales in float32 and set output_dtype where the graph computes in 16 bits.",
    ),
    "scale-shape": Rule(
        severity="error",
        says="There is one scale per tensor, or one for each index of the axis.",
        fix="Store as many scales as the axis is long.",
    ),
    "scale-rank": Rule(
        severity="error",
        says="A scale is a scalar, or a list along the axis; only scales of blocks have the rank "
        "of their tensor. Shapes such as (N, 1) and (1, N) are left to each builder's reading.",
        fix="Store it with the shape () or (N,), and name the axis.",
    ),
    "zero-point": Rule(
        severity="error",
        says="Quantization is symmetric: zero points are 0.",
        fix="Calibrate symmetrically (ONNX Runtime: ActivationSymmetric and WeightSymmetric).",
    ),
    "quantized-type": Rule(
        severity="error",
        says="Activations are INT8 or FP8 E4M3; weights these, INT4, or FP4.",
        fix="Quantize to int8 or float8e4m3fn (ONNX Runtime: QuantType.QInt8 for both).",
    ),
    "quantized-bias": Rule(
        severity="error",
        says="A bias stays in the type that the product gives; INT32 behind a DequantizeLinear is "
        "refused.",
        fix="Leave biases in float (ONNX Runtime: QuantizeBias=False).",
    ),
    "activation-per-channel": Rule(
        severity="error",
        says="Activations have one scale per tensor: a scale per channel of the sum's axis cannot "
        "be taken out of the sum.",
        fix="Quantize activations per tensor; move channel factors into weights (SmoothQuant).",
    ),
    "weight-axis": Rule(
        severity="error",
        says="Scales of a weight belong to its output channels, the axis that the product keeps.",
        fix="MatMul (K, N): axis 1; Gemm with transB and Conv: axis 0.",
    ),
    "weight-in-float": Rule(
        severity="warning",
        says="A weight is stored in 8 bits and read by a DequantizeLinear alone. In float in front "
        "of a QuantizeLinear it takes four times the space and is rounded anew by each builder.",
        fix="Store the quantized weight and remove its QuantizeLinear.",
    ),
    "fp8-hardware": Rule(
        severity="note",
        says="FP8 needs compute capability 8.9 or newer: Ada, Hopper, Blackwell.",
        fix="Export int8 beside it for older GPUs.",
    ),
    "fp8-target": Rule(
        severity="error",
        says="FP8 needs compute capability 8.9 or newer; builders refuse it for the GPU asked for.",
        fix="Export int8 for this GPU.",
    ),
    # --- placement ---
    "missing-pair": Rule(
        severity="warning",
        says="Both inputs of a product are quantized, or neither. With one pair alone the product "
        "runs in 16 bits and has paid for the rounding.",
        fix="Quantize the other input too, or remove the pair.",
    ),
    "weight-only": Rule(
        severity="note",
        says="Weights alone are quantized. That saves their memory and the time to read it, which "
        "is most of decoding; products still run in 16 or 32 bits. TensorRT-RTX takes INT8 and "
        "INT4, TensorRT INT4, ONNX Runtime both.",
        fix="Nothing for a decoder. Quantize the inputs too where products take the time.",
    ),
    "mixed-formats": Rule(
        severity="error",
        says="Both inputs of a product have one 8-bit format; none multiplies INT8 by FP8.",
        fix="Quantize both to the same format.",
    ),
    "breaks-epilogue": Rule(
        severity="warning",
        says="Bias and activation are fused into the product in front of them. A pair between them "
        "stops that, and rounds what nobody reads in 8 bits.",
        fix="Remove the pair, or place it behind the activation where a product reads that.",
    ),
    "output-pair": Rule(
        severity="warning",
        says="A product's output carries a pair only where the next product reads it.",
        fix="Remove the pair.",
    ),
    "residual-trunk": Rule(
        severity="warning",
        says="The residual stream stays in 16 or 32 bits. Rounded at every addition, outliers of "
        "its channels drown the others.",
        fix="Remove the pairs at additions of two activations.",
    ),
    "quantized-nonlinear": Rule(
        severity="warning",
        says="Norms, softmax and GELU read 16 or 32 bits. Queries and keys with a norm are "
        "quantized behind it, not in front.",
        fix="Move the pair behind the norm or activation, where the products read it.",
    ),
    "pair-without-product": Rule(
        severity="warning",
        says="A pair exists for a product behind it. Without one it costs a rounding and gains "
        "nothing.",
        fix="Remove the pair.",
    ),
    "shared-pair": Rule(
        severity="warning",
        says="Readers of one tensor, such as q, k and v behind a norm, share one pair. Different "
        "scales make a kernel for each instead of one in the norm's epilogue.",
        fix="Calibrate one range for the tensor and let all readers read one DequantizeLinear.",
    ),
    "narrow-product": Rule(
        severity="warning",
        says="Products with fewer than 16 inputs or outputs do not pay in 8 bits.",
        fix="Leave them in 16 bits.",
    ),
    "patch-embed": Rule(
        severity="note",
        says="The patch embedding reads pixels: its error reaches every layer, its time is small.",
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
        fix="Place the pairs that are missing, or remove the others.",
    ),
    "attention-softmax-scale": Rule(
        severity="warning",
        says="The softmax's output is at most 1; its FP8 scale is 1/448.",
        fix="Set it to 1/448.",
    ),
    "attention-scale-order": Rule(
        severity="warning",
        says="1/√d is multiplied into q, or its root into q and k, in front of q kᵀ; behind it, "
        "quantized attention is not fused.",
        fix="Move the factor in front of the pair of q.",
    ),
    "decomposed-norm": Rule(
        severity="note",
        says="Norms are LayerNormalization or RMSNormalization: written as Pow, ReduceMean and "
        "Sqrt they overflow float16, and the quantization behind them is not fused.",
        fix="Export with opset 23 or newer and native norms.",
    ),
}
