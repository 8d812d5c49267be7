"""``export``, ``build``, ``verify``, ``inspect`` and ``convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from internvl_edge.cli.console import Output
from internvl_edge.cli.options import DIRECTORY, answers, backend, memory, names
from internvl_edge.errors import MissingDependency, UsageError

PRECISIONS = "fp32, fp16, bf16, int8 or fp8"


@click.command()
@click.argument("checkpoint", type=DIRECTORY, required=False)
@click.option("-o", "--out", type=DIRECTORY, required=True, help="Directory to write.")
@click.option("-p", "--precision", default="fp32", show_default=True, help=f"{PRECISIONS}.")
@click.option("--components", callback=names, help="Comma-separated; default: all there are.")
@click.option("--image-size", type=int, help="Resolution; default: the checkpoint's own.")
@click.option("--calib", "calibration", type=DIRECTORY, help="Folder of calibration images.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("onnx",),
    show_default=True,
    help="onnx, tensorrt-rtx or tensorrt; repeat for several.",
)
@click.option(
    "--weights",
    type=click.Choice(("auto", "link", "copy")),
    default="auto",
    show_default=True,
    help="The checkpoint's own files: as reflinks or hard links, or copied. auto: reflinks, copies "
    "up to 2 GB, else hard links; files of our own where the dtype differs.",
)
@click.option("--align", type=int, help="Write weights at multiples of this many bytes: 256.")
@click.option(
    "--verify",
    type=click.Choice(("auto", "full", "none")),
    default="auto",
    show_default=True,
    help="Compare every component with PyTorch before publishing.",
)
@click.option("--recipe", type=DIRECTORY, help="Quantization recipe (JSON).")
@click.option(
    "--memory-budget", callback=memory, help="Most memory to take, such as 3GB; default: all free."
)
@click.option("--force", is_flag=True, help="Replace OUT, once the new one is complete.")
@click.option("--dry-run", is_flag=True, help="Check everything and forecast; write nothing.")
@backend
@answers
def export(output: Output, backend: str, dry_run: bool, **chosen: Any) -> None:
    """Compile CHECKPOINT (default: the bundled demo model) into OUT.

    Traces every component to ONNX, quantizes it if the precision says so, verifies it against
    PyTorch, builds the engines asked for and publishes OUT in one step.
    """
    compiler = _compiler()
    options = compiler.ExportOptions(**chosen)
    if dry_run:
        _show_forecast(output, compiler.forecast(options))
        return
    with output.progress() as report:
        artifact = compiler.export(options, report)
    _show_artifact(output, artifact)


@click.command()
@click.argument("out", type=DIRECTORY)
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("tensorrt-rtx",),
    show_default=True,
    help="tensorrt-rtx or tensorrt; repeat for both.",
)
@click.option("--components", callback=names, help="Comma-separated; default: all there are.")
@click.option("--batch", default="1,4,16", show_default=True, help="Smallest, usual, largest.")
@click.option("--length", default="1,32,80", show_default=True, help="The same, of texts.")
@backend
@answers
def build(
    output: Output,
    out: Path,
    targets: tuple[str, ...],
    components: tuple[str, ...] | None,
    batch: str,
    length: str,
    backend: str,
) -> None:
    """Build engines for the exported directory OUT; needs no GPU for tensorrt-rtx."""
    compiler = _compiler()
    profile = compiler.profile_from(batch=batch, length=length)
    with output.progress() as report:
        engines = compiler.build(
            out, targets, components=components, profile=profile, report=report
        )
    rows = [
        (e.component, e.target, e.file, f"{(out / e.file).stat().st_size / 1e6:.1f} MB")
        for e in engines
    ]
    output.table(("component", "target", "file", "size"), rows)
    output.result(
        {
            "out": out,
            "engines": [
                dict(zip(("component", "target", "file", "size"), r, strict=True)) for r in rows
            ],
        }
    )


@click.command()
@click.argument("out", type=DIRECTORY)
@click.option("--checkpoint", type=DIRECTORY, help="Compare with this checkpoint in PyTorch too.")
@click.option("--full", is_flag=True, help="Hash the checkpoint's own linked files whole, too.")
@backend
@answers
def verify(output: Output, out: Path, checkpoint: Path | None, full: bool, backend: str) -> None:
    """Check that OUT is what its manifest says, and with --checkpoint that it computes it.

    Weights that were linked are checked by size and header. --full reads them whole: it compares
    their sha256 where it is known, and records it in the manifest where it is not.
    """
    from internvl_edge.artifact import open_artifact
    from internvl_edge.publish import verify_whole

    recorded: tuple[str, ...] = ()
    if full:
        artifact, recorded = verify_whole(out)
    else:
        artifact = open_artifact(out, hash_files=checkpoint is None)
    figures: dict[str, Any] = {name: {} for name in artifact.manifest.components}
    if checkpoint is not None:
        with output.progress() as report:
            figures = _compiler().verify(out, checkpoint, report)
        rows = [(name, *_figures(f)) for name, f in figures.items()]
        output.table(("component", "cosine", "SQNR", "max |Δ|"), rows)
    linked = [n for n, record in artifact.manifest.files.items() if record.header_sha256]
    if recorded:
        output.say(f"sha256 now known, and recorded: {', '.join(recorded)}")
    if linked and not full:
        output.say(f"by size and header only, --full reads them whole: {', '.join(linked)}")
    output.say(f"{out}: every file matches its sha256, every graph is sound")
    output.result(
        {"out": out, "ok": True, "full": full, "recorded": recorded, "components": figures}
    )


@click.command()
@click.argument("path", type=DIRECTORY)
@backend
@answers
def inspect(output: Output, path: Path, backend: str) -> None:
    """Say what PATH is: a compiled directory, or a checkpoint."""
    if (path / "manifest.json").exists():
        from internvl_edge.artifact import open_artifact

        _show_artifact(output, open_artifact(path))
        return
    if not path.exists():
        raise UsageError(f"{path} does not exist; expected a checkpoint or a compiled directory")
    _require_export()
    from internvl_edge.export.checkpoint import open_checkpoint
    from internvl_edge.export.components import available_components

    checkpoint = open_checkpoint(path)
    nbytes = sum(entry.nbytes for entry in checkpoint.tensors.values())
    count = sum(entry.nbytes // entry.dtype.itemsize for entry in checkpoint.tensors.values())
    components = available_components(checkpoint.config)
    dtypes = sorted({entry.dtype.name for entry in checkpoint.tensors.values()})
    output.say(
        f"{path}: {checkpoint.config.kind} checkpoint, {count / 1e6:.1f} M parameters in "
        f"{len(checkpoint.shards)} file(s), {nbytes / 1e6:.1f} MB, {', '.join(dtypes)}"
    )
    output.say(f"components: {', '.join(components)}")
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


@click.command()
@click.argument("source", type=DIRECTORY)
@click.argument("out", type=DIRECTORY)
@backend
@answers
def convert(output: Output, source: Path, out: Path, backend: str) -> None:
    """Turn a checkpoint of pickle files (.bin, .pth) into safetensors, in a subprocess."""
    _require_export()
    from internvl_edge.export.convert import convert_pickles

    with output.progress():
        count = convert_pickles(source, out)
    output.say(f"{out}: {count} tensors")
    output.result({"out": out, "tensors": count})


def _compiler() -> Any:
    _require_export()
    from internvl_edge import compiler

    return compiler


def _require_export() -> None:
    import importlib.util

    for package in ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency.of(package, "export")


def _show_artifact(output: Output, artifact: Any) -> None:
    manifest = artifact.manifest
    rows = [
        (name, f"{record.nbytes / 1e6:.1f} MB", *_figures(record.verification or {}))
        for name, record in manifest.components.items()
    ]
    output.say(f"{artifact.path}: {manifest.precision}, {manifest.image_size} px")
    output.table(("component", "weights", "cosine", "SQNR", "max |Δ|"), rows)
    for reason in {(r.verification or {}).get("skipped") for r in manifest.components.values()}:
        if reason:
            output.say(reason)
    for engine in manifest.engines:
        size = manifest.files[engine.file].nbytes
        output.say(
            f"engine {engine.component} ({engine.target}): {engine.file}, {size / 1e6:.1f} MB"
        )
    if links := manifest.hard_links:
        output.say(
            f"hard links to the checkpoint's own files: {', '.join(links)}. What edits the one "
            "edits the other. ONNX Runtime and TensorRT accept them, onnx.checker and onnx-ir "
            "refuse files of two names; --weights copy makes files of their own"
        )
    output.result({"out": artifact.path, **manifest.to_json()})


def _figures(verification: dict[str, Any]) -> tuple[str, str, str]:
    if "cosine" not in verification:
        return ("not verified", "", "")
    return (
        f"{verification['cosine']:.6f}",
        f"{verification['sqnr_db']:.1f} dB",
        f"{verification['max_abs']:.2g}",
    )


def _show_forecast(output: Output, forecast: Any) -> None:
    output.table(("step", "memory", "disk", "time"), forecast.rows())
    output.result(forecast.to_json())
