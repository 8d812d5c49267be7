"""QLLaMA: a LLaMA that attends to an image through learnable queries and cross-attention.

Notable features:
- plain LLaMA layers: RMSNorm, rotary positions, gated SiLU MLP, no biases
- every ``cross_attention_frequency``-th layer lets the first ``num_query_token`` positions, the
  queries, attend to the vision tower's tokens, between self-attention and MLP
- one stack for four purposes, which differ only in the self-attention mask (``masks`` below):
  text embedding, image queries, image-text matching, generation

Queries never attend to text except in matching, so in generation the first ``num_query_token``
positions of the key/value cache hold all of the image, and the rest is a plain causal LLaMA.
Cross-attention therefore runs if ``vision`` is given, whatever the sequence length.
Parameter names are the published checkpoints'. See docs/model.md, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvl_edge.export.config.checkpoint import InternVLConfig, QLlamaConfig
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.export.models.attention import (
    attention,
    cached_attention,
    rotary_tables,
    rotate,
    split_heads,
    write_positions,
)
from internvl_edge.export.models.vit import RMSNorm, unrotated, unrotation

KeyValue = tuple[Tensor, Tensor]  # (B, heads, T, d) each, keys after their rotation
InPlace = tuple[Tensor, Tensor, Tensor]  # (B, heads, C, d) twice; first new position, (B,)


# --- masks: True where row i may attend to column j (docs/model.md, section 2.5) -------------


def padding_mask(attention_mask: Tensor) -> Tensor:
    """Turn (B, S) of 1 and 0 into (B, 1, 1, S): no position attends to padding."""
    return attention_mask.bool()[:, None, None, :]


def causal_mask(length: int, device: torch.device, *, past: int = 0) -> Tensor:
    """Make (1, 1, T, past + T): no position attends to later ones."""
    row = torch.arange(length, device=device)[:, None] + past
    column = torch.arange(past + length, device=device)[None, :]
    return (column <= row)[None, None]


def generation_mask(attention_mask: Tensor, num_queries: int) -> Tensor:
    """Turn (B, S) into (B, 1, S, S): queries see all queries; text is causal and sees them."""
    causal = causal_mask(attention_mask.shape[1], attention_mask.device).clone()
    mask = (causal & padding_mask(attention_mask)).clone()
    mask[..., :num_queries, :num_queries] = True
    return mask


def decoding_mask(attention_mask: Tensor, length: int) -> Tensor:
    """Turn (B, P + T) into (B, 1, T, P + T): the last T positions, causal.

    Left padding would attend to nothing at all, and a softmax over nothing is NaN: such a row
    attends to itself, and nothing attends to it.
    """
    past = attention_mask.shape[1] - length
    causal = causal_mask(length, attention_mask.device, past=past)
    is_blind = attention_mask.cumsum(-1)[:, past:] == 0  # (B, T)
    row = torch.arange(length, device=attention_mask.device)[:, None] + past
    itself = row == torch.arange(past + length, device=attention_mask.device)[None, :]
    return (causal & padding_mask(attention_mask)) | (is_blind[:, None, :, None] & itself)


def in_place_mask(attention_mask: Tensor, length: int, first: Tensor) -> Tensor:
    """Turn (B, C) into (B, 1, T, C): :func:`decoding_mask` for T positions from ``first`` (B,) on.

    No position attends to later entries of the cache, whatever the mask says of them.
    """
    device = attention_mask.device
    row = first[:, None] + torch.arange(length, device=device)  # (B, T)
    column = torch.arange(attention_mask.shape[1], device=device)
    seen = (column <= row[..., None]) & attention_mask.bool()[:, None, :]  # (B, T, C)
    is_blind = seen.long().sum(-1, keepdim=True) == 0
    return (seen | (is_blind & (column == row[..., None])))[:, None]


def mask_on(past: Sequence[KeyValue | InPlace], attention_mask: Tensor, length: int) -> Tensor:
    """Make the mask of ``length`` new positions for a cache of either kind."""
    first = past[0]
    if len(first) == 2:
        return decoding_mask(attention_mask, length)
    return in_place_mask(attention_mask, length, first[2])


def extended(past: KeyValue | InPlace, new: KeyValue) -> KeyValue:
    """Extend a cache by new positions: after the others, or written in place."""
    if len(past) == 2:
        key, value = (torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))
    else:
        key, value = (
            write_positions(held, x, past[2]) for held, x in zip(past[:2], new, strict=True)
        )
    return key, value


def generation_positions(attention_mask: Tensor) -> Tensor:
    """Count positions (B, S) of a mask (B, S) over real tokens; padding gets position 1."""
    return (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)


# --- layers ----------------------------------------------------------------------------------


class HeadNorm(RMSNorm):
    """RMSNorm of each head by itself, (B, T, heads·d); all heads have one gain (d)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, len(self.weight)))).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, config: QLlamaConfig | LanguageConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        q_width, kv_width = self.num_heads * size, self.num_kv_heads * size
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, outputs, bias=config.has_qkv_bias)
            for outputs in (q_width, kv_width, kv_width)
        )
        self.o_proj = nn.Linear(q_width, width, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.has_qk_norm:
            self.q_norm = HeadNorm(size, config.rms_norm_eps)
            self.k_norm = HeadNorm(size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: KeyValue | InPlace | None,
    ) -> tuple[Tensor, KeyValue]:
        q = rotate(self.q_norm(self.q_proj(x)), *rope, self.num_heads)
        k = rotate(self.k_norm(self.k_proj(x)), *rope, self.num_kv_heads)
        v = self.v_proj(x)
        present = split_heads(k, self.num_kv_heads), split_heads(v, self.num_kv_heads)
        if past is None:
            seen = attention(q, k, v, self.num_heads, mask, self.num_kv_heads)
            return self.o_proj(seen), present
        assert mask is not None
        key, value = extended(past, present)
        return self.o_proj(cached_attention(q, key, value, self.num_heads, mask)), (key, value)


class CrossAttention(nn.Module):
    """Queries look at every vision token; the pre-norms are inside, positions do not exist."""

    def __init__(self, config: QLlamaConfig, vision_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.norm1 = RMSNorm(width, config.rms_norm_eps)
        self.norm2 = RMSNorm(vision_width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(vision_width, width, bias=False)
        self.v_proj = nn.Linear(vision_width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, vision: Tensor) -> Tensor:
        compute = self.q_proj.weight.dtype
        seen = self.norm2(vision).to(compute)
        q = self.q_proj(self.norm1(x).to(compute))
        return self.o_proj(attention(q, self.k_proj(seen), self.v_proj(seen), self.num_heads))


class MLP(nn.Module):
    def __init__(self, config: QLlamaConfig | LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A LLaMA layer; with cross-attention, one of QLLaMA's that attend to the image."""

    def __init__(
        self,
        config: QLlamaConfig | LanguageConfig,
        vision_width: int = 0,
        *,
        has_cross: bool = False,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = None
        if has_cross:
            assert isinstance(config, QLlamaConfig)
            self.cross_attn = CrossAttention(config, vision_width)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past: KeyValue | InPlace | None = None,
        vision: Tensor | None = None,
        num_queries: int = 0,
    ) -> tuple[Tensor, KeyValue]:
        compute = self.mlp.gate_proj.weight.dtype
        attended, present = self.self_attn(self.input_layernorm(x).to(compute), rope, mask, past)
        x = x + attended.to(x.dtype)
        if self.cross_attn is not None and vision is not None:
            queries, text = x[:, :num_queries], x[:, num_queries:]
            queries = queries + self.cross_attn(queries, vision).to(x.dtype)
            x = queries if x.shape[1] == num_queries else torch.cat((queries, text), dim=1)
        x = x + self.mlp(self.post_attention_layernorm(x).to(compute)).to(x.dtype)
        return x, present


class LlamaModel(nn.Module):
    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        llama, every = config.qllama, config.cross_attention_frequency
        self.embed_tokens = nn.Embedding(llama.vocab_size, llama.hidden_size)
        self.layers = nn.ModuleList(
            Layer(llama, config.vision.hidden_size, has_cross=i % every == 0)
            for i in range(llama.num_hidden_layers)
        )
        self.unrotation = unrotation(llama.hidden_size, llama.is_rotated)
        self.norm = RMSNorm(llama.hidden_size, llama.rms_norm_eps)


class QLlama(nn.Module):
    """The model from inputs_embeds (B, T, D) to final hidden states (B, T, D), and the cache."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        llama = config.qllama
        self.config = llama
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(llama.hidden_size, llama.vocab_size, bias=False)
        shape = llama.max_position_embeddings, llama.head_dim // 2
        self.register_buffer("rope_cos", torch.empty(shape), persistent=False)
        self.register_buffer("rope_sin", torch.empty(shape), persistent=False)
        self.reset_tables()

    def reset_tables(self) -> None:
        """Compute the rotary tables; called again when weights replace those of a meta model."""
        if self.model.norm.weight.is_meta:
            return
        tables = rotary_tables(self.config.max_position_embeddings, self.config.head_dim)
        self.rope_cos, self.rope_sin = (t.to(self.model.norm.weight.device) for t in tables)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed (B, T) → (B, T, D), in the dtype of the residual stream."""
        tokens: Tensor = self.model.embed_tokens(input_ids)
        return tokens.to(self.model.norm.weight.dtype)

    def forward(
        self,
        inputs_embeds: Tensor,
        mask: Tensor | None,
        positions: Tensor | None = None,
        past: Sequence[KeyValue | InPlace] | None = None,
        vision: Tensor | None = None,
        num_queries: int = 0,
    ) -> tuple[Tensor, list[KeyValue]]:
        x, presents = inputs_embeds, []
        rope = self.rope(x.shape[1], positions)
        for i, layer in enumerate(self.model.layers):
            x, present = layer(x, rope, mask, past and past[i], vision, num_queries)
            presents.append(present)
        return self.model.norm(unrotated(x, self.model.unrotation)), presents

    def rope(self, length: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Look up cos and sin of ``positions`` (B, T), or of 0 … length − 1: (B|1, T, d/2) each."""
        if positions is None:
            return self.rope_cos[None, :length], self.rope_sin[None, :length]
        return F.embedding(positions, self.rope_cos), F.embedding(positions, self.rope_sin)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits: (B, T, D) → (B, T, vocabulary)."""
        out: Tensor = self.lm_head(hidden.to(self.lm_head.weight.dtype))
        return out
