"""``verify`` and ``inspect``: what a directory is, and whether it is what its manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from internvl_edge.artifact.open import (
    CHECKPOINT_FILE,
    MANIFEST,
    Artifact,
    EngineRecord,
    open_artifact,
)
from internvl_edge.cli.console import Output
from internvl_edge.cli.options import CHECKPOINT, DIRECTORY, answers, no_backend
from internvl_edge.errors import InputError
from internvl_edge.export import require_packages
from internvl_edge.files.packages import require
from internvl_edge.files.reading import cache_hint

ENGINE_COLUMNS = ("component", "target", "profile", "size", "", "file")


@click.command()
@click.argument("out", type=DIRECTORY)
@click.option("--checkpoint", type=CHECKPOINT, help="Compare with this checkpoint in PyTorch too.")
@click.option("--full", is_flag=True, help="Hash the checkpoint's own linked files whole, too.")
@no_backend
@answers
def verify(output: Output, out: Path, checkpoint: Path | None, full: bool, backend: str) -> None:
    """Check that OUT is what its manifest says, and with --checkpoint that it computes it.

    Weights that were linked are checked by size and header. --full reads them whole: it compares
    their sha256 where it is known, and records it in the manifest where it is not.
    """
    from internvl_edge.artifact.publish import verify_whole

    recorded: tuple[str, ...] = ()
    if full:
        artifact, recorded = verify_whole(out)
    else:
        artifact = open_artifact(out, hash_files=checkpoint is None)
    figures: dict[str, Any] = {name: {} for name in artifact.manifest.components}
    if checkpoint is not None:
        require_packages()
        from internvl_edge import compiler

        with output.progress() as report:
            figures = compiler.verify(out, checkpoint, report)
        rows = [(name, *figures_row(f)) for name, f in figures.items()]
        output.table(("component", "cosine", "SQNR", "max |Δ|"), rows)
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
    from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
    from internvl_edge.export.config.checkpoint import available_components

    checkpoint = open_checkpoint(path)
    nbytes = sum(entry.nbytes for entry in checkpoint.tensors.values())
    count = sum(entry.nbytes // entry.dtype.itemsize for entry in checkpoint.tensors.values())
    components = available_components(checkpoint.config)
    dtypes = sorted({entry.dtype.name for entry in checkpoint.tensors.values()})
    output.lines(
        [
            f"{path}: {checkpoint.config.kind} checkpoint, {count / 1e6:.1f} M parameters in "
            f"{len(checkpoint.shards)} file(s), {nbytes / 1e6:.1f} MB, {', '.join(dtypes)}",
            f"components: {', '.join(components)}",
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
        }
    )


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
    output.table(("component", "weights", "cosine", "SQNR", "max |Δ|"), rows)
    for reason in {(r.verification or {}).get("skipped") for r in manifest.components.values()}:
        if reason:
            output.lines([reason])
    for engine in manifest.engines:
        size = manifest.files[engine.file].nbytes
        output.lines(
            [f"engine {engine.component} ({engine.target}): {engine.file}, {size / 1e6:.1f} MB"]
        )
    if links := manifest.hard_links:
        output.lines([f"hard links to the checkpoint's own files: {', '.join(links)}"])
        output.say(
            "hard links: what edits the one edits the other. ONNX Runtime and TensorRT accept "
            "them, onnx.checker and onnx-ir refuse files of two names; --weights copy makes files "
            "of their own"
        )
    output.result({"out": artifact.path, **manifest.to_json()})


def figures_row(verification: dict[str, Any]) -> tuple[str, str, str]:
    """Format the cosine, SQNR and largest difference of a component."""
    if "cosine" not in verification:
        return ("not verified", "", "")
    return (
        f"{verification['cosine']:.6f}",
        f"{verification['sqnr_db']:.1f} dB",
        f"{verification['max_abs']:.2g}",
    )
