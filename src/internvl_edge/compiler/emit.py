"""Graphs and weights: every component traced, every tensor stored once, one pointing to the other.

A directory has one weights file for all of its components. At fp32, fp16 and bf16 it holds the
parameters in the dtypes the graphs ask for; quantized, the linear layers' weights in 8 bits with
their scales, and the rest as the checkpoint stores it. Where that would be the checkpoint's own
bytes, its shards are brought instead; ``--weights link`` or ``copy`` bring them in any case, and
the graphs cast.

A quantized component has two graphs on the same weights: ``vision.onnx`` computes in float32
around its 8-bit products, which is what ONNX Runtime's CPU kernels fuse; ``vision.fp16.onnx``
computes in 16 bits, which is what engines are built from.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from internvl_edge.artifact import TensorSpec
from internvl_edge.compiler.options import ExportOptions, Plan
from internvl_edge.compiler.progress import Progress, Report
from internvl_edge.errors import UsageError
from internvl_edge.export import graph as graphs
from internvl_edge.export.bind import bind, save, weights_without_data
from internvl_edge.export.blocks import COMPONENT_STREAM, LLAMA_PREFIX, VISION_PREFIX, sites_of
from internvl_edge.export.bring import Brought, bring_shards
from internvl_edge.export.checkpoint import (
    Checkpoint,
    TensorEntry,
    build_model,
    torch_from_numpy,
)
from internvl_edge.export.components import (
    COMPONENTS,
    build_component,
    example_inputs,
    input_specs,
)
from internvl_edge.export.config import CheckpointConfig, with_depth
from internvl_edge.export.models import InternViT, InternVL
from internvl_edge.export.models.attention import rotary_tables
from internvl_edge.export.models.vit import resize_position_embedding
from internvl_edge.export.pixels import take_levels
from internvl_edge.export.precision import POLICIES, apply_policy
from internvl_edge.export.stamp import blocks_of, shallow_depth, stamp
from internvl_edge.export.weights import StoredTensor, WeightsWriter
from internvl_edge.quantize.blockwise import block_of
from internvl_edge.quantize.calibrate import SMOOTHING_SUFFIX, CalibratedBlock, is_quantized
from internvl_edge.quantize.qdq import SCALE_SUFFIX, QuantizedLinear, insert_qdq
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.quantize.weights import stored_layout

Array = np.ndarray[Any, Any]

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"
POSITIONS = "vision_model.embeddings.position_embedding"
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """A component's graph on disk."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nbytes: int  # of weights that it reads


def trace_all(plan: Plan, base: str, report: Report) -> dict[str, ir.Model]:
    """Trace every component of a plan at a base precision; the graphs have no weights yet.

    Towers are traced a few blocks deep and stamped; one that does not repeat is traced in full.
    """
    config = plan.source.config
    shallow = shallow_config(config)
    model = _meta_model(plan, shallow, base)
    traced = {}
    for done, name in enumerate(plan.components):
        report(Progress(step="trace", detail=name, done=done, total=len(plan.components)))
        traced[name] = _trace(plan, name, shallow, model)
        if not stamp_towers(traced[name], config):
            logger.info("%s: blocks that differ, traced one by one", name)
            traced[name] = _trace(plan, name, config, _meta_model(plan, config, base))
        if plan.options.input == "uint8":
            take_levels(traced[name], plan.preprocessing)
    return traced


def _towers(config: CheckpointConfig) -> dict[str, tuple[int, int]]:
    """Prefix of each tower's blocks → their period and their number."""
    towers = {VISION_PREFIX: (1, config.vision.num_hidden_layers)}
    if config.internvl is not None:
        period = config.internvl.cross_attention_frequency
        towers[LLAMA_PREFIX] = period, config.internvl.qllama.num_hidden_layers
    return towers


def shallow_config(config: CheckpointConfig) -> CheckpointConfig:
    """The same model with no more blocks than stamping needs to see."""
    depth = {prefix: shallow_depth(n, period) for prefix, (period, n) in _towers(config).items()}
    return with_depth(config, depth[VISION_PREFIX], depth.get(LLAMA_PREFIX, 0))


def stamp_towers(model: ir.Model, config: CheckpointConfig) -> bool:
    """Make the towers of a graph that was traced shallow as deep as they are; False if it fails."""
    for prefix, (period, depth) in _towers(config).items():
        if blocks_of(model, prefix) and not stamp(model, prefix, period, depth):
            return False
    graphs.name_values(model)
    return True


def _meta_model(plan: Plan, config: CheckpointConfig, base: str) -> InternVL | InternViT:
    with torch.device("meta"):
        model = build_model(config)
        vision = model.vision_model if isinstance(model, InternVL) else model
        # Resampled once, not in every forward: one graph per resolution.
        tokens = config.vision.num_tokens(plan.image_size)
        vision.embeddings.position_embedding = torch.nn.Parameter(
            torch.empty(1, tokens, config.vision.hidden_size)
        )
    apply_policy(model, POLICIES[base])
    return model


def _trace(
    plan: Plan, name: str, config: CheckpointConfig, model: InternVL | InternViT
) -> ir.Model:
    compute = "float32"
    if isinstance(model, InternVL):
        compute = str(model.qllama.lm_head.weight.dtype).removeprefix("torch.")
    specs = input_specs(COMPONENTS[name], config, plan.image_size, compute)
    traced = graphs.trace(
        build_component(COMPONENTS[name], model),
        example_inputs(specs),
        [{i: d for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs],
        [spec.name for spec in specs],
        COMPONENTS[name].output_names(config),
    )
    if config.internvl is not None:
        llama = config.internvl.qllama
        cos, sin = rotary_tables(llama.max_position_embeddings, llama.head_dim)
        tables = {"qllama.rope_cos": cos.numpy(), "qllama.rope_sin": sin.numpy()}
        graphs.set_constants(traced, tables)
    return graphs.simplify(traced)


# --- weights -------------------------------------------------------------------------------------


def read_tensor(plan: Plan, name: str) -> Array:
    """A parameter as the graphs of this resolution need it; resampled positions in float32."""
    if name.endswith(SMOOTHING_SUFFIX):  # of a site that nothing was folded at
        shape = plan.source.tensors[name.replace(SMOOTHING_SUFFIX, ".weight")].shape[1:]
        return np.ones(shape, np.float32)
    values = plan.source.read(name)
    if name != POSITIONS:
        return values
    side = plan.image_size // plan.source.config.vision.patch_size
    resized: Array = resize_position_embedding(
        torch_from_numpy(values).float(), (side, side)
    ).numpy()
    return resized


def store_weights(
    plan: Plan, models: Mapping[str, ir.Model], directory: Path, report: Report
) -> tuple[dict[str, StoredTensor], dict[str, Brought]]:
    """Put every parameter the graphs need into ``directory``; nothing is quantized.

    Returns:
        Where each lies, and the checkpoint's own shards that were brought.
    """

    def copied(shard: str, done: int, total: int) -> None:
        done, total = done // 10**6, -(-total // 10**6)
        report(Progress(step="copy", detail=f"{shard} (MB)", done=done, total=total))

    needed = weights_without_data(models.values())
    resized = plan.image_size != plan.source.config.vision.image_size
    held = {n: plan.source.tensors[n] for n in needed if n != POSITIONS or not resized}
    stored: dict[str, StoredTensor] = {}
    brought: dict[str, Brought] = {}
    if can_bring(plan.options, needed, held):
        transfer = plan.options.weights
        stored, brought = bring_shards(plan.checkpoint, held, directory, transfer, copied)
    elif plan.options.weights == "copy":  # not as the shards lie, but with the same values
        needed |= {name: entry.dtype for name, entry in held.items()}
    own = {name: dtype for name, dtype in needed.items() if name not in stored}
    if own:
        layout = {name: (dtype, _shape(plan, name)) for name, dtype in own.items()}
        path = directory / WEIGHTS_FILE
        with WeightsWriter(path, layout, align=plan.options.align) as writer:
            copy_rest(plan, writer, own, report)
        stored |= writer.stored
    return stored, brought


def can_bring(
    options: ExportOptions,
    needed: Mapping[str, np.dtype[Any]],
    held: Mapping[str, TensorEntry],
) -> bool:
    """Whether the checkpoint's own shards can be what the graphs read.

    Raises:
        UsageError: they are to be linked, and a tensor is not aligned to its item size.
    """
    is_auto = options.weights == "auto"
    if options.align is not None:
        return False
    if is_auto and any(needed[name] != entry.dtype for name, entry in held.items()):
        return False
    crooked = [n for n, entry in held.items() if entry.offset % entry.dtype.itemsize]
    if crooked and options.weights == "link":
        entry = held[crooked[0]]
        raise UsageError(
            f"--weights link: {entry.file}: expected offsets that are multiples of the item size, "
            f"found {crooked[0]} at {entry.offset} ({len(crooked)} such tensor(s)); use --weights "
            "copy, which writes them anew, or --align without --weights"
        )
    return not crooked


def copy_rest(
    plan: Plan, writer: WeightsWriter, dtypes: Mapping[str, np.dtype[Any]], report: Report
) -> None:
    """Stream parameters into the weights file, each converted to its dtype."""
    for done, (name, dtype) in enumerate(dtypes.items()):
        report(Progress(step="weights", detail=name, done=done, total=len(dtypes)))
        writer.write(name, convert(read_tensor(plan, name), dtype))


def convert(values: Array, dtype: np.dtype[Any]) -> Array:
    """Another float type; values beyond float16's range saturate rather than become infinite."""
    if values.dtype == dtype:
        return values
    wide = values.astype(FLOAT32)
    if dtype == np.float16:
        limit = float(np.finfo(np.float16).max)
        np.clip(wide, -limit, limit, out=wide)
    return wide.astype(dtype)


def _shape(plan: Plan, name: str) -> tuple[int, ...]:
    if name == POSITIONS:
        vision = plan.source.config.vision
        return 1, vision.num_tokens(plan.image_size), vision.hidden_size
    return plan.source.tensors[name].shape


def quantized_layers(checkpoint: Checkpoint, recipe: Recipe, needed: Iterable[str]) -> list[str]:
    """Weights that a recipe puts into 8 bits: the towers' linear layers, by parameter name."""
    prefixes = (f"{VISION_PREFIX}.", f"{LLAMA_PREFIX}.")
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
        shape = _shape(plan, name)
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
    for prefix, (_, depth) in _towers(config).items():
        for block in (f"{prefix}.{i}" for i in range(depth)):
            for site in sites_of(config, block):
                names = [f"{block}.{r}.weight" for r in site.readers]
                producer = f"{block}.{site.producer}.weight"
                if all(n in layers for n in names) and (site.norm or producer in layers):
                    found.append(f"{block}.{site.readers[0]}")
    return found


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


# --- graphs --------------------------------------------------------------------------------------


def write_graph(
    plan: Plan,
    name: str,
    model: ir.Model,
    stored: Mapping[str, StoredTensor],
    activations: Mapping[str, Mapping[str, float | None]],
    directory: Path,
    file: str,
) -> Emitted:
    """Quantize a traced graph if the plan says so, bind its weights, write it as ``file``."""
    if plan.recipe is not None and name in COMPONENT_STREAM:
        scales = activations[COMPONENT_STREAM[name]]
        linears = {
            weight: _linear(plan, weight, scale)
            for weight, scale in scales.items()
            if weight in model.graph.initializers
        }
        insert_qdq(model, linears)
    nbytes = bind(model, stored, directory)
    save(model, directory / file)
    return Emitted(
        file=file,
        inputs=_specs(model.graph.inputs),
        outputs=_specs(model.graph.outputs),
        nbytes=nbytes,
    )


def _linear(plan: Plan, weight: str, scale: float | None) -> QuantizedLinear:
    assert plan.recipe is not None
    recipe, block = plan.recipe.of(weight), None
    if recipe.weights == "int4":
        block = block_of(plan.source.tensors[weight].shape[1], recipe.block_size)
    return QuantizedLinear(
        weight=weight, activation_scale=scale, format=recipe.weights, block=block
    )


def _specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=str(value.name),
            dtype=np.dtype(value.dtype.numpy()).name,  # type: ignore[union-attr]
            shape=tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ()),
        )
        for value in values
    )
