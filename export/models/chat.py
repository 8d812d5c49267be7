"""InternVL-Chat: the vision tower's patches, projected, become tokens of a LLaMA.

    patches        = ViT(pixels) without its class token                      (B, g², C)
    image_tokens   = projector(pixel_shuffle(patches))                        (B, g²/s², D)
    inputs_embeds  = token embeddings, with image tokens where the prompt has their places

Pixel shuffle puts s by s neighbouring patches side by side into one of s² the width. The first
published version leaves the grid transposed, and the models trained with it rely on that. The
LLaVA layout (V1.0) has no shuffle. Blocks behind ``select_layer`` are not part of the tower: what
is read is what the last block here gives.

V1.0 with QLLaMA has its queries in front of the patches. They look at what the whole tower gives,
so the blocks behind ``select_layer`` are run for them:

    queries        = QLLaMA(query_tokens, looking at vision_behind(ViT(pixels)))   (B, nq, D')
    image_tokens   = [mlp2(queries) | mlp1(patches)]                               (B, nq + g², D)

Source: internvl-spec section 5.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from internvl_edge.errors import CheckpointError
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import CheckpointConfig, InternVLConfig
from internvl_edge.export.models.internvl import InternVL
from internvl_edge.export.models.llama import Llama
from internvl_edge.export.models.qllama import QLlama
from internvl_edge.export.models.vit import Block, InternViT


def pixel_shuffle(grid: Tensor, factor: int, version: str) -> Tensor:
    """(B, h, w, C) → (B, h/s, w/s, C·s²); with v1 (B, w/s, h/s, C·s²), the grid transposed."""
    batch, height, width, channels = grid.shape
    x = grid.reshape(batch, height, width // factor, channels * factor)
    x = x.permute(0, 2, 1, 3)  # (B, w/s, h, C·s)
    x = x.reshape(batch, width // factor, height // factor, channels * factor**2)
    return x.permute(0, 2, 1, 3) if version == "v2" else x


def projector(config: ChatConfig, width: int) -> nn.Sequential:
    """From patches (…, C·s²) to the language model's width (…, D)."""
    if config.layout == "llava":
        return _mlp(width, config.language_width)
    merged = width * config.shuffle**2
    return nn.Sequential(nn.LayerNorm(merged), *_mlp(merged, config.language_width))


def _mlp(width: int, language_width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, language_width),
        nn.GELU(),
        nn.Linear(language_width, language_width),
    )


def _through(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """LayerNorm belongs to the stream; linear layers compute in their weights' dtype."""
    for layer in layers:
        weight = getattr(layer, "weight", None)
        x = layer(x if weight is None else x.to(weight.dtype))
    return x


class QueryProjector(nn.Module):
    """The projector of V1.0 with QLLaMA: one of patches, one of queries."""

    def __init__(self, config: ChatConfig, width: int, query_width: int) -> None:
        super().__init__()
        self.mlp1 = projector(config, width)
        self.mlp2 = _mlp(query_width, config.language_width)


class Queries(nn.Module):
    """What V1.0 with QLLaMA has behind ``select_layer``: the tower's last blocks, and QLLaMA."""

    def __init__(self, config: InternVLConfig, num_blocks: int) -> None:
        super().__init__()
        self.vision_behind = nn.ModuleList(Block(config.vision) for _ in range(num_blocks))
        self.qllama = QLlama(config)
        # it reads no text, and writes none
        self.qllama.lm_head, self.qllama.model.embed_tokens = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.query_tokens = nn.Parameter(
            torch.zeros(1, config.num_query_token, config.qllama.hidden_size)
        )


class Chat(nn.Module):
    """The parts of an InternVL-Chat; parameter names of V1-1 and later, of V1.0's too."""

    queries: Queries  # of V1.0 with QLLaMA, as the next
    mm_projector: QueryProjector

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__()
        assert config.chat is not None
        self.checkpoint_config, self.config, llama = config, config.chat, config.chat.llama
        self.vision_model = InternViT(config.vision)
        width = config.vision.hidden_size
        made: nn.Module = projector(config.chat, width)
        if config.queries is not None:
            made = QueryProjector(config.chat, width, config.queries.qllama.hidden_size)
            self.queries = Queries(config.queries, config.chat.num_blocks_behind)
        setattr(self, self.config.projector, made)
        self.language_model = None if llama is None else Llama(llama)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) → image tokens (B, N, D)."""
        hidden = self.vision_model(pixel_values)
        if self.config.num_queries == 0:
            return self.project(hidden)
        return torch.cat((self.look(hidden), self.project(hidden)), dim=1)

    def project(self, hidden: Tensor) -> Tensor:
        """What the tower's last block leaves (B, 1 + g², C) → image tokens (B, N, D)."""
        x = hidden[:, 1:]
        factor = self.config.shuffle
        if factor > 1:
            side = round(x.shape[1] ** 0.5)
            grid = x.unflatten(1, (side, side))
            x = pixel_shuffle(grid, factor, self.config.ps_version).flatten(1, 2)
        layers = getattr(self, self.config.projector)
        return _through(layers.mlp1 if self.config.num_queries else layers, x)

    def look(self, hidden: Tensor) -> Tensor:
        """What the tower leaves at ``select_layer`` (B, 1 + g², C) → query tokens (B, nq, D)."""
        for block in self.queries.vision_behind:
            hidden = block(hidden)
        states, _ = InternVL.encode_queries(self.queries, hidden)  # type: ignore[arg-type]
        return self.project_queries(states)

    def project_queries(self, states: Tensor) -> Tensor:
        """QLLaMA's query states (B, nq, D') → query tokens (B, nq, D)."""
        return _through(self.mm_projector.mlp2, states)

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
