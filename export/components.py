"""The PyTorch module of each component, and the examples that it is traced with.

What is known of a component without its weights stands in ``artifact.components``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from internvl_edge.artifact import TensorSpec
from internvl_edge.artifact.components import (
    CHAT_DECODER,
    CHAT_QUERIES,
    CHAT_VISION,
    DECODER,
    IMAGE_EMBED,
    IMAGE_POOL,
    IMAGE_QUERIES,
    MATCHER,
    TEXT_EMBED,
    VISION,
    Component,
)
from internvl_edge.errors import UsageError
from internvl_edge.export.config.checkpoint import (
    CheckpointConfig,
    QLlamaConfig,
    available_components,
)
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.export.models import Chat, InternViT, InternVL
from internvl_edge.export.models.chat import require_llama
from internvl_edge.export.models.qllama import InPlace, KeyValue
from internvl_edge.runtime.generation.fixed_cache import WRITE_INDICES

TOTAL = "past+length"
# Sizes of the traced example; all of these dimensions stay dynamic.
EXAMPLE_BATCH, EXAMPLE_LENGTH, EXAMPLE_PAST = 2, 7, 5


class Vision(nn.Module):
    def __init__(self, vit: InternViT) -> None:
        super().__init__()
        self.vision_model = vit

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vision_model(pixel_values).float()


class ImageEmbed(nn.Module):
    def __init__(self, model: InternVL) -> None:
        super().__init__()
        self.vision_model, self.clip_projector = model.vision_model, model.clip_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.clip_projector(self.vision_model(pixel_values)).float()


class ImagePool(nn.Module):
    def __init__(self, model: InternVL) -> None:
        super().__init__()
        self.clip_projector = model.clip_projector

    def forward(self, last_hidden_state: Tensor) -> Tensor:
        stream = self.clip_projector.norm1_q.weight.dtype
        return self.clip_projector(last_hidden_state.to(stream)).float()


class ImageQueries(nn.Module):
    def __init__(self, model: InternVL) -> None:
        super().__init__()
        self.qllama, self.query_tokens = model.qllama, model.query_tokens
        self.clip_projector2 = model.clip_projector2

    def forward(self, last_hidden_state: Tensor) -> tuple[Tensor, ...]:
        vision = last_hidden_state.to(self.query_tokens.dtype)
        hidden, cache = InternVL.encode_queries(self, vision)  # type: ignore[arg-type]
        presents = [tensor for pair in cache for tensor in pair]
        return self.clip_projector2(hidden).float(), *presents


class TextEmbed(nn.Module):
    def __init__(self, model: InternVL) -> None:
        super().__init__()
        self.qllama, self.text_projection = model.qllama, model.text_projection

    text_states = InternVL.text_states

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return InternVL.encode_text(self, input_ids, attention_mask).float()  # type: ignore[arg-type]


class Matcher(nn.Module):
    def __init__(self, model: InternVL) -> None:
        super().__init__()
        self.qllama, self.query_tokens, self.itm_head = (
            model.qllama,
            model.query_tokens,
            model.itm_head,
        )

    match_states, _queries_and_text = InternVL.match_states, InternVL._queries_and_text

    def forward(
        self, last_hidden_state: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        vision = last_hidden_state.to(self.query_tokens.dtype)
        logits = InternVL.match_tokens(self, vision, input_ids, attention_mask)  # type: ignore[arg-type]
        return logits.float()


def by_layer(past: Sequence[Tensor]) -> list[KeyValue | InPlace]:
    """Keys and values of each layer; one tensor before them says where new positions begin."""
    first, pairs = past[: len(past) % 2], past[len(past) % 2 :]
    return [(k, v, *first) for k, v in zip(pairs[::2], pairs[1::2], strict=True)]  # type: ignore[misc]


class Decoder(nn.Module):
    def __init__(self, model: InternVL) -> None:
        super().__init__()
        self.qllama = model.qllama

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        held = by_layer(past)
        logits, cache = InternVL.decode_at(self, input_ids, attention_mask, position_ids, held)  # type: ignore[arg-type]
        return logits.float(), *(tensor for pair in cache for tensor in pair)


class ChatVision(nn.Module):
    def __init__(self, model: Chat) -> None:
        super().__init__()
        self.config, self.vision_model = model.config, model.vision_model
        setattr(self, self.config.projector, getattr(model, self.config.projector))

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, ...]:
        hidden = self.vision_model(pixel_values)
        tokens = Chat.project(self, hidden).float()  # type: ignore[arg-type]
        return (tokens, hidden.float()) if self.config.num_queries else tokens


class ChatQueries(nn.Module):
    def __init__(self, model: Chat) -> None:
        super().__init__()
        self.queries, self.mm_projector = model.queries, model.mm_projector

    project_queries = Chat.project_queries

    def forward(self, hidden_state: Tensor) -> Tensor:
        hidden = hidden_state.to(self.queries.query_tokens.dtype)
        return Chat.look(self, hidden).float()  # type: ignore[arg-type]


class ChatDecoder(nn.Module):
    def __init__(self, model: Chat) -> None:
        super().__init__()
        self.language_model = require_llama(model)

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        held = by_layer(past)
        logits, cache = self.language_model(inputs_embeds, attention_mask, position_ids, held)
        return logits.float(), *(tensor for pair in cache for tensor in pair)


# Component → its module, of the reference model
MODULES: dict[str, Callable[[Any], nn.Module]] = {
    VISION: lambda model: Vision(getattr(model, "vision_model", model)),
    IMAGE_EMBED: ImageEmbed,
    IMAGE_POOL: ImagePool,
    IMAGE_QUERIES: ImageQueries,
    TEXT_EMBED: TextEmbed,
    MATCHER: Matcher,
    DECODER: Decoder,
    CHAT_VISION: ChatVision,
    CHAT_QUERIES: ChatQueries,
    CHAT_DECODER: ChatDecoder,
}


def input_names(
    component: Component, config: CheckpointConfig, capacity: int | None = None
) -> list[str]:
    """Name the graph's inputs, key/value tensors of every layer included.

    With ``capacity`` positions a cache is written where it lies: the graph takes
    ``write_indices`` [B] int64, where new positions begin, and a mask of the whole cache
    [B, capacity].
    """
    past = cache_names(config, "past_key_values") if component.takes_cache else ()
    first = (WRITE_INDICES,) if component.takes_cache and capacity is not None else ()
    return [*component.inputs, *first, *past]


def output_names(component: Component, config: CheckpointConfig) -> list[str]:
    """Name the graph's outputs, key/value tensors of every layer included."""
    presents = cache_names(config, "present") if component.gives_cache else ()
    return [*component.outputs, *(component.read_on if config.queries else ()), *presents]


def cache_names(config: CheckpointConfig, prefix: str) -> Iterator[str]:
    """Name the key/value tensors of the language model's layers."""
    llama = language_config(config)
    layers = 0 if llama is None else llama.num_hidden_layers
    return (f"{prefix}.{i}.{kind}" for i in range(layers) for kind in ("key", "value"))


def language_config(config: CheckpointConfig) -> QLlamaConfig | LanguageConfig | None:
    """The configuration of the checkpoint's language model; None where it has none of ours."""
    if config.internvl is not None:
        return config.internvl.qllama
    return None if config.chat is None else config.chat.llama


def choose_components(config: CheckpointConfig, names: Sequence[str] | None) -> tuple[str, ...]:
    """The components asked for, in their canonical order; all of them by default.

    Raises:
        UsageError: a name that is not a component, or that this checkpoint does not have.
    """
    available = available_components(config)
    if config.chat is not None and config.chat.llama is None and names != (CHAT_VISION,):
        raise UsageError(
            f"the language model is {config.chat.unsupported}; compile the vision side alone with "
            f"--components {CHAT_VISION}, and run the language model with another tool"
        )
    if names is None:
        return available
    unknown = [name for name in names if name not in available]
    if unknown or not names:
        raise UsageError(
            f"component {', '.join(map(repr, unknown)) or 'list is empty'}: expected some of "
            f"{', '.join(available)} for this {config.kind} checkpoint"
        )
    return tuple(name for name in available if name in names)


def build_component(component: Component, model: InternVL | Chat | InternViT) -> nn.Module:
    """The component's module around the (shared) reference model."""
    return MODULES[component.name](model).eval()


def input_specs(
    component: Component,
    config: CheckpointConfig,
    image_size: int,
    compute: str = "float32",
    capacity: int | None = None,
) -> tuple[TensorSpec, ...]:
    """The contract of the component's inputs at a resolution.

    Args:
        component: of the table.
        config: of the checkpoint.
        image_size: pixels of a side.
        compute: the cache's dtype.
        capacity: positions of a cache that is written where it lies; None: it grows.
    """
    vision = config.vision
    specs = {
        "pixel_values": TensorSpec(
            name="pixel_values",
            dtype="float32",
            shape=("batch", vision.num_channels, image_size, image_size),
        ),
        "last_hidden_state": TensorSpec(
            name="last_hidden_state",
            dtype="float32",
            shape=("batch", vision.num_tokens(image_size), vision.hidden_size),
        ),
        "input_ids": TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length")),
        "attention_mask": TensorSpec(
            name="attention_mask",
            dtype="int64",
            shape=("batch", (capacity or TOTAL) if component.takes_cache else "length"),
        ),
        WRITE_INDICES: TensorSpec(name=WRITE_INDICES, dtype="int64", shape=("batch",)),
        "position_ids": TensorSpec(name="position_ids", dtype="int64", shape=("batch", "length")),
    }
    specs["hidden_state"] = replace(specs["last_hidden_state"], name="hidden_state")
    llama = language_config(config)
    if component.takes_cache and llama is not None:
        embeds = ("batch", "length", llama.hidden_size)
        specs["inputs_embeds"] = TensorSpec(name="inputs_embeds", dtype="float32", shape=embeds)
        places = capacity or "past"
        shape = ("batch", llama.num_key_value_heads, places, llama.head_dim)
        past = TensorSpec(name="", dtype=compute, shape=shape)
        names = cache_names(config, "past_key_values")
        specs |= {name: replace(past, name=name) for name in names}
    return tuple(specs[name] for name in input_names(component, config, capacity))


def example_inputs(specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
    """Meta tensors of the right shapes to trace with."""
    sizes = {"batch": EXAMPLE_BATCH, "length": EXAMPLE_LENGTH, "past": EXAMPLE_PAST}
    sizes[TOTAL] = EXAMPLE_PAST + EXAMPLE_LENGTH
    return tuple(
        torch.empty(
            [n if isinstance(n, int) else sizes[n] for n in spec.shape],
            dtype=getattr(torch, spec.dtype),
            device="meta",
        )
        for spec in specs
    )
