"""Every component, traced without weights, against the reference: numbers, names, shapes, ops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from support.checkpoints import TINY, write_internvl

from internvl_edge.artifact.components import COMPONENTS, components_of
from internvl_edge.errors import InternVLError, UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.checkpoint.load import load_reference
from internvl_edge.export.compare import (
    agreement,
    component_feeds,
    reference_outputs,
    sample_feeds,
    with_hidden_state,
)
from internvl_edge.export.components import (
    build_component,
    choose_components,
    example_inputs,
    input_names,
    input_specs,
    output_names,
)
from internvl_edge.export.config.checkpoint import CheckpointConfig, VisionConfig
from internvl_edge.export.graph import trace as graphs
from internvl_edge.export.graph.bf16_twin import widen
from internvl_edge.export.graph.bind import bind, save, weights_without_data
from internvl_edge.export.graph.dtypes import POLICIES, apply_policy
from internvl_edge.export.models import InternVL
from internvl_edge.export.models.attention import rotary_tables
from internvl_edge.export.weights.writer import WeightsWriter

STANDARD = {"", "ai.onnx"}

OF_INTERNVL = components_of("internvl")  # those of a chat model: test_chat_export


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: Any) -> Checkpoint:
    return open_checkpoint(write_internvl(tmp_path_factory.mktemp("c") / "checkpoint").path)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> InternVL:
    loaded = load_reference(checkpoint.path)
    assert isinstance(loaded, InternVL)
    return loaded


def traced(checkpoint: Checkpoint, name: str, base: str) -> ir.Model:
    component, config = COMPONENTS[name], checkpoint.config
    with torch.device("meta"):
        model = InternVL(config.internvl)
    apply_policy(model, POLICIES[base])
    compute = str(POLICIES[base].compute).removeprefix("torch.")
    specs = input_specs(component, config, config.vision.image_size, compute)
    graph = graphs.trace(
        build_component(component, model),
        example_inputs(specs),
        [{i: d for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs],
        [spec.name for spec in specs],
        output_names(component, config),
    )
    llama = config.internvl.qllama
    cos, sin = rotary_tables(llama.max_position_embeddings, llama.head_dim)
    graphs.set_constants(graph, {"qllama.rope_cos": cos.numpy(), "qllama.rope_sin": sin.numpy()})
    return graphs.simplify(graph)


def write(checkpoint: Checkpoint, graph: ir.Model, directory: Path) -> Path:
    needed = weights_without_data([graph])
    layout = {name: (dtype, checkpoint.tensors[name].shape) for name, dtype in needed.items()}
    with WeightsWriter(directory / "weights.safetensors", layout) as writer:
        for name, dtype in needed.items():
            writer.write(name, checkpoint.read(name).astype(dtype))
    bind(graph, writer.stored, directory)
    save(graph, directory / "component.onnx")
    return directory / "component.onnx"


def run(path: Path, feeds: dict[str, Any], names: list[str]) -> dict[str, Any]:
    session = ort.InferenceSession(path)
    dtypes = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
    inputs = {i.name: feeds[i.name].astype(dtypes[i.type]) for i in session.get_inputs()}
    outputs = session.run(names, inputs)
    return dict(zip(names, outputs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", OF_INTERNVL)
def test_component(
    checkpoint: Checkpoint, model: InternVL, tmp_path: Path, name: str, base: str
) -> None:
    graph = traced(checkpoint, name, base)
    assert {node.domain for node in graph.graph} <= STANDARD
    assert graph.opset_imports[""] >= 23
    assert not any(node.op_type.startswith("Sequence") for node in graph.graph)
    path = write(checkpoint, graph, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    if base == "bf16":
        widened = ir.load(path)
        assert widen(widened)
        twin = ir.to_proto(widened).SerializeToString()
        assert twin is not None
        path = tmp_path / "wide.onnx"
        path.write_bytes(twin)
    else:
        assert not widen(ir.load(path))
    bound = {"fp32": 90, "fp16": 45, "bf16": 25}[base]
    names = output_names(COMPONENTS[name], checkpoint.config)
    for batch, length, seed in ((1, 5, 1), (3, 11, 2)):  # neither is the traced size
        feeds = sample_feeds(checkpoint.config, 28, seed=seed, batch=batch, length=length)
        feeds = with_hidden_state(model, feeds, checkpoint.config)
        module = build_component(COMPONENTS[name], model)
        feeds = component_feeds(name, feeds, checkpoint.config)
        expected = reference_outputs(module, name, feeds, checkpoint.config)
        actual = run(path, feeds, names)
        for output in names:
            assert agreement(expected[output], actual[output]).sqnr_db > bound, output


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_INTERNVL)
def test_interface_is_the_contract(checkpoint: Checkpoint, name: str) -> None:
    graph = traced(checkpoint, name, "fp16").graph
    assert [v.name for v in graph.inputs] == input_names(COMPONENTS[name], checkpoint.config)
    for value in (*graph.inputs, *graph.outputs):
        integer = value.name in ("input_ids", "attention_mask", "position_ids")
        half = str(value.name).startswith(("present.", "past_key_values."))
        expected = ir.DataType.INT64 if integer else ir.DataType.FLOAT
        assert value.dtype == (ir.DataType.FLOAT16 if half else expected)
        assert str(value.shape[0]) == "batch"
    presents = [v.name for v in graph.outputs if str(v.name).startswith("present.")]
    layers = TINY.qllama.num_hidden_layers if COMPONENTS[name].gives_cache else 0
    expected_names = [f"present.{i}.{k}" for i in range(layers) for k in ("key", "value")]
    assert presents == expected_names


def test_the_float16_stream_is_float32(checkpoint: Checkpoint) -> None:
    """Residual additions happen in float32, matrix products in float16."""
    from internvl_edge.export.graph.bf16_twin import infer_dtypes

    graph = traced(checkpoint, "vision", "fp16").graph
    infer_dtypes(graph)
    adds = [
        n for n in graph if n.op_type == "Add" and str(n.name).startswith("vision_model.encoder")
    ]
    residual = [n for n in adds if "attn" not in str(n.name) and "mlp" not in str(n.name)]
    assert len(residual) == 2 * TINY.vision.num_hidden_layers
    assert {n.outputs[0].dtype for n in residual} == {ir.DataType.FLOAT}
    products = [n for n in graph if n.op_type == "MatMul"]
    assert {n.inputs[0].dtype for n in products} == {ir.DataType.FLOAT16}


def test_node_names_tell_the_module(checkpoint: Checkpoint) -> None:
    names = [str(node.name) for node in traced(checkpoint, "vision", "fp32").graph]
    assert len(set(names)) == len(names)
    assert "vision_model.encoder.layers.1.mlp.fc2/MatMul" in names


def test_tracing_reads_no_weight(checkpoint: Checkpoint) -> None:
    graph = traced(checkpoint, "image_embed", "fp32").graph
    parameters = [v for v in graph.initializers.values() if "." in str(v.name)]
    assert len(parameters) > 20
    assert all(value.const_value is None for value in parameters)


def test_a_frozen_batch_is_refused() -> None:
    class Frozen(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(len(x), 1, device=x.device)

    example = torch.empty(2, 3, device="meta")
    with pytest.raises(InternVLError, match="batch to stay dynamic, but the trace froze it"):
        graphs.trace(Frozen(), [example], [{0: "batch"}], ["x"], ["y"])


def test_components_of_a_bare_tower() -> None:
    config = CheckpointConfig(kind="vit", vision=VisionConfig())
    assert choose_components(config, None) == ("vision",)
    with pytest.raises(UsageError, match="text_embed"):
        choose_components(config, ["text_embed"])


def test_unknown_component_is_named() -> None:
    config = CheckpointConfig(kind="internvl", vision=TINY.vision, internvl=TINY)
    assert choose_components(config, ["text_embed", "vision"]) == ("vision", "text_embed")
    for names in (["visoin"], []):
        with pytest.raises(UsageError, match="expected some of vision"):
            choose_components(config, names)


def test_values_beyond_float16_stay_finite(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Massive residual activations, as large vision transformers have them."""
    state = {name: checkpoint.read(name).copy() for name in checkpoint.tensors}
    state["vision_model.embeddings.position_embedding"][0, 1, 3] = 3e5
    graph = traced(checkpoint, "vision", "fp16")
    needed = weights_without_data([graph])
    layout = {name: (dtype, state[name].shape) for name, dtype in needed.items()}
    with WeightsWriter(tmp_path / "w", layout) as writer:
        for name, dtype in needed.items():
            writer.write(name, state[name].astype(dtype))
    bind(graph, writer.stored, tmp_path)
    save(graph, tmp_path / "m.onnx")
    feeds = sample_feeds(checkpoint.config, 28)
    hidden = run(tmp_path / "m.onnx", feeds, ["last_hidden_state"])["last_hidden_state"]
    assert np.isfinite(hidden).all()
    assert np.abs(hidden).max() > 2e5


def test_other_resolution_needs_other_positions(checkpoint: Checkpoint) -> None:
    specs = input_specs(COMPONENTS["matcher"], checkpoint.config, 56)
    assert specs[0].shape == ("batch", 17, TINY.vision.hidden_size)
    assert replace(specs[0], name="x").dtype == "float32"


@pytest.mark.slow
def test_the_decoder_goes_on_from_any_cache(
    checkpoint: Checkpoint, model: InternVL, tmp_path: Path
) -> None:
    """A prompt at once, token by token, and without any image: the same logits."""
    config = checkpoint.config
    path = write(checkpoint, traced(checkpoint, "decoder", "fp32"), tmp_path)
    names = output_names(COMPONENTS["decoder"], config)
    caches = input_names(COMPONENTS["decoder"], config)[3:]
    ids = np.random.default_rng(3).integers(3, 300, (2, 6))
    mask = np.ones((2, 6), np.int64)
    mask[1, :2] = 0  # left padding, with nothing before it
    positions = np.where(mask > 0, mask.cumsum(axis=1) - 1, 1)
    empty = np.zeros((2, 3, 0, 16), np.float32)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    whole = run(path, feeds | dict.fromkeys(caches, empty), names)
    assert np.isfinite(whole["logits"]).all()
    with torch.inference_mode():
        alone = model.qllama(model.qllama.embed(torch.from_numpy(ids[1:, 2:])), _causal(4))[0]
        expected = model.qllama.logits(alone).numpy()
    np.testing.assert_allclose(whole["logits"][1:, 2:], expected, atol=2e-5)
    cache = dict.fromkeys(caches, empty)
    for t in range(6):
        step = {
            "input_ids": ids[:, t : t + 1],
            "attention_mask": mask[:, : t + 1],
            "position_ids": positions[:, t : t + 1],
        }
        found = run(path, step | cache, names)
        np.testing.assert_allclose(found["logits"], whole["logits"][:, t : t + 1], atol=2e-5)
        cache = dict(zip(caches, (found[n] for n in names[1:]), strict=True))
    assert cache[caches[0]].shape == (2, 3, 6, 16)


def _causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]
