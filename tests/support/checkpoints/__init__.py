"""Small checkpoints of chosen shapes with seeded weights, in the published layout."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from internvl_edge.export.checkpoint.checkpoint import LLAVA_TOWER
from internvl_edge.export.config.checkpoint import (
    InternVLConfig,
    QLlamaConfig,
    VisionConfig,
    load_config,
    published_fields,
)
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.export.models import Chat, InternViT, InternVL

LLM_KEYS = (  # those of LanguageConfig that transformers has too
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)

TINY = InternVLConfig(
    vision=VisionConfig(
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        num_hidden_layers=2,
        patch_size=14,
        image_size=28,
    ),
    qllama=QLlamaConfig(
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=96,
        num_hidden_layers=3,
        vocab_size=300,
        max_position_embeddings=128,
    ),
    clip_embed_dim=16,
    attn_pool_num_heads=4,
    num_query_token=5,
    cross_attention_frequency=2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatShapes:
    """The two towers of a chat checkpoint."""

    vision: VisionConfig
    llama: LanguageConfig


CHAT = ChatShapes(
    vision=replace(TINY.vision, num_hidden_layers=3, image_size=56),
    llama=LanguageConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        num_hidden_layers=2,
        vocab_size=320,
        max_position_embeddings=512,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A checkpoint directory and the state it holds."""

    path: Path
    state: dict[str, torch.Tensor]


def write_internvl(
    path: Path,
    config: InternVLConfig = TINY,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> Written:
    """Write an InternVL checkpoint."""
    torch.manual_seed(seed)
    state = randomised(InternVL(config))
    raw = {
        "model_type": "internvl",
        "architectures": ["InternVLModel"],
        "vision_config": asdict(config.vision),
        "qllama_config": asdict(config.qllama),
        "clip_embed_dim": config.clip_embed_dim,
        "attn_pool_num_heads": config.attn_pool_num_heads,
        "num_query_token": config.num_query_token,
        "cross_attention_frequency": config.cross_attention_frequency,
        "tie_word_embeddings": False,
    }
    return write_raw(path, raw, state, dtype=dtype, shards=shards)


def write_vit(path: Path, config: VisionConfig = TINY.vision, *, seed: int = 0) -> Written:
    """Write a bare InternViT checkpoint."""
    torch.manual_seed(seed)
    raw = {"model_type": "intern_vit_6b", **asdict(config)}
    return write_raw(path, raw, randomised(InternViT(config)))


def write_chat(
    path: Path,
    shapes: ChatShapes = CHAT,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    llm_config: dict[str, Any] | None = None,
    **more: Any,
) -> Written:
    """Write an InternVL-Chat checkpoint of the layout of V1-2; ``more`` goes into its config."""
    torch.manual_seed(seed)
    llama = {k: v for k, v in asdict(shapes.llama).items() if k in LLM_KEYS}
    raw = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "vision_config": published_fields(shapes.vision),
        "llm_config": {"architectures": ["LlamaForCausalLM"], **llama, **(llm_config or {})},
        "select_layer": -1,
        "ps_version": "v2",
        "template": "Hermes-2",
        **more,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    return write_raw(path, raw, randomised(Chat(load_config(path))), dtype=dtype)


def write_llava(path: Path, shapes: ChatShapes = CHAT, *, seed: int = 0) -> Written:
    """Write an InternVL-Chat V1.0 checkpoint: LLaVA's names, three blocks of which two are read."""
    torch.manual_seed(seed)
    llama = {k: v for k, v in asdict(shapes.llama).items() if k in LLM_KEYS}
    vision = replace(shapes.vision, image_size=28)
    raw = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        **llama,
        "mm_vision_tower": "OpenGVLab/InternViT-6B-224px",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "image_size": 42,
        "vision_config": published_fields(vision),
    }
    path.mkdir(parents=True, exist_ok=True)
    whole = raw | {"mm_vision_select_layer": -1}
    (path / "config.json").write_text(json.dumps(whole))
    state = randomised(Chat(load_config(path)))
    names = {
        "vision_model.": "model.vision_tower.vision_tower.",
        "mm_projector.": "model.mm_projector.",
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
    }
    renamed = {
        new + name.removeprefix(old): tensor
        for name, tensor in state.items()
        for old, new in names.items()
        if name.startswith(old)
    }
    return write_raw(path, raw, renamed)


def write_llava_queries(path: Path, *, seed: int = 0, depth: int = 3) -> Written:
    """V1.0 with QLLaMA: its tower is an InternVL-14B, written whole as one that has been trained.

    Args:
        path: the directory.
        seed: of the weights.
        depth: of QLLaMA; the vision tower has three blocks, patches are read after the second.
    """
    plain = write_llava(path, seed=seed)
    raw = json.loads((path / "config.json").read_text())
    vision = VisionConfig(**raw["vision_config"])
    tower = replace(TINY, vision=vision, qllama=replace(TINY.qllama, num_hidden_layers=depth))
    torch.manual_seed(seed + 1)
    state = {f"{LLAVA_TOWER}{n}": t for n, t in randomised(InternVL(tower)).items()}
    state |= {n: t for n, t in plain.state.items() if not n.startswith("model.vision_tower")}
    width, language = TINY.qllama.hidden_size, raw["hidden_size"]
    for part in ("0.weight", "0.bias", "2.weight", "2.bias"):
        state[f"model.mm_projector.mlp1.{part}"] = state.pop(f"model.mm_projector.{part}")
    for layer, inputs in ((0, width), (2, language)):
        weight = torch.randn(language, inputs) / inputs**0.5
        state[f"model.mm_projector.mlp2.{layer}.weight"] = weight
        state[f"model.mm_projector.mlp2.{layer}.bias"] = 0.1 * torch.randn(language)
    raw |= {
        "mm_vision_tower": "OpenGVLab/InternVL-14B-224px",
        "mm_projector_type": "two_mlp",
        "mm_hidden_size": width,
        "qllama_config": asdict(tower.qllama),
        "num_query_token": tower.num_query_token,
        "cross_attention_frequency": tower.cross_attention_frequency,
    }
    return write_raw(path, raw, state)


def write_raw(
    path: Path,
    config: dict[str, Any],
    state: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> Written:
    """Write a config and a state dict, in one file or in several with an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    state = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return Written(path=path, state=state)
    names = list(state)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: state[name] for name in names[i::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return Written(path=path, state=state)


def as_snapshot(path: Path, cache: Path) -> Path:
    """A checkpoint directory as a Hugging Face cache has it: a snapshot of links to blobs."""
    repository = cache / "models--OpenGVLab--InternVL"
    snapshot, blobs = repository / "snapshots" / ("c0ffee" * 7)[:40], repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in path.iterdir():
        data = file.read_bytes()
        large = file.suffix == ".safetensors"  # LFS files by SHA-256, others as git names them
        name = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        (blobs / name).write_bytes(data)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", name))
    return snapshot


def randomised(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that leave every part of the computation visible in the output."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.7 / parameter.shape[-1] ** 0.5)
                if name.endswith("weight"):  # output channels of different sizes, as trained ones
                    rows = torch.empty(len(parameter)).log_normal_(0, 0.5)
                    parameter.mul_(rows.reshape(-1, *[1] * (parameter.ndim - 1)))
            elif name != "logit_scale":
                parameter.normal_(0, 0.3)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def write_tokenizer(path: Path, vocab_size: int = 300, *, normalises: bool = True) -> None:
    """Train a tiny SentencePiece model into a checkpoint directory; LLaMA's normalises nothing."""
    import sentencepiece

    texts = [
        "a photo of a red seven",
        "summarize:a blue three",
        "English caption:",
        "left of above",
    ]
    with (path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 4),
            model_writer=file,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            pad_id=-1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            hard_vocab_limit=False,
            minloglevel=2,
            normalization_rule_name="nmt_nfkc" if normalises else "identity",
            remove_extra_whitespaces=normalises,
        )


CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def write_chat_tokenizer(path: Path) -> dict[str, int]:
    """The same with the added tokens of a chat model; their ids."""
    write_tokenizer(path)
    added = {token: 300 + i for i, token in enumerate(CHAT_TOKENS)}
    (path / "added_tokens.json").write_text(json.dumps(added))
    return added
