"""The components that a checkpoint is compiled into: their modules, inputs and outputs.

A component is a part of the reference model with a tensor interface that other programs rely on:
names, dtypes and dimensions below are a contract. Images, embeddings, hidden states and logits
are float32 at every precision, ids and masks int64; the casts stand inside the graph. Only
key/value tensors have the compute dtype.

    component       inputs                                        outputs
    vision          pixel_values                                  last_hidden_state
    image_embed     pixel_values                                  image_embeds
    image_pool      last_hidden_state                             image_embeds
    image_queries   last_hidden_state                             query_embeds, present.{i}.*
    text_embed      input_ids, attention_mask                     text_embeds
    matcher         last_hidden_state, input_ids, attention_mask  match_logits
    decoder         input_ids, attention_mask, position_ids,      logits, present.{i}.*
                    past_key_values.{i}.*
    chat_vision     pixel_values                                  image_tokens
    chat_queries    hidden_state                                  image_tokens
    chat_decoder    inputs_embeds, attention_mask, position_ids,  logits, present.{i}.*
                    past_key_values.{i}.*

The decoder is one graph for a prompt and for every token behind it. It never sees an image: what
``image_queries`` gives as ``present`` are the first positions of its cache. ``attention_mask``
covers the cache and the new tokens (B, P + T), 0 where there is padding; P may be 0. A chat
model's decoder is the same of token embeddings: the runtime looks them up and puts image tokens
into their places, so that the graph has neither the table nor a second kind of prompt.

``chat_queries`` is of V1.0 with QLLaMA alone. There ``chat_vision`` gives ``hidden_state`` too,
what the tower has at ``select_layer``. Query tokens come first, an image's patches behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from internvl_edge.artifact.open import TensorSpec
from internvl_edge.errors import UsageError
from internvl_edge.export.config.chat import LlamaConfig
from internvl_edge.export.config.checkpoint import (
    OF_CHAT,
    CheckpointConfig,
    QLlamaConfig,
    available_components,
)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A part of the model that is compiled on its own."""

    name: str
    module: Callable[[Any], nn.Module]  # of the reference model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # presents are appended by ``output_names``
    has_cache: bool = False  # gives presents
    takes_cache: bool = False
    capacity: int | None = None  # positions of a cache that is written in place; None: it grows

    def input_names(self, config: CheckpointConfig) -> list[str]:
        """Names of the graph's inputs, key/value tensors of every layer included."""
        past = _cache_names(config, "past_key_values") if self.takes_cache else ()
        first = () if self.capacity is None else (WRITE_INDICES,)
        return [*self.inputs, *first, *past]

    def output_names(self, config: CheckpointConfig) -> list[str]:
        """Names of the graph's outputs, key/value tensors of every layer included."""
        presents = _cache_names(config, "present") if self.has_cache else ()
        read_on = ("hidden_state",) if self.name == "chat_vision" and config.queries else ()
        return [*self.outputs, *read_on, *presents]


def language_config(config: CheckpointConfig) -> QLlamaConfig | LlamaConfig | None:
    """The configuration of the checkpoint's language model; None where it has none of ours."""
    if config.internvl is not None:
        return config.internvl.qllama
    return None if config.chat is None else config.chat.llama


def _cache_names(config: CheckpointConfig, prefix: str) -> Iterator[str]:
    llama = language_config(config)
    layers = 0 if llama is None else llama.num_hidden_layers
    return (f"{prefix}.{i}.{kind}" for i in range(layers) for kind in ("key", "value"))


COMPONENTS: dict[str, Component] = {
    component.name: component
    for component in (
        Component(
            name="vision",
            module=lambda model: Vision(model.vision_model),
            inputs=("pixel_values",),
            outputs=("last_hidden_state",),
        ),
        Component(
            name="image_embed",
            module=ImageEmbed,
            inputs=("pixel_values",),
            outputs=("image_embeds",),
        ),
        Component(
            name="image_pool",
            module=ImagePool,
            inputs=("last_hidden_state",),
            outputs=("image_embeds",),
        ),
        Component(
            name="image_queries",
            module=ImageQueries,
            inputs=("last_hidden_state",),
            outputs=("query_embeds",),
            has_cache=True,
        ),
        Component(
            name="text_embed",
            module=TextEmbed,
            inputs=("input_ids", "attention_mask"),
            outputs=("text_embeds",),
        ),
        Component(
            name="matcher",
            module=Matcher,
            inputs=("last_hidden_state", "input_ids", "attention_mask"),
            outputs=("match_logits",),
        ),
        Component(
            name="decoder",
            module=Decoder,
            inputs=("input_ids", "attention_mask", "position_ids"),
            outputs=("logits",),
            has_cache=True,
            takes_cache=True,
        ),
        Component(
            name="chat_vision",
            module=ChatVision,
            inputs=("pixel_values",),
            outputs=("image_tokens",),
        ),
        Component(
            name="chat_queries",
            module=ChatQueries,
            inputs=("hidden_state",),
            outputs=("image_tokens",),
        ),
        Component(
            name="chat_decoder",
            module=ChatDecoder,
            inputs=("inputs_embeds", "attention_mask", "position_ids"),
            outputs=("logits",),
            has_cache=True,
            takes_cache=True,
        ),
    )
}


def choose_components(config: CheckpointConfig, names: Sequence[str] | None) -> tuple[str, ...]:
    """The components asked for, in their canonical order; all of them by default.

    Raises:
        UsageError: a name that is not a component, or that this checkpoint does not have.
    """
    available = available_components(config)
    if config.chat is not None and config.chat.llama is None and names != OF_CHAT[:1]:
        raise UsageError(
            f"the language model is {config.chat.unsupported}; compile the vision side alone with "
            "--components chat_vision, and run the language model with another tool"
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


def component_of(name: str, capacity: int | None = None) -> Component:
    """A component; of a decoder, with a cache of ``capacity`` positions if that is given.

    Such a cache is written where it lies: the graph takes ``write_indices`` [B] int64, where new
    positions begin, and a mask of the whole cache [B, capacity].
    """
    chosen = COMPONENTS[name]
    return replace(chosen, capacity=capacity) if chosen.takes_cache else chosen


def build_component(component: Component, model: InternVL | Chat | InternViT) -> nn.Module:
    """The component's module around the (shared) reference model."""
    if isinstance(model, InternViT):
        return Vision(model).eval()
    return component.module(model).eval()


def input_specs(
    component: Component, config: CheckpointConfig, image_size: int, compute: str = "float32"
) -> tuple[TensorSpec, ...]:
    """The contract of the component's inputs at a resolution; ``compute`` is the cache's dtype."""
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
            shape=("batch", (component.capacity or TOTAL) if component.takes_cache else "length"),
        ),
        WRITE_INDICES: TensorSpec(name=WRITE_INDICES, dtype="int64", shape=("batch",)),
        "position_ids": TensorSpec(name="position_ids", dtype="int64", shape=("batch", "length")),
    }
    specs["hidden_state"] = replace(specs["last_hidden_state"], name="hidden_state")
    llama = language_config(config)
    if component.takes_cache and llama is not None:
        embeds = ("batch", "length", llama.hidden_size)
        specs["inputs_embeds"] = TensorSpec(name="inputs_embeds", dtype="float32", shape=embeds)
        places = component.capacity or "past"
        shape = ("batch", llama.num_key_value_heads, places, llama.head_dim)
        past = TensorSpec(name="", dtype=compute, shape=shape)
        names = _cache_names(config, "past_key_values")
        specs |= {name: replace(past, name=name) for name in names}
    return tuple(specs[name] for name in component.input_names(config))


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
