"""The language model's config: what each family has, and what is refused before any work."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints.family import chat_config

from internvl_edge.errors import CheckpointError
from internvl_edge.export.config.checkpoint import CheckpointConfig, load_config
from internvl_edge.export.config.language import LanguageConfig


def load(path: Path, kind: str = "qwen2", top: dict[str, Any] | None = None, **llm: Any) -> Any:
    raw = chat_config(kind, {}, llm) | (top or {})
    (path / "config.json").write_text(json.dumps(raw))
    return load_config(path)


def language(config: CheckpointConfig) -> LanguageConfig:
    assert config.chat is not None and config.chat.llama is not None
    return config.chat.llama


def test_what_a_family_has(tmp_path: Path) -> None:
    have = {
        kind: (
            language(load(tmp_path, kind)).has_qkv_bias,
            language(load(tmp_path, kind)).has_qk_norm,
        )
        for kind in ("llama", "internlm2", "internlm3", "qwen2", "qwen3", "phi3")
    }
    assert have["qwen2"] == (True, False) and have["qwen3"] == (False, True)
    assert {have[kind] for kind in have if kind not in ("qwen2", "qwen3")} == {(False, False)}


def test_a_head_has_its_own_size(tmp_path: Path) -> None:
    assert language(load(tmp_path, "qwen3")).head_dim == 24  # of 64 / 4 = 16
    assert language(load(tmp_path, "qwen2")).head_dim == 16
    raw = chat_config("qwen3", {}, {})
    del raw["llm_config"]["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert language(load_config(tmp_path)).head_dim == 128  # the family's


def test_a_manifest_of_before_is_read() -> None:
    new = ("head_dim", "short_factor", "long_factor", "rope_attention_factor")
    new += ("has_qkv_bias", "has_qk_norm")
    config = LanguageConfig()
    old = {key: value for key, value in asdict(config).items() if key not in new}
    assert LanguageConfig.from_json(old) == config
    assert LanguageConfig.from_json(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("kind", "llm", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "sliding_window 32: expected attention to all"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "layer_types 'sliding_attention'"),
        ("phi3", {"sliding_window": 128}, "sliding_window 128: expected attention to all"),
        ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling must be one of"),
        ("qwen2", {"rope_scaling": {"rope_type": "dynamic"}}, "dynamic needs factor"),
        ("qwen2", {"rope_scaling": {"full_attention": {}}}, "one object for all layers"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
        ("qwen2", {"rope_parameters": {"rope_type": "spiral"}}, "rope_scaling must be one of"),
        ("qwen2", {"moe_config": {"num_experts": 8}}, "mixtures of experts"),
        ("qwen3", {"num_experts": 128}, "num_experts 128: mixtures of experts"),
        ("llama", {"num_local_experts": 8}, "num_local_experts 8: mixtures of experts"),
        ("qwen2", {"model_type": "qwen3"}, "found architectures Qwen2ForCausalLM and model_type"),
        ("qwen3", {"attention_bias": True}, "attention_bias: expected false"),
        ("internlm2", {"bias": True}, "bias: expected false"),
        ("internlm3", {"qkv_bias": True}, "qkv_bias: expected false"),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, "longrope needs long"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor: expected 8 positive factors",
        ),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act must be one of silu"),
        ("qwen3", {"head_dim": 7}, "an even head size, found 7"),
        ("internlm2", {"architectures": ["InternLM2VEForCausalLM"]}, "a Mono-InternVL"),
    ],
)
def test_another_value_is_refused_by_name(
    kind: str, llm: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, kind, **llm)


def test_a_flash_model_is_refused(tmp_path: Path) -> None:
    flash = {"flash_relative_threshold": 0.85}, {"architectures": ["InternVLChatFlashModel"]}
    for more in flash:
        with pytest.raises(CheckpointError, match=r"an InternVL3\.5-Flash"):
            load(tmp_path, "qwen3", more)


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_a_mixture_of_experts_is_named(name: str, tmp_path: Path) -> None:
    """Of InternVL3.5: the 30B-A3B and 241B-A28B, and the 20B on GPT-OSS."""
    chat = load(tmp_path, "qwen3", architectures=[name], model_type="").chat
    assert chat.llama is None
    assert f"{name}, a mixture of experts" in chat.unsupported


def test_the_default_layer_is_that_of_the_config_class(tmp_path: Path) -> None:
    raw = chat_config("llama", {"num_hidden_layers": 5}, {})
    del raw["select_layer"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_config(tmp_path).vision.num_hidden_layers == 5  # -1
    del raw["ps_version"]  # before V1-5
    (tmp_path / "config.json").write_text(json.dumps(raw))
    before = load_config(tmp_path)
    assert before.vision.num_hidden_layers == 2  # -4
    assert before.chat is not None and before.chat.ps_version == "v1"


def test_absent_tiling_keys(tmp_path: Path) -> None:
    raw = chat_config("qwen2", {}, {})
    for key in ("dynamic_image_size", "use_thumbnail", "max_dynamic_patch", "min_dynamic_patch"):
        del raw[key]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    chat = load_config(tmp_path).chat
    assert chat is not None
    assert (chat.dynamic_image_size, chat.use_thumbnail) == (False, False)
    assert (chat.min_dynamic_patch, chat.max_dynamic_patch) == (1, 6)


@given(positions=st.integers(65, 4096), original=st.integers(2, 64))
def test_the_factor_of_long_rope(positions: int, original: int) -> None:
    from internvl_edge.export.config.language import read_language

    raw = {
        "max_position_embeddings": positions,
        "original_max_position_embeddings": original,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]},
    }
    config = read_language(raw, "Phi3ForCausalLM", Path("config.json"), "llm_config.")
    share = math.log(positions / original) / math.log(original)
    assert config.rope_attention_factor == pytest.approx(math.sqrt(1 + share))
    assert config.long_positions == original
