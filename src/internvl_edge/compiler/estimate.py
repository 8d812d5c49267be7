"""What an export will need, before it is done: memory, disk and time of each step.

Sizes of files follow exactly from shapes and dtypes. Memory and time are estimates from what the
steps were measured to take per byte and per operation on two CPU cores; they scale with the
model, and are meant to tell minutes from hours and 2 GB from 20.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from internvl_edge.compiler.calibration import BATCH
from internvl_edge.compiler.check import (
    FLOAT32_NBYTES,
    available_memory,
    is_compared_whole,
    reason_not_to_verify,
    reference_nbytes,
)
from internvl_edge.compiler.emit import quantized_layout
from internvl_edge.compiler.options import ExportOptions, Plan, make_plan
from internvl_edge.errors import ResourceError
from internvl_edge.export.blocks import LLAMA_PREFIX, VISION_PREFIX
from internvl_edge.export.checkpoint import DTYPES, build_model
from internvl_edge.export.components import COMPONENTS, build_component
from internvl_edge.export.models import InternViT
from internvl_edge.publish import require_free_disk
from internvl_edge.spool import Budget

IMPORTS_NBYTES = 450_000_000  # PyTorch, ONNX and the exporter, loaded
TRACE_SECONDS_PER_COMPONENT = 2.0
TRACE_SECONDS_PER_BLOCK = 0.35
BLOCK_NBYTES_PER_PARAMETER = 7.0  # float32, what was read, and what is quantized of it
MAX_SPOOLED_NBYTES = 1_000_000_000
CONVERT_NBYTES_PER_SECOND = 250e6
CALIBRATION_FLOPS = 60e9  # of a block's float32 forwards, observers included
VERIFY_NBYTES_PER_SECOND = 200e6
BUILD_NBYTES_PER_SECOND = 90e6
BUILD_SECONDS = 2.0
STORED_AS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step of an export will need."""

    name: str
    memory_nbytes: int
    disk_nbytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """All steps of an export."""

    steps: tuple[Step, ...]

    @property
    def peak_nbytes(self) -> int:
        return max(step.memory_nbytes for step in self.steps)

    @property
    def disk_nbytes(self) -> int:
        return sum(step.disk_nbytes for step in self.steps)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table: step, memory, disk, time."""
        total = Step(
            name="all",
            memory_nbytes=self.peak_nbytes,
            disk_nbytes=self.disk_nbytes,
            seconds=sum(step.seconds for step in self.steps),
        )
        return [
            (
                step.name,
                f"{step.memory_nbytes / 1e9:.2f} GB",
                f"{step.disk_nbytes / 1e9:.3f} GB",
                f"{step.seconds:.0f} s",
            )
            for step in (*self.steps, total)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": [asdict(step) for step in self.steps],
            "peak_memory_nbytes": self.peak_nbytes,
            "disk_nbytes": self.disk_nbytes,
        }


def forecast(options: ExportOptions) -> Forecast:
    """Check the options as an export would, and say what it would need.

    Raises:
        UsageError, CheckpointError: as ``export`` would.
    """
    return forecast_plan(make_plan(options))


def forecast_plan(plan: Plan) -> Forecast:
    """What a checked plan will need."""
    options = plan.options
    entries = plan.checkpoint.tensors
    tensors = {name: (entries[name].dtype, entries[name].shape) for name in read_by(plan)}
    written = _written_nbytes(plan, tensors)
    engines = len(options.targets) - ("onnx" in options.targets)
    steps = [_trace(plan), _weights(plan, written)]
    if plan.recipe is not None:
        steps.append(_quantize(plan))
    if reason_not_to_verify(options.verify) is None:
        steps.append(_verify(plan))
    if engines:
        steps.append(_build(plan, written, engines))
    return Forecast(steps=tuple(steps))


def require_fit(plan: Plan) -> None:
    """Refuse, before any work, what this machine or the memory budget cannot hold.

    Raises:
        ResourceError: the step, what it needs and what there is.
    """
    found = forecast_plan(plan)
    require_free_disk(plan.options.out.absolute().parent, found.disk_nbytes)
    worst = max(found.steps, key=lambda step: step.memory_nbytes)
    budget = plan.options.memory_budget
    limit = available_memory() if budget is None else budget
    if worst.memory_nbytes > limit:
        source = "are free" if budget is None else "are allowed by --memory-budget"
        raise ResourceError(
            f"step {worst.name!r} needs {worst.memory_nbytes / 1e9:.2f} GB of memory, "
            f"{limit / 1e9:.2f} GB {source}; --dry-run lists every step"
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
    """The parameters that the chosen components read."""
    with torch.device("meta"):
        model = build_model(plan.checkpoint.config)
    if isinstance(model, InternViT):
        return set(plan.checkpoint.tensors)
    names: set[str] = set()
    for component in plan.components:
        names |= build_component(COMPONENTS[component], model).state_dict().keys()
    return names - {"qllama.lm_head.weight"}  # of the decoder, which these components are not


def _written_nbytes(plan: Plan, tensors: Mapping[str, Any]) -> int:
    if plan.recipe is not None:
        layout = quantized_layout(plan, {name: dtype for name, (dtype, _) in tensors.items()})
        sizes = [math.prod(shape) * int(dtype.itemsize) for dtype, shape in layout.values()]
        return sum(sizes)
    if plan.options.weights == "link":
        return 0
    if plan.options.weights == "copy":
        return sum(shard.stat().st_size for shard in plan.checkpoint.shards)
    count = sum(math.prod(shape) for _, shape in tensors.values())
    return int(count * DTYPES[STORED_AS[plan.options.precision]].itemsize)


def _blocks(plan: Plan) -> dict[str, int]:
    """Parameters of every block."""
    sizes: dict[str, int] = {}
    for name, entry in plan.checkpoint.tensors.items():
        for prefix in (VISION_PREFIX, LLAMA_PREFIX):
            if name.startswith(f"{prefix}."):
                block = name[: name.index(".", len(prefix) + 1)]
                sizes[block] = sizes.get(block, 0) + math.prod(entry.shape)
    return sizes


def _trace(plan: Plan) -> Step:
    graphs = 1 if plan.base == plan.engine_base else 2
    blocks = len(_blocks(plan))
    seconds = TRACE_SECONDS_PER_COMPONENT * len(plan.components) + TRACE_SECONDS_PER_BLOCK * blocks
    return Step(
        name="trace",
        memory_nbytes=IMPORTS_NBYTES + 2_000_000 * blocks,
        disk_nbytes=100_000 * blocks * graphs,
        seconds=seconds * graphs,
    )


def _weights(plan: Plan, written: int) -> Step:
    largest = max(math.prod(entry.shape) for entry in plan.checkpoint.tensors.values())
    return Step(
        name="weights",
        memory_nbytes=IMPORTS_NBYTES + 10 * largest,  # stored, float32 and converted, at once
        disk_nbytes=written,
        seconds=written / CONVERT_NBYTES_PER_SECOND,
    )


def _quantize(plan: Plan) -> Step:
    assert plan.recipe is not None
    vision = plan.checkpoint.config.vision
    tokens = plan.recipe.num_samples * vision.num_tokens(plan.image_size)
    blocks = _blocks(plan)
    kept = 3 * FLOAT32_NBYTES * tokens * vision.hidden_size  # hidden states, before two norms
    return Step(
        name="quantize",
        memory_nbytes=_block_nbytes(plan) + min(kept, spool_budget(plan).free_nbytes),
        disk_nbytes=0,
        seconds=2.0 * sum(blocks.values()) * tokens / CALIBRATION_FLOPS,
    )


def _block_nbytes(plan: Plan) -> int:
    """Memory that calibrating the largest block needs, but for what is spooled."""
    vision = plan.checkpoint.config.vision
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
        head = plan.checkpoint.tensors.get("qllama.lm_head.weight")
        other -= 0 if head is None else math.prod(head.shape)
        compared = FLOAT32_NBYTES * (max(blocks.values()) + other)
        seconds = 3.0
    graphs = 1 if plan.base == plan.engine_base else 2
    return Step(
        name="verify",
        memory_nbytes=IMPORTS_NBYTES + 2 * compared,
        disk_nbytes=0,
        seconds=graphs
        * len(plan.components)
        * seconds
        * (1.0 + compared / VERIFY_NBYTES_PER_SECOND),
    )


def _build(plan: Plan, written: int, targets: int) -> Step:
    count = len(plan.components) * targets
    return Step(
        name="build",
        memory_nbytes=IMPORTS_NBYTES + 2 * written,
        disk_nbytes=written * targets,
        seconds=count * BUILD_SECONDS + written * targets / BUILD_NBYTES_PER_SECOND,
    )
