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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvl_edge.export.checkpoint import Checkpoint, load_into
from internvl_edge.export.config import InternVLConfig
from internvl_edge.export.models.qllama import Layer, QLlama, causal_mask, padding_mask
from internvl_edge.export.models.vit import Block as VisionBlock
from internvl_edge.export.models.vit import InternViT

COMPONENT_STREAM = {
    "vision": "image",
    "image_embed": "image",
    "image_queries": "queries",
    "text_embed": "text",
    "matcher": "match",
}
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

State = Any  # what a stream carries from block to block: a Tensor, or a _Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block with its weights in memory, float32."""

    name: str  # prefix of its parameters' names
    module: nn.Module
    norms: Mapping[str, tuple[str, ...]]  # norm → linear layers that read it
    run: Callable[[State], State]

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


@dataclass(slots=True)
class _Sequence:
    """A QLLaMA stream's state: hidden states, and what its layers look at."""

    x: Tensor
    mask: Tensor | None
    rope: tuple[Tensor, Tensor]
    vision: Tensor | None = None
    num_queries: int = 0
    rows: Tensor | None = None  # (B, T), true where there is no padding; None: nowhere


@dataclass(slots=True)
class Streams:
    """The states of every stream; replaced block by block by the calibrator."""

    states: dict[str, list[State]] = field(default_factory=dict)


def calibration_blocks(
    checkpoint: Checkpoint, samples: Samples, streams: set[str]
) -> Iterator[tuple[Block, Streams]]:
    """Every block that the wanted streams run through, in order.

    The consumer runs ``block.run`` on each of ``streams.states`` and puts the results back before
    it asks for the next block. Tower outputs flow on by themselves.
    """
    vision_out: list[Tensor] = []
    if streams & {"image", "queries", "match"}:
        current = Streams(states={"image": _embed_images(checkpoint, samples)})
        for block in _vision_blocks(checkpoint):
            yield block, current
        vision_out = current.states["image"]
    if streams & {"queries", "text", "match"}:
        current = _llama_streams(checkpoint, samples, streams, vision_out)
        for block in _llama_blocks(checkpoint):
            yield block, current


@torch.inference_mode()
def _embed_images(checkpoint: Checkpoint, samples: Samples) -> list[State]:
    config = checkpoint.config.vision
    with torch.device("meta"):
        embeddings = InternViT(replace(config, num_hidden_layers=1)).embeddings
    load_into(embeddings, checkpoint, "vision_model.embeddings.", torch.float32)
    return [embeddings(pixels) for pixels in samples.pixel_values]


def _vision_blocks(checkpoint: Checkpoint) -> Iterator[Block]:
    config = checkpoint.config.vision
    for i in range(config.num_hidden_layers):
        with torch.device("meta"):
            module = VisionBlock(config)
        name = f"{VISION_PREFIX}.{i}"
        load_into(module, checkpoint, f"{name}.", torch.float32)
        yield Block(name=name, module=module.eval(), norms=VISION_NORMS, run=module)


@torch.inference_mode()
def _llama_streams(
    checkpoint: Checkpoint, samples: Samples, streams: set[str], vision: Sequence[Tensor]
) -> Streams:
    config = checkpoint.config.internvl
    assert config is not None
    front = _llama_front(checkpoint, config)
    queries = checkpoint.read_torch("query_tokens")
    current = Streams()
    if "queries" in streams:
        current.states["queries"] = [_queries(front, queries, seen) for seen in vision]
    if "text" in streams:
        current.states["text"] = [_text(front, ids) for ids in samples.input_ids]
    if "match" in streams:
        pairs = zip(vision, samples.match_ids, strict=False)
        current.states["match"] = [_match(front, queries, seen, ids) for seen, ids in pairs]
    return current


def _llama_front(checkpoint: Checkpoint, config: InternVLConfig) -> QLlama:
    """QLLaMA without its layers: the token embedding and the rotary tables."""
    with torch.device("meta"):
        front = QLlama(config)
    front.model.layers, front.lm_head = nn.ModuleList(), nn.Identity()  # type: ignore[assignment]
    load_into(front, checkpoint, "qllama.", torch.float32)
    return front


def _queries(front: QLlama, queries: Tensor, vision: Tensor) -> _Sequence:
    count = queries.shape[1]
    x = queries.expand(vision.shape[0], -1, -1)
    return _Sequence(x=x, mask=None, rope=front.rope(count), vision=vision, num_queries=count)


def _text(front: QLlama, ids: Tensor) -> _Sequence:
    mask = causal_mask(ids.shape[1], ids.device) & padding_mask(ids > 0)
    return _Sequence(x=front.embed(ids), mask=mask, rope=front.rope(ids.shape[1]), rows=ids > 0)


def _match(front: QLlama, queries: Tensor, vision: Tensor, ids: Tensor) -> _Sequence:
    state = _queries(front, queries, vision[: ids.shape[0]])
    state.x = torch.cat((state.x, front.embed(ids)), dim=1)
    state.rows = F.pad(ids > 0, (state.num_queries, 0), value=True)
    state.mask = padding_mask(state.rows)
    state.rope = front.rope(state.x.shape[1])
    return state


def _llama_blocks(checkpoint: Checkpoint) -> Iterator[Block]:
    config = checkpoint.config.internvl
    assert config is not None
    for i in range(config.qllama.num_hidden_layers):
        has_cross = i % config.cross_attention_frequency == 0
        with torch.device("meta"):
            layer = Layer(config.qllama, config.vision.hidden_size, has_cross=has_cross)
        name = f"{LLAMA_PREFIX}.{i}"
        load_into(layer, checkpoint, f"{name}.", torch.float32)
        norms = {n: r for n, r in LLAMA_NORMS.items() if has_cross or "cross" not in n}
        yield Block(name=name, module=layer.eval(), norms=norms, run=_run_layer(layer))


def _run_layer(layer: Layer) -> Callable[[_Sequence], _Sequence]:
    def run(state: _Sequence) -> _Sequence:
        x, _ = layer(state.x, state.rope, state.mask, None, state.vision, state.num_queries)
        return replace(state, x=x)

    return run
