"""Graphs and weights: every component traced, every tensor stored once, one pointing to the other.

A directory has one weights file for all of its components. At fp32, fp16 and bf16 it holds the
parameters in the dtypes the graphs ask for; quantized, the linear layers' weights in 8 bits with
their scales, and the rest as the checkpoint stores it. Where that would be the checkpoint's own
bytes, its shards are brought instead; ``--weights link`` or ``copy`` bring them in any case, and
the graphs cast.

A quantized component has two graphs on the same weights: ``vision.onnx`` computes in float32
around its 8-bit products, which is what ONNX Runtime's CPU kernels fuse; ``vision.fp16.onnx``
computes in 16 bits, which is what engines are built from. Where products are INT8 there is a third,
``vision.u8.onnx``, the first one for CPUs without VNNI (``quantize.graph.unsigned``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from internvl_edge.artifact.components import COMPONENTS, QUERIES_PREFIX, VISION_PREFIX
from internvl_edge.artifact.open import TensorSpec
from internvl_edge.artifact.workspace import Workspace
from internvl_edge.compiler.plan import ExportOptions, Plan
from internvl_edge.compiler.progress import Progress, Report
from internvl_edge.compiler.steps.weights import (
    FLOAT32,
    POSITIONS,
    shape_of,
    towers_of,
)
from internvl_edge.errors import UsageError
from internvl_edge.export.checkpoint.load import build_model, torch_from_numpy
from internvl_edge.export.checkpoint.shards import TensorEntry
from internvl_edge.export.components import (
    build_component,
    example_inputs,
    input_specs,
    output_names,
)
from internvl_edge.export.config.checkpoint import CheckpointConfig, with_depth
from internvl_edge.export.graph import trace
from internvl_edge.export.graph.bind import bind, save, weights_without_data
from internvl_edge.export.graph.dtypes import POLICIES, apply_policy
from internvl_edge.export.graph.repeat import blocks_of, shallow_depth, stamp
from internvl_edge.export.graph.uint8_input import take_levels
from internvl_edge.export.models import Chat, InternViT, InternVL
from internvl_edge.export.models.attention import rotary_tables
from internvl_edge.export.models.llama import llama_tables
from internvl_edge.export.models.vit import resize_position_embedding
from internvl_edge.export.weights.link import Brought, bring_shards
from internvl_edge.export.weights.writer import StoredTensor, WeightsWriter
from internvl_edge.quantize.calibration.attention import scales_by_attention
from internvl_edge.quantize.calibration.block import SMOOTHING_SUFFIX
from internvl_edge.quantize.graph.qdq import QuantizedLinear, insert_attention_qdq, insert_qdq
from internvl_edge.quantize.graph.unsigned import take_unsigned_weights
from internvl_edge.quantize.numerics.int4 import block_of
from internvl_edge.runtime.ort.session import unsigned_graph
from internvl_edge.types import Array

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"
PIECE_NBYTES = 1 << 29  # of converted weights, between two points to go on from
CHAT_TOKENS = "language_model.model.embed_tokens.weight"


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


def shallow_config(config: CheckpointConfig) -> CheckpointConfig:
    """The same model with no more blocks than stamping needs to see."""
    depth = {prefix: shallow_depth(n, period) for prefix, (period, n) in towers_of(config).items()}
    queries = depth.pop(QUERIES_PREFIX, None)
    language = next((n for prefix, n in depth.items() if prefix != VISION_PREFIX), 0)
    return with_depth(config, depth[VISION_PREFIX], language, queries)


def stamp_towers(model: ir.Model, config: CheckpointConfig) -> bool:
    """Make the towers of a graph that was traced shallow as deep as they are; False if it fails."""
    for prefix, (period, depth) in towers_of(config).items():
        if blocks_of(model, prefix) and not stamp(model, prefix, period, depth):
            return False
    trace.name_values(model)
    return True


def _meta_model(plan: Plan, config: CheckpointConfig, base: str) -> InternVL | Chat | InternViT:
    with torch.device("meta"):
        model = build_model(config)
        vision = model if isinstance(model, InternViT) else model.vision_model
        # Resampled once, not in every forward: one graph per resolution.
        tokens = config.vision.num_tokens(plan.image_size)
        vision.embeddings.position_embedding = torch.nn.Parameter(
            torch.empty(1, tokens, config.vision.hidden_size)
        )
    apply_policy(model, POLICIES[base])
    return model


def _trace(
    plan: Plan, name: str, config: CheckpointConfig, model: InternVL | Chat | InternViT
) -> ir.Model:
    linear = next((p for n, p in model.named_parameters() if n.endswith("q_proj.weight")), None)
    compute = "float32" if linear is None else str(linear.dtype).removeprefix("torch.")
    component, capacity = COMPONENTS[name], plan.options.cache_capacity
    specs = input_specs(component, config, plan.image_size, compute, capacity)
    traced = trace.trace(
        build_component(component, model),
        example_inputs(specs),
        [{i: d for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs],
        [spec.name for spec in specs],
        output_names(component, config),
    )
    trace.set_constants(traced, _rotary_constants(config))
    return trace.simplify(traced)


def _rotary_constants(config: CheckpointConfig) -> dict[str, Array]:
    """The language model's rotary tables by the names of its buffers."""
    tables = {}
    if config.chat is not None and config.chat.llama is not None:
        tables["language_model"] = llama_tables(config.chat.llama)
    for name, internvl in (("qllama", config.internvl), ("queries.qllama", config.queries)):
        if internvl is not None:
            llama = internvl.qllama
            tables[name] = rotary_tables(llama.max_position_embeddings, llama.head_dim)
    return {
        f"{name}.rope_{which}": table.numpy()
        for name, pair in tables.items()
        for which, table in zip(("cos", "sin"), pair, strict=True)
    }


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


def needed_weights(plan: Plan, models: Mapping[str, ir.Model]) -> dict[str, np.dtype[Any]]:
    """Name and dtype of every parameter that graphs read, and of a chat model's token embedding.

    That one is read by the runtime, which takes it as the checkpoint stores it.
    """
    needed = weights_without_data(models.values())
    if any(COMPONENTS[name].takes_embeds for name in models):
        needed.setdefault(CHAT_TOKENS, plan.source.tensors[CHAT_TOKENS].dtype)
    return needed


def store_weights(
    plan: Plan, models: Mapping[str, ir.Model], directory: Path, work: Workspace, report: Report
) -> tuple[dict[str, StoredTensor], dict[str, Brought]]:
    """Put every parameter the graphs need into ``directory``; nothing is quantized.

    What has to be converted is written in ``work`` and linked: another run goes on behind the
    last piece of it that is durable.

    Returns:
        Where each lies, and the checkpoint's own shards that were brought.
    """

    def copied(shard: str, done: int, total: int) -> None:
        done, total = done // 10**6, -(-total // 10**6)
        report(Progress(step="copy", detail=f"{shard} (MB)", done=done, total=total))

    needed = needed_weights(plan, models)
    held = held_weights(plan, needed)
    stored: dict[str, StoredTensor] = {}
    brought: dict[str, Brought] = {}
    if can_bring(plan.options, needed, held):
        transfer = plan.options.weights
        stored, brought = bring_shards(plan.checkpoint, held, directory, transfer, copied)
    elif plan.options.weights == "copy":  # not as the shards lie, but with the same values
        needed |= {name: entry.dtype for name, entry in held.items()}
    own = {name: dtype for name, dtype in needed.items() if name not in stored}
    if own and WEIGHTS_FILE in brought:
        raise UsageError(
            f"{plan.checkpoint.path / WEIGHTS_FILE}: --image-size {plan.image_size} writes a file "
            "of that name beside the checkpoint's own; give the shard another name"
        )
    if own:
        layout = {name: (dtype, shape_of(plan, name)) for name, dtype in own.items()}
        done = {name for entry in work.entries for name in entry["weights"]}
        if done:
            logger.warning(
                "%d of %d tensors that an earlier run wrote are taken up from %s",
                len(done),
                len(own),
                work.path,
            )
        path = work.path / WEIGHTS_FILE
        with WeightsWriter(path, layout, align=plan.options.align, done=done) as writer:
            copy_rest(plan, writer, own, report, work)
        work.hand_over(WEIGHTS_FILE, directory)
        stored |= writer.stored
    return stored, brought


def held_weights(plan: Plan, needed: Iterable[str]) -> dict[str, TensorEntry]:
    """Those of the needed parameters that the checkpoint has as they are."""
    resized = plan.image_size != plan.source.config.vision.image_size
    return {n: plan.source.tensors[n] for n in needed if n != POSITIONS or not resized}


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
    plan: Plan,
    writer: WeightsWriter,
    dtypes: Mapping[str, np.dtype[Any]],
    report: Report,
    work: Workspace | None = None,
) -> None:
    """Stream the parameters that are not written yet into the file, each converted to its dtype.

    Pieces that are durable are noted in ``work``, if there is one.
    """
    written: list[str] = []
    nbytes, pending = 0, writer.pending
    for done, name in enumerate(pending, len(dtypes) - len(pending)):
        report(Progress(step="weights", detail=name, done=done, total=len(dtypes)))
        writer.write(name, convert(read_tensor(plan, name), dtypes[name]))
        written.append(name)
        nbytes += writer.stored[name].nbytes
        if work is not None and nbytes >= PIECE_NBYTES:
            writer.sync()
            plan.checkpoint.require_unchanged()  # or another's weights would be taken up as these
            work.finish(f"weights.{work.num_done}", {"weights": written}, {})
            written, nbytes = [], 0


def convert(values: Array, dtype: np.dtype[Any]) -> Array:
    """Another float type; values beyond float16's range saturate rather than become infinite."""
    if values.dtype == dtype:
        return values
    wide = values.astype(FLOAT32)
    if dtype == np.float16:
        limit = float(np.finfo(np.float16).max)
        np.clip(wide, -limit, limit, out=wide)
    return wide.astype(dtype)


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
    stream = COMPONENTS[name].stream
    if plan.recipe is not None and stream is not None:
        drop_ones(model, stored, directory)
        scales = activations[stream]
        linears = {
            weight: _linear(plan, weight, scale)
            for weight, scale in scales.items()
            if weight in model.graph.initializers
        }
        insert_attention_qdq(model, scales_by_attention(scales))
        insert_qdq(model, linears)
    nbytes = bind(model, stored, directory)
    save(model, directory / file)
    emitted = Emitted(
        file=file,
        inputs=tensor_specs(model.graph.inputs),
        outputs=tensor_specs(model.graph.outputs),
        nbytes=nbytes,
    )
    if take_unsigned_weights(model):
        save(model, directory / unsigned_graph(name))
    return emitted


def drop_ones(model: ir.Model, stored: Mapping[str, StoredTensor], directory: Path) -> None:
    """Take out the products with factors behind GELU that calibration left at one."""
    for name, factors in [*model.graph.initializers.items()]:
        if not name.endswith(".mlp.spread"):
            continue
        place = stored[name]
        count = math.prod(place.shape)
        path = directory / place.location
        values = np.fromfile(path, place.dtype, count, offset=place.offset)
        if not (values == 1).all():
            continue
        for use in factors.uses():
            (x,) = (value for value in use.node.inputs if value is not factors)
            assert x is not None and use.node.op_type == "Mul"
            ir.convenience.replace_all_uses_with(use.node.outputs[0], x)
            model.graph.remove(use.node, safe=True)
        del model.graph.initializers[name]


def _linear(plan: Plan, weight: str, scale: float | None) -> QuantizedLinear:
    assert plan.recipe is not None
    recipe, block = plan.recipe.of(weight), None
    if recipe.weights == "int4":
        block = block_of(plan.source.tensors[weight].shape[1], recipe.block_size)
    return QuantizedLinear(
        weight=weight, activation_scale=scale, format=recipe.weights, block=block
    )


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """What a graph's inputs or outputs are."""
    return tuple(
        TensorSpec(
            name=str(value.name),
            dtype=np.dtype(value.dtype.numpy()).name,  # type: ignore[union-attr]
            shape=tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ()),
        )
        for value in values
    )
