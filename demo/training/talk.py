"""Train the chat demo from nothing: ``python -m internvl_edge.demo.training.talk OUT``.

The structure is InternVL3's, small: a LayerNorm tower, pixel shuffle, a projector, and a decoder
of the Qwen2 kind that reads nine tokens a picture. One seeded run on the CPU: first the tower
alone, by three linear heads that name what lies under each patch and are thrown away afterwards;
then all of it, by the answers of conversations. The result is rounded to bfloat16 and written in
the layout of the published checkpoints.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internvl_edge.demo.scenes import CANVAS
from internvl_edge.demo.training.batches import PATCH
from internvl_edge.demo.training.conversations import TalkBatch, TalkBatches
from internvl_edge.demo.training.train import (
    PatchHeads,
    Plan,
    cross_entropy,
    initialise_layers,
    look_nearby,
    optimise,
    preprocessor,
    write_checkpoint,
)
from internvl_edge.demo.training.vocabulary import TEMPLATE, train_vocabulary
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import CheckpointConfig, VisionConfig, published_fields
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.export.models.chat import Chat, require_llama

PLAN = Plan(vision_steps=400, steps=1600, batch_size=64)
WIDTH = 128


def configuration(vocab_size: int, image_token_id: int) -> CheckpointConfig:
    """Describe the model for a vocabulary."""
    return CheckpointConfig(
        kind="chat",
        vision=VisionConfig(
            hidden_size=WIDTH,
            num_attention_heads=4,
            intermediate_size=512,
            num_hidden_layers=6,
            patch_size=PATCH,
            image_size=CANVAS,
            qkv_bias=True,
            qk_normalization=False,
            norm_type="layer_norm",
            initializer_factor=0.5,
        ),
        chat=ChatConfig(
            llama=LanguageConfig(
                has_qkv_bias=True,
                hidden_size=WIDTH,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=352,
                num_hidden_layers=4,
                vocab_size=vocab_size,
                max_position_embeddings=1024,
            ),
            architecture="Qwen2ForCausalLM",
            language_width=WIDTH,
            image_size=CANVAS,
            ps_version="v2",
            template=TEMPLATE,
            dynamic_image_size=True,
            use_thumbnail=True,
            image_token_id=image_token_id,
        ),
    )


def losses(
    model: Chat, heads: PatchHeads, batch: TalkBatch, *, vision_only: bool = False
) -> dict[str, Tensor]:
    """Compute each task's mean loss on one batch; with ``vision_only`` the patches' alone."""
    vision = model.vision_model(batch.pixels)  # (M, N, C)
    parts = {"patches": heads(vision, batch)}
    if not vision_only:
        llama = require_llama(model)
        place = model.config.image_token_id
        assert place is not None
        embeds = model.embed(batch.ids, model.project(vision), place)
        positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
        logits, _ = llama(embeds, batch.mask, positions, llama.empty_cache(len(batch.ids)))
        parts["answers"] = cross_entropy(logits[:, :-1], batch.labels[:, 1:])
    return parts


def train(plan: Plan, out: Path) -> None:
    """Train by ``plan`` and write the checkpoint to ``out``."""
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_vocabulary(out)
    config = configuration(tokenizer.get_vocab_size(), tokenizer.token_to_id("<IMG_CONTEXT>"))
    model = Chat(config)
    initialise_layers(model)
    nn.init.normal_(model.vision_model.embeddings.class_embedding, std=0.5)
    look_nearby(model.vision_model)
    heads = PatchHeads(WIDTH)
    side = CANVAS // PATCH // 2
    data = TalkBatches(tokenizer, side * side, plan.seed, plan.steps, plan.batch_size)
    optimise((model, heads), losses, plan, data)
    save_talker(model, tokenizer, out)


def save_talker(model: Chat, tokenizer: Any, out: Path) -> None:
    """Write weights in bfloat16 and their JSON files, as InternVL3's are published."""
    write_checkpoint(model, _documents(model.checkpoint_config, tokenizer), out)


def _documents(config: CheckpointConfig, tokenizer: Any) -> dict[str, dict[str, Any]]:
    chat = config.chat
    assert chat is not None and chat.llama is not None
    llama, end = chat.llama, tokenizer.token_to_id("<|im_end|>")
    pad_id = tokenizer.token_to_id("<|endoftext|>")
    return {
        "config.json": {
            "architectures": ["InternVLChatModel"],
            "downsample_ratio": chat.downsample_ratio,
            "dynamic_image_size": chat.dynamic_image_size,
            "force_image_size": chat.image_size,
            "llm_config": {
                "architectures": ["Qwen2ForCausalLM"],
                "attention_dropout": 0.0,
                "bos_token_id": pad_id,
                "eos_token_id": pad_id,
                "hidden_act": "silu",
                "hidden_size": llama.hidden_size,
                "intermediate_size": llama.intermediate_size,
                "max_position_embeddings": llama.max_position_embeddings,
                "max_window_layers": llama.num_hidden_layers,
                "model_type": "qwen2",
                "num_attention_heads": llama.num_attention_heads,
                "num_hidden_layers": llama.num_hidden_layers,
                "num_key_value_heads": llama.num_key_value_heads,
                "rms_norm_eps": llama.rms_norm_eps,
                "rope_scaling": None,
                "rope_theta": llama.rope_theta,
                "sliding_window": None,
                "tie_word_embeddings": False,
                "torch_dtype": "bfloat16",
                "use_sliding_window": False,
                "vocab_size": llama.vocab_size,
            },
            "max_dynamic_patch": chat.max_dynamic_patch,
            "min_dynamic_patch": chat.min_dynamic_patch,
            "model_type": "internvl_chat",
            "pad2square": False,
            "ps_version": chat.ps_version,
            "select_layer": -1,
            "system_message": None,
            "template": chat.template,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_backbone_lora": 0,
            "use_llm_lora": 0,
            "use_thumbnail": chat.use_thumbnail,
            "vision_config": {**published_fields(config.vision), "model_type": "intern_vit_6b"},
        },
        "generation_config.json": {"eos_token_id": [end, pad_id], "pad_token_id": pad_id},
        "preprocessor_config.json": preprocessor(chat.image_size),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's chat model on digit scenes.")
    parser.add_argument("out", type=Path, help="directory for the checkpoint")
    parser.add_argument("--device", default=PLAN.device, help="to train on: cpu, or cuda")
    parser.add_argument("--workers", type=int, default=PLAN.workers, help="that draw batches")
    options = parser.parse_args()
    train(replace(PLAN, device=options.device, workers=options.workers), options.out)


if __name__ == "__main__":
    main()
