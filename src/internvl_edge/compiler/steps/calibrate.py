"""The pass that quantizes weights: samples through the towers, one block in memory at a time."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from internvl_edge.artifact.components import (
    CHAT_PREFIX,
    COMPONENTS,
    DECODER,
    LLAMA_PREFIX,
    VISION_PREFIX,
    streams_of,
)
from internvl_edge.artifact.workspace import Workspace
from internvl_edge.compiler.cost import (
    FLOAT32_NBYTES,
    IMPORTS_NBYTES,
    Cost,
    require_within_budget,
)
from internvl_edge.compiler.oracle.simulate import write_scales
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress
from internvl_edge.compiler.steps.samples import BATCH, num_images
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.steps.weights import (
    WEIGHTS_FILE,
    WeightsPlan,
    block_sizes,
    copy_rest,
    cost_of_writing,
    products_of,
    require_as_planned,
    write_block,
)
from internvl_edge.export.components import language_config
from internvl_edge.export.towers.blocks import OF_IMAGES, OFF_STREAM, Site, sites_of
from internvl_edge.export.towers.streams import calibration_blocks
from internvl_edge.export.weights.writer import StoredTensor, WeightsWriter
from internvl_edge.files.disk import link_or_copy
from internvl_edge.files.memory import available_memory, trim
from internvl_edge.files.spool import Budget, Spool
from internvl_edge.quantize.calibration.block import CalibratedBlock, calibrate_block
from internvl_edge.quantize.numerics.statistics import layers_to_json, write_statistics
from internvl_edge.quantize.recipe import Recipe

logger = logging.getLogger(__name__)

BLOCK_NBYTES_PER_PARAMETER = 9.0  # float32, what was read, and what is quantized of it
MAX_SPOOLED_NBYTES = 300_000_000
FORWARD_OVERHEAD = 1.15  # of a block's forward over its matrix products
QUANTIZE_SECONDS_PER_PARAMETER = 12e-9  # reading, folding, rounding and writing it
USUAL_TEXT_LENGTH = 16  # tokens of a caption


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize:
    """Calibrate the towers and write their quantized weights, and all other weights as they are."""

    weights: WeightsPlan

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        return cost_of_writing(plan, self.weights), _cost_of_calibration(plan)

    def run(self, plan: Plan, build: Build) -> None:
        require_as_planned(self.weights, build)
        build.stored, build.scales = quantize_weights(plan, self.weights, build)
        link_or_copy(build.work.path / WEIGHTS_FILE, build.directory / WEIGHTS_FILE)
        write_scales(build.directory, build.scales)
        rows = [row for entry in build.work.entries for row in entry["statistics"]]
        write_statistics(build.directory, rows)


def quantize_weights(
    plan: Plan, weights: WeightsPlan, build: Build
) -> tuple[dict[str, StoredTensor], dict[str, dict[str, float | None]]]:
    """Calibrate block by block and write each block's weights as they come.

    Blocks that an earlier run finished are taken from the workspace. The weights file lies there
    too, for the next run, should this one not end.

    Returns:
        Where every tensor lies, and the activation scales: stream → weight → scale.

    Raises:
        ResourceError: the memory budget was exceeded.
    """
    assert plan.recipe is not None and build.samples is not None
    layout, work, report = weights.layout, build.work, build.report
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
    """Make a block's weights durable, and the states it left: ``finish`` need not wait then."""
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


def _num_blocks(plan: Plan, streams: set[str]) -> int:
    config = plan.checkpoint.config
    vision = config.vision.num_hidden_layers if streams & {"image", *OF_IMAGES} else 0
    llama = language_config(config) if streams & {"text", *OF_IMAGES} else None
    return vision + (0 if llama is None else llama.num_hidden_layers)


# --- what it costs -------------------------------------------------------------------------------


def spool_budget(plan: Plan) -> Budget:
    """Say how much memory calibration may keep activations in; what is more waits on disk."""
    if plan.recipe is None:
        return Budget(0)
    limit = plan.options.memory_budget
    if limit is None:
        return Budget(min(MAX_SPOOLED_NBYTES, available_memory() // 4))
    return Budget(min(MAX_SPOOLED_NBYTES, max(limit - _block_nbytes(plan), 0)))


def _cost_of_calibration(plan: Plan) -> Cost:
    assert plan.recipe is not None
    vision = plan.source.config.vision
    images = num_images(plan)
    tokens = {VISION_PREFIX: images * vision.num_tokens(plan.image_size)}
    if plan.source.config.internvl is not None:
        # queries looking at an image, texts, and both together, for matching and for captions
        queries = plan.source.config.internvl.num_query_token
        both = 2 if DECODER in plan.components else 1
        tokens[LLAMA_PREFIX] = (1 + both) * images * (queries + USUAL_TEXT_LENGTH)
    if plan.source.config.chat is not None:
        # an image's tokens and a text, with four patches or one to a token
        places = vision.num_tokens(plan.image_size) // plan.source.config.chat.shuffle**2
        tokens[CHAT_PREFIX] = images * (places + USUAL_TEXT_LENGTH)
    blocks = block_sizes(plan)
    parameters = {
        prefix: sum(n for name, n in blocks.items() if name.startswith(prefix)) for prefix in tokens
    }
    products = 2.0 * sum(parameters[prefix] * tokens[prefix] for prefix in tokens)
    kept, states = _spooled(plan, tokens)
    held = min(kept + states, spool_budget(plan).free_nbytes)
    return Cost(
        name="quantize",
        memory_nbytes=_block_nbytes(plan) + held,
        disk_nbytes=states + min(kept, kept + states - held),
        seconds=(FORWARD_OVERHEAD * products + _rounding_operations(plan, tokens)) / matmul_flops()
        + QUANTIZE_SECONDS_PER_PARAMETER * sum(parameters.values()),
    )


def _spooled(plan: Plan, tokens: Mapping[str, int]) -> tuple[int, int]:
    """Compute the bytes of activations that calibration spools, of the tower that takes most.

    Returns:
        The inputs of linear layers that will be smoothed or rotated, and after the vision
        tower its output in the checkpoint's basis. The hidden states before a block and
        after it, and that output, which are on disk in any case: a later run could take them up.
    """
    config, recipe = plan.source.config, plan.recipe
    assert recipe is not None
    llama = language_config(config)
    streams = streams_of(plan.components)
    looking = len(streams & OF_IMAGES) * tokens[VISION_PREFIX]  # tokens of cross-attention's memory
    image = tokens[VISION_PREFIX] * config.vision.hidden_size
    sizes = [(0, 0)]
    run = {VISION_PREFIX, *(COMPONENTS[name].tower for name in plan.components)}
    for tower, count in tokens.items():
        if tower not in run:
            continue
        is_vision = tower == VISION_PREFIX
        width = config.vision.hidden_size if is_vision or llama is None else llama.hidden_size
        output = kept = 0 if is_vision else image
        for site in sites_of(config, f"{tower}.0"):
            if _is_spooled(recipe.of(f"{tower}.0"), site):
                inputs = plan.source.tensors[f"{tower}.0.{site.readers[0]}.weight"].shape[1]
                kept += inputs * (looking if site.norm in OFF_STREAM else count)
        sizes.append((kept, 2 * count * width + output))
    kept, states = max(sizes, key=sum)
    return FLOAT32_NBYTES * kept, FLOAT32_NBYTES * states


def _is_spooled(recipe: Recipe, site: Site) -> bool:
    """Tell whether the inputs of a site's readers are known only when the block has run."""
    is_turned = recipe.rotate and site.head_dim is not None
    is_changed = recipe.smooth is not None or is_turned
    is_folded = site.norm is not None or site.producer is not None
    return is_changed and is_folded and not recipe.is_weight_only


def _rounding_operations(plan: Plan, tokens: Mapping[str, int]) -> float:
    """Count GPTQ's operations: every activation's products, their factor, rounding by it."""
    return sum(
        2.0 * tokens[prefix] * width**2 + width**3 / 3 + 2.0 * outputs * width**2
        for block, widths in products_of(plan).items()
        for prefix in tokens
        if block.startswith(f"{prefix}.")
        for width, outputs in widths
    )


@functools.cache
def matmul_flops() -> float:
    """Measure, for a moment, the float32 operations of matrix products in a second."""
    rows, width = 1024, 3200
    a, b = torch.ones(rows, width), torch.ones(width, width)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * width * width / best


def _block_nbytes(plan: Plan) -> int:
    """Compute the memory that calibrating the largest block needs, but for what is spooled."""
    vision = plan.source.config.vision
    tokens = BATCH * vision.num_tokens(plan.image_size)
    running = FLOAT32_NBYTES * tokens * (2 * vision.intermediate_size + 6 * vision.hidden_size)
    weights = int(BLOCK_NBYTES_PER_PARAMETER * max(block_sizes(plan).values()))
    # GPTQ: each H, and of the layer that is rounded its errors and what was found
    rounding = [
        sum(k**2 for k, _ in w) + 2 * max(k * n for k, n in w) for w in products_of(plan).values()
    ]
    return IMPORTS_NBYTES + weights + running + FLOAT32_NBYTES * max(rounding, default=0)
