"""Graphs and weights: every component traced, every tensor stored once, one pointing to the other.

A directory has one weights file for all of its components. At fp32, fp16 and bf16 it holds the
parameters in the dtypes the graphs ask for; quantized, the linear layers' weights in 8 bits with
their scales, and the rest as the checkpoint stores it. ``--weights link`` or ``copy`` bring the
checkpoint's own shards instead, and the graphs cast.

A quantized component has two graphs on the same weights: ``vision.onnx`` computes in float32
around its 8-bit products, which is what ONNX Runtime's CPU kernels fuse; ``vision.fp16.onnx``
computes in 16 bits, which is what engines are built from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from internvl_edge.artifact import TensorSpec
from internvl_edge.compiler.options import Plan, Progress, Report
from internvl_edge.export import graph as graphs
from internvl_edge.export.blocks import COMPONENT_STREAM, LLAMA_PREFIX, VISION_PREFIX
from internvl_edge.export.checkpoint import Checkpoint, build_model, torch_from_numpy
from internvl_edge.export.components import (
    COMPONENTS,
    build_component,
    example_inputs,
    input_specs,
)
from internvl_edge.export.models.attention import rotary_tables
from internvl_edge.export.models.internvl import InternVL
from internvl_edge.export.models.vit import resize_position_embedding
from internvl_edge.export.precision import POLICIES, apply_policy
from internvl_edge.export.weights import (
    StoredTensor,
    WeightsWriter,
    bind,
    bring_shards,
    save,
    weights_without_data,
)
from internvl_edge.quantize.calibrate import CalibratedBlock, is_quantized
from internvl_edge.quantize.formats import FORMATS
from internvl_edge.quantize.qdq import SCALE_SUFFIX, QuantizedLinear, insert_qdq
from internvl_edge.quantize.recipe import Recipe

Array = np.ndarray[Any, Any]

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
    """Trace every component of a plan at a base precision; the graphs have no weights yet."""
    with torch.device("meta"):
        model = build_model(plan.checkpoint.config)
        vision = model.vision_model if isinstance(model, InternVL) else model
        tokens = plan.checkpoint.config.vision.num_tokens(plan.image_size)
        # Resampled once, not in every forward: one graph per resolution.
        vision.embeddings.position_embedding = torch.nn.Parameter(
            torch.empty(1, tokens, plan.checkpoint.config.vision.hidden_size)
        )
    apply_policy(model, POLICIES[base])
    traced = {}
    for done, name in enumerate(plan.components):
        report(Progress(step="trace", detail=name, done=done, total=len(plan.components)))
        traced[name] = _trace(plan, name, build_component(COMPONENTS[name], model))
    return traced


def _trace(plan: Plan, name: str, module: torch.nn.Module) -> ir.Model:
    config = plan.checkpoint.config
    specs = input_specs(COMPONENTS[name], config, plan.image_size)
    model = graphs.trace(
        module,
        example_inputs(specs),
        [{i: d for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs],
        COMPONENTS[name].inputs,
        COMPONENTS[name].output_names(config),
    )
    if config.internvl is not None:
        llama = config.internvl.qllama
        cos, sin = rotary_tables(llama.max_position_embeddings, llama.head_dim)
        tables = {"qllama.rope_cos": cos.numpy(), "qllama.rope_sin": sin.numpy()}
        graphs.set_constants(model, tables)
    return graphs.simplify(model)


# --- weights -------------------------------------------------------------------------------------


def read_tensor(plan: Plan, name: str) -> Array:
    """A parameter as the graphs of this resolution need it; resampled positions in float32."""
    values = plan.checkpoint.read(name)
    if name != POSITIONS:
        return values
    side = plan.image_size // plan.checkpoint.config.vision.patch_size
    resized: Array = resize_position_embedding(
        torch_from_numpy(values).float(), (side, side)
    ).numpy()
    return resized


def store_weights(
    plan: Plan, models: Mapping[str, ir.Model], directory: Path, report: Report
) -> dict[str, StoredTensor]:
    """Put every parameter the graphs need into ``directory``; nothing is quantized."""
    needed = weights_without_data(models.values())
    resized = plan.image_size != plan.checkpoint.config.vision.image_size
    if plan.options.weights != "auto":
        stored = bring_shards(plan.checkpoint, directory, plan.options.weights)
        needed = {name: needed[name] for name in needed if name == POSITIONS and resized}
    else:
        stored = {}
    if needed:
        shapes = {name: (dtype, _shape(plan, name)) for name, dtype in needed.items()}
        with WeightsWriter(directory / WEIGHTS_FILE, shapes) as writer:
            copy_rest(plan, writer, needed, report)
        stored |= writer.stored
    return stored


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
        vision = plan.checkpoint.config.vision
        return 1, vision.num_tokens(plan.image_size), vision.hidden_size
    return plan.checkpoint.tensors[name].shape


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
    layers = set(quantized_layers(plan.checkpoint, plan.recipe, needed))
    for name in needed:
        shape = _shape(plan, name)
        if name in layers:
            layout[name] = FORMATS[plan.recipe.weights].dtype, shape[::-1]  # (K, N)
            layout[name + SCALE_SUFFIX] = FLOAT32, shape[:1]
        else:
            # gains may be folded, and are small; what is large stays as the checkpoint has it
            held = plan.checkpoint.tensors[name].dtype
            is_wide = len(shape) == 1 or name == POSITIONS or held.itemsize > 4
            layout[name] = (FLOAT32 if is_wide else held), shape
    return layout


def write_block(writer: WeightsWriter, block: CalibratedBlock) -> None:
    """Write what one calibrated block leaves behind."""
    for name, weight in block.weights.items():
        if name in writer.stored:  # a component that was not asked for may read others
            writer.write(name, weight.values)
            writer.write(name + SCALE_SUFFIX, weight.scales)
    for name, values in block.folded.items():
        if name in writer.stored:
            writer.write(name, values.astype(FLOAT32))


# --- graphs --------------------------------------------------------------------------------------


def write_graph(
    plan: Plan,
    name: str,
    model: ir.Model,
    stored: Mapping[str, StoredTensor],
    activations: Mapping[str, Mapping[str, float]],
    directory: Path,
    file: str,
) -> Emitted:
    """Quantize a traced graph if the plan says so, bind its weights, write it as ``file``."""
    if plan.recipe is not None and name in COMPONENT_STREAM:
        scales = activations[COMPONENT_STREAM[name]]
        linears = {
            weight: QuantizedLinear(
                weight=weight, activation_scale=scale, format=plan.recipe.activations
            )
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


def _specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name=str(value.name),
            dtype=np.dtype(value.dtype.numpy()).name,  # type: ignore[union-attr]
            shape=tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ()),
        )
        for value in values
    )
