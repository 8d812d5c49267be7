"""A chat checkpoint written again in the other published layout; the weights stay as they are.

    internvl_chat   the layout of the original's code: ``llm_config``, ``vision_model.``, ``mlp1.``
    internvl_hf     that of transformers' own classes, with the names of transformers 4, which
                    version 5 reads as well

One tensor of the new files is in memory at a time. The language model is called what it is in the
target layout: InternLM2 becomes the LLaMA that it is, unpacked, and stays one on the way back. What
a layout cannot say (pixel shuffle v1, another resolution than the stored one) is refused. Tokenizer
files are copied, and not translated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.artifact.publish import staging
from internvl_edge.errors import UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.checkpoint.side_files import (
    SIDE_FILES,
    read_preprocessing,
    read_side_file,
    refuse_foreign,
)
from internvl_edge.export.config.chat import ChatConfig, Layout
from internvl_edge.export.config.checkpoint import VisionConfig
from internvl_edge.export.config.fields import read_json
from internvl_edge.export.config.language import FAMILIES, LLAMA, LanguageConfig
from internvl_edge.export.config.native import QK_NORM_EPS
from internvl_edge.export.convert.published import Published, published_tensors
from internvl_edge.export.weights.writer import WeightsWriter

__all__ = ["convert_layout", "write_layout"]

LAYOUTS: dict[str, Layout] = {"internvl_chat": "internvl_chat", "internvl_hf": "internvl_hf"}
MAX_SHARD_NBYTES = 5_000_000_000
CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
# Language models that transformers has under another name in this layout.
NATIVE_TWINS = {"InternLM2ForCausalLM": LLAMA, "InternLM3ForCausalLM": LLAMA}
TEMPLATE = "internvl2_5"  # spells prompts as transformers' own template, but for the system turn
TEMPLATES = {"Phi3ForCausalLM": "phi3-chat"}
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
NOT_COPIED = ("auto_map", "_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A chat checkpoint with a language model, and the parts of its configuration."""

    checkpoint: Checkpoint
    chat: ChatConfig
    llama: LanguageConfig
    vision: VisionConfig
    raw: dict[str, Any]  # config.json


def convert_layout(source: Path, out: Path, layout: str) -> int:
    """Write the chat checkpoint of a directory in a layout; return the number of tensors.

    Args:
        source: a directory of either layout, with safetensors.
        out: the new directory; it must not exist, and appears when it is complete.
        layout: ``internvl_chat`` or ``internvl_hf``.

    Raises:
        CheckpointError: ``source`` is not a checkpoint, or has links out of it.
        UsageError: as ``write_layout``, ``out`` exists, or no such layout.
        ResourceError: the disk is full.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"layout {layout}: expected one of {', '.join(LAYOUTS)}")
    checkpoint = open_checkpoint(source)
    with staging(out, force=False, check=_check) as directory:
        return write_layout(checkpoint, directory, LAYOUTS[layout])


def _check(directory: Path) -> None:
    open_checkpoint(directory)


def write_layout(checkpoint: Checkpoint, directory: Path, layout: Layout) -> int:
    """Write a chat checkpoint in a layout into an empty directory; return the number of tensors.

    Args:
        checkpoint: of either layout.
        directory: exists, and is empty.
        layout: ``internvl_chat`` or ``internvl_hf``.

    Raises:
        CheckpointError: a side file is a link out of its folder.
        UsageError: it is not a chat checkpoint, or has something that the layout cannot say.
    """
    for name in (CONFIG, *SIDE_FILES):
        refuse_foreign(checkpoint.path / name)
    source = _source(checkpoint, layout)
    architecture = source.chat.architecture
    if layout == "internvl_hf":
        architecture = NATIVE_TWINS.get(architecture, architecture)
        config = _native_config(source, architecture)
    else:
        config = _chat_config(source, architecture)
    _write_json(directory / CONFIG, config)
    _write_json(directory / PROCESSOR, _processor(source, layout))
    for name in SIDE_FILES:
        data = None if name == PROCESSOR else read_side_file(checkpoint.path, name)
        if data is not None:
            (directory / name).write_bytes(data)
    tensors = published_tensors(checkpoint.config, layout, architecture)
    _write_tensors(checkpoint, tensors, directory)
    return len(tensors)


def _source(checkpoint: Checkpoint, layout: Layout) -> _Source:
    chat, vision = checkpoint.config.chat, checkpoint.config.vision
    if chat is None or chat.llama is None or chat.layout == "llava":
        raise UsageError(
            f"{checkpoint.path}: expected a chat model of V1-1 or later with a known language "
            f"model, which has two layouts, found a {checkpoint.config.kind} checkpoint"
            f"{'' if chat is None else ' of ' + chat.architecture}"
        )
    if layout == "internvl_hf":
        cannot = {
            f"ps_version {chat.ps_version}": chat.ps_version != "v2",
            "pad2square": chat.pad2square,
            f"images of {chat.image_size} pixels on positions of {vision.image_size}": (
                chat.image_size != vision.image_size
            ),
            f"norms of queries and keys with eps {vision.layer_norm_eps:g}": (
                vision.qk_normalization and vision.layer_norm_eps != QK_NORM_EPS
            ),
            "no id of <IMG_CONTEXT> in its tokenizer files": chat.image_token_id is None,
        }
        found = [what for what, is_so in cannot.items() if is_so]
        if found:
            raise UsageError(
                f"{checkpoint.path}: cannot be written in the layout internvl_hf, which has no "
                f"place for: {', '.join(found)}"
            )
    raw = read_json(checkpoint.path / CONFIG)
    return _Source(checkpoint=checkpoint, chat=chat, llama=chat.llama, vision=vision, raw=raw)


# --- config.json ---------------------------------------------------------------------------------


def _native_config(source: _Source, architecture: str) -> dict[str, Any]:
    chat, vision = source.chat, source.vision
    side = chat.image_size // vision.patch_size // chat.shuffle
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": _language(source, architecture),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "internvl_vision",
            **_tower(vision),
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_normalization,
            "use_mean_pooling": True,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
        },
        "downsample_ratio": chat.downsample_ratio,
        "image_seq_length": side * side,
        "image_token_id": chat.image_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,  # blocks after it are not written
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": source.llama.tie_word_embeddings,
        "torch_dtype": _dtype(source),
    }


def _chat_config(source: _Source, architecture: str) -> dict[str, Any]:
    chat, vision = source.chat, source.vision
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": _language(source, architecture),
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            **_tower(vision),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "qkv_bias": vision.qkv_bias,
            "qk_normalization": vision.qk_normalization,
        },
        "force_image_size": chat.image_size,
        "downsample_ratio": chat.downsample_ratio,
        "ps_version": chat.ps_version,
        "select_layer": -1,  # blocks after it are not written
        "template": chat.template or TEMPLATES.get(architecture, TEMPLATE),
        "dynamic_image_size": chat.dynamic_image_size,
        "use_thumbnail": chat.use_thumbnail,
        "min_dynamic_patch": chat.min_dynamic_patch,
        "max_dynamic_patch": chat.max_dynamic_patch,
        "pad2square": chat.pad2square,
        "tie_word_embeddings": source.llama.tie_word_embeddings,
        "torch_dtype": _dtype(source),
    }


def _tower(vision: VisionConfig) -> dict[str, Any]:
    """Return the keys of a vision config that both layouts call the same."""
    return {
        "hidden_size": vision.hidden_size,
        "num_attention_heads": vision.num_attention_heads,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_channels": vision.num_channels,
        "layer_norm_eps": vision.layer_norm_eps,
        "norm_type": vision.norm_type,
        "hidden_act": vision.hidden_act,
    }


def _language(source: _Source, architecture: str) -> dict[str, Any]:
    """Return a language model's config under the keys that both layouts know."""
    given = source.raw.get("llm_config") or source.raw["text_config"]
    kept = {k: v for k, v in given.items() if k not in (*ROPE_KEYS, *NOT_COPIED)}
    scaling = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    kind = source.llama.rope_type
    for key in ("rope_theta", "partial_rotary_factor", "type", "rope_type"):
        scaling.pop(key, None)
    is_scaled = kind != "default"
    return {
        **kept,
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
        "head_dim": source.llama.head_dim,
        "tie_word_embeddings": source.llama.tie_word_embeddings,
        "rope_theta": source.llama.rope_theta,
        "rope_scaling": {**scaling, "type": kind, "rope_type": kind} if is_scaled else None,
        "torch_dtype": _dtype(source),
    }


def _dtype(source: _Source) -> str:
    """Name the type that most of the weights have."""
    tensors = source.checkpoint.tensors.values()
    return str(max(tensors, key=lambda entry: entry.nbytes).dtype)


def _processor(source: _Source, layout: Layout) -> dict[str, Any]:
    """Say how pictures become tensors, as the files of the layout do."""
    chat = source.chat
    made = read_preprocessing(source.checkpoint.path, chat.image_size)
    values = {"image_mean": list(made.mean), "image_std": list(made.std), "resample": 3}
    values |= {"do_normalize": True, "do_resize": True}
    if layout == "internvl_chat":
        size = chat.image_size
        return {**values, "feature_extractor_type": "CLIPFeatureExtractor", "size": size}
    return {
        **values,
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "processor_class": "InternVLProcessor",
        "size": {"height": chat.image_size, "width": chat.image_size},
        "crop_to_patches": False,  # as published: the processor cuts tiles nevertheless
        "min_patches": chat.min_dynamic_patch,
        "max_patches": chat.max_dynamic_patch,
    }


# --- tensors -------------------------------------------------------------------------------------


def _write_tensors(
    checkpoint: Checkpoint, tensors: Mapping[str, Published], directory: Path
) -> None:
    dtypes = {name: checkpoint.tensors[t.rows[0].name].dtype for name, t in tensors.items()}
    sizes = {name: math.prod(t.shape) * dtypes[name].itemsize for name, t in tensors.items()}
    shards = list(_shards(sizes))
    places: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        layout = {name: (dtypes[name], tensors[name].shape) for name in names}
        with WeightsWriter(directory / file, layout, metadata={"format": "pt"}) as writer:
            for name in names:
                writer.write(name, np.ascontiguousarray(tensors[name].read(checkpoint.read)))
        places |= dict.fromkeys(names, file)
    checkpoint.require_unchanged()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        _write_json(directory / "model.safetensors.index.json", index)


def _shards(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Divide tensors into files, in their order."""
    names: list[str] = []
    nbytes = 0
    for name, size in sizes.items():
        if names and nbytes + size > MAX_SHARD_NBYTES:
            yield names
            names, nbytes = [], 0
        names.append(name)
        nbytes += size
    yield names


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
