"""Export, forecast and verify: one list of steps for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from internvl_edge._version import __version__
from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.artifact.open import Artifact, open_artifact
from internvl_edge.artifact.publish import record, staging
from internvl_edge.artifact.workspace import drop_published, kept_nbytes, workspace
from internvl_edge.compiler.cost import Forecast
from internvl_edge.compiler.plan import ExportOptions, Plan, make_plan
from internvl_edge.compiler.progress import Progress, Report, silent
from internvl_edge.compiler.steps.calibration.cost import spool_budget
from internvl_edge.compiler.steps.calibration.samples import load_samples, samples_for
from internvl_edge.compiler.steps.engines import BuildEngines, require_targets
from internvl_edge.compiler.steps.graphs import WriteGraphs
from internvl_edge.compiler.steps.meta_model import shallow_model
from internvl_edge.compiler.steps.publish import ListFiles, Publish
from internvl_edge.compiler.steps.quantize import Quantize
from internvl_edge.compiler.steps.step import Build, Step
from internvl_edge.compiler.steps.trace import Trace
from internvl_edge.compiler.steps.verify import (
    Checker,
    Verify,
    is_compared_whole,
    open_source,
    quantization_of,
)
from internvl_edge.compiler.steps.weights import StoreWeights
from internvl_edge.compiler.weights.layout import block_sizes, engine_nbytes
from internvl_edge.compiler.weights.plan import WeightsPlan, plan_weights
from internvl_edge.export.checkpoint.shards import header_fingerprint
from internvl_edge.export.graph.uint8_input import preprocessing_inside
from internvl_edge.files.packages import TRACED_WITH, versions
from internvl_edge.quantize.calibration.images import CalibrationSet

MB = 10**6


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


def steps(plan: Plan) -> list[Step]:
    """List the steps of an export, in the order they run."""
    model = shallow_model(plan)
    weights = plan_weights(plan, model)
    return [
        Trace(model=model),
        StoreWeights(weights=weights) if plan.recipe is None else Quantize(weights=weights),
        WriteGraphs(model=model),
        *([] if plan.options.verify == "none" else [Verify()]),
        ListFiles(),
        *([_engines(plan, weights)] if plan.engine_targets else []),
        Publish(),
    ]


def _engines(plan: Plan, weights: WeightsPlan) -> BuildEngines:
    blocks = list(block_sizes(plan))
    return BuildEngines(
        targets=plan.engine_targets,
        weights={name: engine_nbytes(plan, read) for name, read in weights.reads.items()},
        depths={
            component: sum(name.startswith(f"{COMPONENTS[component].tower}.") for name in blocks)
            for component in plan.components
        },
        precision=plan.options.precision,
    )


def forecast(options: ExportOptions) -> Forecast:
    """Check the options as an export would, and say what it would need.

    Sizes of files follow exactly from shapes and dtypes. Memory and time are estimates from what
    the steps were measured to take per byte and per operation on two CPU cores; they scale with
    the model, and are meant to tell minutes from hours and 2 GB from 20.

    Raises:
        UsageError, CheckpointError: as ``export`` would.
    """
    return forecast_plan(make_plan(options))


def forecast_plan(plan: Plan) -> Forecast:
    """Say what a checked plan will need."""
    return total(plan, steps(plan))


def total(plan: Plan, chosen: Sequence[Step]) -> Forecast:
    """Add up what steps state."""
    return Forecast(steps=tuple(cost for step in chosen for cost in step.costs(plan)))


def require_fit(plan: Plan, forecast: Forecast) -> None:
    """Refuse, before any work, what this machine or the memory budget cannot hold.

    Raises:
        ResourceError: the step, what it needs and what there is.
    """
    out = plan.options.out
    forecast.require_fit(out.absolute().parent, plan.options.memory_budget, kept_nbytes(out))


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
            name, artifact.onnx_path(name), artifact.manifest.precision, base, engine_base
        )
    return figures


# --- what may be taken up again ------------------------------------------------------------------


def _content(plan: Plan, report: Report) -> str:
    """Identify a checkpoint's contents; linked shards are not read, the point of linking."""
    if plan.options.weights == "link" and plan.options.verify == "none":
        return repr(
            [header_fingerprint(p) for p in plan.checkpoint.shards] + [*plan.checkpoint.states]
        )
    total, done = sum(entry.nbytes for entry in plan.checkpoint.tensors.values()), 0

    def read(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        report(Progress(step="check", detail="MB of weights", done=done // MB, total=total // MB))

    return plan.checkpoint.content_sha256(read)


def _key(plan: Plan, calibration: CalibrationSet | None, report: Report) -> dict[str, Any]:
    """List all that decides the bytes of a compilation; other work must not be taken up."""
    tokenizer = plan.checkpoint.path / "tokenizer.model"
    return {
        "versions": {"internvl-edge": __version__, "torch": torch.__version__}
        | versions(TRACED_WITH),
        "threads": torch.get_num_threads(),  # float sums are split by them
        "checkpoint": _content(plan, report),
        "config": plan.checkpoint.config.to_json(),
        "tokenizer": record(tokenizer).sha256 if tokenizer.is_file() else None,
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
