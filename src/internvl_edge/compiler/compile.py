"""The whole of an export: the steps of a plan run in a workspace, which another run may take up."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from internvl_edge._version import __version__
from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.artifact.publish import staging
from internvl_edge.artifact.workspace import drop_published, workspace
from internvl_edge.compiler.pipeline import require_fit, steps, total
from internvl_edge.compiler.plan import ExportOptions, Plan, make_plan
from internvl_edge.compiler.progress import Report, silent
from internvl_edge.compiler.steps.calibration.cost import spool_budget
from internvl_edge.compiler.steps.calibration.samples import load_samples, samples_for
from internvl_edge.compiler.steps.engines import require_targets
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.weights.tensors import read_content
from internvl_edge.files.packages import TRACED_WITH, versions
from internvl_edge.quantize.calibration.images import CalibrationSet


def export(options: ExportOptions, report: Report = silent) -> Artifact:
    """Compile a checkpoint into a published directory, and build the engines asked for.

    Raises:
        UsageError: an option that cannot be, or OUT exists.
        CheckpointError: the checkpoint.
        CalibrationError: the calibration images.
        VerificationError: a component disagrees with PyTorch; nothing is published.
        ResourceError: memory or disk.
        BuildError: TensorRT refused a graph.
    """
    drop_published(options.out)
    plan = make_plan(options)
    require_targets(plan.engine_targets, options.precision)
    chosen = steps(plan)
    require_fit(plan, total(plan, chosen))
    calibration = None if plan.recipe is None else load_samples(plan)
    key = partial(_key, plan, calibration, report)
    with (
        workspace(options.out, key, spool_budget(plan)) as work,
        staging(options.out, force=options.force) as directory,
    ):
        build = Build(
            directory=directory,
            work=work,
            report=report,
            calibration=calibration,
            samples=None if calibration is None else samples_for(plan, calibration),
        )
        for step in chosen:
            step.run(plan, build)
    assert build.manifest is not None
    if build.failure is not None:
        raise type(build.failure)(
            f"{build.failure}; {options.out} is published, with {len(build.manifest.engines)} "
            "engine(s)"
        ) from build.failure
    return open_artifact(options.out, hash_files=False)  # they were hashed for the manifest


def rehearse(options: ExportOptions, show: Callable[[Any], None], report: Report = silent) -> None:
    """Refuse all that an export would refuse before its first step, and write nothing.

    Args:
        options: as for :func:`export`.
        show: is given the forecast, before it is held against the machine.
        report: told while weights are read.

    Raises:
        InternVLError: as :func:`export` would.
    """
    plan = make_plan(options)
    require_targets(plan.engine_targets, options.precision)
    needed = total(plan, steps(plan))
    show(needed)
    require_fit(plan, needed)
    if plan.recipe is not None:
        load_samples(plan)
    read_content(plan, report)


def _key(plan: Plan, calibration: CalibrationSet | None, report: Report) -> dict[str, Any]:
    """List all that decides the bytes of a compilation; other work must not be taken up."""
    return {
        "versions": {"internvl-edge": __version__, "torch": torch.__version__}
        | versions(TRACED_WITH),
        "threads": torch.get_num_threads(),  # float sums are split by them
        "checkpoint": read_content(plan, report),
        "config": plan.checkpoint.config.to_json(),
        "tokenizer": plan.checkpoint.side_sha256("tokenizer.model"),
        "precision": plan.options.precision,
        "components": list(plan.components),
        "image_size": plan.image_size,
        "preprocessing": plan.preprocessing.to_json(),
        "input": plan.options.input,
        "cache_capacity": plan.options.cache_capacity,
        "weights": plan.options.weights,
        "align": plan.options.align,
        "recipe": None if plan.recipe is None else plan.recipe.to_json(),
        "calibration": None if calibration is None else calibration.digest,
    }
