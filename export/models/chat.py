"""A chat model: the vision tower's patches are projected to tokens of a language model.

    patches        = ViT(pixels) without its class token                      (B, g², C)
    image_tokens   = projector(pixel_shuffle(patches))                        (B, g²/s², D)
    inputs_embeds  = token embeddings, with image tokens in place of the prompt's placeholders

Pixel shuffle concatenates s by s neighbouring patches into one that is s² times as wide. The first
published version leaves the grid transposed, and the models trained with it rely on that. The
LLaVA layout (V1.0) has no shuffle. Blocks after ``select_layer`` are not part of the tower here:
its output is that of the selected layer.

V1.0 with QLLaMA has its queries before the patches. They attend to the output of the whole tower,
so the blocks after ``select_layer`` run for them:

    queries        = QLLaMA(query_tokens, attending to vision_behind(ViT(pixels)))  (B, nq, D')
    image_tokens   = [mlp2(queries) | mlp1(patches)]                                (B, nq + g², D)

See docs/model.md, section 4.
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
    """Shuffle (B, h, w, C) → (B, h/s, w/s, C·s²), or (B, w/s, h/s, C·s²) with v1."""
    batch, height, width, channels = grid.shape
    x = grid.reshape(batch, height, width // factor, channels * factor)
    x = x.permute(0, 2, 1, 3)  # (B, w/s, h, C·s)
    x = x.reshape(batch, width // factor, height // factor, channels * factor**2)
    return x.permute(0, 2, 1, 3) if version == "v2" else x


def projector(config: ChatConfig, width: int) -> nn.Sequential:
    """Build the projector from patches (…, C·s²) to the language model's width (…, D)."""
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
    """Run layers one after the other, each in the dtype of its weights."""
    for layer in layers:
        weight = getattr(layer, "weight", None)
        x = layer(x if weight is None else x.to(weight.dtype))
    return x


class QueryProjector(nn.Module):
    """The projector of V1.0 with QLLaMA: one for patches, one for queries."""

    def __init__(self, config: ChatConfig, width: int, query_width: int) -> None:
        super().__init__()
        self.mlp1 = projector(config, width)
        self.mlp2 = _mlp(query_width, config.language_width)


class Queries(nn.Module):
    """The modules of V1.0 with QLLaMA after ``select_layer``: last vision blocks, and QLLaMA."""

    def __init__(self, config: InternVLConfig, num_blocks: int) -> None:
        super().__init__()
        self.vision_behind = nn.ModuleList(Block(config.vision) for _ in range(num_blocks))
        self.qllama = QLlama(config)
        # it reads and writes no text
        self.qllama.lm_head, self.qllama.model.embed_tokens = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.query_tokens = nn.Parameter(
            torch.zeros(1, config.num_query_token, config.qllama.hidden_size)
        )


class Chat(nn.Module):
    """An InternVL-Chat, with the parameter names of V1-1 and later or of V1.0."""

    queries: Queries  # only in V1.0 with QLLaMA, like the next
    mm_projector: QueryProjector

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__()
        assert config.chat is not None
        self.checkpoint_config, self.config, llama = config, config.chat, config.chat.llama
        self.vision_model = InternViT(config.vision)
        width = config.vision.hidden_size
        module: nn.Module = projector(config.chat, width)
        if config.queries is not None:
            module = QueryProjector(config.chat, width, config.queries.qllama.hidden_size)
            self.queries = Queries(config.queries, config.chat.num_blocks_behind)
        setattr(self, self.config.projector, module)
        self.language_model = None if llama is None else Llama(llama)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) → image tokens (B, N, D)."""
        hidden = self.vision_model(pixel_values)
        if self.config.num_queries == 0:
            return self.project(hidden)
        return torch.cat((self.look(hidden), self.project(hidden)), dim=1)

    def project(self, hidden: Tensor) -> Tensor:
        """Project the tower's output (B, 1 + g², C) → image tokens (B, N, D)."""
        x = hidden[:, 1:]
        factor = self.config.shuffle
        if factor > 1:
            side = round(x.shape[1] ** 0.5)
            grid = x.unflatten(1, (side, side))
            x = pixel_shuffle(grid, factor, self.config.ps_version).flatten(1, 2)
        layers = getattr(self, self.config.projector)
        return _through(layers.mlp1 if self.config.num_queries else layers, x)

    def look(self, hidden: Tensor) -> Tensor:
        """Let queries attend to the tower's output (B, 1 + g², C) → query tokens (B, nq, D)."""
        for block in self.queries.vision_behind:
            hidden = block(hidden)
        states, _ = InternVL.encode_queries(self.queries, hidden)  # type: ignore[arg-type]
        return self.project_queries(states)

    def project_queries(self, states: Tensor) -> Tensor:
        """Project QLLaMA's query states (B, nq, D') → query tokens (B, nq, D)."""
        return _through(self.mm_projector.mlp2, states)

    def embed(self, input_ids: Tensor, image_tokens: Tensor, image_token_id: int) -> Tensor:
        """Embed ids (B, T) → (B, T, D), with image tokens (M, N, D) in place of placeholders.

        Raises:
            CheckpointError: the numbers of placeholders and of image tokens differ.
        """
        llama = require_llama(self)
        is_image = input_ids == image_token_id
        tokens = image_tokens.flatten(0, 1)
        if int(is_image.sum()) != len(tokens):
            raise CheckpointError(
                f"expected one placeholder per image token, found {int(is_image.sum())} "
                f"placeholders (id {image_token_id}) and {len(tokens)} image tokens"
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
        """Run tiles (M, 3, H, W) and ids (B, T) with placeholders → logits (B, T, vocabulary)."""
        placeholder = self._placeholder(image_token_id)
        embeds = self.embed(input_ids, self.encode_image(pixel_values), placeholder)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        llama = require_llama(self)
        logits, _ = llama(embeds, mask, llama.positions_of(mask), llama.empty_cache(len(input_ids)))
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
        """Continue left-padded prompts greedily; (B, N) ids, each row padded after its end."""
        llama = require_llama(self)
        placeholder = self._placeholder(image_token_id)
        x = self.embed(input_ids, self.encode_image(pixel_values), placeholder)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = llama.positions_of(mask, max_new_tokens - 1)  # the last is not read
        cache, tokens = llama.empty_cache(len(input_ids)), list[Tensor]()
        is_over = torch.zeros(len(input_ids), dtype=torch.bool)
        for _ in range(max_new_tokens):
            logits, cache = llama(x, mask, positions, cache)
            token = logits[:, -1].argmax(-1).masked_fill(is_over, llama.config.pad_token_id)
            tokens.append(token)
            is_over = is_over | (token == llama.config.eos_token_id)
            if is_over.all():
                break
            x = llama.model.embed_tokens(token)[:, None]
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            positions = positions[:, -1:] + 1
        return torch.stack(tokens, dim=1)

    def _placeholder(self, image_token_id: int | None) -> int:
        token_id = self.config.image_token_id if image_token_id is None else image_token_id
        if token_id is None:
            raise CheckpointError(
                "expected image_token_id, the id of placeholders for image tokens: this checkpoint "
                "has no tokenizer files that define it"
            )
        return token_id


def require_llama(model: Chat) -> Llama:
    """Return the language model.

    Raises:
        CheckpointError: it is of no known family.
    """
    if model.language_model is None:
        raise CheckpointError(f"the language model is {model.config.unsupported}")
    return model.language_model
