"""The linter: one minimal graph per rule that breaks it and nothing else, ours, and a peer's."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.checkpoints import write_vit

from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.errors import ArtifactError, UsageError
from internvl_edge.quantize.lint import RULES, is_clean, lint
from internvl_edge.quantize.lint.view import FUSED
from internvl_edge.types import Array

WIDTH = 32
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
INT8 = np.dtype(np.int8)
MICROSOFT = "com.microsoft"
SCALE, SOFTMAX = np.float32(0.1), np.float32(1 / 448)


class Graph:
    """A graph written by hand; every method adds nodes and gives the name of its output."""

    def __init__(self, length: int = 5) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.inputs = {"x": ["batch", length, WIDTH]}
        self.opset = 23

    def constant(self, name: str, values: Any) -> str:
        self.constants[name] = np.asarray(values)
        return name

    def node(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def pair(
        self, x: str, *, scale: Any = SCALE, dtype: Any = INT8, zero: Any = 0, **a: Any
    ) -> str:
        stem = f"{x}_{len(self.nodes)}"
        parts = [self.constant(f"{stem}.scale", scale)]
        parts += [self.constant(f"{stem}.zero", np.full(np.shape(scale), zero).astype(dtype))]
        quantized = self.node("QuantizeLinear", x, *parts, **a)
        return self.node("DequantizeLinear", quantized, *parts, **a)

    def weight(self, name: str, *shape: int, dtype: Any = INT8, axis: int = 1, **a: Any) -> str:
        values = np.ones(shape).astype(dtype)
        scale = a.pop("scale", np.full(shape[axis], 0.01, np.float32))
        parts = [self.constant(name, values), self.constant(f"{name}.scale", scale)]
        return self.node("DequantizeLinear", *parts, axis=axis, **a)

    def linear(self, x: str, name: str = "w", features: int = WIDTH, dtype: Any = INT8) -> str:
        """A bias after a product of two pairs."""
        product = self.node("MatMul", x, self.weight(name, WIDTH, features, dtype=dtype))
        return self.node("Add", product, self.constant(f"{name}.bias", np.zeros(features, "f4")))

    def norm(self, x: str = "x") -> str:
        gain = self.constant(f"{x}.gain", np.ones(WIDTH, np.float32))
        return self.node("RMSNormalization", x, gain, axis=-1)

    def save(self, path: Path, output: str, *, external: bool = False) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "by_hand",
            [
                helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
                for n, s in self.inputs.items()
            ],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(values, name) for name, values in self.constants.items()],
        )
        domains = {"com.microsoft", *(node.domain for node in self.nodes)} - {""}
        opsets = [helper.make_opsetid(domain, 1) for domain in sorted(domains)]
        opsets.append(helper.make_opsetid("", self.opset))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
        onnx.save(model, path, **(options if external else {}))
        return path


def block(g: Graph, dtype: Any = INT8) -> str:
    """What a transformer does between two additions, as the rules want it."""
    hidden = g.linear(g.pair(g.norm(), dtype=dtype), "fc1", dtype=dtype)
    hidden = g.node("Gelu", hidden)
    return g.node("Add", "x", g.linear(g.pair(hidden, dtype=dtype), "fc2", dtype=dtype))


def attention(
    g: Graph,
    dtype: Any = FP8,
    softmax_scale: Any = SOFTMAX,
    heads: int = 2,
    pair_values: bool = True,
    factor: str = "",
    mask: int | None = None,
) -> str:
    """Self-attention of x in three steps, with pairs on q, k, v and the softmax."""
    shape = g.constant("split", np.array([0, 0, heads, WIDTH // heads], np.int64))
    split = g.node("Reshape", g.norm(), shape)  # (B, T, heads, d)
    orders = [0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]
    q, k, v = (g.node("Transpose", split, perm=order) for order in orders)
    quantized = [g.pair(value, dtype=dtype) for value in (q, k)]
    scores = g.node("MatMul", *quantized)
    if factor:
        scores = g.node(factor, scores, g.constant("factor", np.float32(0.25)))
    if mask is not None:  # the input of Add that it is
        terms = [scores, g.constant("mask", np.zeros((1, 1, 1, 1), np.float32))]
        scores = g.node("Add", *(terms[::-1] if mask == 0 else terms))
    weights = g.pair(g.node("Softmax", scores), scale=softmax_scale, dtype=dtype)
    return g.node("MatMul", weights, g.pair(v, dtype=dtype) if pair_values else v)


# --- each rule, broken --------------------------------------------------------------------------

BREAK: dict[str, Callable[[Graph], str]] = {}


def breaks(rule: str) -> Callable[[Callable[[Graph], str]], Callable[[Graph], str]]:
    def remember(build: Callable[[Graph], str]) -> Callable[[Graph], str]:
        BREAK[rule] = build
        return build

    return remember


@breaks("opset")
def _(g: Graph) -> str:
    g.opset = 17
    return g.linear(g.pair("x", dtype=FP8), dtype=FP8)


@breaks("fused-operator")
def _(g: Graph) -> str:
    return g.node("FusedMatMul", g.pair("x"), g.weight("w", WIDTH, WIDTH), domain=MICROSOFT)


@breaks("specification")
def _(g: Graph) -> str:
    dequantized = g.pair("x")
    g.nodes[0].attribute.append(helper.make_attribute("output_dtype", TensorProto.INT16))
    return g.linear(dequantized)


@breaks("not-judged")
def _(g: Graph) -> str:
    numbers = [g.constant(n, np.float32(v)) for n, v in (("s", 0.1), ("z", 0), ("bits", 4))]
    return g.node("Quant", block(g), *numbers, domain="qonnx.custom_op.general")


@breaks("not-quantized")
def _(g: Graph) -> str:
    return g.node("MatMul", "x", g.constant("w", np.ones((WIDTH, WIDTH), "f4")))


@breaks("operator-form")
def _(g: Graph) -> str:
    names = [g.constant(n, np.ones((WIDTH, WIDTH), np.int8)) for n in "ab"]
    return g.node("Cast", g.node("MatMulInteger", *names), to=TensorProto.FLOAT)


@breaks("unpaired")
def _(g: Graph) -> str:
    scale, zero = g.constant("s", np.float32(1)), g.constant("z", np.int8(0))
    return g.node("Cast", g.node("QuantizeLinear", "x", scale, zero), to=TensorProto.FLOAT)


@breaks("scale-mismatch")
def _(g: Graph) -> str:
    dequantized = g.pair("x")
    g.nodes[-1].input[1] = g.constant("other", np.float32(0.2))
    return g.linear(dequantized)


@breaks("scale-constant")
def _(g: Graph) -> str:
    g.inputs["scale"] = []
    dequantized = g.pair("x")
    for node in g.nodes:
        node.input[1] = "scale"
    return g.linear(dequantized)


@breaks("scale-value")
def _(g: Graph) -> str:
    return g.linear(g.pair("x", scale=np.float32(-0.1)))


@breaks("scale-type")
def _(g: Graph) -> str:
    x = g.node("Cast", "x", to=TensorProto.FLOAT16)
    x = g.node("Cast", g.pair(x, scale=np.float16(0.1)), to=TensorProto.FLOAT)
    return g.linear(x)


def narrow_product(g: Graph, scale: Any, declared: int) -> str:
    """A product in 8 bits of a graph that computes in ``declared``, with scales of another type."""
    x = g.node("Cast", "x", to=declared)
    zero = g.constant("zero", np.zeros((), np.int8))
    quantized = g.node("QuantizeLinear", x, g.constant("scale", SCALE), zero)
    out = {"output_dtype": declared}
    x = g.node("DequantizeLinear", quantized, g.constant("narrow", SCALE), zero, **out)
    weight = g.weight("w", WIDTH, WIDTH, scale=np.full(WIDTH, 0.01, scale), **out)
    return g.node("Cast", g.node("MatMul", x, weight), to=TensorProto.FLOAT)


@breaks("wide-sums")
def _(g: Graph) -> str:
    return narrow_product(g, np.float32, TensorProto.BFLOAT16)


@breaks("product-type")
def _(g: Graph) -> str:
    return narrow_product(g, ml_dtypes.bfloat16, TensorProto.FLOAT16)


@breaks("scale-shape")
def _(g: Graph) -> str:
    weight = g.weight("w", WIDTH, WIDTH, scale=np.full(WIDTH + 1, 0.01, np.float32))
    return g.node("MatMul", g.pair("x"), weight)


@breaks("scale-rank")
def _(g: Graph) -> str:
    weight = g.weight("w", WIDTH, WIDTH, scale=np.full((1, WIDTH), 0.01, np.float32))
    return g.node("MatMul", g.pair("x"), weight)


@breaks("zero-point")
def _(g: Graph) -> str:
    return g.linear(g.pair("x", zero=3))


@breaks("quantized-type")
def _(g: Graph) -> str:
    return g.linear(g.pair("x", dtype=np.uint8), "w", dtype=np.uint8)


@breaks("quantized-bias")
def _(g: Graph) -> str:
    product = g.node("MatMul", g.pair("x"), g.weight("w", WIDTH, WIDTH))
    return g.node("Add", product, g.weight("bias", WIDTH, dtype=np.int32, axis=0))


@breaks("activation-per-channel")
def _(g: Graph) -> str:
    return g.linear(g.pair("x", scale=np.full(WIDTH, 0.1, np.float32), axis=-1))


@breaks("weight-axis")
def _(g: Graph) -> str:
    return g.node("MatMul", g.pair("x"), g.weight("w", WIDTH, WIDTH, axis=0))


@breaks("weight-in-float")
def _(g: Graph) -> str:
    return g.node("MatMul", g.pair("x"), g.pair(g.constant("w", np.ones((WIDTH, WIDTH), "f4"))))


@breaks("fp8-hardware")
def _(g: Graph) -> str:
    return block(g, FP8)


@breaks("fp8-target")
def _(g: Graph) -> str:
    return block(g, FP8)


@breaks("missing-pair")
def _(g: Graph) -> str:
    return g.node("MatMul", g.pair("x"), g.constant("w", np.ones((WIDTH, WIDTH), np.float32)))


@breaks("weight-only")
def _(g: Graph) -> str:
    weight = g.constant("w", np.ones((WIDTH, WIDTH), np.int8))
    scale = g.constant("s", np.full(WIDTH, 0.1, np.float32))
    return g.node("MatMul", "x", g.node("DequantizeLinear", weight, scale, axis=1))


@breaks("mixed-formats")
def _(g: Graph) -> str:
    return g.linear(g.pair("x"), dtype=FP8)


@breaks("breaks-epilogue")
def _(g: Graph) -> str:
    return g.linear(g.pair(g.node("Gelu", g.pair(g.linear(g.pair("x"))))), "second")


@breaks("output-pair")
def _(g: Graph) -> str:
    return g.pair(g.linear(g.pair("x")))


@breaks("residual-trunk")
def _(g: Graph) -> str:
    return g.node("Add", g.pair("x"), g.linear(g.pair(g.norm())))


@breaks("quantized-nonlinear")
def _(g: Graph) -> str:
    return g.linear(g.pair(g.norm(g.pair("x"))))


@breaks("pair-without-product")
def _(g: Graph) -> str:
    return g.node("Neg", g.pair("x"))


@breaks("shared-pair")
def _(g: Graph) -> str:
    hidden = g.norm()
    first, second = (
        g.linear(g.pair(hidden, scale=np.float32(s)), f"w{i}") for i, s in enumerate((0.1, 0.2))
    )
    return g.node("Add", first, second)


@breaks("narrow-product")
def _(g: Graph) -> str:
    return g.linear(g.pair("x"), features=8)


@breaks("patch-embed")
def _(g: Graph) -> str:
    g.inputs["x"] = ["batch", 3, 8, 8]
    weight = g.weight("w", WIDTH, 3, 4, 4, axis=0)
    return g.node("Conv", g.pair("x"), weight, strides=[4, 4])


@breaks("attention-int8")
def _(g: Graph) -> str:
    return attention(g, INT8, np.float32(1 / 127), heads=4)  # of size 8


@breaks("attention-incomplete")
def _(g: Graph) -> str:
    heads = {"q_num_heads": 2, "kv_num_heads": 2}
    hidden = g.norm()
    pairs = [g.pair(hidden, dtype=FP8)] * 2
    return g.node("Attention", *pairs, hidden, **heads)


@breaks("attention-softmax-scale")
def _(g: Graph) -> str:
    return attention(g, softmax_scale=np.float32(1 / 127))


@breaks("attention-scale-order")
def _(g: Graph) -> str:
    return attention(g, factor="Mul")


@breaks("decomposed-norm")
def _(g: Graph) -> str:
    square = g.node("Pow", "x", g.constant("two", np.float32(2)))
    mean = g.node("ReduceMean", square, g.constant("axes", np.array([-1], np.int64)))
    root = g.node("Sqrt", g.node("Add", mean, g.constant("eps", np.float32(1e-6))))
    return g.linear(g.pair(g.node("Div", "x", root)))


@pytest.mark.parametrize("rule", RULES)
def test_a_graph_that_breaks_one_rule(rule: str, tmp_path: Path) -> None:
    g = Graph()
    path = g.save(tmp_path / "m.onnx", BREAK[rule](g))
    findings = lint(path, "sm86" if rule == "fp8-target" else None)
    is_fp8 = any(c.dtype == FP8 for c in g.constants.values())
    others = {"fp8-hardware"} if is_fp8 and rule != "fp8-target" else set()
    assert {found.rule for found in findings} == {rule} | others
    (found, *_) = [f for f in findings if f.rule == rule]
    assert found.found
    assert found.node
    assert is_clean(findings) == (found.severity == "note")


@pytest.mark.parametrize("dtype", [INT8, FP8])
def test_a_graph_that_keeps_every_rule(dtype: Any, tmp_path: Path) -> None:
    g = Graph()
    found = lint(g.save(tmp_path / "m.onnx", block(g, dtype)))
    assert [f.rule for f in found] == (["fp8-hardware"] if dtype == FP8 else [])


@pytest.mark.parametrize(
    ("target", "rules"),
    [(None, {"fp8-hardware"}), ("sm75", {"fp8-target"}), ("SM86", {"fp8-target"})]
    + [(target, set()) for target in ("sm89", "sm90", "sm120")],
)
def test_fp8_on_a_gpu(target: str | None, rules: set[str], tmp_path: Path) -> None:
    g = Graph()
    path = g.save(tmp_path / "fp8.onnx", block(g, FP8))
    assert {f.rule for f in lint(path, target)} == rules
    g = Graph()
    assert lint(g.save(tmp_path / "int8.onnx", block(g)), target) == []


@pytest.mark.parametrize("target", ["", "86", "sm8", "sm88", "hopper", "sm86,sm89"])
def test_a_gpu_that_is_not_known(target: str, tmp_path: Path) -> None:
    g = Graph()
    path = g.save(tmp_path / "m.onnx", block(g))
    with pytest.raises(UsageError, match=r"--gpu: expected one of sm75 \(Turing\), .*sm121"):
        lint(path, target)


# --- operators of ONNX Runtime and of other tools ------------------------------------------------


@pytest.mark.parametrize("op", sorted(FUSED - {"FusedConv"}))
@pytest.mark.parametrize("features", [8, WIDTH])
def test_fused_products_are_judged_as_products(op: str, features: int, tmp_path: Path) -> None:
    g = Graph()
    y = g.node(op, g.pair("x"), g.weight("w", WIDTH, features), domain=MICROSOFT)
    rules = {f.rule: f.found for f in lint(g.save(tmp_path / "m.onnx", y))}
    assert rules.pop("fused-operator") == f"{MICROSOFT}.{op}"
    assert rules == ({"narrow-product": "32 inputs and 8 outputs"} if features == 8 else {})


@pytest.mark.parametrize(("axis", "rules"), [(0, set()), (1, {"weight-axis"})])
def test_the_axis_of_a_weight_that_a_fused_product_transposes(
    axis: int, rules: set[str], tmp_path: Path
) -> None:
    g = Graph()
    weight = g.weight("w", 64, WIDTH, axis=axis)
    y = g.node("FusedMatMul", g.pair("x"), weight, transB=1, domain=MICROSOFT)
    found = {f.rule for f in lint(g.save(tmp_path / "m.onnx", y))}
    assert found == {"fused-operator", *rules}


@pytest.mark.parametrize("op", ["MyProduct", "SkipSomething"])
def test_an_operator_that_reads_a_pair_is_not_judged(op: str, tmp_path: Path) -> None:
    g = Graph()
    y = g.node(op, g.pair("x"), domain="mine")
    (found,) = lint(g.save(tmp_path / "m.onnx", y))
    assert (found.rule, found.found) == ("not-judged", f"mine.{op}")


def _nbits(g: Graph, features: int) -> str:
    parts = [
        g.constant("w", np.zeros((features, 1, 16), np.uint8)),
        g.constant("w.scales", np.ones(features, np.float32)),
    ]
    sizes = {"K": WIDTH, "N": features, "bits": 4, "block_size": WIDTH}
    return g.node("MatMulNBits", "x", *parts, domain=MICROSOFT, **sizes)


def _integer(op: str) -> Callable[[Graph, int], str]:
    def build(g: Graph, features: int) -> str:
        shape = (features, WIDTH) if op == "QGemm" else (WIDTH, features)
        weight = g.constant("w", np.ones(shape, np.int8))
        ends = g.constant("s", SCALE), g.constant("z", np.int8(0))
        x = g.node("QuantizeLinear", "x", *ends)
        if op == "MatMulInteger":
            return g.node(op, x, weight)
        if op == "QGemm":
            return g.node(op, x, *ends, weight, *ends, transB=1, domain=MICROSOFT)
        return g.node(op, x, *ends, weight, *ends, *ends)

    return build


@pytest.mark.parametrize(
    "build",
    [_nbits, *map(_integer, ("QLinearMatMul", "QGemm", "MatMulInteger"))],
    ids=["MatMulNBits", "QLinearMatMul", "QGemm", "MatMulInteger"],
)
@pytest.mark.parametrize("features", [15, 16])
def test_operators_that_multiply_in_8_bits_are_narrow_too(
    build: Callable[[Graph, int], str], features: int, tmp_path: Path
) -> None:
    g = Graph()
    found = lint(g.save(tmp_path / "m.onnx", build(g, features)))
    narrow = [f.found for f in found if f.rule == "narrow-product"]
    assert narrow == ["32 inputs and 15 outputs"] * (features < 16)


@pytest.mark.parametrize(
    ("stored", "to", "rules"),
    [
        (np.float32(0.1), TensorProto.FLOAT16, ["scale-type"]),
        (np.float32(3e-5), TensorProto.FLOAT16, ["scale-type", "scale-value"]),  # denormal
        (np.float32(1e-8), TensorProto.FLOAT16, ["scale-type", "scale-value"]),  # zero
        (np.float32(1e5), TensorProto.FLOAT16, ["scale-type", "scale-value"]),  # infinite
        (np.float32(1e-8), TensorProto.BFLOAT16, []),
        (np.float16(0.1), TensorProto.FLOAT, ["scale-type"]),
        (np.float16(3e-5), TensorProto.FLOAT, ["scale-type", "scale-value"]),
    ],
)
def test_scales_that_are_cast_are_judged_as_they_arrive(
    stored: Any, to: int, rules: list[str], tmp_path: Path
) -> None:
    g = Graph()
    cast = g.node("Cast", g.constant("s", stored), to=to)
    scale = g.node("Identity", cast)
    x = "x" if to == TensorProto.FLOAT else g.node("Cast", "x", to=to)
    zero = g.constant("z", np.int8(0))
    pair = g.node("DequantizeLinear", g.node("QuantizeLinear", x, scale, zero), scale, zero)
    found = lint(g.save(tmp_path / "m.onnx", g.node("MatMul", pair, pair)))
    assert [f.rule for f in found if f.rule.startswith("scale-")] == rules
    assert all(f.severity == "note" for f in found if f.rule == "scale-type")


@pytest.mark.parametrize(
    ("opset", "dtype", "needed"), [(12, INT8, 13), (17, FP8, 19), (19, "int4", 21)]
)
def test_the_advice_of_the_opset_names_the_one_that_is_needed(
    opset: int, dtype: Any, needed: int, tmp_path: Path
) -> None:
    g = Graph()
    g.opset = opset
    kind = np.dtype(ml_dtypes.int4) if isinstance(dtype, str) else dtype
    path = g.save(tmp_path / "m.onnx", g.node("MatMul", "x", g.weight("w", 64, 64, dtype=kind)))
    (found,) = [f for f in lint(path) if f.rule == "opset"]
    assert found.found.endswith(f"in opset {opset}; it needs {needed}")
    assert "the one that is named" in RULES["opset"].fix


@pytest.mark.parametrize("shape", [(WIDTH, 1), (1, WIDTH), (1, 1)])
def test_scales_of_two_dimensions(shape: tuple[int, int], tmp_path: Path) -> None:
    g = Graph()
    weight = g.weight("w", WIDTH, WIDTH, scale=np.full(shape, 0.01, np.float32))
    (found,) = lint(g.save(tmp_path / "m.onnx", g.node("MatMul", g.pair("x"), weight)))
    assert (found.rule, found.severity) == ("scale-rank", "error")
    assert f"[{shape[0]},{shape[1]}]" in found.found
    g = Graph()
    (found,) = lint(g.save(tmp_path / "a.onnx", g.linear(g.pair("x", scale=[[SCALE]]))))
    assert found.rule == "scale-rank"


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scales_of_a_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    g = Graph()
    y = g.linear(g.pair("x", scale=np.full(shape, SCALE, np.float32)))
    assert lint(g.save(tmp_path / "m.onnx", y)) == []


def tower(g: Graph, name: str, *paired: bool) -> str:
    """Linear layers, one after the other, with a pair on their inputs or without."""
    y = "x"
    for i, has_pair in enumerate(paired):
        y = g.linear(g.norm(y) if not has_pair else g.pair(g.norm(y)), f"{name}.{i}.fc.weight")
    return y


@pytest.mark.parametrize(
    ("language", "rules"),
    [((False, False), {"weight-only"}), ((True, False), {"missing-pair"}), ((True, True), set())],
)
def test_weights_alone_in_one_of_two_towers(
    language: tuple[bool, ...], rules: set[str], tmp_path: Path
) -> None:
    """A family of layers whose inputs are all left alone misses nothing."""
    g = Graph()
    y = g.node("Add", tower(g, "vision.layers", True, True), tower(g, "llama.layers", *language))
    findings = lint(g.save(tmp_path / "m.onnx", y))
    assert {f.rule for f in findings} - {"shared-pair"} == rules
    assert is_clean(findings) == (rules != {"missing-pair"})


def test_weights_alone_next_to_pairs_without_names(tmp_path: Path) -> None:
    g = Graph()
    g.linear(g.pair("x"), "onnx::MatMul_12")
    y = g.node("Add", g.nodes[-1].output[0], g.linear("x", "onnx::MatMul_13"))
    assert {f.rule for f in lint(g.save(tmp_path / "m.onnx", y))} == {"missing-pair"}


def test_fp8_attention_in_the_form_that_is_fused(tmp_path: Path) -> None:
    g = Graph()
    assert {f.rule for f in lint(g.save(tmp_path / "m.onnx", attention(g)))} == {"fp8-hardware"}


@pytest.mark.parametrize(("heads", "length", "clean"), [(2, 512, True), (2, 513, False)])
def test_int8_attention_fits_or_does_not(
    heads: int, length: int, clean: bool, tmp_path: Path
) -> None:
    g = Graph(length)
    path = g.save(tmp_path / "m.onnx", attention(g, INT8, np.float32(1 / 127), heads))
    assert is_clean(lint(path)) is clean


@pytest.mark.parametrize("mask", [0, 1])
def test_a_mask_hides_no_attention(mask: int, tmp_path: Path) -> None:
    g = Graph(513)
    output = attention(g, INT8, np.float32(1 / 127), mask=mask)
    assert "attention-int8" in {f.rule for f in lint(g.save(tmp_path / "m.onnx", output))}


def test_attention_without_a_pair_on_v(tmp_path: Path) -> None:
    g = Graph()
    rules = {f.rule for f in lint(g.save(tmp_path / "m.onnx", attention(g, pair_values=False)))}
    assert rules == {"fp8-hardware", "missing-pair", "attention-incomplete"}


@pytest.mark.parametrize(
    ("value", "says"), [(0.0, "zero"), (np.nan, "NaN"), (np.inf, "NaN"), (1e-40, "denormal")]
)
def test_values_that_no_scale_may_have(value: float, says: str, tmp_path: Path) -> None:
    g = Graph()
    (found,) = lint(g.save(tmp_path / "m.onnx", g.linear(g.pair("x", scale=np.float32(value)))))
    assert found.rule == "scale-value"
    assert says in found.found


@pytest.mark.parametrize(("transposed", "axis", "clean"), [(1, 0, True), (1, 1, False)])
def test_axes_after_transposes(transposed: int, axis: int, clean: bool, tmp_path: Path) -> None:
    """(N, K) weights that a Transpose brings to the product, and a Gemm that transposes itself."""
    g = Graph()
    weight = g.node("Transpose", g.weight("w", 64, WIDTH, axis=axis), perm=[1, 0])
    first = g.node("MatMul", g.pair("x"), weight)
    found = lint(g.save(tmp_path / "m.onnx", first))
    assert {f.rule for f in found} == (set() if clean else {"weight-axis"})
    g = Graph()
    g.inputs["x"] = ["batch", WIDTH]
    weight = g.weight("w", 64, WIDTH, axis=axis)
    found = lint(g.save(tmp_path / "m.onnx", g.node("Gemm", g.pair("x"), weight, transB=1)))
    assert {f.rule for f in found} == (set() if clean else {"weight-axis"})


@pytest.mark.parametrize(("dtype", "rules"), [(FP8, ["fp8-hardware", "shared-pair"]), (INT8, [])])
def test_two_pairs_of_one_scale_are_a_note(dtype: Any, rules: list[str], tmp_path: Path) -> None:
    """ONNX Runtime's INT8 kernels need them."""
    g = Graph()
    y = g.node("Add", *(g.linear(g.pair("x", dtype=dtype), f"w{i}", dtype=dtype) for i in "ab"))
    findings = lint(g.save(tmp_path / "m.onnx", y))
    assert sorted({f.rule for f in findings}) == rules
    assert is_clean(findings)


def test_weights_are_not_needed(tmp_path: Path) -> None:
    """Scales are judged where their file is there; the graph is, in any case."""
    g = Graph()
    y = g.linear(g.pair("x", scale=np.float32(np.nan)), features=8)
    path = g.save(tmp_path / "m.onnx", y, external=True)
    assert {f.rule for f in lint(path)} == {"narrow-product", "scale-value"}
    (tmp_path / "w.bin").unlink()
    assert {f.rule for f in lint(path)} == {"narrow-product"}


def test_more_than_two_gigabytes_of_weights(tmp_path: Path) -> None:
    g = Graph()
    y = g.linear(g.pair("x"))
    path = g.save(tmp_path / "m.onnx", y)
    model = onnx.load(path)
    (weight,) = [t for t in model.graph.initializer if t.name == "w"]
    weight.ClearField("raw_data")
    weight.dims[:] = [WIDTH, 2**27]
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "big.bin"), ("length", str(WIDTH * 2**27))):
        weight.external_data.add(key=key, value=value)
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(WIDTH * 2**27)  # 4 GiB of a hole
    onnx.save(model, path)
    assert {f.rule for f in lint(path)} == {"scale-shape"}


# --- the specification ---------------------------------------------------------------------------

FLOATS = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}
QUANTIZED = {n: np.dtype(getattr(ml_dtypes, n, n)) for n in ("int8", "uint8", "int16", "int4")}
QUANTIZED |= {n: np.dtype(getattr(ml_dtypes, n)) for n in ("uint4", "float8_e4m3fn")}
FORMS = [
    {
        "opset": opset,
        "x": FLOATS[x],
        "scale": FLOATS[scale],
        "dtype": QUANTIZED[dtype],
        "form": form,
    }
    for opset in (13, 17, 19, 21, 23)
    for x in FLOATS
    for scale in FLOATS
    for dtype in QUANTIZED
    for form in ("zero point", "output_dtype", "blocks")
]


def quantizer(
    g: Graph, opset: int, x: np.dtype[Any], scale: np.dtype[Any], dtype: np.dtype[Any], form: str
) -> str:
    """Round x once in a form that opsets have or have not; back in float32."""
    g.opset = opset
    source = g.node("Cast", "x", to=helper.np_dtype_to_tensor_dtype(x))
    shape = (1, 5, WIDTH // 8) if form == "blocks" else ()
    names = [g.constant("scale", np.full(shape, 0.1).astype(scale))]
    attributes: dict[str, Any] = {}
    if form == "output_dtype":
        attributes["output_dtype"] = helper.np_dtype_to_tensor_dtype(dtype)
    else:
        names.append(g.constant("zero", np.zeros(shape).astype(dtype)))
    if form == "blocks":
        g.inputs["x"] = [1, 5, WIDTH]
        attributes |= {"axis": 2, "block_size": 8}
    quantized = g.node("QuantizeLinear", source, *names, **attributes)
    attributes.pop("output_dtype", None)
    back = g.node("DequantizeLinear", quantized, *names, **attributes)
    return g.node("Cast", back, to=TensorProto.FLOAT)


def is_taken(path: Path) -> bool:
    """Ask ONNX Runtime whether a graph is valid; a kernel that is missing is another matter."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except states.NotImplemented:
        return True
    except (states.InvalidGraph, states.Fail, states.InvalidArgument):
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(form=st.sampled_from(FORMS))
def test_what_an_opset_has_is_what_onnx_runtime_takes(form: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        g = Graph()
        path = g.save(Path(folder) / "m.onnx", quantizer(g, **form))
        rules = {f.rule for f in lint(path)}
        assert ("opset" in rules) is not is_taken(path), form
        assert "specification" not in rules


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (
            {"opset": 19, "form": "output_dtype"},
            "no attribute output_dtype in opset 19; it needs 21",
        ),
        ({"opset": 19, "form": "blocks"}, "no attribute block_size in opset 19; it needs 21"),
        ({"opset": 19, "dtype": QUANTIZED["int4"]}, "in INT4 in opset 19; it needs 21"),
        ({"opset": 17, "dtype": FP8}, "in FLOAT8E4M3FN in opset 17; it needs 19"),
        ({"opset": 21, "x": np.dtype("f2")}, "x in FLOAT16 with y_scale in FLOAT .*needs 23"),
        ({"opset": 17, "x": np.dtype("f2"), "scale": np.dtype("f2")}, "in FLOAT16 .*needs 19"),
    ],
)
def test_what_came_later_is_named(form: dict[str, Any], says: str, tmp_path: Path) -> None:
    defaults = {"x": FLOATS["float32"], "scale": FLOATS["float32"], "dtype": INT8}
    g = Graph()
    y = quantizer(g, **{**defaults, "form": "zero point", **form})
    found = [f.found for f in lint(g.save(tmp_path / "m.onnx", y)) if f.rule == "opset"]
    assert any(re.search(says, text) for text in found), found


@pytest.mark.parametrize(("opset", "clean"), [(19, False), (21, True), (23, True)])
def test_output_dtype_of_a_quantizer(opset: int, clean: bool, tmp_path: Path) -> None:
    g = Graph()
    g.opset = opset
    names = [g.constant("s", SCALE)]
    quantized = g.node("QuantizeLinear", "x", *names, output_dtype=TensorProto.INT8)
    y = g.linear(g.node("DequantizeLinear", quantized, *names))
    assert (lint(g.save(tmp_path / "m.onnx", y)) == []) is clean


@pytest.mark.parametrize(("rows", "clean"), [(2, True), (3, False), (1, False)])
def test_scales_of_blocks(rows: int, clean: bool, tmp_path: Path) -> None:
    g = Graph()
    scale = np.full((rows, WIDTH), 0.01, np.float32)
    weight = g.weight("w", WIDTH, WIDTH, axis=0, scale=scale, block_size=16)
    findings = lint(g.save(tmp_path / "m.onnx", g.node("MatMul", "x", weight)))
    assert {f.rule for f in findings} == {"weight-only"} | (set() if clean else {"scale-shape"})


# --- operators of other tools --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "op"),
    [
        ("com.microsoft", "MatMulNBits"),
        ("com.microsoft", "MatMulBnb4"),
        ("com.microsoft", "GatherBlockQuantized"),
        ("com.microsoft", "QMoE"),
        ("com.microsoft", "QOrderedMatMul"),
        ("trt", "TRT_FP8QuantizeLinear"),
        ("trt", "TRT_INT4DequantizeLinear"),
        ("trt", "TRT_FP4DynamicQuantize"),
        ("qonnx.custom_op.general", "BipolarQuant"),
        ("qonnx.custom_op.general", "Trunc"),
        ("onnx.brevitas", "Quant"),
        ("com.amd.quark", "BFPQuantizeDequantize"),
        ("quantized", "linear"),
        ("", "FakeQuantize"),
        ("some.tool", "LinearW8A16"),  # by its weight of 8 bits
    ],
)
@pytest.mark.parametrize("is_alone", [True, False])
def test_operators_that_no_rule_judges(
    domain: str, op: str, is_alone: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    g = Graph()
    weight = g.constant("packed", np.zeros((WIDTH, WIDTH), np.uint8))
    y = g.node(op, "x" if is_alone else block(g), weight, domain=domain)
    path = g.save(tmp_path / "m.onnx", y)
    (found,) = lint(path)
    assert (found.rule, found.found) == ("not-judged", f"{domain or 'ai.onnx'}.{op}")
    assert run(["lint", str(path)]) == 6
    assert "kept" not in capsys.readouterr().out


def test_operators_of_other_domains_that_do_not_quantize(tmp_path: Path) -> None:
    g = Graph()
    y = g.node("QuickGelu", g.linear(g.pair("x")), domain="com.microsoft")
    assert lint(g.save(tmp_path / "m.onnx", g.linear(g.pair(y), "second"))) == []


def test_operators_on_integers_of_every_name(tmp_path: Path) -> None:
    g = Graph()
    names = [g.constant(n, v) for n, v in (("s", SCALE), ("z", np.uint8(0)))]
    y = g.node("Cast", g.node("QLinearSigmoid", "x", *names, *names), to=TensorProto.FLOAT)
    g.nodes[0].domain = "com.microsoft"
    assert {f.rule for f in lint(g.save(tmp_path / "m.onnx", y))} == {"operator-form"}


def test_a_graph_in_float_is_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = Graph()
    y = g.node("MatMul", g.norm(), g.constant("w", np.ones((WIDTH, WIDTH), "f4")))
    assert run(["lint", str(g.save(tmp_path / "m.onnx", y))]) == 0
    shown = capsys.readouterr().out
    assert "nothing was judged" in shown
    assert "kept" not in shown


# --- constants -----------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Graph, str], str]] = {
    "Identity": lambda g, name: g.node("Identity", name),
    "Reshape": lambda g, name: g.node("Reshape", name, g.constant("no_axes", np.array([], "i8"))),
    "Cast": lambda g, name: g.node("Cast", name, to=TensorProto.FLOAT),
    "Squeeze": lambda g, name: g.node("Squeeze", name),
    "Constant": lambda g, name: g.node(
        "Constant", value=numpy_helper.from_array(g.constants.pop(name))
    ),
    "Div": lambda g, name: g.node("Div", name, g.constant("two", np.float32(2))),
    "Sqrt": lambda g, name: g.node("Sqrt", g.node("Mul", name, name)),
}


@pytest.mark.parametrize("steps", [*([step] for step in STEPS), ["Identity", "Reshape", "Cast"]])
def test_constants_after_steps(steps: list[str], tmp_path: Path) -> None:
    """What follows from stored values alone is a constant: scales, and zero points."""
    g = Graph()
    scale, zero = g.constant("s", SCALE), g.node("Identity", g.constant("z", np.int8(0)))
    for step in steps:
        scale = STEPS[step](g, scale)
    y = g.linear(
        g.node("DequantizeLinear", g.node("QuantizeLinear", "x", scale, zero), scale, zero)
    )
    assert lint(g.save(tmp_path / "m.onnx", y)) == []


@pytest.mark.parametrize("step", ["Identity", "Reshape", "Cast", "Squeeze", "Constant"])
def test_values_after_steps_are_judged(step: str, tmp_path: Path) -> None:
    g = Graph()
    scales = [STEPS[step](g, g.constant(name, v)) for name, v in (("s", SCALE), ("t", 2 * SCALE))]
    zero = g.node("Identity", g.constant("z", np.int8(3)))
    quantized = g.node("QuantizeLinear", "x", scales[0], zero)
    y = g.linear(g.node("DequantizeLinear", quantized, scales[1], zero))
    rules = {f.rule for f in lint(g.save(tmp_path / "m.onnx", y))}
    assert rules == {"scale-mismatch", "zero-point"}
    g = Graph()
    bad = STEPS[step](g, g.constant("s", np.float32(-1)))
    zero = g.constant("z", np.int8(0))
    y = g.linear(g.node("DequantizeLinear", g.node("QuantizeLinear", "x", bad, zero), bad, zero))
    assert {f.rule for f in lint(g.save(tmp_path / "m.onnx", y))} == {"scale-value"}


@pytest.mark.parametrize("source", ["x", "RandomNormal", "pair"])
def test_scales_that_do_not_follow_from_constants(source: str, tmp_path: Path) -> None:
    g = Graph()
    if source == "x":
        scale = g.node("ReduceMax", "x", keepdims=0)
    elif source == "pair":
        scale = g.node("ReduceMax", g.pair("x"), keepdims=0)
    else:
        scale = g.node("RandomNormal", shape=[1])
    zero = g.constant("z", np.int8(0))
    scale = g.node("Identity", scale)
    y = g.linear(
        g.node("DequantizeLinear", g.node("QuantizeLinear", "x", scale, zero), scale, zero)
    )
    assert "scale-constant" in {f.rule for f in lint(g.save(tmp_path / "m.onnx", y))}


def test_a_weight_after_steps_is_a_weight(tmp_path: Path) -> None:
    g = Graph()
    weight = g.constant("w", np.ones((WIDTH, WIDTH), np.int8))
    names = [g.node("Identity", weight), g.constant("s", np.full(WIDTH, 0.01, np.float32))]
    y = g.node("MatMul", g.pair("x"), g.node("DequantizeLinear", *names, axis=0))
    assert {f.rule for f in lint(g.save(tmp_path / "m.onnx", y))} == {"weight-axis"}


def test_scales_of_blocks_that_are_stored_quantized(tmp_path: Path) -> None:
    """As in NVFP4: the scales of the blocks are in E4M3, with a scale of their own."""
    g = Graph()
    scale = np.ones((2, WIDTH)).astype(FP8)
    scales = g.weight("ws", *scale.shape, dtype=FP8, scale=np.float32(0.1))
    values = g.constant("w", np.ones((WIDTH, WIDTH)).astype(ml_dtypes.float4_e2m1fn))
    weight = g.node("DequantizeLinear", values, scales, axis=0, block_size=16)
    found = {f.rule for f in lint(g.save(tmp_path / "m.onnx", g.node("MatMul", "x", weight)))}
    assert "scale-constant" not in found


# --- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_what_we_export_is_clean(precision: str, tmp_path: Path) -> None:
    checkpoint = write_vit(tmp_path / "checkpoint").path
    options = ExportOptions(
        checkpoint=checkpoint, out=tmp_path / "out", precision=precision, verify="none"
    )
    export(options)
    graphs = [tmp_path / "out" / f"vision{base}.onnx" for base in ("", ".fp16")]
    for path in graphs:
        allowed = {"fp8-hardware"} if precision == "fp8" else set()
        assert {found.rule for found in lint(path)} == allowed


def test_what_onnx_runtime_quantizes_is_explained(tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    checkpoint = write_vit(tmp_path / "checkpoint").path
    options = ExportOptions(checkpoint=checkpoint, out=tmp_path / "out", verify="none")
    artifact = export(options)

    class Noise(CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{"pixel_values": np.ones((1, 3, 28, 28), np.float32)}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    path = tmp_path / "ort.onnx"
    quantize_static(
        str(artifact.onnx_path("vision")), str(path), Noise(), quant_format=QuantFormat.QDQ
    )
    found = lint(path)
    assert not is_clean(found)
    rules = {f.rule for f in found}
    assert {"zero-point", "breaks-epilogue", "residual-trunk", "patch-embed"} <= rules
    assert "scale-mismatch" not in rules


# --- hostile files and the command ---------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"not ONNX at all", b"\x3a\x7f", bytes(64), b"\x08\x08\x3a\x02\x12\x00"]
)
def test_what_is_not_onnx_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        lint(path)


def test_a_file_that_is_not_there_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        lint(tmp_path / "none.onnx")
    with pytest.raises(ArtifactError, match=r"expected FILE\.onnx, found a folder"):
        lint(tmp_path)


def test_a_graph_that_bites_its_tail(tmp_path: Path) -> None:
    g = Graph()
    g.node("Transpose", "b", output="a")
    g.node("Transpose", "a", output="b")
    path = g.save(tmp_path / "m.onnx", g.node("MatMul", "a", "b"))
    try:
        lint(path)  # whatever it says, it ends
    except ArtifactError as error:
        assert "m.onnx" in str(error)


def test_scales_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    g = Graph()
    path = g.save(tmp_path / "m.onnx", g.linear(g.pair("x")))
    (tmp_path / "secret.bin").write_bytes(np.float32(np.nan).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    model = onnx.load(path)
    (scale,) = [t for t in model.graph.initializer if t.name == "x_0.scale"]
    scale.ClearField("raw_data")
    scale.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../secret.bin"), ("length", "4")):
        scale.external_data.add(key=key, value=value)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    assert lint(folder / "m.onnx") == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = Graph()
    bad = str(g.save(tmp_path / "bad.onnx", g.pair(g.linear(g.pair("x")))))
    assert run(["lint", bad]) == 6
    shown = capsys.readouterr().out
    assert "warning output-pair: 1 place(s)" in shown
    assert RULES["output-pair"].fix in shown
    assert run(["lint", bad, "--json"]) == 6
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["clean"] is False
    assert answer["counts"] == {"output-pair": 1}
    assert answer["findings"][0].keys() == {"rule", "severity", "node", "found", "says", "fix"}
    g = Graph()
    good = str(g.save(tmp_path / "good.onnx", block(g)))
    assert run(["lint", good, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clean"] is True
    assert run(["lint", str(tmp_path / "none.onnx")]) == 3


def test_the_command_for_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    g = Graph()
    path = str(g.save(tmp_path / "m.onnx", block(g, FP8)))
    assert run(["lint", path]) == 0
    assert run(["lint", path, "--gpu", "sm89"]) == 0
    capsys.readouterr()
    assert run(["lint", path, "--gpu", "sm86"]) == 6
    assert "error fp8-target: 1 place(s)" in capsys.readouterr().out
    assert run(["lint", path, "--gpu", "sm1"]) == 2
    assert "sm86 (Ampere)" in capsys.readouterr().err


def test_tensors_of_many_dimensions_are_refused_before_a_parser_multiplies_them(
    tmp_path: Path,
) -> None:
    g = Graph()
    path = g.save(tmp_path / "m.onnx", block(g))
    model = onnx.load(path)
    model.graph.initializer[0].dims.extend([1] * 50_000)
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match=r"m\.onnx: tensor '.*': 5000\d dimensions, at most 64"):
        lint(path)
