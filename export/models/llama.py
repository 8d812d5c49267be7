"""The language model of a chat model: a LLaMA of any family (``config.language``).

It shares its layers with QLLaMA, and may differ in what QLLaMA fixes: fewer key and value heads
than query heads, heads of another size than their share of the width, biases of q, k and v, norms
of q and k, another rotary base, scaled rotary positions, and an output layer that may be the token
embedding itself.

    scaling   angle per position of a pair i with frequency f
    default   f
    linear    f / factor
    dynamic   f, up to the trained number of positions, which is all that is compiled for
    llama3    f for short waves, f / factor for long ones, a blend of the two in between
    longrope  f / short_factor[i] for texts of up to L positions, f / long_factor[i] for longer ones

With w = 2π / f the wave's length and L the original number of positions, a wave is short where
w < L / high_freq_factor and long where w > L / low_freq_factor; between,
s = (L / w − low) / (high − low) is the share of f. See docs/model.md, section 4.5.

**LongRoPE** has two sets of angles for the same position, and a text uses one of them throughout.
Both are rows of one table: those of short texts first, from row ``long_positions`` on those of long
ones. So a graph knows nothing of it: whoever runs it adds ``long_positions`` to the positions of a
text that will be longer than L (``positions_of`` here, ``generation.batch`` in the runtime).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.export.models.attention import rotary_frequencies, tables_of
from internvl_edge.export.models.qllama import (
    InPlace,
    KeyValue,
    Layer,
    generation_positions,
    mask_on,
)
from internvl_edge.export.models.vit import RMSNorm, unrotated, unrotation


def llama_tables(config: LanguageConfig) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of every row, float32, (rows, d/2) each."""
    frequency = rotary_frequencies(config.head_dim, config.rope_theta)
    if config.rope_type == "longrope":
        return _longrope(frequency, config)
    if config.rope_type == "linear":
        frequency = frequency / config.rope_factor
    elif config.rope_type == "llama3":
        frequency = _llama3(frequency, config)
    return tables_of(frequency, config.max_position_embeddings)


def table_rows(config: LanguageConfig) -> int:
    """Count the rows of the rotary tables: one for each position, and those of long texts."""
    return config.max_position_embeddings + config.long_positions


def _longrope(frequency: Tensor, config: LanguageConfig) -> tuple[Tensor, Tensor]:
    """Join the tables of short and long texts; cos and sin have their factor at any length."""
    whole = config.max_position_embeddings
    lengths = config.long_positions or whole, whole
    factors = config.short_factor, config.long_factor
    pairs = [
        tables_of(frequency / torch.tensor(factor), length)
        for factor, length in zip(factors, lengths, strict=True)
    ]
    cos, sin = (torch.cat(some) for some in zip(*pairs, strict=True))
    rows, scale = table_rows(config), config.rope_attention_factor
    return cos[:rows] * scale, sin[:rows] * scale


def _llama3(frequency: Tensor, config: LanguageConfig) -> Tensor:
    low, high = config.low_freq_factor, config.high_freq_factor
    turns = config.original_max_position_embeddings * frequency / (2 * math.pi)  # L / w
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return share * frequency + (1 - share) * frequency / config.rope_factor


class LlamaModel(nn.Module):
    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.unrotation = unrotation(config.hidden_size, config.is_rotated)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """The model from inputs_embeds (B, T, D) to logits (B, T, vocabulary), and the cache."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        shape = table_rows(config), config.head_dim // 2
        self.register_buffer("rope_cos", torch.empty(shape), persistent=False)
        self.register_buffer("rope_sin", torch.empty(shape), persistent=False)
        self.reset_tables()

    def reset_tables(self) -> None:
        """Compute the rotary tables; called again when weights replace those of a meta model."""
        if self.model.norm.weight.is_meta:
            return
        device = self.model.norm.weight.device
        self.rope_cos, self.rope_sin = (t.to(device) for t in llama_tables(self.config))

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[KeyValue | InPlace],
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run tokens (B, T, D) after a cache of P positions; the mask is (B, P + T)."""
        x, presents = self.entered(inputs_embeds), []
        mask = mask_on(past, attention_mask, inputs_embeds.shape[1])
        rope = self.rope(position_ids)
        for layer, cached in zip(self.model.layers, past, strict=True):
            x, present = layer(x, rope, mask, cached)
            presents.append(present)
        hidden = self.model.norm(unrotated(x, self.model.unrotation))
        output = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden.to(output.dtype), output), presents

    def rope(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Look up cos and sin of positions (B, T): (B, T, d/2) each."""
        return F.embedding(position_ids, self.rope_cos), F.embedding(position_ids, self.rope_sin)

    def positions_of(self, mask: Tensor, new_tokens: int = 0) -> Tensor:
        """Count positions (B, S) of a mask (B, S) of a text that will get ``new_tokens`` more."""
        positions = generation_positions(mask)
        if not self.config.long_positions:
            return positions
        length = mask.sum(-1, keepdim=True) + new_tokens
        is_long = length > self.config.long_positions
        return positions + is_long * self.config.long_positions

    def entered(self, inputs_embeds: Tensor) -> Tensor:
        """Bring token embeddings (B, T, D) into the basis of the residual stream.

        They are an input, in the checkpoint's basis. The rotation is its own inverse, so the
        matrix that undoes it also applies it.
        """
        x = inputs_embeds.to(self.model.norm.weight.dtype)
        return unrotated(x, self.model.unrotation)

    def empty_cache(self, batch: int) -> list[KeyValue]:
        """Make a cache without positions for every layer."""
        config, like = self.config, self.model.embed_tokens.weight
        empty = like.new_empty(batch, config.num_key_value_heads, 0, config.head_dim)
        return [(empty, empty)] * config.num_hidden_layers
