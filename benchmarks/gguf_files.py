"""A chat checkpoint as llama.cpp's files: the language model, and the tower with its projector.

Two files of the layout that llama.cpp's own converter gives InternVL checkpoints, for Qwen2 and
InternLM2 language models and 300M towers. The vocabulary is made up: bytes, and numbers for the
rest.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from llama_cpp._ggml import libggml

from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.checkpoint.load import read_torch
from internvl_edge.types import Array

TYPES = {"Q8_0": Type.Q8_0, "Q6_K": Type.Q6_K, "Q4_0": Type.Q4_0}
ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "InternLM2ForCausalLM": "internlm2"}
LANGUAGE = "language_model."
LANGUAGE_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
VISION_NAMES = {
    "vision_model.embeddings.class_embedding": "v.class_embd",
    "vision_model.embeddings.position_embedding": "v.position_embd.weight",
    "vision_model.embeddings.patch_embedding": "v.patch_embd",
    "norm1": "ln1",
    "norm2": "ln2",
    "ls1": "ls1.weight",
    "ls2": "ls2.weight",
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # that stand for themselves


def write_language(checkpoint: Path, path: Path, kind: str) -> None:
    """Write the language model, its matrices quantized to ``kind``.

    The vocabulary's product gets what llama.cpp's own quantizer gives it: where ``kind`` is Q4_0,
    6 bits in blocks of 256, or 8 bits where 256 does not divide its inputs, as Qwen2's 896.
    """
    source = open_checkpoint(checkpoint)
    assert source.config.chat is not None and source.config.chat.llama is not None
    llama, architecture = source.config.chat.llama, source.config.chat.architecture
    output = "Q6_K" if kind == "Q4_0" and llama.hidden_size % 256 == 0 else "Q8_0"
    # InternLM2's rotated pairs are neighbours there, and a head's halves in the checkpoint
    heads = {"q_proj": llama.num_attention_heads, "k_proj": llama.num_key_value_heads}
    paired = heads if architecture == "InternLM2ForCausalLM" else {}
    writer = gguf.GGUFWriter(str(path), ARCHITECTURES[architecture])
    writer.add_context_length(llama.max_position_embeddings)
    writer.add_embedding_length(llama.hidden_size)
    writer.add_block_count(llama.num_hidden_layers)
    writer.add_feed_forward_length(llama.intermediate_size)
    writer.add_head_count(llama.num_attention_heads)
    writer.add_head_count_kv(llama.num_key_value_heads)
    writer.add_rope_dimension_count(llama.head_dim)
    writer.add_rope_freq_base(llama.rope_theta)
    writer.add_layer_norm_rms_eps(llama.rms_norm_eps)
    _add_vocabulary(writer, llama.vocab_size)
    for name in source.tensors:
        if name.startswith(LANGUAGE):
            stem, _, leaf = name.removeprefix(LANGUAGE).rpartition(".")
            new = f"{_in_block(stem, 'model.layers.', 'blk.', LANGUAGE_NAMES)}.{leaf}"
            values = _read(source, name)
            if count := paired.get(stem.rpartition(".")[2]):
                halves = values.reshape(count, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
            _add(writer, new, values, output if stem == "lm_head" else kind)
    _finish(writer)


def write_vision(checkpoint: Path, path: Path, kind: str) -> None:
    """Write the vision tower and its projector, their matrices quantized to ``kind``."""
    source = open_checkpoint(checkpoint)
    config, chat = source.config.vision, source.config.chat
    assert chat is not None
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("internvl")
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(config.num_hidden_layers)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_projection_dim(chat.language_width)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_use_gelu(True)
    writer.add_vision_projector_scale_factor(chat.shuffle)
    writer.add_vision_image_mean([0.485, 0.456, 0.406])
    writer.add_vision_image_std([0.229, 0.224, 0.225])
    for name in source.tensors:
        if name.startswith("mlp1."):
            kept = "F32" if name.startswith("mlp1.0.") else kind
            _add(writer, name.replace("mlp1.", "mm.model.mlp."), _read(source, name), kept)
        elif ".attn.qkv." in name:
            block = _in_block(name, "vision_model.encoder.layers.", "v.blk.", {})
            for part, values in zip("qkv", np.split(_read(source, name), 3), strict=True):
                _add(writer, block.replace(".attn.qkv.", f".attn_{part}."), values, kind)
        elif name.startswith("vision_model."):
            stem, _, leaf = name.rpartition(".")
            stem, leaf = (name, "") if leaf not in ("weight", "bias") else (stem, f".{leaf}")
            new = _in_block(stem, "vision_model.encoder.layers.", "v.blk.", VISION_NAMES)
            kept = kind if ".blk." in new else "F32"
            _add(writer, new + leaf, np.squeeze(_read(source, name)), kept)
    _finish(writer)


def _add_vocabulary(writer: Any, size: int) -> None:
    """Add a byte-level vocabulary: every byte, the marks of an image, and numbers."""
    shifted = [byte for byte in range(256) if byte not in BYTES]
    letters = [*map(chr, BYTES), *(chr(256 + i) for i in range(len(shifted)))]
    tokens = [*letters, "<img>", "</img>", *(f"[{i}]" for i in range(size))][:size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * size)  # each a normal one
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)


def _in_block(name: str, prefix: str, new: str, names: dict[str, str]) -> str:
    """Rename a tensor, or one inside a block."""
    match = re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(.*)", name)
    return names[name] if match is None else f"{new}{match[1]}.{names.get(match[2], match[2])}"


def _read(source: Checkpoint, name: str) -> Array:
    values: Array = read_torch(source, name).numpy()
    return values


def _add(writer: Any, name: str, values: Array, kind: str) -> None:
    """Add a tensor: a matrix as ``kind`` says, others in float32."""
    values = np.ascontiguousarray(values, np.float32)
    if kind in TYPES and values.ndim == 2:
        writer.add_tensor(name, _quantized(values, TYPES[kind]), raw_dtype=TYPES[kind])
    else:
        writer.add_tensor(name, values)


def _quantized(values: Array, kind: Type) -> Array:
    """Round a matrix as llama.cpp does; the package ``gguf`` cannot, to 6 bits."""
    (rows, columns), (block, nbytes) = values.shape, gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((rows, columns // block * nbytes), np.uint8)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (values, out))
    sizes = (ctypes.c_int64(count) for count in (0, rows, columns))
    libggml.ggml_quantize_chunk(ctypes.c_int(kind), *pointers, *sizes, None)
    return out


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
