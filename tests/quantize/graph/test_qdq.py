"""Placing Q/DQ: the numbers a rewritten graph gives, and the rules of placement."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvl_edge.compiler.oracle.run_graph import runnable
from internvl_edge.errors import InternVLError
from internvl_edge.export.graph import trace as graphs
from internvl_edge.export.graph.bind import bind, save, weights_without_data
from internvl_edge.export.graph.dtypes import POLICIES, apply_policy
from internvl_edge.export.models.vit import RMSNorm
from internvl_edge.export.weights.writer import WeightsWriter
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX, QuantizedLinear, insert_qdq
from internvl_edge.quantize.graph.unsigned import take_unsigned_weights
from internvl_edge.quantize.lint import lint
from internvl_edge.quantize.numerics import formats
from internvl_edge.runtime.ort import opening
from internvl_edge.runtime.ort.cpu import products_saturate
from internvl_edge.runtime.ort.options import OrtOptions, native_options
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.types import Array

WIDTH, OUT = 32, 48


class Branches(nn.Module):
    """A norm read by two linear layers, and a third after an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = RMSNorm(WIDTH, 1e-6)
        self.q, self.k = nn.Linear(WIDTH, OUT, bias=False), nn.Linear(WIDTH, OUT)
        self.proj = nn.Linear(OUT, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x).to(self.q.weight.dtype)
        return (x + self.proj(F.gelu(self.q(h) + self.k(h))).to(x.dtype)).float()


SCALES = {"q.weight": 2.0**-5, "k.weight": 2.0**-5, "proj.weight": 0.05078125}


@pytest.fixture(scope="module")
def module() -> Branches:
    torch.manual_seed(0)
    return Branches().eval()


def quantized(
    module: Branches, directory: Path, fmt: str, base: str = "fp32", layers: Any = SCALES
) -> tuple[Path, ir.Model, dict[str, Any]]:
    """Trace, quantize and write; the path, the graph and the stored weights."""
    with torch.device("meta"):
        traced = Branches().eval()
    apply_policy(traced, POLICIES[base])
    example = torch.empty(2, 5, WIDTH, device="meta", dtype=traced.norm1.weight.dtype)
    model = graphs.trace(traced, [example], [{0: "batch"}], ["x"], ["y"])
    graphs.simplify(model)
    needed = weights_without_data([model])
    state = module.state_dict()
    tensors = {name: state[name].numpy() for name in needed}
    for name in layers:
        scale = formats.weight_scale(tensors[name], fmt, axis=0)
        values = formats.quantize(tensors[name], scale, fmt, axis=0)
        tensors[name], tensors[name + SCALE_SUFFIX] = np.ascontiguousarray(values.T), scale
    linears = {
        name: QuantizedLinear(weight=name, activation_scale=scale, format=fmt)
        for name, scale in layers.items()
    }
    assert insert_qdq(model, linears) == len(layers)
    sizes = {name: (t.dtype, t.shape) for name, t in tensors.items()}
    with WeightsWriter(directory / "w.safetensors", sizes) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
    bind(model, writer.stored, directory)
    save(model, directory / "m.onnx")
    return directory / "m.onnx", model, tensors


def by_hand(module: Branches, x: Array, fmt: str) -> Array:
    """The same computation in numpy, every pair an explicit fake quantization."""

    def linear(name: str, activation: Array) -> Array:
        layer = module.get_submodule(name)
        weight = layer.weight.detach().numpy()
        scale = formats.weight_scale(weight, fmt, axis=0)
        w = formats.fake_quantize(weight, scale, fmt, axis=0)
        a = formats.fake_quantize(activation, SCALES[f"{name}.weight"], fmt)
        bias = 0 if layer.bias is None else layer.bias.detach().numpy()
        return a @ w.T + bias

    with torch.inference_mode():
        h = module.norm1(torch.from_numpy(x)).numpy()
    return x + linear("proj", F.gelu(torch.from_numpy(linear("q", h) + linear("k", h))).numpy())


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_the_graph_computes_fake_quantization(module: Branches, tmp_path: Path, fmt: str) -> None:
    path, model, _ = quantized(module, tmp_path, fmt)
    if products_saturate():
        take_unsigned_weights(model)
        save(model, path)
    x = np.random.default_rng(1).standard_normal((3, 5, WIDTH)).astype(np.float32)
    (y,) = ort.InferenceSession(path).run(None, {"x": x})
    expected = by_hand(module, x, fmt)
    # one activation may round to the other neighbour where the norms differ in the last bit
    assert np.abs(y - expected).max() < 0.02
    assert np.abs(y - expected).mean() < 1e-4


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_placement(module: Branches, tmp_path: Path, fmt: str) -> None:
    _, model, _ = quantized(module, tmp_path, fmt)
    counts = Counter(node.op_type for node in model.graph)
    pairs = 3 if fmt == "int8" else 2  # q and k share the norm's pair, but for ONNX Runtime's int8
    assert counts["QuantizeLinear"] == pairs
    assert counts["DequantizeLinear"] == pairs + 3
    assert counts["Transpose"] == 0
    for node in model.graph:
        if node.op_type == "MatMul":
            assert [v.producer().op_type for v in node.inputs] == ["DequantizeLinear"] * 2
        if node.op_type == "QuantizeLinear":
            reader = {use.node.op_type for use in node.outputs[0].uses()}
            assert reader == {"DequantizeLinear"}


def test_every_product_of_8_bits_is_fused(
    module: Branches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime would dequantize the weights of others anew in every call."""
    path, _, _ = quantized(module, tmp_path, "int8")
    optimized = tmp_path / "optimized.onnx"

    def written(chosen: OrtOptions) -> Any:
        native = native_options(chosen)
        native.optimized_model_filepath = str(optimized)
        return native

    monkeypatch.setattr(opening, "native_options", written)
    with OrtSession(path):
        counts = Counter(node.op_type for node in ir.load(optimized).graph)
    names = ("MatMulIntegerToFloat", "MatMul", "DequantizeLinear")
    assert [counts[name] for name in names] == [3, 0, 0]


def test_a_pair_of_its_own_for_each_reader_keeps_the_rules(
    module: Branches, tmp_path: Path
) -> None:
    path, _, _ = quantized(module, tmp_path, "int8")
    assert "shared-pair" not in {found.rule for found in lint(path)}


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_products_of_a_16_bit_graph_are_in_bfloat16(
    module: Branches, tmp_path: Path, base: str, fmt: str
) -> None:
    _, model, _ = quantized(module, tmp_path, fmt, base)
    compute = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[base]
    for node in model.graph:
        if node.op_type == "QuantizeLinear":  # whose quotient is not to be rounded first
            assert (node.inputs[0].dtype, node.inputs[1].dtype) == (compute, ir.DataType.FLOAT)
        if node.op_type == "DequantizeLinear":  # else TensorRT-RTX does not multiply in 8 bits
            assert node.inputs[1].dtype == node.outputs[0].dtype == ir.DataType.BFLOAT16
            assert "output_dtype" not in node.attributes
        if node.op_type == "MatMul":
            assert node.outputs[0].dtype == ir.DataType.BFLOAT16
            readers = [use.node for use in node.outputs[0].uses()]
            assert readers
            if base == "fp16":
                assert [reader.op_type for reader in readers] == ["Cast"]
                assert readers[0].outputs[0].dtype == compute


@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_a_16_bit_graph_runs_and_agrees(module: Branches, tmp_path: Path, base: str) -> None:
    path, model, _ = quantized(module, tmp_path, "int8", base)
    x = np.random.default_rng(2).standard_normal((3, 5, WIDTH)).astype(np.float32)
    with OrtSession(path, graph=runnable(model), options=OrtOptions(exact=True)) as session:
        y = session.run({"x": x})["y"]
    bound = 0.05 if base == "fp16" else 0.1
    assert np.abs(y - by_hand(module, x, "int8")).max() < bound


def test_both_graphs_have_the_same_scales(module: Branches, tmp_path: Path) -> None:
    """What bfloat16 does not hold is not written, so that a cast to it changes no scale."""
    _, _, tensors = quantized(module, tmp_path, "int8", "fp16")
    stored = [values for name, values in tensors.items() if name.endswith(SCALE_SUFFIX)]
    assert stored
    for values in stored:
        np.testing.assert_array_equal(values, values.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_layers_left_out_keep_their_weights(module: Branches, tmp_path: Path) -> None:
    _, model, _ = quantized(module, tmp_path, "int8", layers={"proj.weight": 0.05})
    assert model.graph.initializers["q.weight"].dtype == ir.DataType.FLOAT
    assert model.graph.initializers["proj.weight"].dtype == ir.DataType.INT8
    counts = Counter(node.op_type for node in model.graph)
    assert (counts["QuantizeLinear"], counts["Transpose"]) == (1, 2)


def test_a_weight_that_is_no_linear_layer_is_refused(module: Branches) -> None:
    with torch.device("meta"):
        traced = Branches().eval()
    example = torch.empty(2, 5, WIDTH, device="meta")
    model = graphs.simplify(graphs.trace(traced, [example], [{0: "batch"}], ["x"], ["y"]))
    norm = QuantizedLinear(weight="norm1.weight", activation_scale=1.0, format="int8")
    with pytest.raises(InternVLError, match="expected one Transpose"):
        insert_qdq(model, {"norm1.weight": norm})
