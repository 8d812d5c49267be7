"""InternVL-Chat from a checkpoint to its two components."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import CHAT, write_chat, write_llava
from support.golden import assert_golden, read_golden

from internvl_edge import compiler, load, open_session
from internvl_edge.artifact.components import WEIGHTS_FILE
from internvl_edge.compiler import ExportOptions, make_plan
from internvl_edge.compiler.progress import silent
from internvl_edge.compiler.steps import trace
from internvl_edge.compiler.steps.meta_model import meta_model, shallow_model
from internvl_edge.compiler.weights import layout
from internvl_edge.errors import CheckpointError, UsageError
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.checkpoint.load import load_model, load_reference
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import CheckpointConfig, VisionConfig, load_config
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.export.graph.last_logits import take_last_logits
from internvl_edge.export.models import Chat
from internvl_edge.export.models.chat import pixel_shuffle
from internvl_edge.export.models.llama import Llama, llama_tables
from internvl_edge.quantize.fold import folded
from internvl_edge.quantize.numerics.rotation import rotation
from internvl_edge.runtime.tasks.caption import generation
from internvl_edge.types import Array

pytestmark = pytest.mark.slow

IMAGE_TOKEN = 299  # of the golden prompts


def edited(golden: Path, directory: Path, **changes: Any) -> Path:
    """The golden chat checkpoint with other values in its config; None removes a key."""
    directory.mkdir()
    raw = json.loads((golden / "tiny/chat_v2/config.json").read_text())
    llm = changes.pop("llm_config", {})
    raw |= changes | {"llm_config": raw["llm_config"] | llm}
    raw = {key: value for key, value in raw.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(raw))
    (directory / "model.safetensors").symlink_to(golden / "tiny/chat_v2/model.safetensors")
    return directory


@pytest.fixture
def reference(golden: Path) -> dict[str, Array]:
    return read_golden(golden / "tiny/reference.npz")


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_image_tokens_are_the_originals(
    golden: Path, tmp_path: Path, reference: dict[str, Any], version: str, layer: int
) -> None:
    changed = edited(golden, tmp_path / "c", ps_version=version, select_layer=layer)
    model = load_reference(changed)
    assert isinstance(model, Chat)
    with torch.inference_mode():
        found = model.encode_image(torch.from_numpy(reference["in.pixel_values"])).numpy()
    expected = reference[f"chat.{version}.sel{layer}.image_tokens"]
    assert_golden(found, expected, 1e-5)


def test_logits_and_greedy_ids_are_the_originals(golden: Path, reference: dict[str, Any]) -> None:
    model = load_reference(golden / "tiny/chat_v2")
    assert isinstance(model, Chat)
    pixels, ids = (
        torch.from_numpy(reference[n]) for n in ("in.pixel_values", "chat.v2.in.input_ids")
    )
    with torch.inference_mode():
        logits = model(pixels, ids, image_token_id=IMAGE_TOKEN).numpy()
    assert_golden(logits, reference["chat.v2.logits"], 5e-5)
    greedy = reference["chat.v2.greedy"][:, 1:]
    found = model.generate(pixels, ids, image_token_id=IMAGE_TOKEN, max_new_tokens=greedy.shape[1])
    np.testing.assert_array_equal(found.numpy(), greedy)


def test_padding_at_the_start_changes_nothing(golden: Path, reference: dict[str, Any]) -> None:
    model = load_reference(golden / "tiny/chat_v2")
    assert isinstance(model, Chat)
    pixels, ids = (
        torch.from_numpy(reference[n]) for n in ("in.pixel_values", "chat.v2.in.input_ids")
    )
    mask = torch.ones_like(ids)
    padded = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(mask, (3, 0))
    with torch.inference_mode():
        plain = model(pixels, ids, image_token_id=IMAGE_TOKEN)
        moved = model(pixels, *padded, image_token_id=IMAGE_TOKEN)
    torch.testing.assert_close(moved[:, 3:], plain, atol=2e-5, rtol=0)


def test_merged_patches_stand_row_by_row() -> None:
    """Output cell (a, b) of v2 holds patches (2a, 2b), (2a, 2b + 1), (2a + 1, 2b), …"""
    grid = torch.arange(24.0).reshape(1, 4, 6, 1)
    merged = pixel_shuffle(grid, 2, "v2")
    assert merged.shape == (1, 2, 3, 4)
    assert merged[0, 1, 2].tolist() == [16.0, 17.0, 22.0, 23.0]
    torch.testing.assert_close(pixel_shuffle(grid, 2, "v1"), merged.transpose(1, 2))


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5_000_000.0},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {
        "rope_theta": 500_000.0,
        "rope_scaling": LLAMA3,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=["default", "theta", "linear", "dynamic", "llama3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_is_transformers_llama(
    tmp_path: Path, rope: dict[str, Any], tied: bool
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    written = write_chat(tmp_path / "c", llm_config={**rope, "tie_word_embeddings": tied})
    model = load_reference(written.path)
    assert isinstance(model, Chat)
    llama = model.language_model
    assert llama is not None
    raw = json.loads((written.path / "config.json").read_text())["llm_config"]
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**raw, attn_implementation="eager")
    ).eval()
    prefix = "language_model."
    state = {n.removeprefix(prefix): t for n, t in written.state.items() if n.startswith(prefix)}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if tied else [])
    ids = torch.randint(3, 200, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        logits, _ = llama(
            llama.model.embed_tokens(ids), mask, mask.cumsum(-1) - 1, llama.empty_cache(2)
        )
        expected = theirs(ids).logits
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)


def test_llama3_scaling_leaves_short_waves() -> None:
    """A mutation of it would be seen: the first pair is not scaled, the last is, by the factor."""
    llama = replace(
        CHAT.llama, rope_type="llama3", rope_factor=8.0, original_max_position_embeddings=32
    )
    plain, scaled = (llama_tables(c)[1][1].asin() for c in (CHAT.llama, llama))
    ratio = (plain / scaled).tolist()
    assert ratio[0] == pytest.approx(1.0, abs=1e-5)
    assert ratio[-1] == pytest.approx(8.0, rel=1e-4)


# --- LLaVA's layout ------------------------------------------------------------------------------


def test_llava_names_and_projector(tmp_path: Path) -> None:
    written = write_llava(tmp_path / "c")
    model = load_reference(written.path)
    assert isinstance(model, Chat)
    assert model.config.layout == "llava"
    state = written.state
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        hidden = model.vision_model(pixels)[:, 1:]
        w0, b0, w2, b2 = (
            state[f"model.mm_projector.{n}"] for n in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        expected = torch.nn.functional.gelu(hidden @ w0.T + b0) @ w2.T + b2
        torch.testing.assert_close(model.encode_image(pixels), expected, atol=1e-5, rtol=0)
    key = "model.vision_tower.vision_tower.encoder.layers.0.attn.qkv.weight"
    torch.testing.assert_close(model.vision_model.encoder.layers[0].attn.qkv.weight, state[key])
    # two of the three blocks: what select_layer -2 reads comes after the second
    assert len(model.vision_model.encoder.layers) == 2


def test_llava_names_its_tower(tmp_path: Path) -> None:
    """Without a vision_config, the tower is the InternViT-6B that the config names."""
    written = write_llava(tmp_path / "c")
    raw = json.loads((written.path / "config.json").read_text())
    del raw["vision_config"], raw["image_size"]
    for name, stored, run, depth in (
        ("OpenGVLab/InternViT-6B-224px", 224, 336, 45),
        ("OpenGVLab/InternViT-6B-448px", 448, 448, 45),
        ("OpenGVLab/InternViT-6B-448px-V1-2", 448, 448, 42),
    ):
        changed = raw | {"mm_vision_tower": name, "mm_vision_select_layer": -4}
        (written.path / "config.json").write_text(json.dumps(changed))
        config = load_config(written.path)
        assert config.vision == VisionConfig(image_size=stored, num_hidden_layers=depth)
        assert config.image_size == run


# --- components ----------------------------------------------------------------------------------


def test_components_are_the_originals(
    golden: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    artifact = compiler.export(ExportOptions(checkpoint=golden / "tiny/chat_v2", out=out))
    assert list(artifact.manifest.components) == ["chat_vision", "chat_decoder"]
    with open_session(out, "chat_vision") as vision:
        tokens = vision.run({"pixel_values": reference["in.pixel_values"]})["image_tokens"]
    expected = reference["chat.v2.sel-1.image_tokens"]
    np.testing.assert_allclose(tokens, expected, atol=1e-5, rtol=0)
    ids = reference["chat.v2.in.input_ids"]
    table = open_checkpoint(golden / "tiny/chat_v2").read(layout.CHAT_TOKENS)
    embeds = table[ids]
    embeds[ids == IMAGE_TOKEN] = tokens.reshape(-1, tokens.shape[-1])
    with open_session(out, "chat_decoder") as decoder:
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.ones_like(ids).cumsum(1) - 1,
        }
        past = [spec for spec in decoder.inputs.values() if spec.name.startswith("past_")]
        for spec in past:
            heads, size = spec.shape[1], spec.shape[3]
            feeds[spec.name] = np.zeros((len(ids), heads, 0, size), np.float32)
        logits = decoder.run(feeds)["logits"]
    assert_golden(logits, reference["chat.v2.logits"], 5e-5)


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8", "int8-wo", "int4-wo"])
def test_every_precision_is_verified(tmp_path: Path, precision: str) -> None:
    written = write_chat(tmp_path / "c", seed=5)
    out = tmp_path / "out"
    options = ExportOptions(checkpoint=written.path, out=out, precision=precision)
    artifact = compiler.export(options)
    for record in artifact.manifest.components.values():
        assert record.verification is not None
        assert record.verification["sqnr_db"] > (6 if precision == "int4-wo" else 12)
    found = compiler.verify(out, written.path)
    assert found.keys() == artifact.manifest.components.keys()


def test_deep_towers_are_stamped_as_traced(tmp_path: Path) -> None:
    """Both towers, five and four blocks deep, give the bytes of a full trace."""
    llama = replace(CHAT.llama, num_hidden_layers=5)
    vision = replace(CHAT.vision, num_hidden_layers=4)
    written = write_chat(tmp_path / "c", replace(CHAT, llama=llama, vision=vision))
    plan = make_plan(ExportOptions(checkpoint=written.path, out=tmp_path / "out"))
    stamped = trace.trace_all(plan, shallow_model(plan), plan.base, silent)
    config = plan.source.config
    deep = meta_model(config, plan.image_size)
    for name, model in stamped.items():
        full = trace._trace(plan, name, config, deep)
        take_last_logits(full)
        assert [n.name for n in model.graph] == [n.name for n in full.graph]
        assert list(model.graph.initializers) == list(full.graph.initializers)
        assert [v.name for v in model.graph.inputs] == [v.name for v in full.graph.inputs]


def test_rotation_changes_no_output(tmp_path: Path) -> None:
    """Folded and rotated, the checkpoint computes what it computed."""
    checkpoint = open_checkpoint(write_chat(tmp_path / "c", seed=9).path)
    turned = folded(checkpoint, lambda width: rotation(width, seed=3), has_shift=True)
    plain, rotated = load_model(checkpoint), load_model(turned)
    assert isinstance(plain, Chat)
    assert isinstance(rotated, Chat)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 56, 56, generator=generator)
    ids = torch.randint(3, 200, (2, 12), generator=generator)
    ids[:, 2:6] = IMAGE_TOKEN
    with torch.inference_mode():
        expected, found = (m(pixels, ids, image_token_id=IMAGE_TOKEN) for m in (plain, rotated))
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_weights_hold_the_token_embedding_as_stored(tmp_path: Path) -> None:
    """The runtime looks tokens up; converted weights would change what it finds."""
    written = write_chat(tmp_path / "c", dtype=torch.bfloat16)
    out = tmp_path / "out"
    compiler.export(ExportOptions(checkpoint=written.path, out=out, precision="fp16"))
    assert (out / WEIGHTS_FILE).exists()
    from internvl_edge.export.checkpoint.shards import read_header

    entry = read_header(out / WEIGHTS_FILE)[layout.CHAT_TOKENS]
    stored = torch.from_numpy(entry.read().view(np.int16)).view(torch.bfloat16)
    assert torch.equal(stored, written.state[layout.CHAT_TOKENS])


# --- bad input -----------------------------------------------------------------------------------


def test_other_language_models_are_named(golden: Path, tmp_path: Path) -> None:
    llm = {"architectures": ["MptForCausalLM"]}
    other = edited(golden, tmp_path / "c", llm_config=llm, template="internvl_of_mpt")
    with pytest.raises(UsageError, match=r"MptForCausalLM; supported are Llama.*chat_vision"):
        make_plan(ExportOptions(checkpoint=other, out=tmp_path / "out"))
    vision = ExportOptions(checkpoint=other, out=tmp_path / "out", components=("chat_vision",))
    compiler.export(vision)
    with load(vision.out) as model:
        assert model.components.has("chat_vision") and not model.components.has("chat_decoder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select_layer": -9}, "select_layer -9: expected a layer of a tower of 4 blocks"),
        ({"ps_version": "v3"}, "ps_version must be one of v1, v2, found 'v3'"),
        ({"downsample_ratio": 0.3}, "downsample_ratio must be 1, 0.5 or 0.25"),
        ({"llm_config": {"attention_bias": True}}, "attention_bias: expected false"),
        ({"llm_config": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "found 'yarn'"),
        ({"llm_config": {"rope_scaling": [2]}}, "rope_scaling must be one object"),
        ({"llm_config": {"rope_scaling": {"type": "linear"}}}, "linear needs factor, found none"),
        (
            {"llm_config": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}},
            "llama3 needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
        ),
        (
            {"llm_config": {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}},
            "expected low_freq_factor below high_freq_factor, found 4.0 and 4.0",
        ),
        ({"llm_config": {"eos_token_id": [2, "x"]}}, "eos_token_id must be int, found 'x'"),
        ({"template": "nope"}, "template must be one of Hermes-2, .* found 'nope'"),
        ({"min_dynamic_patch": 13}, "expected min_dynamic_patch up to max_dynamic_patch, found 13"),
        ({"llm_config": {"num_key_value_heads": 3}}, "not a multiple of 3 heads"),
        ({"llm_config": {"head_dim": 20}}, "q_proj.weight: expected shape"),
    ],
)
def test_impossible_configs_are_refused(
    golden: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(edited(golden, tmp_path / "c", **changes))


def test_several_ids_may_end_a_text(golden: Path, tmp_path: Path) -> None:
    several = edited(golden, tmp_path / "c", llm_config={"eos_token_id": [7, 9, 11]})
    chat = load_config(several).chat
    assert chat is not None
    assert chat.llama is not None
    assert (chat.llama.eos_token_id, chat.llama.more_eos_ids) == (7, (9, 11))
    assert ChatConfig.from_json(json.loads(json.dumps(asdict(chat)))) == chat
    manifest = SimpleNamespace(language_model=asdict(chat.llama), model={"chat": asdict(chat)})
    parts: Any = SimpleNamespace(artifact=SimpleNamespace(manifest=manifest))
    assert generation(parts).stop_ids == (7, 9, 11)


def test_llavas_other_projectors_are_refused(tmp_path: Path) -> None:
    written = write_llava(tmp_path / "c")
    raw = json.loads((written.path / "config.json").read_text())
    (written.path / "config.json").write_text(json.dumps(raw | {"mm_projector_type": "linear"}))
    with pytest.raises(CheckpointError, match="expected mm_projector_type mlp2x_gelu"):
        load_config(written.path)


def test_patches_that_do_not_merge_are_refused(tmp_path: Path) -> None:
    written = write_chat(tmp_path / "c")
    options = ExportOptions(checkpoint=written.path, out=tmp_path / "out", image_size=42)
    with pytest.raises(UsageError, match=r"multiple of the merged patch size 28, found 42"):
        make_plan(options)


def test_places_and_image_tokens_must_be_as_many(golden: Path, reference: dict[str, Any]) -> None:
    model = load_reference(golden / "tiny/chat_v2")
    assert isinstance(model, Chat)
    pixels = torch.from_numpy(reference["in.pixel_values"])
    ids = torch.from_numpy(reference["chat.v2.in.input_ids"])
    places = 4 * len(ids)
    message = rf"{places} placeholders \(id 299\) and {places - 4} image tokens"
    with pytest.raises(CheckpointError, match=message):
        model(pixels[:-1], ids, image_token_id=IMAGE_TOKEN)
    with pytest.raises(CheckpointError, match="expected image_token_id"):
        model(pixels, ids)


def test_a_config_survives_json(tmp_path: Path) -> None:
    config = load_config(write_chat(tmp_path / "c").path)
    assert CheckpointConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert Llama(
        LanguageConfig(
            hidden_size=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=8,
            num_hidden_layers=1,
            vocab_size=5,
        )
    ).lm_head
