"""The weights file of a directory: what it holds, and every parameter stored in it once.

A directory has one weights file for all of its components. At fp32, fp16 and bf16 it holds the
parameters in the dtypes the graphs ask for; quantized, the linear layers' weights in 8 bits with
their scales, and the rest as the checkpoint stores it. Where that would be the checkpoint's own
bytes, its shards are brought instead; ``--weights link`` or ``copy`` bring them in any case, and
the graphs cast.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.artifact.workspace import Workspace
from internvl_edge.compiler.plan import ExportOptions, Plan
from internvl_edge.compiler.progress import Progress, Report
from internvl_edge.errors import UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, TensorEntry, torch_from_numpy
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.graph.bind import weights_without_data
from internvl_edge.export.models.vit import resize_position_embedding
from internvl_edge.export.towers.blocks import (
    CHAT_PREFIX,
    LLAMA_PREFIX,
    OTHER_TOWERS,
    PREFIXES,
    VISION_PREFIX,
    sites_of,
)
from internvl_edge.export.weights.link import Brought, bring_shards
from internvl_edge.export.weights.writer import StoredTensor, WeightsWriter
from internvl_edge.quantize.calibration.block import SMOOTHING_SUFFIX, CalibratedBlock, is_quantized
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.numerics.weights import stored_layout
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "weights.safetensors"
PIECE_NBYTES = 1 << 29  # of converted weights, between two points to go on from
CHAT_TOKENS = "language_model.model.embed_tokens.weight"
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
        towers[OTHER_TOWERS["chat_queries"]] = period, llama.num_hidden_layers
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
    if "chat_decoder" in models:
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
