"""A checkpoint rewritten to quantize well: gains folded away, the residual stream rotated.

The model computes the same function with other tensors. In a pre-norm tower, norms' gains and
LayerScale are diagonal maps next to linear layers, so they move into the layers' weights:

    norm gain g, norm bias b       W ← W diag(g),  bias ← bias + W b       its readers' columns
    LayerScale l                   W ← diag(l) W,  bias ← l · bias         its writer's rows

and so does an orthogonal Q of the residual stream (``numerics.rotation`` says which, and why):

    readers                        W ← W Q
    writers, patch embedding       W ← Qᵀ W,  bias ← bias Q
    class token, positions, token embedding, query tokens     t ← t Q
    after the last block           one more product with Qᵀ, ``unrotation``

Cross-attention's second norm reads the vision tower's output, which is not in the residual stream:
its gain is folded, but nothing is rotated. Self-attention's q and k norms stay, since they do not
read the stream either.

The result is an ordinary ``Checkpoint`` with another config and other tensors. Each tensor is
computed when it is read, so calibration, verification and writing still stream. It holds no shards
of its own: hashes and links are those of the original.

What nothing is quantized in is folded by its LayerScale alone, ``without_layer_scale``: two
operations of every block less, and at the price of storing its two writers anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.artifact.components import VISION_PREFIX
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.load import read_torch
from internvl_edge.export.checkpoint.parameters import expected_shapes
from internvl_edge.export.checkpoint.shards import TensorEntry
from internvl_edge.export.components import language_config
from internvl_edge.export.config.checkpoint import CheckpointConfig, QLlamaConfig, VisionConfig
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.export.towers.blocks import (
    LLAMA_NORMS,
    LLAMA_WRITERS,
    OFF_STREAM,
    VISION_NORMS,
    VISION_WRITERS,
    language_prefix,
    sites_of,
)
from internvl_edge.quantize.numerics.rotation import Rotation, rotation
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

FLOAT32 = np.dtype(np.float32)
EMBEDDINGS = "vision_model.embeddings"
TOKENS = "qllama.model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived(TensorEntry):
    """A tensor that is computed from others when it is read."""

    compute: Callable[[], Array]

    def read(self) -> Array:
        """Compute the values, in the entry's dtype."""
        return self.compute().astype(self.dtype, copy=False)


def source_of(checkpoint: Checkpoint, recipe: Recipe | None) -> Checkpoint:
    """Fold a checkpoint into the form that a recipe quantizes: the same function, other tensors."""
    if recipe is None or not recipe.fold:
        return checkpoint
    turn = partial(rotation, seed=recipe.rotation_seed) if recipe.rotate else None
    return folded(checkpoint, turn, has_shift=recipe.shift)


def folded(
    checkpoint: Checkpoint, rotation: Callable[[int], Rotation] | None, *, has_shift: bool
) -> Checkpoint:
    """Fold a checkpoint's gains and LayerScale, and rotate it where a rotation is given.

    Args:
        checkpoint: as on disk.
        rotation: gives the rotation for a width; None leaves the residual streams in their basis.
        has_shift: give the vision tower's MLPs factors (ones) and a shift (zero) after GELU, for
            calibration to set.
    """
    config = _folded_config(checkpoint.config, is_rotated=rotation is not None, shift=has_shift)
    tensors = dict(checkpoint.tensors)
    makers: Makers = {}
    if any(name.startswith(VISION_PREFIX) for name in tensors):
        vision = rotation and rotation(config.vision.hidden_size)
        makers = _vision(checkpoint, vision, has_shift=has_shift)
    llama = language_config(config)
    if llama is not None and any(name.startswith(language_prefix(config)) for name in tensors):
        makers |= _llama(checkpoint, llama, rotation and rotation(llama.hidden_size))
    for name, shape in expected_shapes(config).items():
        if name in makers:
            # token embeddings are large and keep their dtype; the rest is small or quantized next
            dtype = tensors[name].dtype if name == TOKENS else FLOAT32
            tensors[name] = _derived(name, dtype, shape, makers[name])
    kept = expected_shapes(config)
    return replace(checkpoint, config=config, tensors={n: tensors[n] for n in kept if n in tensors})


def without_layer_scale(checkpoint: Checkpoint) -> Checkpoint:
    """Fold LayerScale into the linear layers before it; every other tensor stays as it is."""
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    if not config.vision.has_layer_scale:
        return checkpoint
    for i in range(config.vision.num_hidden_layers):
        for writer, scale in VISION_WRITERS.items():
            for part in ("weight", "bias"):
                name = f"{VISION_PREFIX}.{i}.{writer}.{part}"
                if name in tensors:
                    make = _writer(checkpoint, name, f"{VISION_PREFIX}.{i}.{scale}", None)
                    tensors[name] = _derived(name, FLOAT32, tensors[name].shape, make)
    config = _with_vision(config, replace(config.vision, has_layer_scale=False))
    kept = expected_shapes(config)
    return replace(checkpoint, config=config, tensors={n: tensors[n] for n in kept if n in tensors})


def _derived(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], compute: Callable[[], Array]
) -> Derived:
    return Derived(
        name=name,
        dtype=dtype,
        shape=shape,
        file=Path(),
        offset=0,
        nbytes=dtype.itemsize * math.prod(shape),
        compute=compute,
    )


def _with_vision(config: CheckpointConfig, vision: VisionConfig) -> CheckpointConfig:
    if config.internvl is None:
        return replace(config, vision=vision)
    return replace(config, vision=vision, internvl=replace(config.internvl, vision=vision))


def _folded_config(config: CheckpointConfig, *, is_rotated: bool, shift: bool) -> CheckpointConfig:
    has_bias = config.vision.qkv_bias or config.vision.norm_type == "layer_norm"
    vision = replace(
        config.vision,
        has_layer_scale=False,
        is_rotated=is_rotated,
        has_shift=shift,
        qkv_bias=has_bias,
    )
    if config.chat is not None and config.chat.llama is not None:
        chat = replace(config.chat, llama=replace(config.chat.llama, is_rotated=is_rotated))
        return replace(config, vision=vision, chat=chat)
    if config.internvl is None:
        return replace(config, vision=vision)
    llama = replace(config.internvl.qllama, is_rotated=is_rotated)
    internvl = replace(config.internvl, vision=vision, qllama=llama)
    return replace(config, vision=vision, internvl=internvl)


Makers = dict[str, Callable[[], Array]]


def _vision(checkpoint: Checkpoint, q: Rotation | None, *, has_shift: bool) -> Makers:
    makers: Makers = {}
    for name in ("class_embedding", "position_embedding", "patch_embedding.bias"):
        makers[f"{EMBEDDINGS}.{name}"] = _rotated(checkpoint, f"{EMBEDDINGS}.{name}", q)
    patches = f"{EMBEDDINGS}.patch_embedding.weight"
    makers[patches] = _rotated(checkpoint, patches, q, axis=0)
    width = checkpoint.config.vision.intermediate_size
    for i in range(checkpoint.config.vision.num_hidden_layers):
        block = f"{VISION_PREFIX}.{i}"
        makers |= _block(checkpoint, block, VISION_NORMS, VISION_WRITERS, q)
        if has_shift:
            makers[f"{block}.mlp.spread"] = lambda: np.ones(width, np.float32)
            makers[f"{block}.mlp.shift"] = lambda: np.zeros((), np.float32)
    if q is None:
        return {name: make for name, make in makers.items() if EMBEDDINGS not in name}
    return makers | {"vision_model.unrotation": q.matrix}


def _llama(
    checkpoint: Checkpoint, llama: QLlamaConfig | LanguageConfig, q: Rotation | None
) -> Makers:
    config, makers = checkpoint.config, dict[str, Callable[[], Array]]()
    for i in range(llama.num_hidden_layers):
        block = f"{language_prefix(config)}.{i}"
        readers = [name for site in sites_of(config, block) for name in site.readers]
        has_cross = any("cross" in name for name in readers)
        norms = {n: r for n, r in LLAMA_NORMS.items() if has_cross or "cross" not in n}
        writers = {w: s for w, s in LLAMA_WRITERS.items() if has_cross or "cross" not in w}
        makers |= _block(checkpoint, block, norms, writers, q)
    if q is None:
        return makers
    if config.chat is not None:  # token embeddings are an input, and are rotated in the graph
        return makers | {"language_model.model.unrotation": q.matrix}
    for name in (TOKENS, "query_tokens"):
        makers[name] = _rotated(checkpoint, name, q)
    return makers | {"qllama.model.unrotation": q.matrix}


def _block(
    checkpoint: Checkpoint,
    block: str,
    norms: Mapping[str, tuple[str, ...]],
    writers: Mapping[str, str | None],
    q: Rotation | None,
) -> Makers:
    makers: Makers = {}
    for norm, readers in norms.items():
        gain, bias = f"{block}.{norm}.weight", f"{block}.{norm}.bias"
        makers[gain] = _constant(checkpoint, gain, 1.0)
        if bias in checkpoint.tensors:
            makers[bias] = _constant(checkpoint, bias, 0.0)
        for reader in readers:
            name = f"{block}.{reader}"
            makers[f"{name}.weight"] = _reader(
                checkpoint, f"{name}.weight", gain, None if norm in OFF_STREAM else q
            )
            if bias in checkpoint.tensors:
                makers[f"{name}.bias"] = _reader_bias(checkpoint, name, bias)
    for writer, scale in writers.items():
        for part in ("weight", "bias"):
            name = f"{block}.{writer}.{part}"
            if name in checkpoint.tensors:
                scaled = None if scale is None else f"{block}.{scale}"
                makers[name] = _writer(checkpoint, name, scaled, q)
    return makers


def _wide(checkpoint: Checkpoint, name: str) -> Array:
    return checkpoint.read(name).astype(np.float64)


def _constant(checkpoint: Checkpoint, name: str, value: float) -> Callable[[], Array]:
    shape = checkpoint.tensors[name].shape
    return lambda: np.full(shape, value, np.float32)


def _rotated(
    checkpoint: Checkpoint, name: str, q: Rotation | None, axis: int = -1
) -> Callable[[], Array]:
    return lambda: checkpoint.read(name) if q is None else q.apply(checkpoint.read(name), axis)


def _reader(
    checkpoint: Checkpoint, name: str, gain: str, q: Rotation | None
) -> Callable[[], Array]:
    def make() -> Array:
        weight = read_torch(checkpoint, name).mul_(read_torch(checkpoint, gain)).numpy()
        return weight if q is None else q.apply(weight, in_place=True)

    return make


def _reader_bias(checkpoint: Checkpoint, name: str, norm_bias: str) -> Callable[[], Array]:
    def make() -> Array:
        moved = _wide(checkpoint, f"{name}.weight") @ _wide(checkpoint, norm_bias)
        own = f"{name}.bias"
        return np.asarray(moved + _wide(checkpoint, own) if own in checkpoint.tensors else moved)

    return make


def _writer(
    checkpoint: Checkpoint, name: str, scale: str | None, q: Rotation | None
) -> Callable[[], Array]:
    def make() -> Array:
        values = read_torch(checkpoint, name)
        if scale is not None:
            values.mul_(read_torch(checkpoint, scale).reshape(-1, *[1] * (values.ndim - 1)))
        weight, axis = values.numpy(), 0 if values.ndim > 1 else -1
        return weight if q is None else q.apply(weight, axis, in_place=True)

    return make
