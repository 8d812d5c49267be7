"""The table of components: everything that is known of each without its weights.

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

The decoder is one graph for a prompt and for every token after it. It never sees an image: what
``image_queries`` gives as ``present`` are the first positions of its cache. ``attention_mask``
covers the cache and the new tokens (B, P + T), 0 where there is padding; P may be 0. A chat
model's decoder is the same of token embeddings: the runtime looks them up and puts image tokens
into their places, so that the graph has neither the table nor a second kind of prompt.

``chat_queries`` is of V1.0 with QLLaMA alone. There ``chat_vision`` gives ``hidden_state`` too,
the tower's output at ``select_layer``. Query tokens come first, an image's patches after them.

A new component is a row of this table, and its PyTorch module in ``export.components``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

# Towers, by the prefix of their blocks' parameters: the vision tower, QLLaMA, the LLaMA of a chat
# model, and the QLLaMA of one that has queries too, which is never quantized.
VISION_PREFIX, LLAMA_PREFIX = "vision_model.encoder.layers", "qllama.model.layers"
CHAT_PREFIX, QUERIES_PREFIX = "language_model.model.layers", "queries.qllama.model.layers"
PREFIXES = (VISION_PREFIX, LLAMA_PREFIX, CHAT_PREFIX)  # of towers that may be quantized

# For code that needs one component for what it alone does.
VISION, IMAGE_EMBED, IMAGE_POOL = "vision", "image_embed", "image_pool"
IMAGE_QUERIES, TEXT_EMBED, MATCHER, DECODER = "image_queries", "text_embed", "matcher", "decoder"
CHAT_VISION, CHAT_QUERIES, CHAT_DECODER = "chat_vision", "chat_queries", "chat_decoder"

EMBEDDERS = (IMAGE_EMBED, TEXT_EMBED)  # pictures and texts that are compared by their embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """A part of the model that is compiled on its own."""

    name: str
    inputs: tuple[str, ...] = ()  # without key/value tensors
    outputs: tuple[str, ...] = ()  # likewise
    read_on: tuple[str, ...] = ()  # outputs too, where the checkpoint has ``chat_queries``
    gives_cache: bool = False
    takes_cache: bool = False
    tower: str | None = None  # prefix of the blocks that it runs through; None: it has none
    stream: str | None = None  # how calibration runs them; None: it is never quantized
    parts: tuple[str, ...] = ()  # of a checkpoint that it reads: names up to the first dot
    unread: tuple[str, ...] = ()  # parts of names: parameters of its module not in its graph
    kinds: tuple[str, ...] = ("internvl",)  # of checkpoints that have it
    needs: str | None = None  # a key of a chat model's configuration: it is there where that is set

    @property
    def is_language(self) -> bool:
        """True where it runs through the blocks of a language model."""
        return self.tower is not None and self.tower != VISION_PREFIX

    @property
    def is_vision(self) -> bool:
        """True where it sees images alone: the vision tower, or a head on its output."""
        return bool(self.inputs) and not self.is_language

    @property
    def takes_embeds(self) -> bool:
        """True where the runtime looks its tokens up."""
        return "inputs_embeds" in self.inputs

    @property
    def takes_ids(self) -> bool:
        """True where its graph looks its tokens up."""
        return "input_ids" in self.inputs

    @property
    def reads_text(self) -> bool:
        """True where a tokenizer is needed to give it strings."""
        return self.takes_ids or self.takes_embeds

    @property
    def has_queries(self) -> bool:
        """True where its graph puts query tokens, which look at an image, before the text."""
        return self.takes_ids and "last_hidden_state" in self.inputs

    def reads(self, parameter: str) -> bool:
        """Tell whether its graph reads a parameter that its module has."""
        return not any(part in parameter for part in self.unread)


COMPONENTS: dict[str, Component] = {
    component.name: component
    for component in (
        Component(
            name=VISION,
            inputs=("pixel_values",),
            outputs=("last_hidden_state",),
            parts=("vision_model",),
            tower=VISION_PREFIX,
            stream="image",
            kinds=("internvl", "vit"),
        ),
        Component(
            name=IMAGE_EMBED,
            inputs=("pixel_values",),
            outputs=("image_embeds",),
            parts=("vision_model", "clip_projector"),
            tower=VISION_PREFIX,
            stream="image",
        ),
        Component(
            name=IMAGE_POOL,
            inputs=("last_hidden_state",),
            outputs=("image_embeds",),
            parts=("clip_projector",),
        ),
        Component(
            name=IMAGE_QUERIES,
            inputs=("last_hidden_state",),
            outputs=("query_embeds",),
            parts=("qllama", "query_tokens", "clip_projector2"),
            gives_cache=True,
            tower=LLAMA_PREFIX,
            stream="queries",
            unread=("lm_head.", "embed_tokens."),
        ),
        Component(
            name=TEXT_EMBED,
            inputs=("input_ids", "attention_mask"),
            outputs=("text_embeds",),
            parts=("qllama", "text_projection"),
            tower=LLAMA_PREFIX,
            stream="text",
            unread=("lm_head.", ".cross_attn."),
        ),
        Component(
            name=MATCHER,
            inputs=("last_hidden_state", "input_ids", "attention_mask"),
            outputs=("match_logits",),
            parts=("qllama", "query_tokens", "itm_head"),
            tower=LLAMA_PREFIX,
            stream="match",
            unread=("lm_head.",),
        ),
        Component(
            name=DECODER,
            inputs=("input_ids", "attention_mask", "position_ids"),
            outputs=("logits",),
            parts=("qllama",),
            gives_cache=True,
            takes_cache=True,
            tower=LLAMA_PREFIX,
            stream="caption",
            unread=(".cross_attn.",),  # the image lies in the cache
        ),
        Component(
            name=CHAT_VISION,
            inputs=("pixel_values",),
            outputs=("image_tokens",),
            parts=("vision_model", "mlp1", "mm_projector"),  # a projector has either name
            read_on=("hidden_state",),
            tower=VISION_PREFIX,
            stream="image",
            unread=("mm_projector.mlp2.",),  # which queries go through
            kinds=("chat",),
        ),
        Component(
            name=CHAT_QUERIES,
            inputs=("hidden_state",),
            outputs=("image_tokens",),
            parts=("queries", "mm_projector"),
            tower=QUERIES_PREFIX,
            unread=("mm_projector.mlp1.",),  # which patches go through
            kinds=("chat",),
            needs="num_queries",
        ),
        Component(
            name=CHAT_DECODER,
            inputs=("inputs_embeds", "attention_mask", "position_ids"),
            outputs=("logits",),
            parts=("language_model",),
            gives_cache=True,
            takes_cache=True,
            tower=CHAT_PREFIX,
            stream="chat",
            kinds=("chat",),
            needs="llama",
        ),
    )
}


def find_component(name: str) -> Component:
    """Look a name up; of one that the table does not have, nothing is known but the name."""
    return COMPONENTS.get(name) or Component(name=name)


def components_of(kind: str, has: Collection[str] = ()) -> tuple[str, ...]:
    """List what a checkpoint can be compiled into, in the order of the table.

    Args:
        kind: of the checkpoint: ``"vit"``, ``"internvl"`` or ``"chat"``.
        has: the keys of a chat model's configuration that are set, of those that are needed.
    """
    return tuple(
        name
        for name, component in COMPONENTS.items()
        if kind in component.kinds and (component.needs is None or component.needs in has)
    )


def streams_of(names: Iterable[str]) -> set[str]:
    """Collect the streams that calibrate components."""
    streams = (find_component(name).stream for name in names)
    return {stream for stream in streams if stream is not None}


def embedder_of(names: Collection[str]) -> str | None:
    """Choose the component that maps whole pictures to embeddings, or else to patches; or None."""
    return next((name for name in (IMAGE_EMBED, VISION) if name in names), None)


# --- what a task runs -----------------------------------------------------------------------------


def to_embed_images(has: Collection[str], mode: str) -> tuple[str, ...]:
    """List what maps images to embeddings in a mode, of a directory that has these components."""
    if mode == "g":
        return VISION, IMAGE_POOL, IMAGE_QUERIES
    if VISION in has and IMAGE_POOL in has and IMAGE_EMBED not in has:
        return VISION, IMAGE_POOL
    return (IMAGE_EMBED,)


def to_answer(chat: Mapping[str, object] | None) -> tuple[str, ...]:
    """List what writes a text about images.

    Args:
        chat: the configuration of a chat model; None: an InternVL-G.
    """
    if not chat:
        return VISION, IMAGE_QUERIES, DECODER
    return components_of("chat", [key for key, value in chat.items() if value])


# --- the files of a component's graphs, all on the same weights ----------------------------------

WEIGHTS_FILE = "weights.safetensors"  # what is written, and not the checkpoint's own


def engine_graph(component: str, base: str) -> str:
    """Name the graph that engines are built from, where it is not the component's own."""
    return f"{component}.{base}.onnx"


def unsigned_graph(component: str) -> str:
    """Name the graph for CPUs whose INT8 products saturate (``quantize.graph.unsigned``)."""
    return f"{component}.u8.onnx"


JOINED_GRAPH = "model.onnx"  # of ``EMBEDDERS``, as transformers' classes open it


def cuda_graph(component: str) -> str:
    """Name the graph in operators of ONNX Runtime's CUDA provider (``export.graph.providers``)."""
    return f"{component}.cuda.onnx"


def cpu_graph(component: str) -> str:
    """Name a decoder's graph with fewer products (``export.graph.providers.cpu``)."""
    return f"{component}.cpu.onnx"
