"""Small chat checkpoints of every kind of the family, in both published layouts.

Names, packing and configs are written here a second time, from what is published, so that the
product's own reading of them is checked and not repeated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import Written, randomised, write_raw

from internvl_edge.export.config.checkpoint import load_config
from internvl_edge.export.models import Chat

DYNAMIC = {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}
TOWER_6B = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
TOWER_300M = {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of language model, with the tower that it is published with."""

    architecture: str
    model_type: str
    native_type: str  # model_type in transformers' layout
    template: str = "internvl2_5"
    tower: dict[str, Any] = field(default_factory=lambda: TOWER_300M)
    language: dict[str, Any] = field(default_factory=dict)  # more of its config


KINDS = {
    "llama": Kind(
        architecture="LlamaForCausalLM",
        model_type="llama",
        native_type="llama",
        template="Hermes-2",
        tower=TOWER_6B,
    ),
    "internlm2": Kind(
        architecture="InternLM2ForCausalLM",
        model_type="internlm2",
        native_type="llama",
        language={"bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "internlm3": Kind(
        architecture="InternLM3ForCausalLM",
        model_type="internlm3",
        native_type="llama",
        language={"bias": False, "qkv_bias": False, "rope_scaling": DYNAMIC},
    ),
    "qwen2": Kind(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        native_type="qwen2",
        language={"rope_scaling": DYNAMIC, "use_sliding_window": False, "sliding_window": 32},
    ),
    "qwen3": Kind(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        native_type="qwen3",
        language={"head_dim": 24, "attention_bias": False, "rope_scaling": None},
    ),
    "phi3": Kind(
        architecture="Phi3ForCausalLM",
        model_type="phi3",
        native_type="phi3",
        template="phi3-chat",
        tower=TOWER_300M,
        language={
            "original_max_position_embeddings": 64,
            "sliding_window": 4096,
            "rope_scaling": {
                "type": "su",
                "short_factor": [1.0 + 0.05 * i for i in range(8)],
                "long_factor": [2.0 + 1.5 * i for i in range(8)],
            },
        },
    ),
}
VISION = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "image_size": 56,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "num_channels": 3,
}
LANGUAGE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
IMAGE_TOKEN_ID = 120


def chat_config(kind: str, vision: dict[str, Any], language: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of the layout internvl_chat."""
    of = KINDS[kind]
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": {
            **LANGUAGE,
            "architectures": [of.architecture],
            "model_type": of.model_type,
            **of.language,
            **language,
        },
        "vision_config": {"model_type": "intern_vit_6b", **VISION, **of.tower, **vision},
        "select_layer": -1,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "template": of.template,
    }


def native_config(raw: dict[str, Any], kind: str) -> dict[str, Any]:
    """The same model's ``config.json`` in transformers' layout."""
    vision = dict(raw["vision_config"])
    text = {**raw["llm_config"], "model_type": KINDS[kind].native_type}
    side = vision["image_size"] // vision["patch_size"] // 2
    scaling = text.get("rope_scaling")
    if scaling and scaling["type"] == "su":
        text["rope_scaling"] = scaling | {"type": "longrope"}
    vision |= {
        "model_type": "internvl_vision",
        "attention_bias": vision.pop("qkv_bias"),
        "use_qk_norm": vision.pop("qk_normalization"),
        "image_size": [vision["image_size"]] * 2,
        "patch_size": [vision["patch_size"]] * 2,
    }
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text,
        "vision_config": vision,
        "downsample_ratio": 0.5,
        "image_seq_length": side * side,
        "image_token_id": IMAGE_TOKEN_ID,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


def write_family(
    path: Path,
    kind: str,
    layout: str = "chat",
    *,
    seed: int = 0,
    is_new: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    vision: dict[str, Any] | None = None,
    language: dict[str, Any] | None = None,
) -> Written:
    """Write a checkpoint; both layouts have the same weights.

    Args:
        path: the directory.
        kind: a key of ``KINDS``.
        layout: ``chat`` or ``hf``.
        seed: of the weights.
        is_new: names as transformers 5 writes them, in the layout ``hf``.
        shards: how many files.
        dtype: of all tensors.
        vision: other values of the vision config.
        language: other values of the language model's.
    """
    raw = chat_config(kind, vision or {}, language or {})
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(seed)
    state = randomised(Chat(load_config(path)))
    added = {"<IMG_CONTEXT>": IMAGE_TOKEN_ID}
    (path / "added_tokens.json").write_text(json.dumps(added))
    if layout == "chat":
        return write_raw(path, raw, packed(state, kind, raw), dtype=dtype, shards=shards)
    settings = {"min_patches": 1, "max_patches": 12, "crop_to_patches": False}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    renamed = native_names(state, raw["vision_config"]["hidden_size"], is_new=is_new)
    if kind == "phi3":
        renamed = packed(renamed, kind, raw)
    return write_raw(path, native_config(raw, kind), renamed, dtype=dtype, shards=shards)


# --- names and packing ---------------------------------------------------------------------------


def packed(
    state: dict[str, torch.Tensor], kind: str, raw: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Pack what InternLM2's and Phi-3's files have packed."""
    if kind not in ("internlm2", "phi3"):
        return state
    llm, done = raw["llm_config"], dict(state)
    heads, kv = llm["num_attention_heads"], llm["num_key_value_heads"]
    width = llm["hidden_size"]
    size = llm.get("head_dim") or width // heads
    for name in [name for name in state if name.endswith("self_attn.q_proj.weight")]:
        block = name.removesuffix("self_attn.q_proj.weight")
        q, k, v = (done.pop(f"{block}self_attn.{which}_proj.weight") for which in "qkv")
        if kind == "phi3":
            gate, up = (done.pop(f"{block}mlp.{one}_proj.weight") for one in ("gate", "up"))
            done[f"{block}self_attn.qkv_proj.weight"] = torch.cat((q, k, v))
            done[f"{block}mlp.gate_up_proj.weight"] = torch.cat((gate, up))
            continue
        groups = (q.reshape(kv, heads // kv, size, width), k.reshape(kv, 1, size, width))
        whole = torch.cat((*groups, v.reshape(kv, 1, size, width)), dim=1)
        done[f"{block}attention.wqkv.weight"] = whole.reshape(-1, width)
    if kind == "phi3":
        return done
    names = (
        ("embed_tokens", "tok_embeddings"),
        ("language_model.lm_head", "language_model.output"),
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    )
    return {_with(name, names): tensor for name, tensor in done.items()}


def native_names(
    state: dict[str, torch.Tensor], width: int, *, is_new: bool
) -> dict[str, torch.Tensor]:
    """Rename to transformers' layout; the vision tower's qkv is three tensors there."""
    names = (
        ("vision_model.encoder.layers.", "vision_tower.encoder.layer."),
        ("vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token"),
        (
            "vision_model.embeddings.position_embedding",
            "vision_tower.embeddings.position_embeddings",
        ),
        (
            "vision_model.embeddings.patch_embedding",
            "vision_tower.embeddings.patch_embeddings.projection",
        ),
        (".norm1", ".layernorm_before"),
        (".norm2", ".layernorm_after"),
        (".attn.proj", ".attention.projection_layer"),
        (".attn.", ".attention."),
        (".ls1", ".lambda_1"),
        (".ls2", ".lambda_2"),
        ("mlp1.0", "multi_modal_projector.layer_norm"),
        ("mlp1.1", "multi_modal_projector.linear_1"),
        ("mlp1.3", "multi_modal_projector.linear_2"),
    )
    newer = (
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"),
    )
    done = {}
    for name, tensor in state.items():
        renamed = _with(name, names)
        if is_new:
            renamed = _with(renamed, newer)
        if ".attention.qkv." not in renamed:
            done[renamed] = tensor
            continue
        for i, which in enumerate("qkv"):
            rows = tensor[i * width : (i + 1) * width]
            done[renamed.replace("qkv", f"{which}_proj")] = rows
    return done


def _with(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for old, new in names:
        name = name.replace(old, new)
    return name
