"""The comparison of every component with PyTorch, before anyone may use a directory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.artifact.open import open_artifact
from internvl_edge.compiler.cost import FLOAT32_NBYTES, IMPORTS_NBYTES, Cost, require_within_budget
from internvl_edge.compiler.oracle.checker import Checker
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.plan import Verify as Which
from internvl_edge.compiler.progress import Progress, Report, silent
from internvl_edge.compiler.source import open_source, quantization_of
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.weights.layout import LLAMA_HEAD, block_sizes
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.components import language_config
from internvl_edge.export.graph.uint8_input import preprocessing_inside

VERIFY_NBYTES_PER_SECOND = 200e6
# What is compared, in float32: reference and graph, constants that are widened, and the simulation.
VERIFY_COPIES = {"fp32": 2.5, "fp16": 4.7, "bf16": 4.7, "quantized": 5.2}
VERIFIED_TEXTS = 2
CACHE_COPIES = 3  # of a cache in place that is compared: as it is given, read and written
MAX_WHOLE_NBYTES = 4_000_000_000  # of a float32 reference that --verify auto holds: 1 B parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Compare every component with PyTorch."""

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        return (_cost(plan),)

    def run(self, plan: Plan, build: Build) -> None:
        quantization = None
        if plan.recipe is not None:
            quantization = Quantization.read(build.directory, plan.recipe, plan.source)
        checker = Checker(
            plan.checkpoint,
            plan.image_size,
            build.samples,
            quantization,
            whole=is_compared_whole(plan.checkpoint, plan.options.verify),
            preprocessing=plan.preprocessing if plan.options.input == "uint8" else None,
        )
        precision, budget = plan.options.precision, plan.options.memory_budget
        remedy = "raise the budget, or choose --verify none"
        for done, (name, graph) in enumerate(build.graphs.items()):
            total = len(build.graphs)
            build.report(Progress(step="verify", detail=name, done=done, total=total))
            build.figures[name] = checker.check_both(
                name, build.directory / graph.file, precision, plan.base, plan.engine_base
            )
            require_within_budget(budget, done + 1, total, "components verified", remedy)


def reference_nbytes(checkpoint: Checkpoint) -> int:
    """Compute the memory of the float32 reference."""
    parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    return parameters * FLOAT32_NBYTES


def is_compared_whole(checkpoint: Checkpoint, verify: Which) -> bool:
    """Tell whether the whole reference is held in memory, rather than one block at a time."""
    return verify == "full" or reference_nbytes(checkpoint) <= MAX_WHOLE_NBYTES


def _cost(plan: Plan) -> Cost:
    whole = is_compared_whole(plan.checkpoint, plan.options.verify)
    compared, seconds = reference_nbytes(plan.checkpoint), 1.0
    if not whole:
        # one block, and what comes before and after its tower
        blocks = block_sizes(plan)
        other = compared // FLOAT32_NBYTES - sum(blocks.values())
        head = plan.source.tensors.get(LLAMA_HEAD)
        other -= 0 if head is None else math.prod(head.shape)
        compared = FLOAT32_NBYTES * (max(blocks.values()) + other)
        seconds = 3.0
    graphs = 1 if plan.base == plan.engine_base else 2
    is_by_choice = plan.options.verify == "full" and not is_compared_whole(plan.checkpoint, "auto")
    remedy = "--verify auto compares one block at a time, " if is_by_choice else ""
    copies = VERIFY_COPIES["quantized" if plan.recipe is not None else plan.base]
    return Cost(
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
    """Compute the bytes of a decoder's cache of fixed capacity while it is compared."""
    llama, capacity = language_config(plan.checkpoint.config), plan.options.cache_capacity
    if llama is None or capacity is None:
        return 0
    layers = llama.num_hidden_layers if whole else 1
    position = 2 * llama.num_key_value_heads * llama.head_dim  # a key and a value
    return FLOAT32_NBYTES * CACHE_COPIES * VERIFIED_TEXTS * layers * position * capacity


def verify(
    out: Path, checkpoint: Path | None = None, report: Report = silent
) -> dict[str, dict[str, Any]]:
    """Check a published directory again, and with a checkpoint, compare it with PyTorch.

    Args:
        out: the directory; its hashes and structure are always checked.
        checkpoint: the one it was made from; None leaves the comparison out.
        report: told before each component.

    Returns:
        Component → figures; empty dictionaries without a checkpoint.

    Raises:
        ArtifactError: the directory is not what its manifest says.
        UsageError: another checkpoint than the one it was made from.
        VerificationError: a component disagrees.
    """
    artifact = open_artifact(out)
    if checkpoint is None:
        return {name: {} for name in artifact.manifest.components}
    opened = open_source(artifact, checkpoint)
    quantization = quantization_of(artifact, opened)
    base = engine_base = artifact.manifest.precision
    if quantization is not None:
        base, engine_base = quantization.recipe.base or "fp32", quantization.recipe.engine_base
    checker = Checker(
        opened,
        artifact.manifest.image_size,
        quantization=quantization,
        whole=is_compared_whole(opened, "auto"),
        preprocessing=preprocessing_inside(artifact.manifest),
    )
    figures: dict[str, dict[str, Any]] = {}
    for done, name in enumerate(artifact.manifest.components):
        total = len(artifact.manifest.components)
        report(Progress(step="verify", detail=name, done=done, total=total))
        figures[name] = checker.check_both(
            name,
            artifact.onnx_path(name),
            artifact.manifest.precision,
            base,
            engine_base,
            artifact.manifest.files,
        )
    return figures
