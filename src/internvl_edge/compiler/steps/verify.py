"""The comparison of every component with PyTorch, before anyone may use a directory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from internvl_edge.compiler.cost import FLOAT32_NBYTES, IMPORTS_NBYTES, Cost, require_within_budget
from internvl_edge.compiler.oracle.checker import Checker
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.weights.layout import CHAT_TOKENS, LLAMA_HEAD, block_sizes
from internvl_edge.errors import UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.compare import CostBounds
from internvl_edge.export.components import language_config
from internvl_edge.files.memory import available_memory, total_memory

VERIFY_NBYTES_PER_SECOND = 200e6
# What is compared, in float32: reference and graph, constants that are widened, and the simulation.
VERIFY_COPIES = {"fp32": 2.5, "fp16": 4.7, "bf16": 4.7, "quantized": 5.2}
VERIFIED_TEXTS = 2
CACHE_COPIES = 3  # of a cache in place that is compared: as it is given, read and written
MAX_WHOLE_NBYTES = 4_000_000_000  # of a float32 reference that --verify auto holds at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Compare every component with PyTorch."""

    whole: bool  # components at once, rather than one block of a tower at a time

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        if not self.whole:
            require_no_bounds(_bounds(plan), "add --verify full, or leave them out")
        return (_cost(plan, self.whole),)

    def run(self, plan: Plan, build: Build) -> None:
        quantization = None
        if plan.recipe is not None:
            quantization = Quantization.read(build.directory, plan.recipe, plan.source)
        checker = Checker(
            plan.checkpoint,
            plan.image_size,
            build.samples,
            quantization,
            whole=self.whole,
            preprocessing=plan.preprocessing if plan.options.input == "uint8" else None,
            bounds=_bounds(plan),
        )
        precision, budget = plan.options.precision, plan.options.memory_budget
        remedy = "raise the budget, or choose --verify none"
        total, done = len(plan.bases) * len(build.graphs), 0
        for name, graph in build.graphs.items():
            build.report(Progress(step="verify", detail=name, done=done, total=total))
            build.figures[name] = checker.check_both(
                name, build.directory / graph.file, precision, plan.base, plan.engine_base
            )
            done += len(plan.bases)  # graphs of a component are compared with one reference
            require_within_budget(budget, done, total, "graphs verified", remedy)


def reference_nbytes(checkpoint: Checkpoint) -> int:
    """Compute the memory of the float32 reference."""
    parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    return parameters * FLOAT32_NBYTES


def is_compared_whole(
    checkpoint: Checkpoint, kind: str, cache_nbytes: int = 0, budget: int | None = None
) -> bool:
    """Tell whether --verify auto holds the whole reference in memory, or one block at a time.

    It holds up to a billion parameters, where a budget has room, or else half of the machine's
    memory: of all, not of what is free, so that an export that goes on compares as it began.

    Args:
        checkpoint: what is compared with.
        kind: of graphs: a key of ``VERIFY_COPIES``.
        cache_nbytes: of a decoder's cache, in addition.
        budget: of memory, in bytes; None: there is none.
    """
    limit = (total_memory() or 2 * available_memory()) // 2 if budget is None else budget
    reference = reference_nbytes(checkpoint)
    fits = _compared_nbytes(reference, kind) + cache_nbytes <= limit
    return fits and reference <= MAX_WHOLE_NBYTES


def plans_whole(plan: Plan) -> bool:
    """Tell whether an export compares whole components; as it is asked, or ``auto``."""
    asked, budget = plan.options.verify, plan.options.memory_budget
    cache = _cache_nbytes(plan, whole=True)
    return asked == "full" or is_compared_whole(plan.checkpoint, _kind(plan), cache, budget)


def _kind(plan: Plan) -> str:
    return "quantized" if plan.recipe is not None else plan.base


def _compared_nbytes(reference: int, kind: str) -> int:
    """Compute the memory of a comparison from the bytes of its reference in float32."""
    return IMPORTS_NBYTES + int(VERIFY_COPIES[kind] * reference)


def _cost(plan: Plan, whole: bool) -> Cost:
    compared, seconds = reference_nbytes(plan.checkpoint), 1.0
    if not whole:
        # one block, and what comes before and after its tower
        blocks = block_sizes(plan)
        other = compared // FLOAT32_NBYTES - sum(blocks.values())
        other -= sum(math.prod(plan.source.tensors[n].shape) for n in _unread(plan.checkpoint))
        compared = FLOAT32_NBYTES * (max(blocks.values()) + other)
        seconds = 3.0
    graphs = len(plan.bases)
    remedy = ""
    if plan.options.verify == "full":
        remedy = "--verify auto compares one block at a time where there is less, "
    return Cost(
        name="verify",
        memory_nbytes=_compared_nbytes(compared, _kind(plan)) + _cache_nbytes(plan, whole=whole),
        disk_nbytes=0,
        remedy=f"{remedy}--verify none leaves the comparison out",
        seconds=graphs
        * len(plan.components)
        * seconds
        * (1.0 + compared / VERIFY_NBYTES_PER_SECOND),
    )


def _unread(checkpoint: Checkpoint) -> list[str]:
    """Name the tables that a comparison of one block leaves on disk."""
    tables = [LLAMA_HEAD] * (LLAMA_HEAD in checkpoint.tensors)
    has_output_layer = "language_model.lm_head.weight" in checkpoint.tensors
    return tables + [CHAT_TOKENS] * has_output_layer  # else it is the output layer


def _cache_nbytes(plan: Plan, *, whole: bool) -> int:
    """Compute the bytes of a decoder's cache of fixed capacity while it is compared."""
    llama, capacity = language_config(plan.checkpoint.config), plan.options.cache_capacity
    if llama is None or capacity is None:
        return 0
    layers = llama.num_hidden_layers if whole else 1
    position = 2 * llama.num_key_value_heads * llama.head_dim  # a key and a value
    return FLOAT32_NBYTES * CACHE_COPIES * VERIFIED_TEXTS * layers * position * capacity


def _bounds(plan: Plan) -> CostBounds:
    return CostBounds(min_sqnr_db=plan.options.min_sqnr, max_drop=plan.options.max_drop)


def require_no_bounds(bounds: CostBounds, remedy: str) -> None:
    """Refuse bounds on a whole component where blocks are compared one at a time."""
    if bounds:
        raise UsageError(
            "--min-sqnr and --max-drop bound what whole components lose; this model is compared "
            "one block at a time, as it has more than a billion parameters, or would take more "
            f"than half of the machine's memory, or the budget; {remedy}"
        )
