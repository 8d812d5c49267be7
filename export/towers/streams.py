"""Calibration samples, carried through the towers block by block.

Calibration needs the activations that enter every linear layer. Running the whole model would
need all of its weights at once, so the hidden states of the calibration samples are carried from
block to block instead: load block i, run it on the outputs of block i − 1, drop it.

QLLaMA runs the same layers for several purposes whose activations differ, so each purpose is a
stream with its own ranges:

    stream    what runs                              components
    image     ViT                                    vision, image_embed
    queries   queries looking at an image            image_queries
    text      causal text                            text_embed
    match     queries and text, all seeing all       matcher
    caption   text after the queries, causal         decoder
    chat      conversations about images, causal     chat_decoder, of a chat model's LLaMA

A batch's hidden states change from block to block; they are kept in a spool, in memory or on disk.
The other inputs of its blocks (masks, rotary tables, the image) are its context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.load import load_into, read_torch
from internvl_edge.export.config.checkpoint import InternVLConfig, with_depth
from internvl_edge.export.models import Chat
from internvl_edge.export.models.chat import Queries, require_llama
from internvl_edge.export.models.qllama import (
    QLlama,
    causal_mask,
    generation_mask,
    padding_mask,
)
from internvl_edge.export.models.vit import InternViT, unrotated
from internvl_edge.export.towers.blocks import (
    OF_IMAGES,
    Block,
    Context,
    llama_blocks,
    query_blocks,
    remaining_vision_blocks,
    vision_blocks,
)
from internvl_edge.files.spool import Spool
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.types import Array

NO_TOKEN = -1  # pads rows of chats, whose vocabularies have a token of every id from 0 up


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The inputs that calibration runs on, in batches of the sizes that memory allows."""

    pixel_values: Sequence[Tensor] = ()  # (B, 3, H, W) each, normalised
    input_ids: Sequence[Tensor] = ()  # (B, T) each, as for text embedding
    match_ids: Sequence[Tensor] = ()  # (B, T) each, as for matching; pairs with pixel_values
    caption_ids: Sequence[Tensor] = ()  # (B, T) each, prompt and caption; pairs with pixel_values
    # (B, T) each, of chat models: conversations, right-padded by NO_TOKEN. A PLACE in them is that
    # of the next image of pixel_values
    chat_ids: Sequence[Tensor] = ()


def last_samples(samples: Samples, count: int) -> Samples:
    """Take the last samples of each kind, one batch; all images that the last chat is about."""
    pictures = int((samples.chat_ids[-1][-1] == PLACE).sum()) if samples.chat_ids else 0

    def last(batches: Sequence[Tensor], size: int = count) -> list[Tensor]:
        return [torch.cat([*batches[-size:]])[-size:]] if batches else []

    return Samples(
        pixel_values=last(samples.pixel_values, max(count, pictures)),
        input_ids=last(samples.input_ids),
        match_ids=last(samples.match_ids),
        caption_ids=last(samples.caption_ids),
        chat_ids=last(samples.chat_ids),
    )


@dataclass(slots=True)
class SampleStream:
    """All samples of one stream, between two blocks."""

    hidden: Spool  # (B, T, C) of each batch; the calibrator replaces it after each block
    contexts: list[Context | None]


class Store(Protocol):
    """A place for hidden states between two blocks; knows the blocks an earlier run finished."""

    @property
    def num_done(self) -> int: ...
    def hidden(self, stream: str) -> Spool:
        """Make a spool for a stream's hidden states after the current block."""
        ...

    def restore(self, stream: str) -> Spool:
        """Open the hidden states after the last finished block of the stream."""
        ...

    def scratch(self) -> Spool:
        """Make a spool that is deleted when it is closed."""
        ...


def calibration_blocks(
    checkpoint: Checkpoint, samples: Samples, streams: set[str], store: Store
) -> Iterator[tuple[Block, dict[str, SampleStream]]]:
    """Yield, in order, every unfinished block that the wanted streams run through.

    The consumer runs ``block.run`` on each batch of each stream, and replaces the stream's hidden
    states by the results before it asks for the next block. The outputs of one tower are passed
    to the next one here.
    """
    depth = 0
    image: Sequence[Array] = ()
    if streams & {"image", *OF_IMAGES}:
        depth = checkpoint.config.vision.num_hidden_layers
        current = {"image": _images(checkpoint, samples, store)}
        yield from _with(current, vision_blocks(checkpoint, range(store.num_done, depth)))
        image = _unrotated(checkpoint, current["image"].hidden, streams, store)
    if streams & {"text", *OF_IMAGES}:
        start = max(store.num_done - depth, 0)
        begin = _chat_streams if checkpoint.config.chat is not None else _llama_streams
        current = begin(checkpoint, samples, streams, image, store, resumed=start > 0)
        yield from _with(current, llama_blocks(checkpoint, start))


def _with(
    streams: dict[str, SampleStream], blocks: Iterator[Block]
) -> Iterator[tuple[Block, dict[str, SampleStream]]]:
    """Pair each block with the streams; a loop would hold one block while it loads the next."""
    return map(lambda block: (block, streams), blocks)  # noqa: C417 - see above


@torch.inference_mode()
def _images(checkpoint: Checkpoint, samples: Samples, store: Store) -> SampleStream:
    contexts: list[Context | None] = [None] * len(samples.pixel_values)
    if store.num_done:
        return SampleStream(hidden=store.restore("image"), contexts=contexts)
    with torch.device("meta"):
        one = replace(checkpoint.config.vision, num_hidden_layers=1)
        embeddings = InternViT(one).embeddings
    load_into(embeddings, checkpoint, "vision_model.embeddings.", torch.float32)
    hidden = store.hidden("image")
    for pixels in samples.pixel_values:
        hidden.append(embeddings(pixels).numpy())
    return SampleStream(hidden=hidden, contexts=contexts)


@torch.inference_mode()
def _unrotated(
    checkpoint: Checkpoint, hidden: Spool, streams: set[str], store: Store
) -> Sequence[Array]:
    """Return the vision tower's output in the basis that cross-attention reads it in."""
    if not checkpoint.config.vision.is_rotated or not streams & OF_IMAGES:
        return hidden
    matrix, states = read_torch(checkpoint, "vision_model.unrotation"), store.scratch()
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
) -> dict[str, SampleStream]:
    config = checkpoint.config.internvl
    assert config is not None
    front = _llama_front(checkpoint, config)
    queries = read_torch(checkpoint, "query_tokens")
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
    return _started({n: b for n, b in batches.items() if n in streams}, store, resumed=resumed)


def _started(
    batches: dict[str, Iterator[tuple[Tensor, Context]]], store: Store, *, resumed: bool
) -> dict[str, SampleStream]:
    """Make the streams at the start of a tower, or after its last finished block."""
    current = {}
    for name in batches:
        hidden = store.restore(name) if resumed else store.hidden(name)
        contexts: list[Context | None] = []
        for x, context in batches[name]:
            contexts.append(context)
            if not resumed:
                hidden.append(x.numpy())
        current[name] = SampleStream(hidden=hidden, contexts=contexts)
    return current


@torch.inference_mode()
def _chat_streams(
    checkpoint: Checkpoint,
    samples: Samples,
    streams: set[str],
    image: Sequence[Array],
    store: Store,
    *,
    resumed: bool,
) -> dict[str, SampleStream]:
    """Make the stream of a chat model's conversations."""
    with torch.device("meta"):
        front = Chat(with_depth(checkpoint.config, 1, 1, 1))
    front.vision_model = front.queries = nn.Identity()  # type: ignore[assignment]
    llama = require_llama(front)
    llama.model.layers, llama.lm_head = nn.ModuleList(), None
    load_into(front, checkpoint, "", torch.float32)

    config = checkpoint.config.queries
    queries = [None] * len(image) if config is None else _query_states(checkpoint, config, image)

    def seen() -> Iterator[Tensor]:
        for states, looked in zip(image, queries, strict=True):
            tokens = front.project(torch.from_numpy(states))
            if looked is not None:
                tokens = torch.cat((front.project_queries(looked), tokens), dim=1)
            yield from tokens

    def prompt(ids: Tensor, images: Iterator[Tensor]) -> tuple[Tensor, Context]:
        embeds, is_known = embed_chats(llama.model.embed_tokens, ids, images)
        x = llama.entered(embeds)
        mask = causal_mask(x.shape[1], x.device) & padding_mask(is_known)
        positions = llama.positions_of(torch.ones(1, x.shape[1], dtype=torch.long))
        return x, Context(mask=mask, rope=llama.rope(positions), rows=is_known)

    images = seen()
    batches = (prompt(ids, images) for ids in samples.chat_ids)
    return _started({"chat": batches}, store, resumed=resumed)


def embed_chats(
    embed: Callable[[Tensor], Tensor], ids: Tensor, images: Iterator[Tensor]
) -> tuple[Tensor, Tensor]:
    """Embed conversations, with the tokens of an image in each of its places.

    Args:
        embed: looks ids (N,) up in the table of embeddings → (N, D).
        ids: (B, T), of ``Samples.chat_ids``.
        images: the tokens (N, D) of the images, in the order of their places; as many are taken.

    Returns:
        Embeddings (B, T', D), right-padded by zeros, and what is not padding, (B, T').
    """
    rows = []
    for row in ids:
        known = row[row != NO_TOKEN]
        embeds = embed(known.clamp(min=0))
        parts = [
            next(images) if i == PLACE else embeds[at : at + 1]
            for at, i in enumerate(known.tolist())
        ]
        rows.append(torch.cat(parts))
    lengths = torch.tensor([len(row) for row in rows])
    is_known = torch.arange(int(lengths.max())) < lengths[:, None]
    return pad_sequence(rows, batch_first=True), is_known


def _query_states(
    checkpoint: Checkpoint, config: InternVLConfig, image: Sequence[Array]
) -> list[Tensor]:
    """Run a chat model's queries on each batch (B, nq, D'), with one block in memory at a time."""
    with torch.device("meta"):
        front = Queries(config, num_blocks=0)
    front.qllama.model.layers = nn.ModuleList()
    load_into(front, checkpoint, "queries.", torch.float32)
    vision = [torch.from_numpy(np.array(states)) for states in image]
    for block in remaining_vision_blocks(checkpoint):
        vision = [block(x) for x in vision]
    count = config.num_query_token
    states = [front.query_tokens.expand(len(x), -1, -1) for x in vision]
    for layer in query_blocks(checkpoint):
        states = [
            layer(x, front.qllama.rope(count), None, None, seen, count)[0]
            for x, seen in zip(states, vision, strict=True)
        ]
    return [front.qllama.model.norm(x) for x in states]


def _llama_front(checkpoint: Checkpoint, config: InternVLConfig) -> QLlama:
    """Load QLLaMA without its layers: the token embedding and the rotary tables."""
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
    """Build a prompt and its continuation with generation's mask; the decoder sees only text."""
    x, context = _match(front, queries, image, index, ids)
    assert context.rows is not None
    count = context.num_queries
    mask = generation_mask(context.rows.long(), count)
    rows = context.rows.clone()
    rows[:, :count] = False
    return x, replace(context, mask=mask, rows=rows)
