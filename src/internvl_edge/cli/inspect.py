"""``verify`` and ``inspect``: what a directory is, and whether it is what its manifest says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from internvl_edge import compiler
from internvl_edge.artifact import (
    CHECKPOINT_FILE,
    MANIFEST,
    Artifact,
    EngineRecord,
    open_artifact,
)
from internvl_edge.artifact.sidecar import engine_info
from internvl_edge.cli.console import Output
from internvl_edge.cli.options import CHECKPOINT, DIRECTORY, answers, no_backend, on_hardware
from internvl_edge.errors import InputError, UsageError
from internvl_edge.export.advice import advice_of
from internvl_edge.files.packages import EXPORT, require
from internvl_edge.files.reading import cache_hint

FIGURES = ("cosine", "SQNR", "max |Δ|", "for engines")
LITTLE_DB = 10.0
ENGINE_COLUMNS = ("component", "target", "profile", "size", "", "file")


@click.command()
@click.argument("out", type=DIRECTORY)
@click.option("--checkpoint", type=CHECKPOINT, help="Compare with this checkpoint in PyTorch too.")
@click.option("--calib", "calibration", type=DIRECTORY, help="The folder it was calibrated on.")
@click.option(
    "--min-sqnr", type=click.FloatRange(0.0), help="As at an export; default: what OUT's had."
)
@click.option(
    "--max-drop", type=click.FloatRange(0.0, 1.0), help="As at an export; default: what OUT's had."
)
@click.option("--full", is_flag=True, help="Hash the checkpoint's own linked files whole, too.")
@on_hardware
@no_backend
@answers
def verify(
    output: Output,
    out: Path,
    checkpoint: Path | None,
    calibration: Path | None,
    min_sqnr: float | None,
    max_drop: float | None,
    full: bool,
    device: str,
    threads: int | None,
    backend: str,
) -> None:
    """Check that OUT is what its manifest says, and with --checkpoint that it computes it.

    A quantized OUT is compared on the samples that it was calibrated on, and its export's bounds
    are held again: a bundled set is found again, a folder is named with --calib. Without them it
    is compared on noise.

    Weights that were linked are checked by size and header. --full reads them whole: it compares
    their sha256 where it is known, and records it in the manifest where it is not.
    """
    from internvl_edge.artifact.publish import verify_whole

    is_on_hardware = threads is not None or _is_given("device")
    of_comparison = calibration or min_sqnr is not None or max_drop is not None or is_on_hardware
    if checkpoint is None and of_comparison:
        raise UsageError(
            "--calib, --min-sqnr, --max-drop, --device and --threads are of a comparison; add "
            "--checkpoint"
        )
    recorded: tuple[str, ...] = ()
    if full:
        artifact, recorded = verify_whole(out)
    else:
        artifact = open_artifact(out, hash_files=checkpoint is None)
    figures: dict[str, Any] = {name: {} for name in artifact.manifest.components}
    if checkpoint is not None:
        require(*EXPORT)
        from internvl_edge.demo.scenes import samples_of

        with output.progress() as report:
            figures = compiler.verify(
                out,
                checkpoint,
                report,
                min_sqnr=min_sqnr,
                max_drop=max_drop,
                calibration=calibration,
                samples=samples_of(checkpoint),
                hardware=compiler.Hardware(device=device, num_threads=threads),
            )
        rows = [(name, *figures_row(f)) for name, f in figures.items()]
        output.table(("component", *FIGURES), rows)
        output.lines(cost_lines(artifact.manifest.precision, figures))
    linked = [n for n, record in artifact.manifest.files.items() if record.header_sha256]
    if recorded:
        names = ", ".join(recorded)
        output.lines([f"sha256 recorded, with none before to compare it with: {names}"])
    if linked and not full:
        output.lines([f"by size and header only, --full reads them whole: {', '.join(linked)}"])
    which = "every other file" if linked and not full else "every file"
    output.lines([f"{out}: {which} matches its sha256, every graph is sound"])
    output.result(
        {"out": out, "ok": True, "full": full, "recorded": recorded, "components": figures}
    )


@click.command()
@click.argument("path", type=CHECKPOINT)
@no_backend
@answers
def inspect(output: Output, path: Path, backend: str) -> None:
    """Say what PATH is: a compiled directory, or a checkpoint."""
    if (path / MANIFEST).exists():
        show_artifact(output, open_artifact(path))
        return
    if not (path / CHECKPOINT_FILE).exists():
        raise InputError(_neither(path))
    require("ml-dtypes")
    from internvl_edge.export import open_checkpoint
    from internvl_edge.export.checkpoint.side_files import side_file_problem
    from internvl_edge.export.config.checkpoint import available_components

    checkpoint = open_checkpoint(path)
    nbytes = sum(entry.nbytes for entry in checkpoint.tensors.values())
    count = sum(entry.nbytes // entry.dtype.itemsize for entry in checkpoint.tensors.values())
    components = available_components(checkpoint.config)
    dtypes = sorted({entry.dtype.name for entry in checkpoint.tensors.values()})
    problem = side_file_problem(checkpoint.path, checkpoint.config, components)
    output.lines(
        [
            f"{path}: {checkpoint.config.kind} checkpoint, {count / 1e6:.1f} M parameters in "
            f"{len(checkpoint.shards)} file(s), {nbytes / 1e6:.1f} MB, {', '.join(dtypes)}",
            f"components: {', '.join(components)}",
            *([f"export refuses it: {problem}"] if problem else []),
        ]
    )
    output.result(
        {
            "path": path,
            "kind": checkpoint.config.kind,
            "parameters": count,
            "nbytes": nbytes,
            "dtypes": dtypes,
            "components": components,
            "config": checkpoint.config.to_json(),
            "problem": problem,
        }
    )


def _is_given(name: str) -> bool:
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def _neither(path: Path) -> str:
    reason = (
        "found neither"
        if path.is_dir()
        else "it is a file"
        if path.exists()
        else "it does not exist"
    )
    return (
        f"{path}: expected a folder, a checkpoint with {CHECKPOINT_FILE} or a compiled directory "
        f"with {MANIFEST}; {reason}{cache_hint(path)}"
    )


def engine_files(out: Path) -> set[str]:
    """List the engines that a directory has, by file."""
    return {engine.file for engine in open_artifact(out, hash_files=False).manifest.engines}


def engine_facts(out: Path, engine: EngineRecord, *, is_new: bool) -> dict[str, Any]:
    """Collect the facts of an engine, from its sidecar."""
    from internvl_edge.artifact.sidecar import read_engine_info

    info = read_engine_info(out / engine.sidecar)
    symbols = {size for spec in info.inputs for size in spec.shape if isinstance(size, str)}
    return {
        "component": engine.component,
        "target": engine.target,
        "file": engine.file,
        "nbytes": info.nbytes,
        "profile": {name: info.profile.range_of(name) for name in sorted(symbols)},
        "is_new": is_new,
        "census": None if info.census is None else info.census.to_json(),
    }


def engine_row(engine: dict[str, Any]) -> tuple[str, ...]:
    """Arrange the facts of an engine under ``ENGINE_COLUMNS``."""
    profile = [f"{name} {'/'.join(map(str, sizes))}" for name, sizes in engine["profile"].items()]
    return (
        engine["component"],
        engine["target"],
        ", ".join(profile),
        f"{engine['nbytes'] / 1e6:.1f} MB",
        "new" if engine["is_new"] else "",
        engine["file"],
    )


def show_artifact(output: Output, artifact: Artifact) -> None:
    """Show every component with its figures and every engine; with ``--json``, the manifest."""
    manifest = artifact.manifest
    rows = [
        (name, f"{record.nbytes / 1e6:.1f} MB", *figures_row(record.verification or {}))
        for name, record in manifest.components.items()
    ]
    output.lines([f"{artifact.path}: {manifest.precision}, {manifest.image_size} px"])
    output.table(("component", "weights", *FIGURES), rows)
    figures = {name: record.verification or {} for name, record in manifest.components.items()}
    output.lines(cost_lines(manifest.precision, figures))
    for reason in {(r.verification or {}).get("skipped") for r in manifest.components.values()}:
        if reason:
            output.lines([reason])
    for engine in manifest.engines:
        size = manifest.files[engine.file].nbytes
        output.lines(
            [f"engine {engine.component} ({engine.target}): {engine.file}, {size / 1e6:.1f} MB"]
        )
        output.lines([f"  {line}" for line in engine_info(artifact, engine.sidecar).layers_said])
    if links := manifest.hard_links:
        output.lines([f"hard links to the checkpoint's own files: {', '.join(links)}"])
        output.say(
            "hard links: what edits the one edits the other. ONNX Runtime and TensorRT accept "
            "them, onnx.checker and onnx-ir refuse files of two names; --weights copy makes files "
            "of their own"
        )
    opened = compiler.openers(manifest)
    output.lines(
        [
            f"without this runtime: {', '.join(one.files)}: {one.program}; {one.place}"
            for one in opened
        ]
    )
    opens = [dataclasses.asdict(one) for one in opened]
    output.result({"out": artifact.path, **manifest.to_json(), "opens": opens})


def figures_row(verification: dict[str, Any]) -> tuple[str, ...]:
    """Format a component's figures under ``FIGURES``."""
    if "cosine" not in verification:
        return ("not verified", "", "", "")
    engines = verification.get("engine_graph") or {}
    return (
        f"{verification['cosine']:.6f}",
        f"{verification['sqnr_db']:.1f} dB",
        f"{verification['max_abs']:.2g}",
        f"{engines['sqnr_db']:.1f} dB" if "sqnr_db" in engines else "",
    )


def cost_lines(precision: str, components: dict[str, dict[str, Any]]) -> list[str]:
    """Say in words what a precision costs: on what it was measured, where most, what would help."""
    known = {name: figures for name, figures in components.items() if "cosine" in figures}
    rounded = {name: f for name, f in known.items() if "simulated_sqnr_db" in f}
    if any(f.get("blocks") for f in known.values()):
        return [
            "compared block by block with the simulation of the quantization, which says that the "
            "graphs are right; what the whole loses was not measured, --verify full measures it"
        ] * any(f.get("against") == "simulated quantization" for f in known.values())
    if not rounded:
        return []
    first = next(iter(rounded.values()))
    count, inputs = first.get("samples"), first.get("inputs")
    on = f"{count} samples of the calibration set" if inputs == "calibration" else "noise"
    lines = [
        f"SQNR is what {precision} costs compared with PyTorch in float32, on {on}: 20 dB are an "
        "error of a tenth, each 6 dB halve it"
    ]
    if inputs == "noise":
        lines[0] += "; noise is wider than what the ranges were measured on"
    lowest = min(rounded, key=lambda name: float(rounded[name]["sqnr_db"]))
    figures = rounded[lowest]
    words = advice_of(precision, lowest, figures.get("costly_layers") or [])
    lines.append(f"lowest: {lowest}, {figures['sqnr_db']:.1f} dB; {words}")
    if figures["sqnr_db"] < LITTLE_DB:
        lines.append(f"below {LITTLE_DB:g} dB little is left of an output: measure it on a task")
    for bound, value in (first.get("bounds") or {}).items():
        option = {"min_sqnr_db": "--min-sqnr", "max_drop": "--max-drop"}.get(bound, bound)
        lines.append(f"{option} {value:g} is kept by every component")
    return lines
