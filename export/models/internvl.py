"""InternVL-C and InternVL-G: both towers, the pools and the heads, as one PyTorch model.

    image_embeds  = clip_projector(ViT(pixels))                                    InternVL-C
    query_embeds  = clip_projector2(QLLaMA(queries, attending to ViT(pixels)))
    InternVL-G    = image_embeds / |image_embeds| + query_embeds / |query_embeds|
    text_embeds   = QLLaMA(ids)[last token] · text_projection
    match         = mean over queries of itm_head(QLLaMA([queries | ids], no causal mask))

This is the reference that every compiled component is verified against. See docs/model.md,
section 3, and section 2.5 for sequence layouts and masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvl_edge.export.config.checkpoint import InternVLConfig
from internvl_edge.export.models.heads import AttentionPool
from internvl_edge.export.models.qllama import (
    InPlace,
    KeyValue,
    QLlama,
    causal_mask,
    generation_mask,
    generation_positions,
    mask_on,
    padding_mask,
)
from internvl_edge.export.models.vit import InternViT

Mode = Literal["c", "g"]


class InternVL(nn.Module):
    def __init__(self, config: InternVLConfig) -> None:
        super().__init__()
        width, vision_width = config.qllama.hidden_size, config.vision.hidden_size
        heads, embed = config.attn_pool_num_heads, config.clip_embed_dim
        self.config = config
        self.vision_model = InternViT(config.vision)
        self.qllama = QLlama(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_token, width))
        self.text_projection = nn.Parameter(torch.empty(width, embed))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.clip_projector = AttentionPool(vision_width, heads, embed)
        self.clip_projector2 = AttentionPool(width, heads, embed)
        self.itm_head = nn.Linear(width, 2)

    # --- embeddings --------------------------------------------------------------------------

    def encode_image(self, pixel_values: Tensor, mode: Mode = "c") -> Tensor:
        """Embed (B, 3, H, W) → (B, E), not normalised; mode ``g`` sums two unit vectors."""
        vision = self.vision_model(pixel_values)
        image: Tensor = self.clip_projector(vision)
        if mode == "c":
            return image
        queries = self.clip_projector2(self.encode_queries(vision)[0])
        return _unit(image) + _unit(queries)

    def encode_queries(self, vision: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Run queries on vision tokens (B, N, C) → states (B, nq, D), and their key/value cache."""
        queries = self.query_tokens.expand(vision.shape[0], -1, -1)
        num_queries = queries.shape[1]
        hidden, cache = self.qllama(queries, None, vision=vision, num_queries=num_queries)
        return hidden, cache

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed (B, T) → (B, E), not normalised, from the state of each row's last real token."""
        mask = (input_ids > 0).long() if attention_mask is None else attention_mask
        hidden = self.text_states(input_ids, mask)
        column = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * column).argmax(dim=1)  # (B,)
        index = last[:, None, None].expand(-1, 1, hidden.shape[-1])
        pooled = hidden.gather(1, index).squeeze(1)  # (B, D)
        return pooled.to(self.text_projection.dtype) @ self.text_projection

    def text_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the causal text tower on (B, T) → hidden states (B, T, D)."""
        causal = causal_mask(input_ids.shape[1], input_ids.device)
        mask = causal & padding_mask(attention_mask)
        hidden: Tensor = self.qllama(self.qllama.embed(input_ids), mask)[0]
        return hidden

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, mode: Mode = "c"
    ) -> tuple[Tensor, Tensor]:
        """Compute similarity logits of images and texts: (images, texts) and its transpose."""
        image, text = (
            _unit(self.encode_image(pixel_values, mode)),
            _unit(self.encode_text(input_ids)),
        )
        logits = self.logit_scale.exp() * image @ text.T
        return logits, logits.T

    # --- matching ----------------------------------------------------------------------------

    def match(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Match pairs of image and text → logits (B, 2); class 1 means that they match."""
        return self.match_tokens(self.vision_model(pixel_values), input_ids, attention_mask)

    def match_tokens(self, vision: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Match like :meth:`match`, given the vision tower's tokens (B, N, C)."""
        states = self.match_states(vision, input_ids, attention_mask)
        logits: Tensor = self.itm_head(states.to(self.itm_head.weight.dtype))  # (B, nq, 2)
        return logits.mean(dim=1)

    def match_states(self, vision: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute the query states (B, nq, D) with queries and text attending to each other."""
        embeds, mask = self._queries_and_text(input_ids, attention_mask)
        num_queries = self.query_tokens.shape[1]
        hidden, _ = self.qllama(embeds, padding_mask(mask), vision=vision, num_queries=num_queries)
        return hidden[:, :num_queries]

    # --- generation --------------------------------------------------------------------------

    def prefill(
        self, vision: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run [queries | left-padded prompt] → logits (B, nq + T, V), and the cache."""
        embeds, mask = self._queries_and_text(input_ids, attention_mask)
        num_queries = self.query_tokens.shape[1]
        hidden, cache = self.qllama(
            embeds,
            generation_mask(mask, num_queries),
            generation_positions(mask),
            vision=vision,
            num_queries=num_queries,
        )
        return self.qllama.logits(hidden), cache

    def decode(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run further tokens → logits (B, T, V); ``attention_mask`` is (B, nq + text so far)."""
        positions = generation_positions(attention_mask)[:, -input_ids.shape[1] :]
        return self.decode_at(input_ids, attention_mask, positions, past)

    def decode_at(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        positions: Tensor,
        past: Sequence[KeyValue | InPlace],
    ) -> tuple[Tensor, list[KeyValue]]:
        """Decode like :meth:`decode`, at given positions (B, T)."""
        mask = mask_on(past, attention_mask, input_ids.shape[1])
        embeds = self.qllama.embed(input_ids)
        hidden, cache = self.qllama(embeds, mask, positions, past=past)
        return self.qllama.logits(hidden), cache

    @torch.inference_mode()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
    ) -> Tensor:
        """Continue left-padded prompts greedily: (B, ≤ max_new_tokens) ids, 0 after EOS."""
        eos, vision = self.config.qllama.eos_token_id, self.vision_model(pixel_values)
        logits, cache = self.prefill(vision, input_ids, attention_mask)
        mask = F.pad(attention_mask, (self.query_tokens.shape[1], 0), value=1)
        alive = torch.ones(len(input_ids), 1, dtype=torch.bool, device=input_ids.device)
        tokens: list[Tensor] = []
        while len(tokens) < max_new_tokens and bool(alive.any()):
            scores = logits[:, -1].float()
            if len(tokens) < min_new_tokens:
                scores[:, eos] = -torch.inf
            token = scores.argmax(-1, keepdim=True).where(alive, 0)
            tokens.append(token)
            alive = alive & (token != eos)
            mask = F.pad(mask, (0, 1), value=1)
            if len(tokens) < max_new_tokens:
                logits, cache = self.decode(token, mask, cache)
        return torch.cat(tokens, dim=1) if tokens else input_ids[:, :0]

    def _queries_and_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embed [queries | text] → (B, nq + T, D), and extend the padding mask (B, nq + T)."""
        queries = self.query_tokens.expand(input_ids.shape[0], -1, -1)
        embeds = torch.cat((queries, self.qllama.embed(input_ids)), dim=1)
        return embeds, F.pad(attention_mask, (self.query_tokens.shape[1], 0), value=1)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
