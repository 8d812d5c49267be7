"""A compiled directory on the terminal: its components, figures and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internvl_edge.cli.console import Output

ENGINE_COLUMNS = ("component", "target", "profile", "size", "", "file")


def engine_files(out: Path) -> set[str]:
    """The engines that a directory has, by file."""
    from internvl_edge.artifact.open import open_artifact

    return {engine.file for engine in open_artifact(out, hash_files=False).manifest.engines}


def engine_facts(out: Path, engine: Any, *, is_new: bool) -> dict[str, Any]:
    """What there is to know of an engine, from its sidecar."""
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
    """What ``engine_facts`` found, under ``ENGINE_COLUMNS``."""
    profile = [f"{name} {'/'.join(map(str, sizes))}" for name, sizes in engine["profile"].items()]
    return (
        engine["component"],
        engine["target"],
        ", ".join(profile),
        f"{engine['nbytes'] / 1e6:.1f} MB",
        "new" if engine["is_new"] else "",
        engine["file"],
    )


def show_artifact(output: Output, artifact: Any) -> None:
    """Every component with its figures, every engine; with ``--json`` the whole manifest."""
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
    """Cosine, SQNR and largest difference of a component."""
    if "cosine" not in verification:
        return ("not verified", "", "")
    return (
        f"{verification['cosine']:.6f}",
        f"{verification['sqnr_db']:.1f} dB",
        f"{verification['max_abs']:.2g}",
    )
