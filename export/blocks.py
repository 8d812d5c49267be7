"""The towers taken apart for calibration: one block in memory at a time.

Calibration needs the activations that enter every linear layer. Running the whole model would
need all of its weights at once, so the activations of the calibration samples are carried from
block to block instead: load block i, run what block i − 1 left, drop it.

QLLaMA runs the same layers for several uses whose activations differ, so each use is a stream of
its own with its own ranges:

    stream    what runs                              components
    image     ViT                                    vision, image_embed
    queries   queries looking at an image            image_queries
    text      causal text                            text_embed
    match     queries and text, all seeing all       matcher
    caption   text behind the queries, causal        decoder

What changes from block to block is a batch's hidden states; they lie in a spool, in memory or on
disk. What a batch's blocks look at besides (masks, rotary tables, the image) is its context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvl_edge.export.checkpoint import Checkpoint, build_model, load_into
from internvl_edge.export.components import COMPONENTS, build_component
from internvl_edge.export.config import CheckpointConfig, InternVLConfig, with_depth
from internvl_edge.export.models import InternVL
from internvl_edge.export.models.qllama import (
    Layer,
    QLlama,
    causal_mask,
    generation_mask,
    padding_mask,
)
from internvl_edge.export.models.vit import Block as VisionBlock
from internvl_edge.export.models.vit import InternViT, unrotated
from internvl_edge.spool import Spool

Array = np.ndarray[Any, Any]

COMPONENT_STREAM = {
    "vision": "image",
    "image_embed": "image",
    "image_queries": "queries",
    "text_embed": "text",
    "matcher": "match",
    "decoder": "caption",
}
OF_IMAGES = frozenset({"queries", "match", "caption"})  # QLLaMA's streams that read vision tokens
VISION_PREFIX, LLAMA_PREFIX = "vision_model.encoder.layers", "qllama.model.layers"

# A norm's output is read by these linear layers alone, so a per-channel factor can move from the
# norm's gain into their columns without changing the function.
VISION_NORMS = {"norm1": ("attn.qkv",), "norm2": ("mlp.fc1",)}
LLAMA_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "cross_attn.norm1": ("cross_attn.q_proj",),
    "cross_attn.norm2": ("cross_attn.k_proj", "cross_attn.v_proj"),
}
OFF_STREAM = ("cross_attn.norm2",)  # norms of what another tower left
# Linear layers that write into the residual stream, and the LayerScale behind each.
VISION_WRITERS: dict[str, str | None] = {"attn.proj": "ls1", "mlp.fc2": "ls2"}
LLAMA_WRITERS: dict[str, str | None] = dict.fromkeys(
    ("self_attn.o_proj", "cross_attn.o_proj", "mlp.down_proj")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An activation that linear layers read, and what in front of it can be changed to suit them.

    Names are relative to the block. Of ``norm`` and ``producer`` at most one is set.
    """

    readers: tuple[str, ...]  # linear layers; nothing else reads the activation
    norm: str | None = None  # it is this norm's output
    producer: str | None = None  # each channel is linear in one row of this linear layer's weight
    first_row: int = 0  # of those rows
    head_dim: int | None = None  # it is attention's output: channels of a head may be mixed
    shift: str | None = None  # it may be moved by this scalar parameter


def sites_of(config: CheckpointConfig, block: str) -> tuple[Site, ...]:
    """The sites of a block by its full name; those with producers first."""
    if block.startswith(VISION_PREFIX):
        vision = config.vision
        return (
            Site(
                readers=("attn.proj",),
                producer="attn.qkv",
                first_row=2 * vision.hidden_size,
                head_dim=vision.head_dim,
            ),
            Site(readers=("mlp.fc2",), shift="mlp.shift" if vision.has_shift else None),
            *(Site(readers=readers, norm=norm) for norm, readers in VISION_NORMS.items()),
        )
    assert config.internvl is not None
    llama, every = config.internvl.qllama, config.internvl.cross_attention_frequency
    has_cross = int(block.rpartition(".")[2]) % every == 0
    found = (
        # the values of self-attention leave the graph as its cache: they stay what they are
        Site(readers=("self_attn.o_proj",)),
        Site(readers=("cross_attn.o_proj",), producer="cross_attn.v_proj", head_dim=llama.head_dim),
        Site(readers=("mlp.down_proj",), producer="mlp.up_proj"),
        *(Site(readers=readers, norm=norm) for norm, readers in LLAMA_NORMS.items()),
    )
    return tuple(site for site in found if has_cross or "cross" not in site.readers[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block with its weights in memory, float32."""

    name: str  # prefix of its parameters' names
    module: nn.Module
    sites: tuple[Site, ...]
    run: Callable[[Tensor, Context | None], Tensor]  # hidden states (B, T, C) → the same

    def linears(self) -> dict[str, nn.Linear]:
        """Its linear layers by full name, without the ``.weight``."""
        return {
            f"{self.name}.{path}": module
            for path, module in self.module.named_modules()
            if isinstance(module, nn.Linear)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What calibration runs on; batches of the sizes that memory allows."""

    pixel_values: Sequence[Tensor] = ()  # (B, 3, H, W) each, normalised
    input_ids: Sequence[Tensor] = ()  # (B, T) each, as for text embedding
    match_ids: Sequence[Tensor] = ()  # (B, T) each, as for matching; pairs with pixel_values
    caption_ids: Sequence[Tensor] = ()  # (B, T) each, prompt and caption; pairs with pixel_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What QLLaMA's layers look at besides a batch's hidden states."""

    mask: Tensor | None
    rope: tuple[Tensor, Tensor]
    rows: Tensor | None = None  # (B, T), true where there is no padding; None: nowhere
    num_queries: int = 0
    vision: Sequence[Array] = ()  # the vision tower's output, by batch
    index: int = 0  # of this batch's vision

    def vision_states(self) -> Tensor | None:
        """(B, N, C), brought into memory for as long as a block needs it; None for texts."""
        if not self.vision:
            return None
        states = torch.from_numpy(self.vision[self.index])
        return states if self.rows is None else states[: self.rows.shape[0]]


@dataclass(slots=True)
class Stream:
    """One use of a tower on all samples."""

    hidden: Spool  # (B, T, C) of each batch; replaced block by block by the calibrator
    contexts: list[Context | None]


class Store(Protocol):
    """Where hidden states lie between two blocks, and how many blocks an earlier run finished."""

    @property
    def num_done(self) -> int: ...
    def hidden(self, stream: str) -> Spool:
        """A new spool for a stream's hidden states behind the block under way."""
        ...

    def restore(self, stream: str) -> Spool:
        """The hidden states that the last finished block of the stream left."""
        ...

    def scratch(self) -> Spool:
        """A spool that leaves nothing behind."""
        ...


def calibration_blocks(
    checkpoint: Checkpoint, samples: Samples, streams: set[str], store: Store
) -> Iterator[tuple[Block, dict[str, Stream]]]:
    """Every block that the wanted streams run through and that is not done yet, in order.

    The consumer runs ``block.run`` on each batch of each stream, and replaces the stream's hidden
    states by the results before it asks for the next block. Tower outputs flow on by themselves.
    """
    depth = 0
    image: Sequence[Array] = ()
    if streams & {"image", *OF_IMAGES}:
        depth = checkpoint.config.vision.num_hidden_layers
        current = {"image": _images(checkpoint, samples, store)}
        yield from _with(current, _vision_blocks(checkpoint, range(store.num_done, depth)))
        image = _unrotated(checkpoint, current["image"].hidden, streams, store)
    if streams & {"text", *OF_IMAGES}:
        start = max(store.num_done - depth, 0)
        current = _llama_streams(checkpoint, samples, streams, image, store, resumed=start > 0)
        yield from _with(current, _llama_blocks(checkpoint, start))


def _with(
    streams: dict[str, Stream], blocks: Iterator[Block]
) -> Iterator[tuple[Block, dict[str, Stream]]]:
    """Each block with the streams; a loop would hold one while it loads the next."""
    return map(lambda block: (block, streams), blocks)  # noqa: C417 - see above


@torch.inference_mode()
def _images(checkpoint: Checkpoint, samples: Samples, store: Store) -> Stream:
    contexts: list[Context | None] = [None] * len(samples.pixel_values)
    if store.num_done:
        return Stream(hidden=store.restore("image"), contexts=contexts)
    with torch.device("meta"):
        one = replace(checkpoint.config.vision, num_hidden_layers=1)
        embeddings = InternViT(one).embeddings
    load_into(embeddings, checkpoint, "vision_model.embeddings.", torch.float32)
    hidden = store.hidden("image")
    for pixels in samples.pixel_values:
        hidden.append(embeddings(pixels).numpy())
    return Stream(hidden=hidden, contexts=contexts)


def _vision_blocks(checkpoint: Checkpoint, layers: Iterable[int]) -> Iterator[Block]:
    config = checkpoint.config.vision
    for i in layers:
        with torch.device("meta"):
            module = VisionBlock(config)
        name = f"{VISION_PREFIX}.{i}"
        load_into(module, checkpoint, f"{name}.", torch.float32)
        sites = sites_of(checkpoint.config, name)
        yield Block(name=name, module=module.eval(), sites=sites, run=_run_vit(module))


def _run_vit(module: VisionBlock) -> Callable[[Tensor, Context | None], Tensor]:
    def run(x: Tensor, _: Context | None) -> Tensor:
        y: Tensor = module(x)
        return y

    return run


@torch.inference_mode()
def _unrotated(
    checkpoint: Checkpoint, hidden: Spool, streams: set[str], store: Store
) -> Sequence[Array]:
    """What the vision tower left, as cross-attention looks at it."""
    if not checkpoint.config.vision.is_rotated or not streams & OF_IMAGES:
        return hidden
    matrix, states = checkpoint.read_torch("vision_model.unrotation"), store.scratch()
    for values in hidden:
        states.append(unrotated(torch.from_numpy(values), matrix).numpy())
    return states


@torch.inference_mode()
def _llama_streams(
    checkpoint: Checkpoint,
    samples: Samples,
    streams: set[str],
    image: Sequence[Array],
    store: Store,
    *,
    resumed: bool,
) -> dict[str, Stream]:
    config = checkpoint.config.internvl
    assert config is not None
    front = _llama_front(checkpoint, config)
    queries = checkpoint.read_torch("query_tokens")
    batches: dict[str, Iterator[tuple[Tensor, Context]]] = {
        "queries": (_queries(front, queries, image, i) for i in range(len(image))),
        "text": (_text(front, ids) for ids in samples.input_ids),
        "match": (
            _match(front, queries, image, i, ids)
            for i, ids in zip(range(len(image)), samples.match_ids, strict=False)
        ),
        "caption": (
            _caption(front, queries, image, i, ids)
            for i, ids in zip(range(len(image)), samples.caption_ids, strict=False)
        ),
    }
    current = {}
    for name in [name for name in batches if name in streams]:
        hidden = store.restore(name) if resumed else store.hidden(name)
        contexts: list[Context | None] = []
        for x, context in batches[name]:
            contexts.append(context)
            if not resumed:
                hidden.append(x.numpy())
        current[name] = Stream(hidden=hidden, contexts=contexts)
    return current


def _llama_front(checkpoint: Checkpoint, config: InternVLConfig) -> QLlama:
    """QLLaMA without its layers: the token embedding and the rotary tables."""
    with torch.device("meta"):
        front = QLlama(config)
    front.model.layers, front.lm_head = nn.ModuleList(), nn.Identity()  # type: ignore[assignment]
    load_into(front, checkpoint, "qllama.", torch.float32)
    return front


def _queries(
    front: QLlama, queries: Tensor, image: Sequence[Array], index: int
) -> tuple[Tensor, Context]:
    count = queries.shape[1]
    x = queries.expand(image[index].shape[0], -1, -1)
    return x, Context(
        mask=None, rope=front.rope(count), num_queries=count, vision=image, index=index
    )


def _text(front: QLlama, ids: Tensor) -> tuple[Tensor, Context]:
    mask = causal_mask(ids.shape[1], ids.device) & padding_mask(ids > 0)
    return front.embed(ids), Context(mask=mask, rope=front.rope(ids.shape[1]), rows=ids > 0)


def _match(
    front: QLlama, queries: Tensor, image: Sequence[Array], index: int, ids: Tensor
) -> tuple[Tensor, Context]:
    count = queries.shape[1]
    x = torch.cat((queries.expand(ids.shape[0], -1, -1), front.embed(ids)), dim=1)
    rows = F.pad(ids > 0, (count, 0), value=True)
    return x, Context(
        mask=padding_mask(rows),
        rope=front.rope(x.shape[1]),
        rows=rows,
        num_queries=count,
        vision=image,
        index=index,
    )


def _caption(
    front: QLlama, queries: Tensor, image: Sequence[Array], index: int, ids: Tensor
) -> tuple[Tensor, Context]:
    """As generation sees a prompt and its continuation; the decoder runs the text alone."""
    x, context = _match(front, queries, image, index, ids)
    assert context.rows is not None
    count = context.num_queries
    mask = generation_mask(context.rows.long(), count)
    rows = context.rows.clone()
    rows[:, :count] = False
    return x, replace(context, mask=mask, rows=rows)


def _llama_blocks(checkpoint: Checkpoint, start: int) -> Iterator[Block]:
    config = checkpoint.config.internvl
    assert config is not None
    for i in range(start, config.qllama.num_hidden_layers):
        has_cross = i % config.cross_attention_frequency == 0
        with torch.device("meta"):
            layer = Layer(config.qllama, config.vision.hidden_size, has_cross=has_cross)
        name = f"{LLAMA_PREFIX}.{i}"
        load_into(layer, checkpoint, f"{name}.", torch.float32)
        sites = sites_of(checkpoint.config, name)
        yield Block(name=name, module=layer.eval(), sites=sites, run=_run_layer(layer))


def _run_layer(layer: Layer) -> Callable[[Tensor, Context | None], Tensor]:
    def run(x: Tensor, context: Context | None) -> Tensor:
        assert context is not None
        vision = context.vision_states()
        y, _ = layer(x, context.rope, context.mask, None, vision, context.num_queries)
        return y

    return run


def component_of_one_block(
    checkpoint: Checkpoint, component: str, index: int
) -> tuple[nn.Module, Callable[[str], str]]:
    """A component's reference with one block of its tower, the others left out, in float32.

    Args:
        checkpoint: where the weights are.
        component: its name.
        index: the block to keep.

    Returns:
        The module, and the checkpoint's name of each of its parameters.
    """
    config, prefix = checkpoint.config, tower_of(component)
    with torch.device("meta"):
        model = build_model(with_depth(config, 1, 1))
        if isinstance(model, InternVL) and config.internvl is not None:
            has_cross = index % config.internvl.cross_attention_frequency == 0
            width = config.vision.hidden_size
            llama = config.internvl.qllama
            model.qllama.model.layers[0] = Layer(llama, width, has_cross=has_cross)
            if component != "decoder":
                model.qllama.lm_head = nn.Identity()  # type: ignore[assignment]
    module = build_component(COMPONENTS[component], model)

    def stored(name: str) -> str:
        return name.replace(f"{prefix}.0.", f"{prefix}.{index}.")

    load_into(module, checkpoint, "", torch.float32, stored)
    return module, stored


def tower_of(component: str) -> str | None:
    """Prefix of the blocks that a component runs through; None of none."""
    stream = COMPONENT_STREAM.get(component)
    return None if stream is None else VISION_PREFIX if stream == "image" else LLAMA_PREFIX
