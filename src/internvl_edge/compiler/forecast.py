"""What an export will need, before it is done: memory, disk and time of each step.

Sizes of files follow exactly from shapes and dtypes. Memory and time are estimates from what the
steps were measured to take per byte and per operation on two CPU cores; they scale with the
model, and are meant to tell minutes from hours and 2 GB from 20.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Collection, Mapping, Sequence

import torch

from internvl_edge.artifact.workspace import kept_nbytes
from internvl_edge.compiler.engine_forecast import Forecast, Step, build_steps
from internvl_edge.compiler.plan import ExportOptions, Plan, make_plan
from internvl_edge.compiler.steps.calibrate import BATCH, load_samples
from internvl_edge.compiler.steps.verify import (
    FLOAT32_NBYTES,
    is_compared_whole,
    reason_not_to_verify,
    reference_nbytes,
)
from internvl_edge.compiler.steps.weights import (
    CHAT_TOKENS,
    can_bring,
    held_weights,
    products_of,
    quantized_layout,
)
from internvl_edge.export.checkpoint.checkpoint import DTYPES, build_model
from internvl_edge.export.components import COMPONENTS, build_component, language_config
from internvl_edge.export.graph.dtypes import POLICIES
from internvl_edge.export.models import InternViT
from internvl_edge.export.towers.blocks import (
    CHAT_PREFIX,
    COMPONENT_STREAM,
    LLAMA_PREFIX,
    OF_IMAGES,
    OFF_STREAM,
    PREFIXES,
    VISION_PREFIX,
    Site,
    sites_of,
    tower_of,
)
from internvl_edge.export.weights.link import How, way_of
from internvl_edge.files.memory import available_memory
from internvl_edge.files.spool import Budget
from internvl_edge.quantize.recipe import Recipe

IMPORTS_NBYTES = 450_000_000  # PyTorch, ONNX and the exporter, loaded
START_SECONDS = 3.0
TRACE_SECONDS_PER_COMPONENT = 3.0
BLOCK_NBYTES_PER_PARAMETER = 9.0  # float32, what was read, and what is quantized of it
MAX_SPOOLED_NBYTES = 300_000_000
CONVERT_NBYTES_PER_SECOND = 250e6
FORWARD_OVERHEAD = 1.15  # of a block's forward over its matrix products
QUANTIZE_SECONDS_PER_PARAMETER = 12e-9  # reading, folding, rounding and writing it
USUAL_TEXT_LENGTH = 16  # tokens of a caption
VERIFY_NBYTES_PER_SECOND = 200e6
# What is compared, in float32: reference and graph, constants that are widened, and the simulation.
VERIFY_COPIES = {"fp32": 2.5, "fp16": 4.7, "bf16": 4.7, "quantized": 5.2}
VERIFIED_TEXTS = 2
CACHE_COPIES = 3  # of a cache in place that is compared: as it is given, read and written
CROSS_ATTENTION = ".cross_attn."
LLAMA_HEAD, LLAMA_TOKENS = "qllama.lm_head.weight", "qllama.model.embed_tokens.weight"
TOWERS = tuple(f"{prefix}." for prefix in PREFIXES)
STORED_AS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
STORED_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def forecast(options: ExportOptions) -> Forecast:
    """Check the options as an export would, and say what it would need.

    Raises:
        UsageError, CheckpointError: as ``export`` would.
    """
    return forecast_plan(make_plan(options))


def forecast_plan(plan: Plan) -> Forecast:
    """What a checked plan will need."""
    options = plan.options
    steps = [_trace(plan), _weights(plan, read_by(plan))]
    if plan.recipe is not None:
        steps.append(_quantize(plan))
    if reason_not_to_verify(options.verify) is None:
        steps.append(_verify(plan))
    targets = [target for target in options.targets if target != "onnx"]
    if targets:
        steps += _builds(plan, targets)
    return Forecast(steps=tuple(steps))


def require_fit(plan: Plan) -> None:
    """Refuse, before any work, what this machine or the memory budget cannot hold.

    Raises:
        ResourceError: the step, what it needs and what there is.
    """
    require_forecast_fits(plan, forecast_plan(plan))


def require_forecast_fits(plan: Plan, found: Forecast) -> None:
    """The same of a forecast that was made of the plan."""
    options = plan.options
    found.require_fit(
        options.out.absolute().parent, options.memory_budget, kept_nbytes(options.out)
    )


def spool_budget(plan: Plan) -> Budget:
    """Memory that calibration may keep activations in; what is more waits on disk."""
    if plan.recipe is None:
        return Budget(0)
    limit = plan.options.memory_budget
    if limit is None:
        return Budget(min(MAX_SPOOLED_NBYTES, available_memory() // 4))
    return Budget(min(MAX_SPOOLED_NBYTES, max(limit - _block_nbytes(plan), 0)))


def read_by(plan: Plan) -> set[str]:
    """The parameters that the chosen components read, and the runtime beside them."""
    names = set[str]().union(*_read_by_each(plan).values())
    return names | ({CHAT_TOKENS} if "chat_decoder" in plan.components else set())


def _read_by_each(plan: Plan) -> dict[str, set[str]]:
    """Component → the parameters that its graph reads."""
    with torch.device("meta"):
        model = build_model(plan.source.config)
    if isinstance(model, InternViT):
        return {component: set(plan.source.tensors) for component in plan.components}
    unread = {component: {LLAMA_HEAD} for component in plan.components if component != "decoder"}
    if "image_queries" in unread:
        unread["image_queries"].add(LLAMA_TOKENS)
    cross = {name for name in plan.source.tensors if CROSS_ATTENTION in name}
    for component in plan.components:
        if component in ("text_embed", "decoder"):  # no image, or one that lies in the cache
            unread.setdefault(component, set()).update(cross)
    return {
        component: set(build_component(COMPONENTS[component], model).state_dict())
        - unread.get(component, set())
        for component in plan.components
    }


def _transfer(plan: Plan, names: Collection[str]) -> tuple[How | None, int]:
    """How the checkpoint's shards come into OUT, and bytes written; None: weights are new.

    Raises:
        UsageError: the shards are to be linked and cannot be.
    """
    held_dtypes = {name: plan.source.tensors[name].dtype for name in names}
    if plan.recipe is not None:
        layout = quantized_layout(plan, held_dtypes)
        return None, sum(math.prod(shape) * int(d.itemsize) for d, shape in layout.values())
    policy, own = POLICIES[plan.base], {CHAT_TOKENS} & set(names)
    needed = {n: DTYPES[STORED_TYPES[policy.dtype_of(n)]] for n in names} | {
        n: held_dtypes[n] for n in own
    }
    held = held_weights(plan, needed)
    if can_bring(plan.options, needed, held):
        shards = sorted({entry.file for entry in held.values()})
        way = way_of(shards, plan.options.out, plan.options.weights)
        return way, sum(s.stat().st_size for s in shards) if way == "copy" else 0
    dtypes = held_dtypes if plan.options.weights == "copy" else needed
    sizes = (math.prod(plan.source.tensors[n].shape) * int(dtypes[n].itemsize) for n in names)
    return None, sum(sizes)


def _blocks(plan: Plan) -> dict[str, int]:
    """Parameters of every block."""
    sizes: dict[str, int] = {}
    for name, entry in plan.source.tensors.items():
        for prefix in PREFIXES:
            if name.startswith(f"{prefix}."):
                block = name[: name.index(".", len(prefix) + 1)]
                sizes[block] = sizes.get(block, 0) + math.prod(entry.shape)
    return sizes


def _trace(plan: Plan) -> Step:
    graphs = 1 if plan.base == plan.engine_base else 2
    blocks = len(_blocks(plan))
    return Step(
        name="trace",
        memory_nbytes=IMPORTS_NBYTES + 1_000_000 * blocks,
        disk_nbytes=15_000 * blocks * graphs,
        seconds=START_SECONDS + TRACE_SECONDS_PER_COMPONENT * len(plan.components) * graphs,
    )


def _weights(plan: Plan, names: Collection[str]) -> Step:
    way, written = _transfer(plan, names)
    sizes = {name: math.prod(entry.shape) for name, entry in plan.source.tensors.items()}
    if plan.recipe is not None:  # the rest is calibration's
        sizes = {n: size for n, size in sizes.items() if not n.startswith(TOWERS)}
    largest = max(sizes.values()) if way is None else 0
    return Step(
        name="weights",
        memory_nbytes=IMPORTS_NBYTES + 10 * largest,  # stored, float32 and converted, at once
        disk_nbytes=written,
        seconds=written / CONVERT_NBYTES_PER_SECOND,
    )


def _quantize(plan: Plan) -> Step:
    assert plan.recipe is not None
    vision = plan.source.config.vision
    images = num_images(plan)
    tokens = {VISION_PREFIX: images * vision.num_tokens(plan.image_size)}
    if plan.source.config.internvl is not None:
        # queries looking at an image, texts, and both together, for matching and for captions
        queries = plan.source.config.internvl.num_query_token
        both = 2 if "decoder" in plan.components else 1
        tokens[LLAMA_PREFIX] = (1 + both) * images * (queries + USUAL_TEXT_LENGTH)
    if plan.source.config.chat is not None:
        # an image's tokens and a text, with four patches or one to a token
        places = vision.num_tokens(plan.image_size) // plan.source.config.chat.shuffle**2
        tokens[CHAT_PREFIX] = images * (places + USUAL_TEXT_LENGTH)
    blocks = _blocks(plan)
    parameters = {
        prefix: sum(n for name, n in blocks.items() if name.startswith(prefix)) for prefix in tokens
    }
    products = 2.0 * sum(parameters[prefix] * tokens[prefix] for prefix in tokens)
    kept, states = _spooled(plan, tokens)
    held = min(kept + states, spool_budget(plan).free_nbytes)
    return Step(
        name="quantize",
        memory_nbytes=_block_nbytes(plan) + held,
        disk_nbytes=states + min(kept, kept + states - held),
        seconds=(FORWARD_OVERHEAD * products + _rounding_operations(plan, tokens)) / matmul_flops()
        + QUANTIZE_SECONDS_PER_PARAMETER * sum(parameters.values()),
    )


def _spooled(plan: Plan, tokens: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of activations that calibration spools, in the tower that takes the most.

    Returns:
        What enters the linear layers whose inputs will be smoothed or rotated, and behind the
        vision tower its output in the checkpoint's basis. The hidden states in front of a block and
        behind it, and that output, which are on disk in any case: a later run could take them up.
    """
    config, recipe = plan.source.config, plan.recipe
    assert recipe is not None
    llama = language_config(config)
    streams = {COMPONENT_STREAM[name] for name in plan.components if name in COMPONENT_STREAM}
    looking = len(streams & OF_IMAGES) * tokens[VISION_PREFIX]  # tokens of cross-attention's memory
    image = tokens[VISION_PREFIX] * config.vision.hidden_size
    found = [(0, 0)]
    run = {VISION_PREFIX, *(tower_of(name) for name in plan.components)}
    for tower, count in tokens.items():
        if tower not in run:
            continue
        is_vision = tower == VISION_PREFIX
        width = config.vision.hidden_size if is_vision or llama is None else llama.hidden_size
        behind = kept = 0 if is_vision else image
        for site in sites_of(config, f"{tower}.0"):
            if _is_spooled(recipe.of(f"{tower}.0"), site):
                inputs = plan.source.tensors[f"{tower}.0.{site.readers[0]}.weight"].shape[1]
                kept += inputs * (looking if site.norm in OFF_STREAM else count)
        found.append((kept, 2 * count * width + behind))
    kept, states = max(found, key=sum)
    return FLOAT32_NBYTES * kept, FLOAT32_NBYTES * states


def _is_spooled(recipe: Recipe, site: Site) -> bool:
    """Whether what a site's readers see is known only when the block has run."""
    is_turned = recipe.rotate and site.head_dim is not None
    is_changed = recipe.smooth is not None or is_turned
    is_folded = site.norm is not None or site.producer is not None
    return is_changed and is_folded and not recipe.is_weight_only


def _rounding_operations(plan: Plan, tokens: Mapping[str, int]) -> float:
    """Of GPTQ: products of every activation with itself, their factor, and the rounding by it."""
    return sum(
        2.0 * tokens[prefix] * width**2 + width**3 / 3 + 2.0 * outputs * width**2
        for block, widths in products_of(plan).items()
        for prefix in tokens
        if block.startswith(f"{prefix}.")
        for width, outputs in widths
    )


def num_images(plan: Plan) -> int:
    """How many images calibration will see."""
    assert plan.recipe is not None
    if plan.options.calibration is not None:
        found = sum(path.is_file() for path in plan.options.calibration.rglob("*"))
        return min(found, plan.recipe.num_samples)
    if plan.options.samples is not None:
        return plan.recipe.num_samples  # as many as are asked for; they are not drawn for this
    return len(load_samples(plan))


@functools.cache
def matmul_flops() -> float:
    """Float32 operations that this machine's matrix products do in a second, tried for a moment."""
    rows, width = 1024, 3200
    a, b = torch.ones(rows, width), torch.ones(width, width)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2.0 * rows * width * width / best


def _block_nbytes(plan: Plan) -> int:
    """Memory that calibrating the largest block needs, but for what is spooled."""
    vision = plan.source.config.vision
    tokens = BATCH * vision.num_tokens(plan.image_size)
    running = FLOAT32_NBYTES * tokens * (2 * vision.intermediate_size + 6 * vision.hidden_size)
    weights = int(BLOCK_NBYTES_PER_PARAMETER * max(_blocks(plan).values()))
    # GPTQ: each H, and of the layer that is rounded its errors and what was found
    rounding = [
        sum(k**2 for k, _ in w) + 2 * max(k * n for k, n in w) for w in products_of(plan).values()
    ]
    return IMPORTS_NBYTES + weights + running + FLOAT32_NBYTES * max(rounding, default=0)


def _verify(plan: Plan) -> Step:
    whole = is_compared_whole(plan.checkpoint, plan.options.verify)
    compared, seconds = reference_nbytes(plan.checkpoint), 1.0
    if not whole:
        # one block and what is in front of and behind its tower
        blocks = _blocks(plan)
        other = compared // FLOAT32_NBYTES - sum(blocks.values())
        head = plan.source.tensors.get(LLAMA_HEAD)
        other -= 0 if head is None else math.prod(head.shape)
        compared = FLOAT32_NBYTES * (max(blocks.values()) + other)
        seconds = 3.0
    graphs = 1 if plan.base == plan.engine_base else 2
    is_by_choice = plan.options.verify == "full" and not is_compared_whole(plan.checkpoint, "auto")
    remedy = "--verify auto compares one block at a time, " if is_by_choice else ""
    copies = VERIFY_COPIES["quantized" if plan.recipe is not None else plan.base]
    return Step(
        name="verify",
        memory_nbytes=IMPORTS_NBYTES + int(copies * compared) + _cache_nbytes(plan, whole=whole),
        disk_nbytes=0,
        remedy=f"{remedy}--verify none leaves the comparison out",
        seconds=graphs
        * len(plan.components)
        * seconds
        * (1.0 + compared / VERIFY_NBYTES_PER_SECOND),
    )


def _cache_nbytes(plan: Plan, *, whole: bool) -> int:
    """What comparing a decoder holds of a cache of fixed capacity, of one layer or of all."""
    llama, capacity = language_config(plan.checkpoint.config), plan.options.cache_capacity
    if llama is None or capacity is None:
        return 0
    layers = llama.num_hidden_layers if whole else 1
    position = 2 * llama.num_key_value_heads * llama.head_dim  # a key and a value
    return FLOAT32_NBYTES * CACHE_COPIES * VERIFIED_TEXTS * layers * position * capacity


def _builds(plan: Plan, targets: Sequence[str]) -> list[Step]:
    weights = {name: _engine_nbytes(plan, names) for name, names in _read_by_each(plan).items()}
    blocks = list(_blocks(plan))
    depths = {
        component: sum(name.startswith(f"{tower_of(component)}.") for name in blocks)
        for component in plan.components
    }
    return build_steps(weights, depths, targets, plan.options.precision)


def _engine_nbytes(plan: Plan, names: Collection[str]) -> int:
    """Bytes of parameters as an engine holds them."""
    entries = plan.source.tensors
    if plan.recipe is None:
        itemsize = int(DTYPES[STORED_AS[plan.options.precision]].itemsize)
        return itemsize * sum(math.prod(entries[name].shape) for name in names)
    layout = quantized_layout(plan, {name: entries[name].dtype for name in names})
    return sum(math.prod(shape) * int(dtype.itemsize) for dtype, shape in layout.values())
