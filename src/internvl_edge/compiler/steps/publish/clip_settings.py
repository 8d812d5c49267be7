"""The settings that transformers reads next to a graph: of the model, its tokenizer, its pictures.

``config.json`` says ``clip``, which is what the joined graph looks like from outside. Nothing can
be built from it but a graph's session: the towers are InternVL's, and the sizes are theirs.
"""

from __future__ import annotations

import math
from typing import Any

from internvl_edge.export.config.checkpoint import InternVLConfig
from internvl_edge.runtime.images.transform import Preprocessing
from internvl_edge.runtime.tasks.compare import LOGIT_SCALE
from internvl_edge.runtime.text.tokenizer import MAX_TEXT_LENGTH

__all__ = ["model_settings", "picture_settings", "special_tokens", "tokenizer_settings"]

BICUBIC = 3  # Pillow's number


def model_settings(config: InternVLConfig, image_size: int) -> dict[str, Any]:
    """Describe the joined graph as a CLIP, for ``config.json``."""
    vision, text = config.vision, config.qllama
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.clip_embed_dim,
        "logit_scale_init_value": math.log(LOGIT_SCALE),
        "text_config": {
            "model_type": "clip_text_model",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": MAX_TEXT_LENGTH,
            "projection_dim": config.clip_embed_dim,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_channels": vision.num_channels,
            "patch_size": vision.patch_size,
            "image_size": image_size,
            "projection_dim": config.clip_embed_dim,
        },
    }


def picture_settings(preprocessing: Preprocessing) -> dict[str, Any]:
    """Describe the transform ``clip``, for ``preprocessor_config.json``.

    Where a photograph has an odd number of columns too many, ``classification`` crops it one
    further to the side (docs/model.md, section 7.1), which no processor of transformers does.
    """
    size = preprocessing.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def special_tokens(fast: dict[str, Any]) -> dict[str, str]:
    """Name the tokens that have a role in ``tokenizer.json``, for ``special_tokens_map.json``."""
    begin, end = fast["post_processor"]["special_tokens"]
    return {
        "bos_token": begin,
        "eos_token": end,
        "unk_token": fast["model"]["unk_token"],
        "pad_token": fast["padding"]["pad_token"],
    }


def tokenizer_settings(fast: dict[str, Any]) -> dict[str, Any]:
    """Have transformers take ``tokenizer.json`` as it is, for ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens(fast),
        "split_special_tokens": True,  # "</s>" that somebody typed is text
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_TEXT_LENGTH,
        "padding_side": "right",
        "truncation_side": "right",
    }
