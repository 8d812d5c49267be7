"""The weights file of a directory: what it holds, and every parameter stored in it once.

A directory has one weights file for all of its components. At fp32, fp16 and bf16 it holds the
parameters in the dtypes the graphs ask for; quantized, the linear layers' weights in 8 bits with
their scales, and the rest as the checkpoint stores it. Where that would be the checkpoint's own
bytes, its shards are brought instead; ``--weights link`` or ``copy`` bring them in any case, and
the graphs cast.

``plan_weights`` decides all of that once, before any work: the forecast and the run follow it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from internvl_edge.artifact.components import (
    CHAT_PREFIX,
    COMPONENTS,
    LLAMA_PREFIX,
    PREFIXES,
    QUERIES_PREFIX,
    VISION_PREFIX,
)
from internvl_edge.artifact.workspace import Workspace
from internvl_edge.compiler.cost import IMPORTS_NBYTES, Cost
from internvl_edge.compiler.plan import ExportOptions, Plan
from internvl_edge.compiler.progress import Progress, Report
from internvl_edge.compiler.steps.step import Build
from internvl_edge.errors import InternVLError, UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.load import torch_from_numpy
from internvl_edge.export.checkpoint.shards import DTYPES, TensorEntry
from internvl_edge.export.components import build_component
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.graph.bind import weights_without_data
from internvl_edge.export.graph.dtypes import POLICIES
from internvl_edge.export.models import Chat, InternViT, InternVL
from internvl_edge.export.models.vit import resize_position_embedding
from internvl_edge.export.towers.blocks import sites_of
from internvl_edge.export.weights.link import bring_shards, way_of
from internvl_edge.export.weights.writer import Layout, StoredTensor, WeightsWriter
from internvl_edge.quantize.calibration.block import CalibratedBlock, is_quantized
from internvl_edge.quantize.calibration.folding import SMOOTHING_SUFFIX
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.numerics.weights import stored_layout
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"
PIECE_NBYTES = 1 << 29  # of converted weights, between two points to go on from
CONVERT_NBYTES_PER_SECOND = 250e6
CHAT_TOKENS = "language_model.model.embed_tokens.weight"
LLAMA_HEAD = "qllama.lm_head.weight"
TOWERS = tuple(f"{prefix}." for prefix in PREFIXES)
STORED_AS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
STORED_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
POSITIONS = "vision_model.embeddings.position_embedding"
FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsPlan:
    """The way of every parameter that is read into OUT."""

    reads: Mapping[str, frozenset[str]]  # component → the parameters that its graph reads
    brought: frozenset[str]  # parameters that lie in the checkpoint's own shards, which are brought
    layout: Layout  # of the weights file: what is converted, copied or quantized


def plan_weights(plan: Plan, model: InternVL | Chat | InternViT) -> WeightsPlan:
    """Decide where every parameter comes from, and what is written.

    Args:
        plan: what will be compiled.
        model: of the plan's source, on the meta device; of any depth.

    Raises:
        UsageError: shards are to be brought that cannot be.
    """
    reads = {component: _read_by(plan, component, model) for component in plan.components}
    tensors, policy = plan.source.tensors, POLICIES[plan.base]
    needed = {
        name: DTYPES[STORED_TYPES[policy.dtype_of(name)]]
        for name in sorted(set[str]().union(*reads.values()))
    }
    if any(COMPONENTS[name].takes_embeds for name in reads):  # by the runtime, as it is stored
        needed.setdefault(CHAT_TOKENS, tensors[CHAT_TOKENS].dtype)
    if plan.recipe is not None:
        layout = quantized_layout(plan, needed)
        return WeightsPlan(reads=reads, brought=frozenset(), layout=layout)
    held = held_weights(plan, needed)
    is_brought = can_bring(plan.options, needed, held)
    if not is_brought and plan.options.weights == "copy":  # not as shards lie, but the same values
        needed |= {name: entry.dtype for name, entry in held.items()}
    brought = frozenset(held if is_brought else ())
    layout = {n: (dtype, shape_of(plan, n)) for n, dtype in needed.items() if n not in brought}
    if layout and WEIGHTS_FILE in {held[name].file.name for name in brought}:
        raise UsageError(
            f"{plan.checkpoint.path / WEIGHTS_FILE}: --image-size {plan.image_size} writes a file "
            "of that name beside the checkpoint's own; give the shard another name"
        )
    return WeightsPlan(reads=reads, brought=brought, layout=layout)


def _read_by(plan: Plan, name: str, model: InternVL | Chat | InternViT) -> frozenset[str]:
    """Name the parameters of a component's parts, without those that its graph has no use for."""
    component, chat = COMPONENTS[name], plan.source.config.chat
    parts = {key.partition(".")[0] for key in build_component(component, model).state_dict()}
    read = {n for n in plan.source.tensors if n.partition(".")[0] in parts and component.reads(n)}
    is_tied = chat is not None and chat.llama is not None and chat.llama.tie_word_embeddings
    if component.takes_embeds and not is_tied:  # where it is, the table is the head too
        read.discard(CHAT_TOKENS)
    return frozenset(read)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreWeights:
    """Bring the checkpoint's shards, and write what they do not hold as it is read."""

    weights: WeightsPlan

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        return (cost_of_writing(plan, self.weights),)

    def run(self, plan: Plan, build: Build) -> None:
        require_as_planned(self.weights, build)
        if self.weights.brought:
            build.stored, build.brought = bring_shards(
                plan.checkpoint,
                self.weights.brought,
                build.directory,
                plan.options.weights,
                _copied(build.report),
            )
        if self.weights.layout:
            build.stored = build.stored | _written(plan, self.weights.layout, build)


def cost_of_writing(plan: Plan, weights: WeightsPlan) -> Cost:
    """State memory, disk and time of the weights file, but for calibration."""
    written = sum(math.prod(shape) * int(d.itemsize) for d, shape in weights.layout.values())
    sizes = {name: math.prod(entry.shape) for name, entry in plan.source.tensors.items()}
    if plan.recipe is not None:  # the rest is calibration's
        sizes = {n: size for n, size in sizes.items() if not n.startswith(TOWERS)}
    largest = 0 if weights.brought else max(sizes.values())
    if weights.brought:
        shards = sorted({plan.source.tensors[name].file for name in weights.brought})
        if way_of(shards, plan.options.out, plan.options.weights) == "copy":
            written += sum(shard.stat().st_size for shard in shards)
    return Cost(
        name="weights",
        memory_nbytes=IMPORTS_NBYTES + 10 * largest,  # stored, float32 and converted, at once
        disk_nbytes=written,
        seconds=written / CONVERT_NBYTES_PER_SECOND,
    )


def require_as_planned(weights: WeightsPlan, build: Build) -> None:
    """Make sure that graphs read what was planned: what is written was decided before the trace.

    Raises:
        InternVLError: a mistake of ours; names a parameter.
    """
    read = set(weights_without_data(build.models.values()))
    planned = set[str]().union(*weights.reads.values())
    if read != planned:
        raise InternVLError(
            f"the graphs were expected to read {len(planned)} parameters, they read {len(read)}: "
            f"{', '.join(sorted(read ^ planned)[:3])}"
        )


def block_sizes(plan: Plan) -> dict[str, int]:
    """Count the parameters of every block that a recipe may quantize."""
    sizes: dict[str, int] = {}
    for name, entry in plan.source.tensors.items():
        for prefix in PREFIXES:
            if name.startswith(f"{prefix}."):
                block = name[: name.index(".", len(prefix) + 1)]
                sizes[block] = sizes.get(block, 0) + math.prod(entry.shape)
    return sizes


def engine_nbytes(plan: Plan, names: Collection[str]) -> int:
    """Compute the bytes of parameters as an engine holds them."""
    entries = plan.source.tensors
    if plan.recipe is None:
        itemsize = int(DTYPES[STORED_AS[plan.options.precision]].itemsize)
        return itemsize * sum(math.prod(entries[name].shape) for name in names)
    layout = quantized_layout(plan, names)
    return sum(math.prod(shape) * int(dtype.itemsize) for dtype, shape in layout.values())


# --- what the file holds -------------------------------------------------------------------------


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


def shape_of(plan: Plan, name: str) -> tuple[int, ...]:
    if name == POSITIONS:
        vision = plan.source.config.vision
        return 1, vision.num_tokens(plan.image_size), vision.hidden_size
    return plan.source.tensors[name].shape


def quantized_layers(checkpoint: Checkpoint, recipe: Recipe, needed: Iterable[str]) -> list[str]:
    """List the weights that a recipe puts into 8 bits: the towers' linear layers."""
    prefixes = tuple(f"{prefix}." for prefix in PREFIXES)
    layers = []
    for name in needed:
        shape = checkpoint.tensors[name].shape
        layer = name.removesuffix(".weight")
        is_linear = name.startswith(prefixes) and layer != name and len(shape) == 2
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


def write_block(writer: WeightsWriter, block: CalibratedBlock) -> list[str]:
    """Write the tensors of a calibrated block, and return their names."""
    tensors = {name: weight.values for name, weight in block.weights.items()}
    tensors |= {name + SCALE_SUFFIX: weight.scales for name, weight in block.weights.items()}
    tensors |= {name: values.astype(FLOAT32) for name, values in block.folded.items()}
    # a component that was not asked for may read others
    written = [name for name in tensors if name in writer.stored]
    for name in written:
        writer.write(name, tensors[name])
    return written


# --- writing it ----------------------------------------------------------------------------------


def _copied(report: Report) -> Callable[[str, int, int], None]:
    """Turn the progress of a copy into ours."""

    def copied(shard: str, done: int, total: int) -> None:
        done, total = done // 10**6, -(-total // 10**6)
        report(Progress(step="copy", detail=f"{shard} (MB)", done=done, total=total))

    return copied


def _written(plan: Plan, layout: Layout, build: Build) -> dict[str, StoredTensor]:
    """Write a weights file in the workspace, and hand it over: where each tensor lies.

    Another run goes on after the last piece of it that is durable.
    """
    work = build.work
    done = {name for entry in work.entries for name in entry["weights"]}
    if done:
        logger.warning(
            "%d of %d tensors that an earlier run wrote are taken up from %s",
            len(done),
            len(layout),
            work.path,
        )
    path = work.path / WEIGHTS_FILE
    with WeightsWriter(path, layout, align=plan.options.align, done=done) as writer:
        dtypes = {name: dtype for name, (dtype, _) in layout.items()}
        copy_rest(plan, writer, dtypes, build.report, work)
    work.hand_over(WEIGHTS_FILE, build.directory)
    return writer.stored


def read_tensor(plan: Plan, name: str) -> Array:
    """Read a parameter as graphs of this resolution need it; resampled positions in float32."""
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


def held_weights(plan: Plan, needed: Iterable[str]) -> dict[str, TensorEntry]:
    """Select the needed parameters that the checkpoint has as they are."""
    resized = plan.image_size != plan.source.config.vision.image_size
    return {n: plan.source.tensors[n] for n in needed if n != POSITIONS or not resized}


def can_bring(
    options: ExportOptions,
    needed: Mapping[str, np.dtype[Any]],
    held: Mapping[str, TensorEntry],
) -> bool:
    """Tell whether the checkpoint's own shards can be what the graphs read.

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
    """Convert to another float type; values beyond float16's range saturate, none is infinite."""
    if values.dtype == dtype:
        return values
    wide = values.astype(FLOAT32)
    if dtype == np.float16:
        limit = float(np.finfo(np.float16).max)
        np.clip(wide, -limit, limit, out=wide)
    return wide.astype(dtype)
