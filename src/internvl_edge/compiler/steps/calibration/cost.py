"""Memory, disk and time that calibration takes."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping

import torch

from internvl_edge.artifact.components import (
    CHAT_PREFIX,
    COMPONENTS,
    DECODER,
    LLAMA_PREFIX,
    VISION_PREFIX,
    streams_of,
)
from internvl_edge.compiler.cost import FLOAT32_NBYTES, IMPORTS_NBYTES, Cost
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.steps.calibration.samples import BATCH, num_images
from internvl_edge.compiler.weights.layout import block_sizes, products_of
from internvl_edge.export.components import language_config
from internvl_edge.export.towers.blocks import OF_IMAGES, OFF_STREAM, Site, sites_of
from internvl_edge.files.memory import available_memory
from internvl_edge.files.spool import Budget
from internvl_edge.quantize.recipe import Recipe

BLOCK_NBYTES_PER_PARAMETER = 9.0  # float32, what was read, and what is quantized of it
MAX_SPOOLED_NBYTES = 300_000_000
FORWARD_OVERHEAD = 1.15  # of a block's forward over its matrix products
QUANTIZE_SECONDS_PER_PARAMETER = 12e-9  # reading, folding, rounding and writing it
USUAL_TEXT_LENGTH = 16  # tokens of a caption
USUAL_CHAT_LENGTH = 80  # tokens of a system sentence, a question and its answer


def spool_budget(plan: Plan) -> Budget:
    """Say how much memory calibration may keep activations in; what is more waits on disk."""
    if plan.recipe is None:
        return Budget(0)
    limit = plan.options.memory_budget
    if limit is None:
        return Budget(min(MAX_SPOOLED_NBYTES, available_memory() // 4))
    return Budget(min(MAX_SPOOLED_NBYTES, max(limit - _block_nbytes(plan), 0)))


def cost_of_calibration(plan: Plan) -> Cost:
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
        # an image's tokens in a conversation, with four patches or one to a token
        places = vision.num_tokens(plan.image_size) // plan.source.config.chat.shuffle**2
        tokens[CHAT_PREFIX] = images * (places + USUAL_CHAT_LENGTH)
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
    run = {COMPONENTS[name].tower for name in plan.components}
    run |= {VISION_PREFIX} if streams - {"text"} else set()
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
        best = min(best, max(1e-6, time.perf_counter() - started))  # a clock may be set back
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
