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
from typing import Any

import torch

from internvl_edge.compiler.calibration import BATCH, load_samples
from internvl_edge.compiler.check import (
    FLOAT32_NBYTES,
    is_compared_whole,
    reason_not_to_verify,
    reference_nbytes,
)
from internvl_edge.compiler.emit import CHAT_TOKENS
from internvl_edge.compiler.layout import quantized_layout
from internvl_edge.compiler.memory import available_memory
from internvl_edge.compiler.options import ExportOptions, Plan, make_plan
from internvl_edge.compiler.steps import Forecast, Step, build_step
from internvl_edge.export.blocks import (
    CHAT_PREFIX,
    LLAMA_PREFIX,
    PREFIXES,
    VISION_PREFIX,
    tower_of,
)
from internvl_edge.export.bring import How, way_of
from internvl_edge.export.checkpoint import DTYPES, build_model
from internvl_edge.export.components import COMPONENTS, build_component
from internvl_edge.export.models import InternViT
from internvl_edge.resume import kept_nbytes
from internvl_edge.spool import Budget

IMPORTS_NBYTES = 450_000_000  # PyTorch, ONNX and the exporter, loaded
START_SECONDS = 3.0
TRACE_SECONDS_PER_COMPONENT = 3.0
BLOCK_NBYTES_PER_PARAMETER = 7.0  # float32, what was read, and what is quantized of it
MAX_SPOOLED_NBYTES = 300_000_000
CONVERT_NBYTES_PER_SECOND = 250e6
FORWARD_OVERHEAD = 1.15  # of a block's forward over its matrix products
QUANTIZE_SECONDS_PER_PARAMETER = 17e-9  # reading, folding, rounding and writing it
USUAL_TEXT_LENGTH = 16  # tokens of a caption
VERIFY_NBYTES_PER_SECOND = 200e6
# What is compared, in float32: reference and graph, constants that are widened, and the simulation.
VERIFY_COPIES = {"fp32": 2.5, "fp16": 4.7, "bf16": 4.7, "quantized": 5.2}
LLAMA_HEAD, LLAMA_TOKENS = "qllama.lm_head.weight", "qllama.model.embed_tokens.weight"
TOWERS = tuple(f"{prefix}." for prefix in PREFIXES)
STORED_AS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def forecast(options: ExportOptions) -> Forecast:
    """Check the options as an export would, and say what it would need.

    Raises:
        UsageError, CheckpointError: as ``export`` would.
    """
    return forecast_plan(make_plan(options))


def forecast_plan(plan: Plan) -> Forecast:
    """What a checked plan will need."""
    options = plan.options
    entries = plan.source.tensors
    tensors = {name: (entries[name].dtype, entries[name].shape) for name in read_by(plan)}
    steps = [_trace(plan), _weights(plan, tensors)]
    if plan.recipe is not None:
        steps.append(_quantize(plan))
    if reason_not_to_verify(options.verify) is None:
        steps.append(_verify(plan))
    targets = [target for target in options.targets if target != "onnx"]
    if targets:
        steps.append(_build(plan, targets))
    return Forecast(steps=tuple(steps))


def require_fit(plan: Plan) -> None:
    """Refuse, before any work, what this machine or the memory budget cannot hold.

    Raises:
        ResourceError: the step, what it needs and what there is.
    """
    options = plan.options
    forecast_plan(plan).require_fit(
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
    return {
        component: set(build_component(COMPONENTS[component], model).state_dict())
        - unread.get(component, set())
        for component in plan.components
    }


def _way(plan: Plan, tensors: Mapping[str, Any]) -> How | None:
    """How the checkpoint's own shards come into OUT; None where weights are written anew.

    Raises:
        UsageError: they are to be linked and cannot be.
    """
    options = plan.options
    if plan.recipe is not None or options.align is not None:
        return None
    wanted = DTYPES[STORED_AS[options.precision]]
    if options.weights == "auto" and any(dtype != wanted for dtype, _ in tensors.values()):
        return None
    return way_of(plan.checkpoint.shards, options.out.absolute().parent, options.weights)


def _written_nbytes(plan: Plan, tensors: Mapping[str, Any], way: How | None) -> int:
    if plan.recipe is not None:
        layout = quantized_layout(plan, {name: dtype for name, (dtype, _) in tensors.items()})
        sizes = [math.prod(shape) * int(dtype.itemsize) for dtype, shape in layout.values()]
        return sum(sizes)
    if way is not None:
        return sum(s.stat().st_size for s in plan.checkpoint.shards) if way == "copy" else 0
    count: int = sum(math.prod(shape) for _, shape in tensors.values())
    return int(DTYPES[STORED_AS[plan.options.precision]].itemsize) * count


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


def _weights(plan: Plan, tensors: Mapping[str, Any]) -> Step:
    way = _way(plan, tensors)
    written = _written_nbytes(plan, tensors, way)
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
    states = FLOAT32_NBYTES * tokens[VISION_PREFIX] * vision.hidden_size
    kept = 3 * states  # hidden states, and what is kept behind two norms
    held = min(kept, spool_budget(plan).free_nbytes)
    return Step(
        name="quantize",
        memory_nbytes=_block_nbytes(plan) + held,
        # what is not held, and the states of two blocks, which a later run could take up
        disk_nbytes=kept - held + 2 * states,
        seconds=FORWARD_OVERHEAD * products / matmul_flops()
        + QUANTIZE_SECONDS_PER_PARAMETER * sum(parameters.values()),
    )


def num_images(plan: Plan) -> int:
    """How many images calibration will see."""
    assert plan.recipe is not None
    if plan.options.calibration is not None:
        found = sum(path.is_file() for path in plan.options.calibration.rglob("*"))
        return min(found, plan.recipe.num_samples)
    return plan.recipe.num_samples if plan.is_demo else len(load_samples(plan))


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
    return IMPORTS_NBYTES + weights + running


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
    copies = VERIFY_COPIES["quantized" if plan.recipe is not None else plan.base]
    return Step(
        name="verify",
        memory_nbytes=IMPORTS_NBYTES + int(copies * compared),
        disk_nbytes=0,
        seconds=graphs
        * len(plan.components)
        * seconds
        * (1.0 + compared / VERIFY_NBYTES_PER_SECOND),
    )


def _build(plan: Plan, targets: Sequence[str]) -> Step:
    weights = {name: _engine_nbytes(plan, names) for name, names in _read_by_each(plan).items()}
    blocks = list(_blocks(plan))
    depths = {
        component: sum(name.startswith(f"{tower_of(component)}.") for name in blocks)
        for component in plan.components
    }
    return build_step(weights, depths, targets)


def _engine_nbytes(plan: Plan, names: Collection[str]) -> int:
    """Bytes of parameters as an engine holds them."""
    entries = plan.source.tensors
    if plan.recipe is None:
        itemsize = int(DTYPES[STORED_AS[plan.options.precision]].itemsize)
        return itemsize * sum(math.prod(entries[name].shape) for name in names)
    layout = quantized_layout(plan, {name: entries[name].dtype for name in names})
    return sum(math.prod(shape) * int(dtype.itemsize) for dtype, shape in layout.values())
