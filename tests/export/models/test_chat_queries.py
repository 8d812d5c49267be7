"""InternVL-Chat V1.0 with QLLaMA: query tokens before patches."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import TINY, Written, write_chat_tokenizer, write_llava_queries
from torch.nn.functional import gelu

from internvl_edge import compiler, load, open_session
from internvl_edge.artifact.workspace import Workspace
from internvl_edge.compiler import ExportOptions, make_plan
from internvl_edge.compiler.progress import silent
from internvl_edge.compiler.steps import trace, verify
from internvl_edge.compiler.steps.calibration.samples import load_samples, samples_for
from internvl_edge.compiler.steps.meta_model import meta_model, shallow_config, shallow_model
from internvl_edge.errors import CheckpointError, UsageError
from internvl_edge.export.checkpoint.checkpoint import LLAVA_TOWER, open_checkpoint
from internvl_edge.export.checkpoint.load import load_reference
from internvl_edge.export.config.checkpoint import CheckpointConfig, load_config
from internvl_edge.export.models import Chat, InternVL
from internvl_edge.export.towers.streams import calibration_blocks
from internvl_edge.files.spool import Budget
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.types import Array

pytestmark = pytest.mark.slow

NUM_QUERIES, SIDE = TINY.num_query_token, 3  # 42 px in patches of 14


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> Written:
    path = tmp_path_factory.mktemp("llava") / "checkpoint"
    written = write_llava_queries(path, seed=4)
    write_chat_tokenizer(path)
    return written


def expected_tokens(written: Written, pixels: torch.Tensor) -> torch.Tensor:
    """By the spec, from the parts of InternVL-14B and products written out."""
    raw = json.loads((written.path / "config.json").read_text())
    vision = replace(TINY.vision, num_hidden_layers=raw["vision_config"]["num_hidden_layers"])
    depth = raw["qllama_config"]["num_hidden_layers"]
    tower = InternVL(
        replace(TINY, vision=vision, qllama=replace(TINY.qllama, num_hidden_layers=depth))
    )
    state = {n: t for n, t in written.state.items() if n.startswith(LLAVA_TOWER)}
    tower.load_state_dict({n.removeprefix(LLAVA_TOWER): t for n, t in state.items()})

    def projected(x: torch.Tensor, mlp: str) -> torch.Tensor:
        w0, b0, w2, b2 = (
            written.state[f"model.mm_projector.{mlp}.{part}"]
            for part in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        return gelu(x @ w0.T + b0) @ w2.T + b2

    with torch.inference_mode():
        states = tower.vision_model.hidden_states(pixels)
        queries, _ = tower.encode_queries(states[-1])
        patches = states[raw["mm_vision_select_layer"]][:, 1:]
        return torch.cat((projected(queries, "mlp2"), projected(patches, "mlp1")), dim=1)


def pixels_of(batch: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 14 * SIDE, 14 * SIDE, generator=generator)


def tokens_of(out: Path, pixels: Array) -> Array:
    with open_session(out, "chat_vision") as vision, open_session(out, "chat_queries") as queries:
        seen = vision.run({"pixel_values": pixels})
        looked = queries.run({"hidden_state": seen["hidden_state"]})["image_tokens"]
    return np.concatenate((looked, seen["image_tokens"]), axis=1)


def test_queries_stand_before_patches(written: Written) -> None:
    model = load_reference(written.path)
    assert isinstance(model, Chat)
    pixels = pixels_of(2)
    with torch.inference_mode():
        found = model.encode_image(pixels)
    assert found.shape[1] == NUM_QUERIES + SIDE**2
    torch.testing.assert_close(found, expected_tokens(written, pixels), atol=1e-5, rtol=0)


def test_patches_of_the_last_block_leave_none_after_it(tmp_path: Path) -> None:
    written = write_llava_queries(tmp_path / "c")
    raw = json.loads((written.path / "config.json").read_text()) | {"mm_vision_select_layer": -1}
    (written.path / "config.json").write_text(json.dumps(raw))
    model = load_reference(written.path)
    assert isinstance(model, Chat)
    assert len(model.queries.vision_behind) == 0
    with torch.inference_mode():
        found = model.encode_image(pixels_of(1))
    torch.testing.assert_close(found, expected_tokens(written, pixels_of(1)), atol=1e-5, rtol=0)


def test_components_compute_the_same(written: Written, tmp_path: Path) -> None:
    options = ExportOptions(checkpoint=written.path, out=tmp_path / "out")
    artifact = compiler.export(options)
    assert list(artifact.manifest.components) == ["chat_vision", "chat_queries", "chat_decoder"]
    pixels = pixels_of(3)
    found = tokens_of(artifact.path, pixels.numpy())
    expected = expected_tokens(written, pixels).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "chat_decoder=int4-wo"])
def test_every_precision_is_verified(written: Written, tmp_path: Path, precision: str) -> None:
    options = ExportOptions(checkpoint=written.path, out=tmp_path / "out", precision=precision)
    artifact = compiler.export(options)
    assert all(record.verification for record in artifact.manifest.components.values())
    queries = artifact.manifest.components["chat_queries"].verification
    assert queries is not None
    if "int" in precision:  # queries are not quantized
        assert queries["sqnr_db"] > 70
    compiler.verify(artifact.path, written.path)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_block_at_a_time_is_verified(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(verify, "MAX_WHOLE_NBYTES", 1)
    options = ExportOptions(checkpoint=written.path, out=tmp_path / "out", precision=precision)
    artifact = compiler.export(options)
    found = artifact.manifest.components["chat_queries"].verification
    assert found is not None
    assert found["blocks"] == [0, 1, 2]
    assert found["sqnr_db"] > 70


def test_a_deep_qllama_is_stamped_as_traced(tmp_path: Path) -> None:
    written = write_llava_queries(tmp_path / "c", depth=10)
    plan = make_plan(ExportOptions(checkpoint=written.path, out=tmp_path / "out"))
    assert shallow_config(plan.source.config).queries.qllama.num_hidden_layers == 6  # type: ignore[union-attr]
    stamped = trace.trace_all(plan, shallow_model(plan), plan.base, silent)["chat_queries"]
    config = plan.source.config
    deep = meta_model(config, plan.image_size)
    full = trace._trace(plan, "chat_queries", config, deep)
    assert [n.name for n in stamped.graph] == [n.name for n in full.graph]
    assert list(stamped.graph.initializers) == list(full.graph.initializers)


def test_calibration_sees_the_tokens_that_the_runtime_makes(
    written: Written, tmp_path: Path
) -> None:
    """What the language model is calibrated on is what it will read."""
    options = ExportOptions(checkpoint=written.path, out=tmp_path / "out", precision="int8")
    plan = make_plan(options)
    samples = samples_for(plan, load_samples(plan))
    found, work = None, Workspace(tmp_path, Budget(10**9))
    with closing(work):
        for block, streams in calibration_blocks(plan.checkpoint, samples, {"chat"}, work):
            if "chat" in streams:
                found = np.array(streams["chat"].hidden[0])
                break
            for name, stream in streams.items():
                after = work.hidden(name)
                for x, context in zip(stream.hidden, stream.contexts, strict=True):
                    after.append(block.run(torch.from_numpy(x), context).detach().numpy())
                stream.hidden.close()
                stream.hidden = after
    assert found is not None
    expected = expected_tokens(written, samples.pixel_values[0]).numpy()
    for row, ids, tokens in zip(found, samples.chat_ids[0], expected, strict=True):
        (at,) = torch.nonzero(ids == PLACE).flatten().tolist()
        np.testing.assert_allclose(row[at : at + len(tokens)], tokens, atol=1e-4, rtol=0)


def test_chat_reads_both(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compiler.export(ExportOptions(checkpoint=written.path, out=out, verify="none"))
    with load(out) as model:
        seen = model.see(np.zeros((60, 40, 3), np.uint8))
        assert seen.tokens[0].shape[0] == NUM_QUERIES + SIDE**2  # type: ignore[union-attr]
        assert isinstance(model.chat(seen, "a red seven", max_new_tokens=4).text, str)


def test_queries_left_out_are_missed(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "out"
    parts = ("chat_vision", "chat_decoder")
    compiler.export(
        ExportOptions(checkpoint=written.path, out=out, components=parts, verify="none")
    )
    with load(out) as model, pytest.raises(UsageError, match="no component chat_queries"):
        model.see(np.zeros((60, 40, 3), np.uint8))


def test_a_lost_tensor_is_named(written: Written, tmp_path: Path) -> None:
    other = write_llava_queries(tmp_path / "c", depth=2)
    raw = json.loads((written.path / "config.json").read_text())
    (other.path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"queries\.qllama\.model\.layers\.2.*missing"):
        open_checkpoint(other.path)


def test_a_config_survives_json(written: Written) -> None:
    config = load_config(written.path)
    assert config.queries is not None
    assert CheckpointConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_published_tower_needs_no_nested_config(tmp_path: Path) -> None:
    written = write_llava_queries(tmp_path / "c")
    raw = json.loads((written.path / "config.json").read_text())
    for key in ("vision_config", "qllama_config", "num_query_token", "image_size"):
        raw.pop(key)
    (written.path / "config.json").write_text(json.dumps(raw | {"mm_vision_select_layer": -4}))
    config = load_config(written.path)
    assert config.queries is not None
    assert config.chat is not None
    assert (config.vision.num_hidden_layers, config.chat.num_blocks_behind) == (45, 3)
    assert config.queries.qllama.num_hidden_layers == 32
    assert (config.chat.num_queries, config.image_size) == (96, 336)
