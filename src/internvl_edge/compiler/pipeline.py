"""Export and verify: every step of the way, in reading order."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from internvl_edge._version import __version__
from internvl_edge.artifact.open import Artifact, ComponentRecord, Manifest, open_artifact
from internvl_edge.artifact.publish import record, staging, write_manifest
from internvl_edge.artifact.workspace import Workspace, drop_published, workspace
from internvl_edge.compiler.forecast import require_fit, spool_budget
from internvl_edge.compiler.oracle.simulate import read_scales, write_scales
from internvl_edge.compiler.plan import ExportOptions, Plan, make_plan, source_of
from internvl_edge.compiler.progress import Progress, Report, silent
from internvl_edge.compiler.report.readme import readme
from internvl_edge.compiler.report.report import with_report
from internvl_edge.compiler.steps.calibrate import (
    load_samples,
    quantize_weights,
    require_within_budget,
    samples_for,
)
from internvl_edge.compiler.steps.engines import (
    add_engines,
    engine_graph,
    require_targets,
)
from internvl_edge.compiler.steps.graphs import Emitted, write_graph
from internvl_edge.compiler.steps.trace import trace_all
from internvl_edge.compiler.steps.verify import (
    Checker,
    Quantization,
    is_compared_whole,
    reason_not_to_verify,
    stored_changes,
    values_in,
)
from internvl_edge.compiler.steps.weights import WEIGHTS_FILE, store_weights
from internvl_edge.errors import BuildError, InternVLError, ResourceError, UsageError
from internvl_edge.export.checkpoint.checkpoint import (
    Checkpoint,
    header_fingerprint,
    open_checkpoint,
)
from internvl_edge.export.graph.uint8_input import preprocessing_inside
from internvl_edge.export.weights.link import Brought
from internvl_edge.files.disk import link_or_copy
from internvl_edge.quantize.calibration.images import CalibrationSet
from internvl_edge.quantize.numerics.statistics import read_statistics, write_statistics
from internvl_edge.quantize.recipe import Recipe

MB = 10**6
MAX_LISTED = 3  # shards, in an error
# Files of a checkpoint that a runtime reads; copied as they are.
SIDE_FILES = (
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
)


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
    targets = [target for target in options.targets if target != "onnx"]
    require_targets(targets, options.precision)
    require_fit(plan)
    calibration = None if plan.recipe is None else load_samples(plan)
    key = partial(_key, plan, calibration, report)
    with (
        workspace(options.out, key, spool_budget(plan)) as work,
        staging(options.out, force=options.force) as directory,
    ):
        manifest = _compile_into(plan, directory, work, calibration, report)
        failure: InternVLError | None = None
        try:
            built = add_engines(directory, manifest, targets, keep=work.engines, report=report)
            for grown in built:
                plan.checkpoint.require_unchanged()
                manifest = grown
        except (BuildError, ResourceError) as error:
            failure = error  # hours of quantization are not thrown away for one engine
        plan.checkpoint.require_unchanged()
        manifest = with_report(directory, manifest)
        report(Progress(step="publish", detail=str(options.out), done=0, total=1))
        write_manifest(directory, manifest)
        work.publishing(directory)
    if failure is not None:
        raise type(failure)(
            f"{failure}; {options.out} is published, with {len(manifest.engines)} engine(s)"
        ) from failure
    return open_artifact(options.out, hash_files=False)  # they were hashed for the manifest


def _content(plan: Plan, report: Report) -> str:
    """What the checkpoint holds. Linked shards are not read, which is the point of linking."""
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
    """Everything that decides the bytes of a compilation; other work must not be taken up."""
    tokenizer = plan.checkpoint.path / "tokenizer.model"
    return {
        "versions": {"internvl-edge": __version__, "torch": torch.__version__}
        | {package: version(package) for package in ("numpy", "onnx-ir", "onnxscript")},
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


def verify(
    out: Path, checkpoint: Path | None = None, report: Report = silent
) -> dict[str, dict[str, Any]]:
    """Check a published directory again, and with a checkpoint, compare it with PyTorch.

    Args:
        out: the directory; its hashes and structure are always checked.
        checkpoint: what it was made from; None leaves the comparison out.
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
    figures = {}
    for done, name in enumerate(artifact.manifest.components):
        total = len(artifact.manifest.components)
        report(Progress(step="verify", detail=name, done=done, total=total))
        other = artifact.path / engine_graph(name, engine_base)
        figures[name] = checker.check(
            name, artifact.onnx_path(name), artifact.manifest.precision, base=base
        ) | _engine_figures(checker, name, other, artifact.manifest.precision, engine_base)
    return figures


def open_source(artifact: Artifact, checkpoint: Path) -> Checkpoint:
    """The checkpoint that a directory was made from.

    Raises:
        UsageError: it is another one.
    """
    opened = open_checkpoint(checkpoint)
    expected = artifact.manifest.source["files"]
    found = _source_files(opened.shards)
    if found != expected:
        of_old = {name: shard["nbytes"] for name, shard in expected.items()}
        of_this = {name: shard["nbytes"] for name, shard in found.items()}
        difference = (
            "its shards have the same names and sizes, and other tensors"
            if of_old == of_this
            else f"expected {_listed(of_old)}, found {_listed(of_this)}"
        )
        raise UsageError(
            f"{artifact.path} was not made from {checkpoint}: {difference}; name its checkpoint "
            f"with --checkpoint, a folder that was called {artifact.manifest.source['checkpoint']}"
        )
    return opened


def _listed(shards: Mapping[str, int]) -> str:
    """The first shards with their sizes."""
    some = [f"{name} of {nbytes} bytes" for name, nbytes in [*shards.items()][:MAX_LISTED]]
    return ", ".join([*some, *[f"{len(shards) - MAX_LISTED} more"] * (len(shards) > MAX_LISTED)])


def quantization_of(artifact: Artifact, checkpoint: Checkpoint) -> Quantization | None:
    """What the simulation of a directory needs; None where nothing is quantized."""
    if artifact.manifest.recipe is None:
        return None
    recipe = Recipe.from_json(artifact.manifest.recipe)
    return Quantization(
        recipe=recipe,
        scales=read_scales(artifact.path),
        stored=stored_changes(artifact.file(WEIGHTS_FILE)),
        source=source_of(checkpoint, recipe),
        statistics=read_statistics(artifact.path),
        held=values_in(artifact.file(WEIGHTS_FILE)),
    )


def _compile_into(
    plan: Plan,
    directory: Path,
    work: Workspace,
    calibration: CalibrationSet | None,
    report: Report,
) -> Manifest:
    """Write everything but the manifest and the engines."""
    reason = reason_not_to_verify(plan.options.verify)
    samples = None if calibration is None else samples_for(plan, calibration)
    scales: dict[str, dict[str, float | None]] = {}
    models = trace_all(plan, plan.base, report)
    brought: dict[str, Brought] = {}
    if samples is None:
        stored, brought = store_weights(plan, models, directory, work, report)
    else:
        stored, scales = quantize_weights(plan, models, samples, work, report)
        link_or_copy(work.path / WEIGHTS_FILE, directory / WEIGHTS_FILE)
    emitted = {
        name: write_graph(plan, name, model, stored, scales, directory, f"{name}.onnx")
        for name, model in models.items()
    }
    if plan.engine_base != plan.base:
        for name, model in trace_all(plan, plan.engine_base, report).items():
            file = engine_graph(name, plan.engine_base)
            write_graph(plan, name, model, stored, scales, directory, file)
    quantization = None
    if plan.recipe is not None:
        write_scales(directory, scales)
        write_statistics(directory, [row for entry in work.entries for row in entry["statistics"]])
        quantization = Quantization(
            recipe=plan.recipe,
            scales=scales,
            stored=stored_changes(directory / WEIGHTS_FILE),
            source=plan.source,
            statistics=read_statistics(directory),
            held=values_in(directory / WEIGHTS_FILE),
        )
    checker = None
    if reason is None:
        whole = is_compared_whole(plan.checkpoint, plan.options.verify)
        checker = Checker(
            plan.checkpoint,
            plan.image_size,
            samples,
            quantization,
            whole=whole,
            preprocessing=plan.preprocessing if plan.options.input == "uint8" else None,
        )
    records = {}
    for done, (name, graph) in enumerate(emitted.items()):
        if checker is not None:
            report(Progress(step="verify", detail=name, done=done, total=len(emitted)))
        records[name] = _component(plan, name, graph, checker, reason, directory)
        if checker is not None:
            budget, remedy = plan.options.memory_budget, "raise the budget, or choose --verify none"
            require_within_budget(budget, done + 1, len(emitted), "components verified", remedy)
    return _manifest(plan, records, calibration, directory, brought)


def _component(
    plan: Plan,
    name: str,
    graph: Emitted,
    checker: Checker | None,
    reason: str | None,
    directory: Path,
) -> ComponentRecord:
    """A component's record, once both of its graphs agree with the reference."""
    figures: dict[str, Any] = {"skipped": reason}
    if checker is not None:
        precision = plan.options.precision
        other = directory / engine_graph(name, plan.engine_base)
        figures = checker.check(
            name, directory / graph.file, precision, base=plan.base
        ) | _engine_figures(checker, name, other, precision, plan.engine_base)
    return ComponentRecord(
        file=graph.file,
        inputs=graph.inputs,
        outputs=graph.outputs,
        nbytes=graph.nbytes,
        verification=figures,
    )


def _engine_figures(
    checker: Checker, component: str, path: Path, precision: str, base: str
) -> dict[str, Any]:
    """Figures of the graph for engines, where a component has one of its own."""
    if not path.exists():
        return {}
    return {"engine_graph": checker.check(component, path, precision, base=base)}


def _manifest(
    plan: Plan,
    records: dict[str, ComponentRecord],
    calibration: CalibrationSet | None,
    directory: Path,
    brought: Mapping[str, Brought],
) -> Manifest:
    """Copy what a runtime needs beside the graphs, and list it all; what was brought is known."""
    for name in SIDE_FILES:
        if (plan.checkpoint.path / name).is_file():
            shutil.copyfile(plan.checkpoint.path / name, directory / name)
    manifest = Manifest(
        tool_version=__version__,
        precision=plan.options.precision,
        model=plan.checkpoint.config.to_json(),
        image_size=plan.image_size,
        preprocessing=plan.preprocessing.to_json(),
        recipe=None if plan.recipe is None else plan.recipe.to_json(),
        source={
            "checkpoint": plan.checkpoint.path.resolve().name,
            "files": _source_files(plan.checkpoint.shards),
            "weights": {name: shard.how for name, shard in brought.items()},
            "calibration": None
            if calibration is None
            else {
                "name": calibration.name,
                "samples": len(calibration),
                "sha256": calibration.digest,
                "skipped": list(calibration.skipped),
            },
        },
        components=records,
        files={},
    )
    for name, text in plan.options.notes.items():
        (directory / name).write_text(text, encoding="utf-8")
    (directory / "README.md").write_text(readme(manifest), encoding="utf-8")
    files = {
        path.name: brought[path.name].record if path.name in brought else record(path)
        for path in sorted(directory.iterdir())
        if path.is_file()
    }
    return replace(manifest, files=files)


def _source_files(shards: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Size and header hash of each shard: enough to recognise a checkpoint without reading it."""
    return {path.name: header_fingerprint(path) for path in shards}
