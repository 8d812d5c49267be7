"""What a quantized directory's weights file holds: which tensors, of which types and shapes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np

from internvl_edge.artifact.components import (
    CHAT_PREFIX,
    LLAMA_PREFIX,
    PREFIXES,
    QUERIES_PREFIX,
    VISION_PREFIX,
)
from internvl_edge.compiler.plan import Plan
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.towers.blocks import sites_of
from internvl_edge.export.weights.writer import WeightsWriter
from internvl_edge.quantize.calibration.block import SMOOTHING_SUFFIX, CalibratedBlock, is_quantized
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.numerics.weights import stored_layout
from internvl_edge.quantize.recipe import Recipe

POSITIONS = "vision_model.embeddings.position_embedding"
FLOAT32 = np.dtype(np.float32)


def towers_of(config: CheckpointConfig) -> dict[str, tuple[int, int]]:
    """Prefix of each tower's blocks → their period and their number."""
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


def shape_of(plan: Plan, name: str) -> tuple[int, ...]:
    if name == POSITIONS:
        vision = plan.source.config.vision
        return 1, vision.num_tokens(plan.image_size), vision.hidden_size
    return plan.source.tensors[name].shape


def quantized_layers(checkpoint: Checkpoint, recipe: Recipe, needed: Iterable[str]) -> list[str]:
    """Weights that a recipe puts into 8 bits: the towers' linear layers, by parameter name."""
    prefixes = tuple(f"{prefix}." for prefix in PREFIXES)
    found = []
    for name in needed:
        shape = checkpoint.tensors[name].shape
        layer = name.removesuffix(".weight")
        is_linear = name.startswith(prefixes) and layer != name and len(shape) == 2
        if is_linear and is_quantized(recipe, layer, shape[1], shape[0]):
            found.append(name)
    return found


def quantized_layout(
    plan: Plan, needed: Mapping[str, np.dtype[Any]]
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Dtype and shape of every tensor of a quantized directory's weights file."""
    assert plan.recipe is not None
    layout: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    layers = set(quantized_layers(plan.source, plan.recipe, needed))
    for name in needed:
        shape = shape_of(plan, name)
        if name in layers:
            outputs, inputs = shape
            found = stored_layout((outputs, inputs), plan.recipe.of(name))
            layout[name], layout[name + SCALE_SUFFIX] = found
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
    """The first reader of every site whose columns calibration may scale or rotate."""
    config, found = plan.source.config, []
    towers = {prefix: n for prefix, (_, n) in towers_of(config).items() if prefix in PREFIXES}
    for prefix, depth in towers.items():
        for block in (f"{prefix}.{i}" for i in range(depth)):
            for site in sites_of(config, block):
                names = [f"{block}.{r}.weight" for r in site.readers]
                producer = f"{block}.{site.producer}.weight"
                if all(n in layers for n in names) and (site.norm or producer in layers):
                    found.append(f"{block}.{site.readers[0]}")
    return found


def products_of(plan: Plan) -> dict[str, list[tuple[int, int]]]:
    """Block → (inputs, outputs) of each activation whose readers are rounded by its products."""
    assert plan.recipe is not None
    layers = quantized_layers(plan.source, plan.recipe, plan.source.tensors)
    shapes = {
        name.removesuffix(".weight"): plan.source.tensors[name].shape
        for name in layers
        if plan.recipe.of(name).rounding == "gptq"
    }
    found: dict[str, list[tuple[int, int]]] = {}
    for block in dict.fromkeys(_block_of(name) for name in shapes):
        alone = {name: [name] for name in shapes if _block_of(name) == block}
        for site in sites_of(plan.source.config, block):
            readers = [f"{block}.{reader}" for reader in site.readers]
            if all(name in alone for name in readers):
                alone |= {readers[0]: readers}
                for name in readers[1:]:
                    del alone[name]
        found[block] = [
            (shapes[name][1], sum(shapes[reader][0] for reader in readers))
            for name, readers in alone.items()
        ]
    return found


def _block_of(layer: str) -> str:
    prefix = next(prefix for prefix in PREFIXES if layer.startswith(f"{prefix}."))
    return layer[: layer.index(".", len(prefix) + 1)]


def write_block(writer: WeightsWriter, block: CalibratedBlock) -> list[str]:
    """Write what one calibrated block leaves behind; the names of the tensors written."""
    tensors = {name: weight.values for name, weight in block.weights.items()}
    tensors |= {name + SCALE_SUFFIX: weight.scales for name, weight in block.weights.items()}
    tensors |= {name: values.astype(FLOAT32) for name, values in block.folded.items()}
    # a component that was not asked for may read others
    written = [name for name in tensors if name in writer.stored]
    for name in written:
        writer.write(name, tensors[name])
    return written
