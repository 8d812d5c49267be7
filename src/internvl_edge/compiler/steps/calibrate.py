"""Calibration samples for a plan, and the pass that quantizes its weights block by block."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from internvl_edge.artifact.workspace import Workspace
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress, Report
from internvl_edge.compiler.steps.weights import (
    WEIGHTS_FILE,
    copy_rest,
    needed_weights,
    quantized_layout,
    write_block,
)
from internvl_edge.errors import ResourceError
from internvl_edge.export.components import language_config
from internvl_edge.export.towers.blocks import COMPONENT_STREAM, OF_IMAGES
from internvl_edge.export.towers.streams import Samples, calibration_blocks
from internvl_edge.export.weights.writer import StoredTensor, WeightsWriter
from internvl_edge.files.memory import peak_rss_nbytes, trim
from internvl_edge.files.spool import Spool
from internvl_edge.quantize.calibration.block import CalibratedBlock, calibrate_block
from internvl_edge.quantize.calibration.images import CalibrationSet, load_calibration, sample_set
from internvl_edge.quantize.numerics.statistics import layers_to_json
from internvl_edge.runtime.images.transform import pixel_values
from internvl_edge.runtime.text.tokenizer import CAPTION_PROMPT, Tokenizer
from internvl_edge.types import Array

logger = logging.getLogger(__name__)

BATCH = 8  # samples that flow through the blocks together
MAX_TEXT_LENGTH = 80  # tokens (internvl-spec section 3.4)
TOKENIZER_FILE = "tokenizer.model"


def load_samples(plan: Plan) -> CalibrationSet:
    """Load the calibration set of a plan: the folder given, the caller's, or a bundled set.

    Raises:
        CalibrationError: nothing usable in the folder, or a sample set's file has changed.
    """
    assert plan.recipe is not None
    count, seed = plan.recipe.num_samples, plan.recipe.seed
    if plan.options.calibration is not None:
        found = load_calibration(plan.options.calibration, count, seed)
        if found.skipped:
            logger.warning(
                "%s: skipped %d image(s) that do not decode: %s",
                plan.options.calibration,
                len(found.skipped),
                ", ".join(found.skipped[:5]),
            )
        if len(found) < count:
            logger.warning(
                "%s: %d image(s) to calibrate on, the recipe asks for %d; ranges that few images "
                "reach may clip others, add more",
                plan.options.calibration,
                len(found),
                count,
            )
        return found
    if plan.options.samples is not None:
        return plan.options.samples(count, seed)
    return sample_set("digits" if plan.is_demo else "photographs", count, seed)


def tokenize(plan: Plan, captions: list[str]) -> tuple[Array, Array, Array] | None:
    """Ids for text embedding, matching and captioning, right-padded; None without a tokenizer."""
    path = plan.checkpoint.path / TOKENIZER_FILE
    if language_config(plan.checkpoint.config) is None or not path.exists():
        return None
    tokenizer = Tokenizer(path)
    return (
        tokenizer.contrastive(captions, MAX_TEXT_LENGTH, pad_to="longest"),
        tokenizer.match(captions, MAX_TEXT_LENGTH),
        tokenizer.match([f"{CAPTION_PROMPT} {c}" for c in captions], MAX_TEXT_LENGTH),
    )


def samples_for(plan: Plan, calibration: CalibrationSet) -> Samples:
    """Batches of normalised images and of ids."""
    count = len(calibration)
    # one by one: photographs are large until they are resized
    each = [pixel_values(calibration.image(i), plan.preprocessing) for i in range(count)]
    pixels = np.concatenate(each)
    ids = tokenize(plan, list(calibration.captions))
    text, match, caption = ids or (random_ids(plan, count),) * 3
    return Samples(
        pixel_values=_batches(pixels),
        input_ids=_batches(text),
        match_ids=_batches(match),
        caption_ids=_batches(caption),
    )


def random_ids(plan: Plan, count: int, length: int = 16) -> Array:
    """Seeded ids for a checkpoint that comes without a tokenizer."""
    llama = language_config(plan.checkpoint.config)
    if llama is None:
        return np.zeros((0, length), np.int64)
    rng = np.random.default_rng(0 if plan.recipe is None else plan.recipe.seed)
    ids = rng.integers(min(3, llama.vocab_size - 1), llama.vocab_size, (count, length))
    ids[:, 0], ids[:, -1] = llama.bos_token_id, llama.eos_token_id
    return ids.astype(np.int64)


def _batches(array: Array) -> list[Tensor]:
    return [torch.from_numpy(array[i : i + BATCH]) for i in range(0, len(array), BATCH)]


def quantize_weights(
    plan: Plan,
    models: Mapping[str, ir.Model],
    samples: Samples,
    work: Workspace,
    report: Report,
) -> tuple[dict[str, StoredTensor], dict[str, dict[str, float | None]]]:
    """Calibrate block by block and write each block's weights as they come.

    Blocks that an earlier run finished are taken from ``work``. The weights file lies there too,
    for the next run, should this one not end.

    Returns:
        Where every tensor lies, and the activation scales: stream → weight → scale.

    Raises:
        ResourceError: the memory budget was exceeded.
    """
    assert plan.recipe is not None
    needed = needed_weights(plan, models)
    layout = quantized_layout(plan, needed)
    streams = {COMPONENT_STREAM[name] for name in models if name in COMPONENT_STREAM}
    total = _num_blocks(plan, streams)
    if work.num_done:
        logger.warning(
            "%d of %d block(s) that an earlier run finished are taken up from %s",
            work.num_done,
            total,
            work.path,
        )
    blocks = calibration_blocks(plan.source, samples, streams, work)
    done = {name for entry in work.entries for name in entry["weights"]}
    path = work.path / WEIGHTS_FILE
    with (
        WeightsWriter(path, layout, align=plan.options.align, done=done) as writer,
        ThreadPoolExecutor(1, "write") as writing,
    ):
        under_way: _Block | None = None  # written while the next one is read
        for block, current in blocks:
            if under_way is not None:
                _finish(plan, work, under_way, total)
            report(Progress(step="quantize", detail=block.name, done=work.num_done, total=total))
            calibrated = calibrate_block(block, current, plan.recipe, work.hidden, work.scratch)
            hidden = {s: stream.hidden for s, stream in current.items()}
            under_way = _Block(
                name=block.name,
                activations=calibrated.activations,
                statistics=layers_to_json(calibrated.statistics),
                hidden=hidden,
                written=writing.submit(_write, writer, calibrated, hidden),
            )
            del block, calibrated  # one block in memory: this one goes before the next is read
            trim()
        if under_way is not None:
            _finish(plan, work, under_way, total)
        rest = {name: layout[name][0] for name in writer.pending}
        copy_rest(plan, writer, rest, report)
    activations: dict[str, dict[str, float | None]] = {stream: {} for stream in streams}
    for entry in work.entries:
        for stream, scales in entry["activations"].items():
            activations.setdefault(stream, {}).update(scales)
    return writer.stored, activations


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """A calibrated block whose weights are being written."""

    name: str
    activations: dict[str, dict[str, float | None]]
    statistics: list[dict[str, Any]]
    hidden: dict[str, Spool]  # what it left, by stream
    written: Future[list[str]]  # the names of its tensors, once they are durable


def _write(
    writer: WeightsWriter, calibrated: CalibratedBlock, hidden: Mapping[str, Spool]
) -> list[str]:
    """Make a block's weights durable, and what it left, which ``finish`` then need not wait for."""
    written = write_block(writer, calibrated)
    writer.sync()
    for spool in hidden.values():
        spool.sync()
    return written


def _finish(plan: Plan, work: Workspace, block: _Block, total: int) -> None:
    """Note a block as finished once its weights are on the disk.

    Raises:
        OSError: they could not be written.
        CheckpointError: the checkpoint was changed; the block may be of either.
        ResourceError: the memory budget was exceeded.
    """
    entry = {
        "weights": block.written.result(),
        "activations": block.activations,
        "statistics": block.statistics,
    }
    plan.checkpoint.require_unchanged()  # or another's weights would be taken up as these
    work.finish(block.name, entry, block.hidden)
    require_within_budget(plan.options.memory_budget, work.num_done, total)


def require_within_budget(
    budget: int | None,
    done: int,
    total: int,
    what: str = "blocks",
    remedy: str = "the same command with a larger budget goes on from there",
) -> None:
    """Stop a run that takes more memory than it was given.

    Raises:
        ResourceError: with what it took.
    """
    peak = peak_rss_nbytes()
    if budget is not None and peak is not None and peak > budget:
        raise ResourceError(
            f"--memory-budget {budget / 1e9:.2f} GB: {peak / 1e9:.2f} GB were needed after "
            f"{done} of {total} {what}; {remedy}"
        )


def _num_blocks(plan: Plan, streams: set[str]) -> int:
    config = plan.checkpoint.config
    vision = config.vision.num_hidden_layers if streams & {"image", *OF_IMAGES} else 0
    llama = language_config(config) if streams & {"text", *OF_IMAGES} else None
    return vision + (0 if llama is None else llama.num_hidden_layers)
