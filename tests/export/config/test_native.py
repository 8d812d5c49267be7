"""The config of transformers' layout: what decides, what is refused, and where tiling stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints.family import KINDS, chat_config, native_config

from internvl_edge.errors import CheckpointError
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import CheckpointConfig, load_config


def write(path: Path, kind: str = "qwen2", **changes: Any) -> Path:
    """A config alone; a dotted key changes one of a nested section."""
    raw = native_config(chat_config(kind, {}, {}), kind)
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (raw[section] if section else raw)[name] = value
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    return path


def chat_of(path: Path) -> ChatConfig:
    chat = load_config(path).chat
    assert chat is not None
    return chat


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_are_one_configuration(kind: str, tmp_path: Path) -> None:
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "config.json").write_text(json.dumps(chat_config(kind, {}, {})))
    chat, native = load_config(tmp_path / "chat"), load_config(write(tmp_path / "hf", kind))
    assert native.vision == chat.vision
    assert chat.chat is not None and native.chat is not None
    assert native.chat.llama == chat.chat.llama
    assert CheckpointConfig.from_json(json.loads(json.dumps(native.to_json()))) == native


def test_what_transformers_5_writes_is_the_same(tmp_path: Path) -> None:
    before = chat_of(write(tmp_path / "old"))
    raw = native_config(chat_config("qwen2", {}, {}), "qwen2")
    text = raw["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    text["layer_types"] = ["full_attention"] * 2
    text["dtype"] = "bfloat16"
    raw["tie_word_embeddings"] = False
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps(raw))
    assert chat_of(tmp_path / "new") == before


def test_absent_keys_are_transformers_defaults(tmp_path: Path) -> None:
    path = write(tmp_path)
    raw = json.loads((path / "config.json").read_text())
    raw["vision_config"] = {}
    del raw["image_seq_length"], raw["vision_feature_layer"], raw["downsample_ratio"]
    (path / "config.json").write_text(json.dumps(raw))
    vision = load_config(path).vision
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size) == (1024, 24, 448)
    assert (vision.norm_type, vision.qkv_bias, vision.qk_normalization) == (
        "layer_norm",
        False,
        False,
    )


def test_tiling_is_the_processors(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert chat_of(path).max_dynamic_patch == 12
    settings = {"min_patches": 2, "max_patches": 9, "crop_to_patches": False}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    chat = chat_of(path)
    assert (chat.min_dynamic_patch, chat.max_dynamic_patch) == (2, 9)
    assert chat.dynamic_image_size and chat.use_thumbnail


def test_tiling_inside_the_processors_new_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    nested = {"image_processor": {"max_patches": 5}}
    (path / "processor_config.json").write_text(json.dumps(nested))
    assert chat_of(path).max_dynamic_patch == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config__use_mean_pooling": False}, "use_mean_pooling: expected True"),
        ({"vision_config__use_mask_token": True}, "use_mask_token: expected False"),
        (
            {"vision_config__use_absolute_position_embeddings": False},
            "use_absolute_position_embeddings: expected True",
        ),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy: expected"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act: expected 'gelu'"),
        ({"vision_config__image_size": [56, 28]}, "image_size: expected a square"),
        ({"vision_feature_layer": [-1, -2]}, "vision_feature_layer must be int"),
        ({"image_seq_length": 256}, "image_seq_length: expected 4"),
        ({"downsample_ratio": 0.3}, "downsample_ratio must be 1, 0.5 or 0.25"),
        (
            {"vision_config__use_qk_norm": True, "vision_config__layer_norm_eps": 1e-5},
            "layer_norm_eps: expected 1e-06",
        ),
        ({"vision_config__use_moe": True}, "use_moe: expected false"),
        ({"text_config": {"model_type": "qwen2", "hidden_act": "gelu"}}, "hidden_act"),
    ],
)
def test_another_value_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_config(write(tmp_path, **changes))


def test_an_image_token_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 99}))
    with pytest.raises(CheckpointError, match="image_token_id 120: expected 99"):
        load_config(path)


def test_another_language_model_is_named_and_its_vision_side_compiles(tmp_path: Path) -> None:
    chat = chat_of(write(tmp_path, text_config__model_type="qwen3_moe"))
    assert chat.llama is None and chat.architecture == "qwen3_moe"
