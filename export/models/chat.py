"""InternVL-Chat: the vision tower's patches, projected, become tokens of a LLaMA.

    patches        = ViT(pixels) without its class token                      (B, g², C)
    image_tokens   = projector(pixel_shuffle(patches))                        (B, g²/s², D)
    inputs_embeds  = token embeddings, with image tokens where the prompt has their places

Pixel shuffle puts s by s neighbouring patches side by side into one of s² the width. The first
published version leaves the grid transposed, and the models trained with it rely on that. The
LLaVA layout (V1.0) has no shuffle. Blocks behind ``select_layer`` are not part of the tower: what
is read is what the last block here gives. Source: internvl-spec section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from internvl_edge.errors import CheckpointError
from internvl_edge.export.chatconfig import ChatConfig
from internvl_edge.export.config import CheckpointConfig
from internvl_edge.export.models.llama import Llama
from internvl_edge.export.models.vit import InternViT


def pixel_shuffle(grid: Tensor, factor: int, version: str) -> Tensor:
    """(B, h, w, C) → (B, h/s, w/s, C·s²); with v1 (B, w/s, h/s, C·s²), the grid transposed."""
    batch, height, width, channels = grid.shape
    x = grid.reshape(batch, height, width // factor, channels * factor)
    x = x.permute(0, 2, 1, 3)  # (B, w/s, h, C·s)
    x = x.reshape(batch, width // factor, height // factor, channels * factor**2)
    return x.permute(0, 2, 1, 3) if version == "v2" else x


def projector(config: ChatConfig, width: int) -> nn.Sequential:
    """From patches (…, C·s²) to the language model's width (…, D)."""
    language_width = config.language_width
    if config.layout == "llava":
        return nn.Sequential(
            nn.Linear(width, language_width),
            nn.GELU(),
            nn.Linear(language_width, language_width),
        )
    merged = width * config.shuffle**2
    return nn.Sequential(
        nn.LayerNorm(merged),
        nn.Linear(merged, language_width),
        nn.GELU(),
        nn.Linear(language_width, language_width),
    )


class Chat(nn.Module):
    """The parts of an InternVL-Chat; parameter names of V1-1 and later, of V1.0's too."""

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__()
        assert config.chat is not None
        self.checkpoint_config, self.config, llama = config, config.chat, config.chat.llama
        self.vision_model = InternViT(config.vision)
        made = projector(config.chat, config.vision.hidden_size)
        setattr(self, self.config.projector, made)
        self.language_model = None if llama is None else Llama(llama)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) → image tokens (B, N, D)."""
        return Chat.project(self, self.vision_model(pixel_values))

    def project(self, hidden: Tensor) -> Tensor:
        """What the tower's last block leaves (B, 1 + g², C) → image tokens (B, N, D)."""
        x = hidden[:, 1:]
        factor = self.config.shuffle
        if factor > 1:
            side = round(x.shape[1] ** 0.5)
            grid = x.unflatten(1, (side, side))
            x = pixel_shuffle(grid, factor, self.config.ps_version).flatten(1, 2)
        for layer in getattr(self, self.config.projector):
            # LayerNorm belongs to the stream, what follows computes in the linear layers' dtype
            x = layer(x.to(layer.weight.dtype) if hasattr(layer, "weight") else x)
        return x

    def embed(self, input_ids: Tensor, image_tokens: Tensor, image_token_id: int) -> Tensor:
        """Ids (B, T) → (B, T, D), image tokens (M, N, D) in their places, in order.

        Raises:
            CheckpointError: another number of places than of image tokens.
        """
        llama = require_llama(self)
        is_image = input_ids == image_token_id
        tokens = image_tokens.flatten(0, 1)
        if int(is_image.sum()) != len(tokens):
            raise CheckpointError(
                f"expected as many places as image tokens, found {int(is_image.sum())} places of "
                f"id {image_token_id} and {len(tokens)} tokens"
            )
        embeds: Tensor = llama.model.embed_tokens(input_ids.masked_fill(is_image, 0))
        embeds[is_image] = tokens.to(embeds.dtype)
        return embeds

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_token_id: int | None = None,
    ) -> Tensor:
        """Tiles (M, 3, H, W) and ids (B, T) with their places → logits (B, T, vocabulary)."""
        embeds = self.embed(input_ids, self.encode_image(pixel_values), self._place(image_token_id))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        llama = require_llama(self)
        logits, _ = llama(embeds, mask, positions, llama.empty_cache(len(input_ids)))
        return logits

    @torch.inference_mode()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_token_id: int | None = None,
        max_new_tokens: int = 20,
    ) -> Tensor:
        """Greedy continuation (B, N) of left-padded prompts; padded behind a row's end."""
        llama = require_llama(self)
        x = self.embed(input_ids, self.encode_image(pixel_values), self._place(image_token_id))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        cache, found = llama.empty_cache(len(input_ids)), list[Tensor]()
        is_over = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits, cache = llama(x, mask, positions, cache)
            token = logits[:, -1].argmax(-1).masked_fill(is_over, llama.config.pad_token_id)
            found.append(token)
            is_over = is_over | (token == llama.config.eos_token_id)
            if is_over.all():
                break
            x = llama.model.embed_tokens(token)[:, None]
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            positions = mask.sum(-1, keepdim=True) - 1
        return torch.stack(found, dim=1)

    def _place(self, image_token_id: int | None) -> int:
        found = self.config.image_token_id if image_token_id is None else image_token_id
        if found is None:
            raise CheckpointError(
                "expected image_token_id, the id of places for image tokens: this checkpoint has "
                "no tokenizer files that say it"
            )
        return found


def require_llama(model: Chat) -> Llama:
    """The language model.

    Raises:
        CheckpointError: it is of an architecture that is not a LLaMA.
    """
    if model.language_model is None:
        raise CheckpointError(f"the language model is {model.config.unsupported}")
    return model.language_model
