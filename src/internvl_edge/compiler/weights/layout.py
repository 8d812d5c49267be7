"""The layout of a directory's weights file: which tensors it holds, of what dtypes and shapes.

At fp32, fp16 and bf16 that is a parameter's dtype and shape; quantized, the towers' linear layers
become 8-bit weights with scales, in blocks that are calibrated one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Iterable
from typing import Any

import numpy as np

from internvl_edge.artifact.components import (
    CHAT_PREFIX,
    COMPONENTS,
    LLAMA_PREFIX,
    PREFIXES,
    QUERIES_PREFIX,
    VISION_PREFIX,
)
from internvl_edge.compiler.plan import Plan
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.shards import DTYPES
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.towers.blocks import sites_of
from internvl_edge.quantize.calibration.block import is_quantized
from internvl_edge.quantize.calibration.folding import SMOOTHING_SUFFIX
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.numerics.weights import stored_layout
from internvl_edge.quantize.recipe import Recipe, is_head

CHAT_TOKENS = "language_model.model.embed_tokens.weight"
TOWERS = tuple(f"{prefix}." for prefix in PREFIXES)
LLAMA_HEAD = "qllama.lm_head.weight"
STORED_AS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
POSITIONS = "vision_model.embeddings.position_embedding"
FLOAT32 = np.dtype(np.float32)


def towers_of(config: CheckpointConfig) -> dict[str, tuple[int, int]]:
    """List the towers: prefix of their blocks → period and number of these."""
    towers = {VISION_PREFIX: (1, config.vision.num_hidden_layers)}
    if config.internvl is not None:
        period = config.internvl.cross_attention_frequency
        towers[LLAMA_PREFIX] = period, config.internvl.qllama.num_hidden_layers
    if config.chat is not None and config.chat.llama is not None:
        towers[CHAT_PREFIX] = 1, config.chat.llama.num_hidden_layers
    if config.queries is not None:
        llama = config.queries.qllama
        period = config.queries.cross_attention_frequency
        towers[QUERIES_PREFIX] = period, llama.num_hidden_layers
    return towers


def block_sizes(plan: Plan) -> dict[str, int]:
    """Count the parameters of every block that a recipe may quantize."""
    sizes: dict[str, int] = {}
    for name, entry in plan.source.tensors.items():
        for prefix in PREFIXES:
            if name.startswith(f"{prefix}."):
                block = name[: name.index(".", len(prefix) + 1)]
                sizes[block] = sizes.get(block, 0) + math.prod(entry.shape)
    return sizes


def tower_depths(plan: Plan) -> dict[str, int]:
    """Count the blocks of each component's tower."""
    blocks = list(block_sizes(plan))
    return {
        component: sum(name.startswith(f"{COMPONENTS[component].tower}.") for name in blocks)
        for component in plan.components
    }


def shape_of(plan: Plan, name: str) -> tuple[int, ...]:
    if name == POSITIONS:
        vision = plan.source.config.vision
        return 1, vision.num_tokens(plan.image_size), vision.hidden_size
    return plan.source.tensors[name].shape


def has_quantized_head(recipe: Recipe, name: str) -> bool:
    """Tell whether a parameter is the weight of a vocabulary head that a recipe quantizes."""
    return is_head(name) and recipe.of(name).head is not None


def quantized_layers(checkpoint: Checkpoint, recipe: Recipe, needed: Iterable[str]) -> list[str]:
    """List the weights that a recipe puts into few bits: the towers' linear layers, and heads."""
    prefixes = tuple(f"{prefix}." for prefix in PREFIXES)
    layers = []
    for name in needed:
        shape = checkpoint.tensors[name].shape
        layer = name.removesuffix(".weight")
        is_inside = name.startswith(prefixes) or has_quantized_head(recipe, name)
        is_linear = is_inside and layer != name and len(shape) == 2
        if is_linear and is_quantized(recipe, layer, shape[1], shape[0]):
            layers.append(name)
    return layers


def quantized_layout(
    plan: Plan, needed: Collection[str]
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Lay out a quantized directory's weights file: dtype and shape of every tensor."""
    assert plan.recipe is not None
    layout: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    layers = set(quantized_layers(plan.source, plan.recipe, needed))
    for name in needed:
        shape = shape_of(plan, name)
        if name in layers:
            outputs, inputs = shape
            stored = stored_layout((outputs, inputs), plan.recipe.of(name))
            layout[name], layout[name + SCALE_SUFFIX] = stored
        else:
            # gains may be folded, and are small; what is large stays as the checkpoint has it
            held = plan.source.tensors[name].dtype
            is_wide = len(shape) == 1 or name == POSITIONS or held.itemsize > 4
            layout[name] = (FLOAT32 if is_wide else held), shape
    layout |= {
        f"{reader}{SMOOTHING_SUFFIX}": (FLOAT32, plan.source.tensors[f"{reader}.weight"].shape[1:])
        for reader in smoothed_readers(plan, layers)
    }
    return layout


def smoothed_readers(plan: Plan, layers: Container[str]) -> list[str]:
    """List the first reader of every site whose columns calibration may scale or rotate."""
    config, readers = plan.source.config, []
    towers = {prefix: n for prefix, (_, n) in towers_of(config).items() if prefix in PREFIXES}
    for prefix, depth in towers.items():
        for block in (f"{prefix}.{i}" for i in range(depth)):
            for site in sites_of(config, block):
                names = [f"{block}.{r}.weight" for r in site.readers]
                producer = f"{block}.{site.producer}.weight"
                if all(n in layers for n in names) and (site.norm or producer in layers):
                    readers.append(f"{block}.{site.readers[0]}")
    return readers


def products_of(plan: Plan) -> dict[str, list[tuple[int, int]]]:
    """List, by block, (inputs, outputs) of activations whose readers are rounded by products."""
    assert plan.recipe is not None
    layers = quantized_layers(plan.source, plan.recipe, plan.source.tensors)
    shapes = {
        name.removesuffix(".weight"): plan.source.tensors[name].shape
        for name in layers
        if plan.recipe.of(name).rounding == "gptq"
    }
    products: dict[str, list[tuple[int, int]]] = {}
    for block in dict.fromkeys(_block_of(name) for name in shapes):
        alone = {name: [name] for name in shapes if _block_of(name) == block}
        for site in sites_of(plan.source.config, block):
            readers = [f"{block}.{reader}" for reader in site.readers]
            if all(name in alone for name in readers):
                alone |= {readers[0]: readers}
                for name in readers[1:]:
                    del alone[name]
        products[block] = [
            (shapes[name][1], sum(shapes[reader][0] for reader in readers))
            for name, readers in alone.items()
        ]
    return products


def _block_of(layer: str) -> str:
    prefix = next(prefix for prefix in PREFIXES if layer.startswith(f"{prefix}."))
    return layer[: layer.index(".", len(prefix) + 1)]


def weights_nbytes(plan: Plan, names: Collection[str]) -> int:
    """Compute the bytes of parameters in the types that an engine reads, each of them once."""
    entries = plan.source.tensors
    if plan.recipe is None:
        itemsize = int(DTYPES[STORED_AS[plan.options.precision]].itemsize)
        return itemsize * sum(math.prod(entries[name].shape) for name in names)
    layout = quantized_layout(plan, names)
    return sum(math.prod(shape) * int(dtype.itemsize) for dtype, shape in layout.values())
