"""Towers as single blocks: one block in memory at a time, and the sites where it may be changed.

A block's linear layers read activations at a few sites. The operation that produces a site's
activation (a norm's gain, the rows of another linear layer) can be changed to suit the format of
its readers, in such a way that the block still computes the same function; ``sites_of`` lists the
sites. ``streams`` carries samples through the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internvl_edge.artifact.components import (
    CHAT_PREFIX,
    COMPONENTS,
    LLAMA_PREFIX,
    QUERIES_PREFIX,
    VISION_PREFIX,
)
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.load import build_model, load_into
from internvl_edge.export.components import build_component, language_config
from internvl_edge.export.config.checkpoint import (
    CheckpointConfig,
    InternVLConfig,
    VisionConfig,
    with_depth,
)
from internvl_edge.export.models import Chat, InternVL
from internvl_edge.export.models.qllama import Layer
from internvl_edge.export.models.vit import AttentionCore
from internvl_edge.export.models.vit import Block as VisionBlock
from internvl_edge.types import Array

OF_IMAGES = frozenset({"queries", "match", "caption", "chat"})  # streams that read vision tokens

# A norm's output is read by these linear layers alone, so a per-channel factor can move from the
# norm's gain into their columns without changing the function.
VISION_NORMS = {"norm1": ("attn.qkv",), "norm2": ("mlp.fc1",)}
LLAMA_NORMS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "cross_attn.norm1": ("cross_attn.q_proj",),
    "cross_attn.norm2": ("cross_attn.k_proj", "cross_attn.v_proj"),
}
OFF_STREAM = ("cross_attn.norm2",)  # norms of another tower's output, not of the residual stream
# Linear layers that write into the residual stream, and the LayerScale after each.
VISION_WRITERS: dict[str, str | None] = {"attn.proj": "ls1", "mlp.fc2": "ls2"}
LLAMA_WRITERS: dict[str, str | None] = dict.fromkeys(
    ("self_attn.o_proj", "cross_attn.o_proj", "mlp.down_proj")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """An activation that linear layers read, and the parameters before it that may be changed.

    Names are relative to the block. At most one of ``norm`` and ``producer`` is set.
    """

    readers: tuple[str, ...]  # linear layers; nothing else reads the activation
    norm: str | None = None  # it is this norm's output
    producer: str | None = None  # each channel is linear in one row of this linear layer's weight
    first_row: int = 0  # the first of those rows
    head_dim: int | None = None  # it is attention's output: channels of a head may be mixed
    spread: str | None = None  # a parameter that multiplies it, one factor per channel
    shift: str | None = None  # a scalar parameter that is subtracted from it


def sites_of(config: CheckpointConfig, block: str) -> tuple[Site, ...]:
    """Return the sites of the block with this full name; those with producers first."""
    if block.startswith(VISION_PREFIX):
        vision = config.vision
        return (
            Site(
                readers=("attn.proj",),
                producer="attn.qkv",
                first_row=2 * vision.hidden_size,
                head_dim=vision.head_dim,
            ),
            _after_gelu(vision),
            *(Site(readers=readers, norm=norm) for norm, readers in VISION_NORMS.items()),
        )
    llama, has_cross = language_config(config), False
    assert llama is not None
    if config.internvl is not None:
        has_cross = int(block.rpartition(".")[2]) % config.internvl.cross_attention_frequency == 0
    sites = (
        # the values of self-attention leave the graph as its cache, so they must not change
        Site(readers=("self_attn.o_proj",)),
        Site(readers=("cross_attn.o_proj",), producer="cross_attn.v_proj", head_dim=llama.head_dim),
        Site(readers=("mlp.down_proj",), producer="mlp.up_proj"),
        *(Site(readers=readers, norm=norm) for norm, readers in LLAMA_NORMS.items()),
    )
    return tuple(site for site in sites if has_cross or "cross" not in site.readers[0])


def _after_gelu(vision: VisionConfig) -> Site:
    if not vision.has_shift:
        return Site(readers=("mlp.fc2",))
    return Site(readers=("mlp.fc2",), spread="mlp.spread", shift="mlp.shift")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block with its weights in memory, float32."""

    name: str  # prefix of its parameters' names
    module: nn.Module
    sites: tuple[Site, ...]
    run: Callable[[Tensor, Context | None], Tensor]  # hidden states (B, T, C) → the same

    def linears(self) -> dict[str, nn.Linear]:
        """Return its linear layers by full name, without the ``.weight``."""
        return {
            f"{self.name}.{path}": module
            for path, module in self.module.named_modules()
            if isinstance(module, nn.Linear)
        }

    def attentions(self) -> dict[str, nn.Module]:
        """Return the vision tower's attention by full name; nothing for QLLaMA's layers."""
        return {
            f"{self.name}.{path}": module
            for path, module in self.module.named_modules()
            if isinstance(module, AttentionCore)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The inputs of QLLaMA's layers other than a batch's hidden states."""

    mask: Tensor | None
    rope: tuple[Tensor, Tensor]
    rows: Tensor | None = None  # (B, T), true where there is no padding; None: no padding at all
    num_queries: int = 0
    vision: Sequence[Array] = ()  # the vision tower's output, by batch
    index: int = 0  # of this batch in ``vision``

    def vision_states(self) -> Tensor | None:
        """Read (B, N, C) into memory for as long as a block needs it; None for texts."""
        if not self.vision:
            return None
        states = torch.from_numpy(self.vision[self.index])
        return states if self.rows is None else states[: self.rows.shape[0]]


def vision_blocks(checkpoint: Checkpoint, layers: Iterable[int]) -> Iterator[Block]:
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


def llama_blocks(checkpoint: Checkpoint, start: int) -> Iterator[Block]:
    config, llama = checkpoint.config, language_config(checkpoint.config)
    assert llama is not None
    for i in range(start, llama.num_hidden_layers):
        name = f"{language_prefix(config)}.{i}"
        with torch.device("meta"):
            layer = _layer(config, i)
        load_into(layer, checkpoint, f"{name}.", torch.float32)
        sites = sites_of(config, name)
        yield Block(name=name, module=layer.eval(), sites=sites, run=_run_layer(layer))


def remaining_vision_blocks(checkpoint: Checkpoint) -> Iterator[nn.Module]:
    """Load the vision blocks after a chat model's ``select_layer``, which QLLaMA's queries need."""
    assert checkpoint.config.queries is not None and checkpoint.config.chat is not None
    for i in range(checkpoint.config.chat.num_blocks_behind):
        with torch.device("meta"):
            module = VisionBlock(checkpoint.config.queries.vision)
        load_into(module, checkpoint, f"queries.vision_behind.{i}.", torch.float32)
        yield module.eval()


def query_blocks(checkpoint: Checkpoint) -> Iterator[nn.Module]:
    """Load the layers of a chat model's QLLaMA."""
    config = checkpoint.config.queries
    assert config is not None
    for i in range(config.qllama.num_hidden_layers):
        with torch.device("meta"):
            layer = _layer_of(config, i)
        load_into(layer, checkpoint, f"{QUERIES_PREFIX}.{i}.", torch.float32)
        yield layer.eval()


def _layer(config: CheckpointConfig, index: int) -> Layer:
    """Build the language model's layer of an index, with cross-attention where it has one."""
    if config.internvl is None:
        llama = language_config(config)
        assert llama is not None
        return Layer(llama)
    return _layer_of(config.internvl, index)


def _layer_of(config: InternVLConfig, index: int) -> Layer:
    has_cross = index % config.cross_attention_frequency == 0
    return Layer(config.qllama, config.vision.hidden_size, has_cross=has_cross)


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
    """Build a component's PyTorch reference with a single block of its tower, in float32.

    Args:
        checkpoint: where the weights are.
        component: its name.
        index: the block to keep.

    Returns:
        The module, and a function from its parameters' names to the checkpoint's.
    """
    config, chosen = checkpoint.config, COMPONENTS[component]
    with torch.device("meta"):
        model = build_model(with_depth(config, 1, 1, 1))
        if chosen.tower == QUERIES_PREFIX:
            assert isinstance(model, Chat) and config.queries is not None
            model.queries.qllama.model.layers[0] = _layer_of(config.queries, index)
        if isinstance(model, InternVL):
            model.qllama.model.layers[0] = _layer(config, index)
            if not chosen.reads("qllama.lm_head.weight"):
                model.qllama.lm_head = nn.Identity()  # type: ignore[assignment]
    language = model.language_model if isinstance(model, Chat) else None
    if language is not None and language.lm_head is not None:  # then nothing reads the table
        language.model.embed_tokens = nn.Identity()  # type: ignore[assignment]
    module = build_component(chosen, model)

    def stored(name: str) -> str:
        return name.replace(f"{chosen.tower}.0.", f"{chosen.tower}.{index}.")

    load_into(module, checkpoint, "", torch.float32, stored)
    return module, stored


def language_prefix(config: CheckpointConfig) -> str:
    """Return the prefix of the language model's blocks."""
    return LLAMA_PREFIX if config.chat is None else CHAT_PREFIX
