"""Checkpoints of the real shapes with made-up weights.

The published checkpoints are 12 to 28 GB. These have their exact layout (names, shapes, bfloat16,
shards, index, config) and values of plausible sizes, so that everything but accuracy can be tried
on them. They are streamed: memory does not grow with the model.

    python -m internvl_edge.export.synthetic internvit-6b-224 DIRECTORY --layers 4

Two options add what makes real towers hard to quantize, without changing the function computed:

    --outliers   a few channels of every norm are 64 times larger, and the columns of the linear
                 layers that read them 64 times smaller (a power of two: exact in bfloat16)
    --massive    a few tokens carry residual values of some thousands in a few channels, and some
                 rows of v are 64 times larger, the columns of proj that read them smaller

A third changes the function, since GELU is not linear:

    --gelu       a few rows of the vision tower's fc1 are 64 times larger, the columns of fc2 that
                 read them smaller

Values come from one pool of normal numbers, read from positions that a hash of (seed, tensor name)
decides: the same arguments give the same bytes on any machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from internvl_edge.export.checkpoint.parameters import expected_shapes
from internvl_edge.export.components import language_config
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import (
    CheckpointConfig,
    InternVLConfig,
    VisionConfig,
    published_fields,
    with_depth,
)
from internvl_edge.export.config.language import FAMILIES, LanguageConfig
from internvl_edge.export.convert.published import published_tensors
from internvl_edge.export.towers.blocks import LLAMA_NORMS, VISION_NORMS
from internvl_edge.export.weights.writer import WeightsWriter
from internvl_edge.types import Array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
POOL_SIZE = 1 << 21
CHUNK = 1 << 18  # elements in memory at a time
MAX_SHARD_NBYTES = 9_990_000_000  # gives InternVL-14B its three shards
FACTOR = 64.0
OUTLIER_CHANNELS = 6  # of every norm, and of every v
MASSIVE_TOKENS, MASSIVE_CHANNELS, MASSIVE_VALUE = 3, 4, 2000.0

_VIT_6B = VisionConfig()
_VIT_6B_V2_5 = replace(_VIT_6B, image_size=448, num_hidden_layers=45)
_VIT_300M = VisionConfig(
    hidden_size=1024,
    num_attention_heads=16,
    intermediate_size=4096,
    num_hidden_layers=24,
    image_size=448,
    qkv_bias=True,
    qk_normalization=False,
    norm_type="layer_norm",
)
_DYNAMIC = {"rope_theta": 1_000_000.0, "rope_type": "dynamic", "rope_factor": 2.0}
_QWEN2 = LanguageConfig(
    hidden_size=896,
    num_attention_heads=14,
    num_key_value_heads=2,
    intermediate_size=4864,
    num_hidden_layers=24,
    vocab_size=151674,
    max_position_embeddings=32768,
    has_qkv_bias=True,
    **_DYNAMIC,  # type: ignore[arg-type]
)
_INTERNLM2 = LanguageConfig(
    hidden_size=2048,
    num_attention_heads=16,
    num_key_value_heads=8,
    intermediate_size=8192,
    num_hidden_layers=24,
    vocab_size=92553,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    **_DYNAMIC,  # type: ignore[arg-type]
)
_QWEN2_7B = replace(
    _QWEN2,
    hidden_size=3584,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=0,
    intermediate_size=18944,
    num_hidden_layers=28,
)
_INTERNLM2_20B = replace(
    _INTERNLM2,
    hidden_size=6144,
    num_attention_heads=48,
    head_dim=0,
    intermediate_size=16384,
    num_hidden_layers=48,
)


def _chat(vision: VisionConfig, llama: LanguageConfig, architecture: str) -> CheckpointConfig:
    """Make the configuration of a model from InternVL2.5 on."""
    chat = ChatConfig(
        llama=llama,
        architecture=architecture,
        language_width=llama.hidden_size,
        ps_version="v2",
        template="internvl2_5",
        dynamic_image_size=True,
        use_thumbnail=True,
        max_dynamic_patch=12,
    )
    return CheckpointConfig(kind="chat", vision=vision, chat=chat)


_YI_34B = LanguageConfig(
    hidden_size=7168,
    num_attention_heads=56,
    num_key_value_heads=8,
    intermediate_size=20480,
    num_hidden_layers=60,
    vocab_size=64000,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=5_000_000.0,
)
PRESETS: dict[str, CheckpointConfig] = {
    "internvit-6b-224": CheckpointConfig(kind="vit", vision=_VIT_6B),
    "internvit-6b-448-v1-5": CheckpointConfig(
        kind="vit", vision=replace(_VIT_6B, image_size=448, num_hidden_layers=45)
    ),
    # QLLaMA is not published alone: here the vision tower before it is one block deep.
    "qllama-8b": CheckpointConfig(
        kind="internvl",
        vision=replace(_VIT_6B, num_hidden_layers=1),
        internvl=InternVLConfig(vision=replace(_VIT_6B, num_hidden_layers=1)),
    ),
    "internvl-14b-224": CheckpointConfig(
        kind="internvl", vision=_VIT_6B, internvl=InternVLConfig(vision=_VIT_6B)
    ),
    # 40 B parameters: use --layers, or a large disk
    "internvl-chat-v1-2": CheckpointConfig(
        kind="chat",
        vision=replace(_VIT_6B, image_size=448, num_hidden_layers=45),
        chat=ChatConfig(llama=_YI_34B, language_width=_YI_34B.hidden_size),
    ),
    "internvl3-1b": _chat(_VIT_300M, _QWEN2, "Qwen2ForCausalLM"),
    "internvl3-8b": _chat(_VIT_300M, _QWEN2_7B, "Qwen2ForCausalLM"),
    "internvl2_5-2b": _chat(_VIT_300M, _INTERNLM2, "InternLM2ForCausalLM"),
    "internvl2_5-26b": _chat(_VIT_6B_V2_5, _INTERNLM2_20B, "InternLM2ForCausalLM"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """The checkpoint to write."""

    config: CheckpointConfig
    seed: int = 0
    outliers: bool = False
    massive: bool = False
    gelu: bool = False
    layer_scale: float = 0.1  # mean of every LayerScale; 1.0 shows a branch's errors in full


def shrink(config: CheckpointConfig, layers: int | None) -> CheckpointConfig:
    """Reduce the numbers of layers and keep the widths; None keeps all layers."""
    if layers is None:
        return config
    llama = language_config(config)
    language = 0 if llama is None else min(layers, llama.num_hidden_layers)
    return with_depth(config, min(layers, config.vision.num_hidden_layers), language)


def write_checkpoint(synthesis: Synthesis, directory: Path) -> int:
    """Write a checkpoint into a new directory; return its size in bytes."""
    directory.mkdir(parents=True)
    shapes = _published_shapes(synthesis.config)
    shards = list(_shards(shapes))
    weight_map: dict[str, str] = {}
    pool = np.random.default_rng(synthesis.seed).standard_normal(POOL_SIZE, dtype=np.float32)
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        layout = {name: (BFLOAT16, shapes[name]) for name in names}
        with WeightsWriter(directory / file, layout) as writer:
            for name in names:
                for start, values in _values(synthesis, name, shapes[name], pool):
                    writer.write_part(name, start, values.astype(BFLOAT16))
        weight_map |= dict.fromkeys(names, file)
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", published_config(synthesis.config))
    return total


def _published_shapes(config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    """Map the names that published files have to shapes."""
    if config.chat is not None and config.chat.llama is not None:
        tensors = published_tensors(config, config.chat.layout, config.chat.architecture)
        return {name: tensor.shape for name, tensor in tensors.items()}
    prefix = "vision_model." if config.kind == "vit" else ""
    return {n.removeprefix(prefix): shape for n, shape in expected_shapes(config).items()}


def published_config(config: CheckpointConfig) -> dict[str, Any]:
    """Make a ``config.json`` like the published ones, without keys that decide nothing."""
    vision = {"model_type": "intern_vit_6b", **published_fields(config.vision)}
    if config.chat is not None and config.chat.llama is not None:
        return {
            "model_type": "internvl_chat",
            "architectures": ["InternVLChatModel"],
            "torch_dtype": "bfloat16",
            "vision_config": vision,
            "llm_config": _published_language(config.chat.llama, config.chat.architecture),
            "force_image_size": config.chat.image_size,
            "select_layer": -1,
            "ps_version": config.chat.ps_version,
            "template": config.chat.template,
            "downsample_ratio": config.chat.downsample_ratio,
            "dynamic_image_size": config.chat.dynamic_image_size,
            "use_thumbnail": config.chat.use_thumbnail,
            "max_dynamic_patch": config.chat.max_dynamic_patch,
        }
    if config.internvl is None:
        return vision | {"architectures": ["InternVisionModel"], "torch_dtype": "bfloat16"}
    return {
        "model_type": "internvl",
        "architectures": ["InternVLModel"],
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "vision_config": vision,
        "qllama_config": {"model_type": "llama", **published_fields(config.internvl.qllama)},
        "clip_embed_dim": config.internvl.clip_embed_dim,
        "attn_pool_num_heads": config.internvl.attn_pool_num_heads,
        "num_query_token": config.internvl.num_query_token,
        "cross_attention_frequency": config.internvl.cross_attention_frequency,
    }


def _published_language(llama: LanguageConfig, architecture: str) -> dict[str, Any]:
    scaling = None
    if llama.rope_type != "default":
        scaling = {"type": llama.rope_type, "factor": llama.rope_factor}
    return {
        "architectures": [architecture],
        "model_type": FAMILIES[architecture].model_type,
        **published_fields(llama),
        "rope_scaling": scaling,
    }


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names: list[str] = []
    nbytes = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if names and nbytes + size > MAX_SHARD_NBYTES:
            yield names
            names, nbytes = [], 0
        names.append(name)
        nbytes += size
    yield names


def _values(
    synthesis: Synthesis, name: str, shape: tuple[int, ...], pool: Array
) -> Iterator[tuple[int, Array]]:
    """Yield a tensor in flat pieces of whole rows: (first element, values)."""
    width = shape[-1] if shape else 1
    count = math.prod(shape)
    rows_at_once = max(CHUNK // width, 1)
    mean, deviation = _distribution(name, shape, synthesis.layer_scale)
    rng = _rng(synthesis.seed, name)
    for start in range(0, count, rows_at_once * width):
        size = min(rows_at_once * width, count - start)
        position = int(rng.integers(0, POOL_SIZE))
        values = deviation * _cut(pool, position, size)
        values += mean
        rows = values.reshape(-1, width) if shape else values
        inject(synthesis, name, rows, start // width)
        yield start, values


def _cut(pool: Array, position: int, size: int) -> Array:
    """Take ``size`` numbers from ``position`` on, continuing at the start after the end."""
    end = position + size
    if end <= len(pool):
        return pool[position:end]
    return np.concatenate((pool[position:], pool[: end - len(pool)]))


def _distribution(name: str, shape: tuple[int, ...], layer_scale: float) -> tuple[float, float]:
    """Return a mean and standard deviation that give activations the size of real ones."""
    leaf = name.rsplit(".", 1)[-1]
    is_norm = "norm" in name
    if name == "logit_scale":
        return math.log(100.0), 0.0
    if leaf in ("ls1", "ls2"):
        return layer_scale, min(0.2 * layer_scale, 0.1)
    if is_norm and leaf == "weight":
        return 1.0, 0.1
    if len(shape) == 1 or name.endswith("bias"):
        return 0.0, 0.02
    if "embedding" in name or "embed_tokens" in name or name == "query_tokens":
        return 0.0, 0.02 if "patch" in name else 0.5
    fan_in = math.prod(shape[1:]) if name != "text_projection" else shape[0]
    return 0.0, 1.0 / math.sqrt(fan_in)


def inject(synthesis: Synthesis, name: str, rows: Array, first_row: int) -> None:
    """Add outlier channels and massive activations to rows from ``first_row`` on, in place."""
    if synthesis.outliers:
        norm = _norm_of(name)
        if norm is not None:
            channels = _channels(synthesis.seed, norm, rows.shape[-1])
            rows[..., channels] *= FACTOR if name == f"{norm}.weight" else 1 / FACTOR
    if synthesis.gelu:
        block, _, leaf = name.rpartition(".mlp.")
        if leaf in ("fc1.weight", "fc2.weight"):
            _enlarge(synthesis, f"{block}.mlp", rows, first_row, is_reader=leaf == "fc2.weight")
    if not synthesis.massive:
        return
    if name.endswith("position_embedding"):
        # token t is row t of the table; the class token is excluded
        for token in range(1, 1 + MASSIVE_TOKENS):
            if first_row <= token < first_row + len(rows):
                picked = _channels(synthesis.seed, name, rows.shape[-1])[:MASSIVE_CHANNELS]
                rows[token - first_row, picked] = MASSIVE_VALUE * (1 + token)
    block, _, leaf = name.rpartition(".attn.")
    if leaf == "qkv.weight":
        width = rows.shape[-1]
        for channel in _channels(synthesis.seed, f"{block}.attn.v", width):
            row = 2 * width + channel - first_row
            if 0 <= row < len(rows):
                rows[row] *= FACTOR
    if leaf == "proj.weight":
        rows[:, _channels(synthesis.seed, f"{block}.attn.v", rows.shape[-1])] /= FACTOR


def _enlarge(
    synthesis: Synthesis, where: str, rows: Array, first_row: int, *, is_reader: bool
) -> None:
    """Enlarge some rows of fc1, and shrink the columns of fc2 that read them."""
    width = synthesis.config.vision.intermediate_size
    channels = _channels(synthesis.seed, where, width)
    if is_reader:
        rows[:, channels] /= FACTOR
        return
    inside = channels[(channels >= first_row) & (channels < first_row + len(rows))]
    rows[inside - first_row] *= FACTOR


def _norm_of(name: str) -> str | None:
    """Return the norm that a gain belongs to or that a linear layer reads; None for neither."""
    for norms in (VISION_NORMS, LLAMA_NORMS):
        for norm, readers in norms.items():
            for suffix in (f".{norm}.weight", *(f".{reader}.weight" for reader in readers)):
                block = name.removesuffix(suffix)
                if block != name and ".layers." in block and block.rsplit(".", 1)[-1].isdecimal():
                    return f"{block}.{norm}"
    return None


def _channels(seed: int, name: str, width: int) -> Array:
    return _rng(seed, f"channels of {name}").choice(width, OUTLIER_CHANNELS, replace=False)


def _rng(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)


def main() -> None:
    """Run this module's command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("directory", type=Path, help="a new directory")
    parser.add_argument("--layers", type=_positive, help="keep the widths, write fewer layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--massive", action="store_true")
    parser.add_argument("--gelu", action="store_true")
    chosen = parser.parse_args()
    synthesis = Synthesis(
        config=shrink(PRESETS[chosen.preset], chosen.layers),
        seed=chosen.seed,
        outliers=chosen.outliers,
        massive=chosen.massive,
        gelu=chosen.gelu,
    )
    try:
        total = write_checkpoint(synthesis, chosen.directory)
    except FileExistsError:
        parser.error(f"{chosen.directory} exists; choose a new directory")
    except OSError as error:
        parser.error(f"{chosen.directory} cannot be written: {error.strerror}")
    sys.stdout.write(f"{chosen.directory}: {total / 1e9:.2f} GB\n")


if __name__ == "__main__":
    main()
