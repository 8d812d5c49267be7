"""FP8 attention: what is observed, the graph, what it computes, and that a mistake is caught."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.checkpoints import Written, write_vit

from internvl_edge import compiler
from internvl_edge.artifact.open import Artifact
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import InputError, InternVLError, VerificationError
from internvl_edge.export.models.vit import AttentionCore
from internvl_edge.quantize.calibration.attention import (
    SOFTMAX_SCALE,
    AttentionScales,
    scales_by_attention,
    watching_attention,
)
from internvl_edge.quantize.graph import qdq
from internvl_edge.quantize.lint import lint
from internvl_edge.quantize.numerics import formats
from internvl_edge.quantize.recipe import Recipe, recipe_for
from internvl_edge.runtime import open_session

RECIPE = replace(recipe_for("fp8"), name="fp8-attention", attention="fp8", num_samples=8)
STEM = "vision_model.encoder.layers.{}.attn.core"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_vit(tmp_path_factory.mktemp("vit") / "vit", seed=3)


def exported(vit: Written, out: Path, recipe: Recipe = RECIPE) -> Artifact:
    return compiler.export(
        ExportOptions(checkpoint=vit.path, out=out, precision="fp8", recipe=recipe)
    )


@pytest.fixture(scope="module")
def artifact(vit: Written, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(vit, tmp_path_factory.mktemp("out") / "out")


def graphs(artifact: Artifact) -> list[ir.Model]:
    return [ir.load(path) for path in sorted(artifact.path.glob("vision*.onnx"))]


# --- what is seen --------------------------------------------------------------------------------


def test_operands_are_observed_with_the_query_scaled() -> None:
    core = AttentionCore(2)
    q, k, v = (torch.full((1, 3, 8), value) for value in (6.0, 5.0, -7.0))
    with watching_attention({"a": core}) as observers:
        core(q, k, v)
    assert {name: o.absmax for name, o in observers.items()} == {
        "a.query": pytest.approx(3.0),  # 6 / √4
        "a.key": 5.0,
        "a.value": 7.0,
    }
    with watching_attention({"a": core}) as observers:
        pass
    core(q, k, v)
    assert not observers, "nothing is watched after the context"


def test_scales_are_found_among_others() -> None:
    scales: dict[str, float | None] = {
        "a.query": 1.0,
        "a.key": 2.0,
        "a.value": 3.0,
        "a.weight": 4.0,
    }
    scales |= {"a.weight": 4.0, "b.query": None, "b.key": None, "b.value": None}
    assert scales_by_attention(scales) == {"a": AttentionScales(query=1.0, key=2.0, value=3.0)}


# --- the graph -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_graphs_have_four_pairs_per_block_and_no_attention_left(artifact: Artifact) -> None:
    found = graphs(artifact)
    assert len(found) == 2, "one for ONNX Runtime, one for engines"
    for model in found:
        ops = Counter(node.op_type for node in model.graph)
        depth = ops["Softmax"]
        assert depth > 1
        assert ops["Attention"] == 0
        nodes = {str(node.name): node for node in model.graph}
        for block in range(depth):
            stem = STEM.format(block)
            pairs = {
                name.removeprefix(f"{stem}.")
                for name in nodes
                if name.startswith(stem) and name.endswith("/QuantizeLinear")
            }
            before = {f"{name}/Transpose/QuantizeLinear" for name in ("query", "key", "value")}
            after = "mixed/Reshape/QuantizeLinear"  # the projection's
            assert pairs == before | {"softmax/Softmax/QuantizeLinear", after}
            scale = model.graph.initializers[f"{stem}.softmax/Softmax.scale"].const_value
            assert scale is not None
            assert scale.numpy() == np.float32(SOFTMAX_SCALE)


def test_the_linter_finds_nothing(artifact: Artifact) -> None:
    for path in artifact.path.glob("vision*.onnx"):
        assert [f for f in lint(path) if f.severity == "error"] == []


@pytest.mark.slow
def test_one_block_may_be_left_out(vit: Written, tmp_path: Path) -> None:
    recipe = replace(RECIPE, exclude=(STEM.format(1).replace(".", r"\."),))
    model = graphs(exported(vit, tmp_path / "out", recipe))[0]
    kept = [str(node.name) for node in model.graph if node.op_type == "Attention"]
    assert kept == [f"{STEM.format(1)}/Attention"]


def test_masks_are_refused() -> None:
    x = ir.Value(name="x", shape=ir.Shape(["B", 3, 8]), type=ir.TensorType(ir.DataType.FLOAT))
    heads = {"q_num_heads": 2, "kv_num_heads": 2}
    node = ir.node("Attention", [x, x, x, x], heads, name="a/Attention")
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23})
    scales = AttentionScales(query=1.0, key=1.0, value=1.0)
    with pytest.raises(InternVLError, match="no mask"):
        qdq.insert_attention_qdq(ir.Model(graph, ir_version=11), {"a": scales})


# --- what it computes ----------------------------------------------------------------------------


def test_it_stays_near_fp32_and_costs_something(
    vit: Written, artifact: Artifact, tmp_path: Path
) -> None:
    plain = exported(vit, tmp_path / "plain", replace(RECIPE, name="plain", attention=None))
    exact = compiler.export(ExportOptions(checkpoint=vit.path, out=tmp_path / "fp32"))
    pixels = np.random.default_rng(0).standard_normal((4, 3, 28, 28)).astype(np.float32)
    name = "last_hidden_state"

    def run(a: Artifact) -> Any:
        with open_session(a.path, "vision") as session:
            return session.run({"pixel_values": pixels})[name]

    expected = run(exact)
    with_attention, without = (formats.sqnr_db(expected, run(a)) for a in (artifact, plain))
    assert with_attention > 15.0
    assert with_attention != without


# --- mutations of the numerics must not be published ---------------------------------------------


def saturate(scales: AttentionScales) -> AttentionScales:
    """A larger scale would only move the exponent."""
    return replace(scales, key=scales.key / 64)


def swap_scales(scales: AttentionScales) -> AttentionScales:
    return replace(scales, query=scales.value * 16, value=scales.query)


@pytest.mark.parametrize("mutate", [saturate, swap_scales])
def test_wrong_scales_are_caught(
    vit: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Any
) -> None:
    original = qdq.insert_attention_qdq

    def wrong(model: ir.Model, attentions: dict[str, AttentionScales]) -> int:
        return original(model, {name: mutate(scales) for name, scales in attentions.items()})

    monkeypatch.setattr("internvl_edge.compiler.steps.graphs.insert_attention_qdq", wrong)
    with pytest.raises(VerificationError):
        exported(vit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("operand", ["softmax/Softmax", "key/Transpose", "value/Transpose"])
def test_a_pair_left_out_is_caught(
    vit: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operand: str
) -> None:
    """A better graph than its recipe's is not what its simulation computes."""
    original = qdq.insert_attention_qdq

    def without_one(model: ir.Model, attentions: dict[str, AttentionScales]) -> int:
        count = original(model, attentions)
        ending = f"{operand}/QuantizeLinear"
        node = next(n for n in model.graph if str(n.name).endswith(ending))
        dequantize = next(iter(node.outputs[0].uses())).node
        assert node.inputs[0] is not None
        dequantize.outputs[0].replace_all_uses_with(node.inputs[0])
        model.graph.remove([dequantize, node], safe=True)
        return count

    monkeypatch.setattr("internvl_edge.compiler.steps.graphs.insert_attention_qdq", without_one)
    with pytest.raises(VerificationError, match=r"core\.(scores|mixed)/MatMul: expected pairs"):
        exported(vit, tmp_path / "out")


def test_sound_attention_is_its_simulation(artifact: Artifact) -> None:
    found = artifact.manifest.components["vision"].verification
    assert found is not None
    assert found["simulated_sqnr_db"] > 100.0


# --- engines -------------------------------------------------------------------------------------


@pytest.mark.rtx
@pytest.mark.slow
def test_an_engine_builds(artifact: Artifact) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the tensorrt-rtx package is not installed")
    (engine,) = compiler.build(artifact.path, ["tensorrt-rtx"])
    assert artifact.path.joinpath(engine.file).stat().st_size > 0


def test_a_recipe_with_it_must_not_rotate() -> None:
    with pytest.raises(InputError, match="rotate must be false with attention"):
        replace(RECIPE, rotate=True)
    with pytest.raises(InputError, match="smooth must be null with attention"):
        replace(RECIPE, smooth=0.5)
