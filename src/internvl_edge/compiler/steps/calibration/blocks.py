"""The pass that quantizes weights: samples through the towers, one block in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_edge.artifact.components import streams_of
from internvl_edge.compiler.cost import require_within_budget
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress
from internvl_edge.compiler.steps.step import Build
from internvl_edge.export.components import language_config
from internvl_edge.export.towers.blocks import OF_IMAGES
from internvl_edge.export.towers.streams import calibration_blocks
from internvl_edge.export.weights.writer import WeightsWriter
from internvl_edge.files.memory import trim
from internvl_edge.files.spool import Spool
from internvl_edge.quantize.calibration.block import CalibratedBlock, calibrate_block
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.numerics.statistics import layers_to_json

logger = logging.getLogger(__name__)


def quantize_blocks(
    plan: Plan, writer: WeightsWriter, build: Build
) -> dict[str, dict[str, float | None]]:
    """Calibrate block by block and write each block's weights as they come.

    Blocks that an earlier run finished are taken from the workspace.

    Returns:
        The activation scales: stream → weight → scale.

    Raises:
        ResourceError: the memory budget was exceeded.
    """
    assert plan.recipe is not None and build.samples is not None
    work = build.work
    streams = streams_of(plan.components)
    total = _num_blocks(plan, streams)
    if work.num_done:
        logger.warning(
            "%d of %d block(s) that an earlier run finished are taken up from %s",
            work.num_done,
            total,
            work.path,
        )
    blocks = calibration_blocks(plan.source, build.samples, streams, work)
    with ThreadPoolExecutor(1, "write") as writing:
        under_way: _Block | None = None  # written while the next one is read
        for block, current in blocks:
            if under_way is not None:
                _finish(plan, build, under_way, total)
            progress = Progress(step="quantize", detail=block.name, done=work.num_done, total=total)
            build.report(progress)
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
            _finish(plan, build, under_way, total)
    activations: dict[str, dict[str, float | None]] = {stream: {} for stream in streams}
    for entry in work.entries:
        for stream, scales in entry["activations"].items():
            activations.setdefault(stream, {}).update(scales)
    return activations


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """A calibrated block whose weights are being written."""

    name: str
    activations: dict[str, dict[str, float | None]]
    statistics: list[dict[str, Any]]
    hidden: dict[str, Spool]  # what it left, by stream
    written: Future[dict[str, str]]  # its tensors and their hashes, once they are durable


def _write(
    writer: WeightsWriter, calibrated: CalibratedBlock, hidden: Mapping[str, Spool]
) -> dict[str, str]:
    """Make a block's weights durable, and the states it left: ``finish`` need not wait then."""
    written = write_block(writer, calibrated)
    writer.sync()
    for spool in hidden.values():
        spool.sync()
    return writer.sha256_of(written)


def write_block(writer: WeightsWriter, block: CalibratedBlock) -> list[str]:
    """Write the tensors of a calibrated block, and return their names."""
    tensors = {name: weight.values for name, weight in block.weights.items()}
    tensors |= {name + SCALE_SUFFIX: weight.scales for name, weight in block.weights.items()}
    tensors |= {name: values.astype(np.float32) for name, values in block.folded.items()}
    # a component that was not asked for may read others
    written = [name for name in tensors if name in writer.stored]
    for name in written:
        writer.write(name, tensors[name])
    return written


def _finish(plan: Plan, build: Build, block: _Block, total: int) -> None:
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
    build.work.finish(block.name, entry, block.hidden)
    require_within_budget(plan.options.memory_budget, build.work.num_done, total)


def _num_blocks(plan: Plan, streams: set[str]) -> int:
    config = plan.checkpoint.config
    vision = config.vision.num_hidden_layers if streams & {"image", *OF_IMAGES} else 0
    llama = language_config(config) if streams & {"text", *OF_IMAGES} else None
    return vision + (0 if llama is None else llama.num_hidden_layers)
