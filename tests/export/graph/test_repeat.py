"""Stamped graphs against full traces, and graphs of one block against PyTorch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.checkpoints import TINY, write_internvl, write_vit
from support.checkpoints.family import chat_config

from internvl_edge import compiler
from internvl_edge.artifact.components import LLAMA_PREFIX, VISION_PREFIX
from internvl_edge.compiler import ExportOptions, Plan, make_plan
from internvl_edge.compiler.progress import silent
from internvl_edge.compiler.steps import trace, verify
from internvl_edge.compiler.steps.meta_model import meta_model, shallow_config, shallow_model
from internvl_edge.compiler.steps.quantize import Quantize
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.steps.weights import StoreWeights
from internvl_edge.errors import InternVLError, VerificationError
from internvl_edge.export.config.checkpoint import CheckpointConfig, load_config, with_depth
from internvl_edge.export.graph.dtypes import POLICIES, apply_policy
from internvl_edge.export.graph.repeat import blocks_of, keep_block, shallow_depth, stamp
from internvl_edge.export.synthetic import PRESETS

pytestmark = pytest.mark.slow


def deep(depth: int, period: int, norm_type: str = "rms_norm") -> Any:
    vision = replace(TINY.vision, num_hidden_layers=depth, norm_type=norm_type)
    qllama = replace(TINY.qllama, num_hidden_layers=depth)
    return replace(TINY, vision=vision, qllama=qllama, cross_attention_frequency=period)


def plan_of(tmp_path: Path, config: Any, **more: Any) -> Plan:
    checkpoint = write_internvl(tmp_path / "checkpoint", config).path
    return make_plan(ExportOptions(checkpoint=checkpoint, out=tmp_path / "out", **more))


def in_full(plan: Plan, name: str, config: CheckpointConfig | None = None) -> ir.Model:
    config = config or plan.checkpoint.config
    model = meta_model(config, plan.image_size)
    apply_policy(model, POLICIES[plan.base])
    return trace._trace(plan, name, config, model)


def serialized(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


@pytest.mark.parametrize(
    ("name", "depth", "period", "precision", "norm_type"),
    [
        ("vision", 4, 1, "fp32", "rms_norm"),
        ("vision", 5, 1, "fp16", "layer_norm"),
        ("image_embed", 4, 1, "bf16", "layer_norm"),
        ("image_embed", 5, 1, "fp16", "rms_norm"),
        ("image_queries", 4, 1, "fp32", "rms_norm"),
        ("text_embed", 5, 1, "fp16", "rms_norm"),
        ("matcher", 4, 1, "bf16", "rms_norm"),
        ("text_embed", 8, 2, "fp32", "rms_norm"),
        ("matcher", 9, 2, "fp16", "rms_norm"),
        ("image_queries", 13, 3, "fp16", "rms_norm"),
        ("decoder", 4, 1, "bf16", "rms_norm"),
        ("decoder", 9, 2, "fp16", "rms_norm"),
    ],
)
def test_stamped_is_traced(
    name: str, depth: int, period: int, precision: str, norm_type: str
) -> None:
    """To the byte; and stamped indeed, where a tower traced in full would be equal as well."""
    internvl = deep(depth, period, norm_type)
    config = CheckpointConfig(kind="internvl", vision=internvl.vision, internvl=internvl)
    plan = plan_like(type("P", (), {"image_size": 28})(), config, precision)
    shallow = shallow_config(config)
    assert shallow_depth(depth, period) < depth
    model = in_full(plan, name, shallow)
    assert trace.stamp_towers(model, config)
    assert serialized(model) == serialized(in_full(plan, name))


def test_a_cache_in_place_is_stamped() -> None:
    internvl = deep(5, 1)
    config = CheckpointConfig(kind="internvl", vision=internvl.vision, internvl=internvl)
    plan = plan_like(type("P", (), {"image_size": 28})(), config, "fp16", capacity=40)
    model = in_full(plan, "decoder", shallow_config(config))
    assert trace.stamp_towers(model, config)
    assert serialized(model) == serialized(in_full(plan, "decoder"))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "phi3"])
def test_every_language_model_is_stamped(kind: str, tmp_path: Path) -> None:
    raw = chat_config(kind, {}, {"num_hidden_layers": 5})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = load_config(tmp_path)
    plan = plan_like(type("P", (), {"image_size": 56})(), config, "fp16")
    model = in_full(plan, "chat_decoder", shallow_config(config))
    assert trace.stamp_towers(model, config)
    assert serialized(model) == serialized(in_full(plan, "chat_decoder"))


def test_real_widths_are_stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the widths of the real model, constants are too large to be shared by accident."""
    config = PRESETS["internvl-14b-224"]
    plan: Any = type("P", (), {"image_size": 224})()
    shallow = with_depth(config, 3, 6)
    model = in_full(plan_like(plan, config), "image_queries", shallow)
    assert stamp(model, LLAMA_PREFIX, 2, 32)
    assert len(blocks_of(model, LLAMA_PREFIX)) == 32
    assert [o.name for o in model.graph.outputs][-1] == "present.31.value"


def plan_like(
    plan: Any, config: CheckpointConfig, base: str = "bf16", capacity: int | None = None
) -> Any:
    plan.base = base
    plan.checkpoint = type("C", (), {"config": config})()
    plan.options = type("O", (), {"cache_capacity": capacity})()
    return plan


@pytest.mark.parametrize(
    ("depth", "period", "expected"), [(48, 1, 3), (32, 2, 6), (2, 2, 2), (45, 2, 7), (5, 2, 5)]
)
def test_shallow_depth(depth: int, period: int, expected: int) -> None:
    found = shallow_depth(depth, period)
    assert found == expected
    assert (depth - found) % period == 0


def an_attribute(blocks: list[list[ir.Node]]) -> None:
    node = next(n for n in blocks[-1] if n.op_type == "RMSNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)


def an_operator(blocks: list[list[ir.Node]]) -> None:
    next(n for n in blocks[-1] if n.op_type == "Gelu").op_type = "Relu"


def a_weight(blocks: list[list[ir.Node]]) -> None:
    """The last block reads the gain of the one before."""
    norms = [next(n for n in block if n.op_type == "RMSNormalization") for block in blocks[-2:]]
    norms[1].replace_input_with(1, norms[0].inputs[1])


def a_skip(blocks: list[list[ir.Node]]) -> None:
    """The last block reads the stream of two blocks before."""
    node = next(n for n in blocks[-1] if n.op_type == "RMSNormalization")
    node.replace_input_with(0, blocks[-3][-1].outputs[0])


def an_earlier_attribute(blocks: list[list[ir.Node]]) -> None:
    """Of the block that the last one is held against."""
    an_attribute(blocks[:-1])


def a_dtype(blocks: list[list[ir.Node]]) -> None:
    node = next(n for n in blocks[-1] if n.op_type == "RMSNormalization")
    node.inputs[1].type = ir.TensorType(ir.DataType.FLOAT16)  # type: ignore[union-attr]


def a_foreign_node(blocks: list[list[ir.Node]]) -> None:
    """Between the nodes of the last block."""
    graph = blocks[-1][0].graph
    stray = ir.node("Identity", [graph.inputs[0]], name="stray")  # type: ignore[union-attr]
    stray.outputs[0].name = "stray"
    graph.insert_before(blocks[-1][3], stray)  # type: ignore[union-attr]


def an_output_of(index: int) -> Any:
    """A block's stream as one more output of the graph: elsewhere in a deeper tower."""

    def change(blocks: list[list[ir.Node]]) -> None:
        value = blocks[index][-1].outputs[0]
        value.name = "middle"
        blocks[0][0].graph.outputs.append(value)  # type: ignore[union-attr]

    return change


def read_after(of: Any) -> Any:
    """Something of a block is read after the tower as well."""

    def change(blocks: list[list[ir.Node]]) -> None:
        graph: Any = blocks[0][0].graph
        node = ir.node("Add", [graph.outputs[0], of(blocks)], name="tail/Add")
        node.outputs[0].name, graph.outputs[0].name = "last_hidden_state", "inner"
        node.outputs[0].type, node.outputs[0].shape = graph.outputs[0].type, graph.outputs[0].shape
        graph.append(node)
        graph.outputs[0] = node.outputs[0]

    return change


REFUSED = {
    "attribute": an_attribute,
    "earlier attribute": an_earlier_attribute,
    "operator": an_operator,
    "weight": a_weight,
    "skip": a_skip,
    "dtype": a_dtype,
    "foreign node": a_foreign_node,
    "output of the block before": an_output_of(-2),
    "output of the first block": an_output_of(0),
    "stream of the block before, after": read_after(lambda blocks: blocks[-2][-1].outputs[0]),
    "stream of the first block, after": read_after(lambda blocks: blocks[0][-1].outputs[0]),
    "parameter, after": read_after(lambda blocks: blocks[-1][0].inputs[1]),
    "no nodes": lambda blocks: [setattr(node, "name", f"x/{node.name}") for node in blocks[1]],
}


@pytest.fixture(scope="module")
def traced() -> dict[str, ir.Model]:
    """To be cloned: a vision tower of three blocks, and six blocks that look at queries."""
    internvl = deep(6, 2)
    config = CheckpointConfig(kind="internvl", vision=internvl.vision, internvl=internvl)
    plan = plan_like(type("P", (), {"image_size": 28})(), config, "fp32")
    shallow = shallow_config(config)
    names = "vision", "image_queries", "decoder"
    return {name: in_full(plan, name, shallow) for name in names}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED.keys())
def test_blocks_that_differ_are_not_stamped(traced: dict[str, ir.Model], change: Any) -> None:
    model = traced["vision"].clone()
    change(blocks_of(model, VISION_PREFIX))
    before = serialized(model)
    assert not stamp(model, VISION_PREFIX, 1, 9)
    assert serialized(model) == before


def test_a_tower_that_repeats_is_stamped(traced: dict[str, ir.Model]) -> None:
    """What the refusals above start from."""
    assert stamp(traced["vision"].clone(), VISION_PREFIX, 1, 9)
    assert stamp(traced["image_queries"].clone(), LLAMA_PREFIX, 2, 10)


@pytest.mark.parametrize(("period", "depth"), [(2, 9), (2, 4), (2, 0), (1, 10), (3, 12)])
def test_wrong_depths_and_periods_are_not_stamped(
    traced: dict[str, ir.Model], period: int, depth: int
) -> None:
    assert not stamp(traced["image_queries"].clone(), LLAMA_PREFIX, period, depth)


@pytest.mark.parametrize("change", ["missing", "swapped", "not last"])
def test_outputs_of_blocks_that_differ(traced: dict[str, ir.Model], change: str) -> None:
    model = traced["image_queries"].clone()
    outputs = model.graph.outputs
    if change == "missing":
        outputs.pop()
    elif change == "swapped":
        outputs[-1].name, outputs[-2].name = outputs[-2].name, outputs[-1].name
    else:
        outputs.append(outputs.pop(0))
    assert not stamp(model, LLAMA_PREFIX, 2, 10)


@pytest.mark.parametrize("change", ["missing", "swapped", "not last", "shared"])
def test_inputs_of_blocks_that_differ(traced: dict[str, ir.Model], change: str) -> None:
    model = traced["decoder"].clone()
    assert stamp(model.clone(), LLAMA_PREFIX, 2, 10)
    inputs = model.graph.inputs
    if change == "missing":
        other, last = inputs[-3], inputs[-1]
        for node, i in list(last.uses()):
            node.replace_input_with(i, other)
        inputs.pop()
    elif change == "swapped":
        inputs[-1].name, inputs[-2].name = inputs[-2].name, inputs[-1].name
    elif change == "not last":
        inputs.append(inputs.pop(0))
    else:  # the last block looks at another one's cache
        for node, i in list(inputs[-1].uses()):
            node.replace_input_with(i, inputs[-3])
    assert not stamp(model, LLAMA_PREFIX, 2, 10)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_block_that_is_not_there_is_not_kept(traced: dict[str, ir.Model], index: int) -> None:
    with pytest.raises(InternVLError, match="found 3 blocks"):
        keep_block(traced["vision"].clone(), VISION_PREFIX, index)


def test_fallback_is_the_full_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, deep(5, 1), components=("vision",))
    monkeypatch.setattr(trace, "stamp", lambda *_: False)
    found = trace.trace_all(plan, shallow_model(plan), plan.base, silent)["vision"]
    assert serialized(found) == serialized(in_full(plan, "vision", plan.source.config))


def test_blocks_that_are_not_joined(tmp_path: Path) -> None:
    model = in_full(plan_of(tmp_path, deep(3, 1)), "vision")
    end = blocks_of(model, VISION_PREFIX)[0][-1]
    end.replace_input_with(1, model.graph.inputs[0])  # two values from outside are added
    with pytest.raises(InternVLError, match="not joined by one value"):
        keep_block(model, VISION_PREFIX, 1)


# --- comparison block by block -------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8", "fp8"])
def test_compared_block_by_block(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "MAX_WHOLE_NBYTES", 0)
    checkpoint = write_internvl(tmp_path / "checkpoint", deep(4, 2)).path
    options = ExportOptions(
        checkpoint=checkpoint,
        out=tmp_path / "out",
        precision=precision,
        components=("vision", "image_pool", "image_queries", "decoder"),
    )
    components = compiler.export(options).manifest.components
    for name, record in components.items():
        figures = record.verification
        assert figures is not None
        assert figures["cosine"] > 0.99
        assert figures.get("blocks") == (None if name == "image_pool" else [0, 2, 3]), name


def test_a_bare_tower_is_compared_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "MAX_WHOLE_NBYTES", 0)
    checkpoint = write_vit(tmp_path / "vit").path
    options = ExportOptions(checkpoint=checkpoint, out=tmp_path / "out", image_size=42)
    figures = compiler.export(options).manifest.components["vision"].verification
    assert figures is not None
    assert figures["sqnr_db"] > 100


def test_a_machine_with_little_memory_compares_by_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export and a verification later on, of what a larger machine compares whole."""
    checkpoint = write_internvl(tmp_path / "checkpoint", deep(4, 2)).path
    options = ExportOptions(
        checkpoint=checkpoint, out=tmp_path / "out", components=("vision",), precision="int8"
    )
    monkeypatch.setattr(verify, "total_memory", lambda: 500_000_000)
    figures = compiler.export(options).manifest.components["vision"].verification
    assert figures is not None and figures["blocks"] == [0, 2, 3]
    again = compiler.verify(tmp_path / "out", checkpoint)["vision"]
    assert again["blocks"] == [0, 2, 3]
    monkeypatch.setattr(verify, "total_memory", lambda: 24_000_000_000)
    assert "blocks" not in compiler.verify(tmp_path / "out", checkpoint)["vision"]


@pytest.mark.parametrize(
    ("precision", "said"),
    [("fp32", "vision, block 2"), ("int8", r"layers\.2\.mlp\.fc2\.weight: expected")],
)
def test_a_wrong_block_is_found(
    tmp_path: Path, precision: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the weights, by what it computes; in the activation scales, by the audit."""
    monkeypatch.setattr(verify, "MAX_WHOLE_NBYTES", 0)
    step: type[Any] = {"fp32": StoreWeights, "int8": Quantize}[precision]
    run = step.run

    def spoil(self: Any, plan: Plan, build: Build) -> None:
        run(self, plan, build)
        name = f"{VISION_PREFIX}.2.mlp.fc2.weight"
        if precision == "int8":  # of the graph; the check reads those that are written already
            build.scales["image"][name] *= 4  # type: ignore[operator]
            return
        weight = build.stored[name]
        path = build.directory / weight.location
        values = np.fromfile(path, np.uint8)
        place = slice(weight.offset, weight.offset + weight.nbytes)
        values[place] = (values[place].view(np.float32) * 2).view(np.uint8)
        values.tofile(path)

    monkeypatch.setattr(step, "run", spoil)
    checkpoint = write_internvl(tmp_path / "checkpoint", deep(4, 2)).path
    options = ExportOptions(
        checkpoint=checkpoint, out=tmp_path / "out", precision=precision, components=("vision",)
    )
    with pytest.raises(VerificationError, match=said):
        compiler.export(options)
    assert not (tmp_path / "out").exists()
