"""A chat checkpoint's tensors as a published layout has them: ``checkpoint.names`` inverted.

Each tensor of a file is made of tensors here, whole or rows of them one after the other:

    InternLM2   wqkv       for each key/value head: its query heads, its key, its value
    Phi-3       qkv_proj   q | k | v,  gate_up_proj = gate | up
    internvl_hf            a third of the vision tower's qkv each; the older generation of names
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from internvl_edge.export.checkpoint.names import (
    INTERNLM2,
    NATIVE_PROJECTOR,
    NATIVE_VISION,
    replaced,
)
from internvl_edge.export.checkpoint.parameters import expected_shapes
from internvl_edge.export.config.chat import Layout
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.types import Array, Shape

__all__ = ["Published", "published_tensors"]

LAYERS = "language_model.model.layers."


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Some rows of a tensor, or all of it."""

    name: str  # the tensor's, here
    first: int = 0
    count: int | None = None  # None: all of it

    def of(self, values: Array) -> Array:
        return values if self.count is None else values[self.first : self.first + self.count]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One tensor of a file."""

    shape: Shape
    rows: tuple[Rows, ...]

    def read(self, read: Callable[[str], Array]) -> Array:
        """Put it together from tensors that ``read`` gives by their names here."""
        whole = {name: read(name) for name in dict.fromkeys(part.name for part in self.rows)}
        parts = [part.of(whole[part.name]) for part in self.rows]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def published_tensors(
    config: CheckpointConfig, layout: Layout, architecture: str
) -> dict[str, Published]:
    """Map the name of every tensor that a chat checkpoint's files have to what it is made of.

    Args:
        config: of a chat checkpoint with a language model.
        layout: ``internvl_chat`` or ``internvl_hf``.
        architecture: of the language model in the files, which says how they pack it.
    """
    assert config.chat is not None and config.chat.llama is not None
    llama, shapes = config.chat.llama, expected_shapes(config)
    pack = PACKERS.get(architecture, _unpacked)
    tensors: dict[str, Published] = {}
    for name, shape in shapes.items():
        if name.startswith(LAYERS):
            tensors |= pack(name, shapes, llama)
        else:
            tensors[name] = Published(shape=shape, rows=(Rows(name=name),))
    if layout == "internvl_hf":
        return dict(_native(tensors, config.vision.hidden_size))
    if architecture == "InternLM2ForCausalLM":
        return {_internlm2_name(name): tensor for name, tensor in tensors.items()}
    return tensors


Packer = Callable[[str, dict[str, Shape], LanguageConfig], dict[str, Published]]


def _unpacked(name: str, shapes: dict[str, Shape], _: LanguageConfig) -> dict[str, Published]:
    return {name: Published(shape=shapes[name], rows=(Rows(name=name),))}


def _internlm2(name: str, shapes: dict[str, Shape], llama: LanguageConfig) -> dict[str, Published]:
    block, which = _split(name)
    if which in ("k_proj", "v_proj"):
        return {}
    if which != "q_proj":
        return _unpacked(name, shapes, llama)
    size, groups = llama.head_dim, llama.num_key_value_heads
    queries = llama.num_attention_heads // groups * size
    q, k, v = (f"{block}self_attn.{one}_proj.weight" for one in "qkv")
    rows = tuple(
        Rows(name=part, first=group * count, count=count)
        for group in range(groups)
        for part, count in ((q, queries), (k, size), (v, size))
    )
    shape = sum(part.count or 0 for part in rows), llama.hidden_size
    return {f"{block}attention.wqkv.weight": Published(shape=shape, rows=rows)}


def _phi3(name: str, shapes: dict[str, Shape], llama: LanguageConfig) -> dict[str, Published]:
    block, which = _split(name)
    if which in ("k_proj", "v_proj", "up_proj"):
        return {}
    packed = {
        "q_proj": ("self_attn.qkv_proj", ("self_attn.q", "self_attn.k", "self_attn.v")),
        "gate_proj": ("mlp.gate_up_proj", ("mlp.gate", "mlp.up")),
    }
    if which not in packed:
        return _unpacked(name, shapes, llama)
    target, parts = packed[which]
    names = [f"{block}{part}_proj.weight" for part in parts]
    shape = sum(shapes[part][0] for part in names), llama.hidden_size
    rows = tuple(Rows(name=part) for part in names)
    return {f"{block}{target}.weight": Published(shape=shape, rows=rows)}


PACKERS: dict[str, Packer] = {"InternLM2ForCausalLM": _internlm2, "Phi3ForCausalLM": _phi3}


def _split(name: str) -> tuple[str, str]:
    """Split a layer's parameter into the prefix of its block, with a dot, and its module."""
    block = name[: name.index(".", len(LAYERS)) + 1]
    return block, name.split(".")[-2]


def _internlm2_name(name: str) -> str:
    if name.startswith("language_model.lm_head."):
        return name.replace(".lm_head.", ".output.", 1)
    if not name.startswith("language_model."):
        return name
    return replaced(name, {ours: theirs for theirs, ours in INTERNLM2.items()})


def _native(tensors: dict[str, Published], width: int) -> Iterator[tuple[str, Published]]:
    vision = {ours: theirs for theirs, ours in NATIVE_VISION.items()}
    projector = {ours: theirs for theirs, ours in NATIVE_PROJECTOR.items()}
    for name, tensor in tensors.items():
        if name.startswith("mlp1."):
            rest = replaced(name.removeprefix("mlp1."), projector)
            yield f"multi_modal_projector.{rest}", tensor
        elif ".attn.qkv." in name:
            block, _, kind = name.removeprefix("vision_model.").partition(".attn.qkv.")
            block = replaced(block, vision)
            for i, which in enumerate("qkv"):
                rows = (Rows(name=name, first=i * width, count=width),)
                shape = (width, *tensor.shape[1:])
                native = f"vision_tower.{block}.attention.{which}_proj.{kind}"
                yield native, Published(shape=shape, rows=rows)
        elif name.startswith("vision_model."):
            yield f"vision_tower.{replaced(name.removeprefix('vision_model.'), vision)}", tensor
        else:
            yield name, tensor
