"""``export``, ``build`` and ``convert``: from a checkpoint to a compiled directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from internvl_edge.artifact import CHECKPOINT_FILE, MANIFEST
from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.cli.console import Output
from internvl_edge.cli.inspect import (
    ENGINE_COLUMNS,
    engine_facts,
    engine_files,
    engine_row,
    show_artifact,
)
from internvl_edge.cli.options import (
    CHECKPOINT,
    DIRECTORY,
    answers,
    memory,
    names,
    no_backend,
    one_of,
    targets,
)
from internvl_edge.errors import CheckpointError, UsageError, did_you_mean
from internvl_edge.export import require_packages
from internvl_edge.export.precision import PRECISIONS, precision_hint
from internvl_edge.runtime.images.formats import SUFFIXES

AUTO = "auto"
OFFERED = (*PRECISIONS, AUTO)
LAYOUTS = ("internvl_chat", "internvl_hf")
METRICS = ("cosine", "zero-shot", "recall@1")
EXPECT_FUSED = "Refuse an engine that lost fused attention or 8-bit products; inspect shows them."


@click.command()
@click.argument("checkpoint", type=CHECKPOINT, required=False)
@click.option("-o", "--out", type=DIRECTORY, required=True, help="Directory to write.")
@click.option(
    "-p",
    "--precision",
    callback=lambda _, __, value: value.lower(),
    default="fp32",
    show_default=True,
    help=f"{', '.join(OFFERED)}; or one per tower: vision=int8,decoder=int4-wo.",
)
@click.option("--components", callback=names, help="Comma-separated; default: all there are.")
@click.option("--image-size", type=int, help="Resolution; default: the checkpoint's own.")
@click.option(
    "--input",
    type=one_of("float32", "uint8"),
    default="float32",
    show_default=True,
    help="What image graphs take: normalised values, or 8-bit levels that they normalise.",
)
@click.option(
    "--cache-capacity",
    type=int,
    help="Positions of a decoder's cache, written where it lies; default: it grows by each token.",
)
@click.option("--calib", "calibration", type=DIRECTORY, help="Folder of calibration images.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("onnx",),
    show_default=True,
    callback=targets,
    help="onnx, tensorrt-rtx or tensorrt; several comma-separated.",
)
@click.option("--expect-fused", is_flag=True, help=EXPECT_FUSED)
@click.option(
    "--layout",
    type=one_of("optimum"),
    help="Also write model.onnx, a CLIP of both towers, and what optimum and transformers open it "
    "with.",
)
@click.option(
    "--weights",
    type=one_of("auto", "link", "copy"),
    default="auto",
    show_default=True,
    help="The checkpoint's own files: as reflinks or hard links, or copied. auto: reflinks, copies "
    "up to 2 GB, else hard links; files of our own where the dtype differs.",
)
@click.option("--align", type=int, help="Write weights at multiples of this many bytes: 256.")
@click.option(
    "--verify",
    type=one_of("auto", "full", "none"),
    default="auto",
    show_default=True,
    help="Compare every component with PyTorch before publishing.",
)
@click.option("--recipe", type=DIRECTORY, help="Quantization recipe (JSON).")
@click.option(
    "--head",
    type=one_of("int8"),
    help="Also quantize the vocabulary's product, the largest weight of a small language model: "
    "int8, its inputs are not rounded. Default: as stored.",
)
@click.option(
    "--min-sqnr",
    type=click.FloatRange(0.0),
    help="Refuse a component below so many dB compared with PyTorch; default: say how many.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0.0, 1.0),
    help="Refuse a component whose worst cosine drops by more, 0 to 1. With --precision auto: how "
    "much the metric may lose against float32.",
)
@click.option(
    "--metric",
    type=one_of(*METRICS),
    help="With --precision auto. cosine (default): of the towers' outputs, the worst sample; "
    "zero-shot and recall@1: between the calibration images and their captions.",
)
@click.option(
    "--memory-budget", callback=memory, help="Most memory to take, such as 3GB; default: all free."
)
@click.option("--force", is_flag=True, help="Replace OUT, once the new one is complete.")
@click.option("--dry-run", is_flag=True, help="Check everything and forecast; write nothing.")
@no_backend
@answers
def export(
    output: Output,
    backend: str,
    dry_run: bool,
    max_drop: float | None,
    metric: str | None,
    **chosen: Any,
) -> None:
    """Compile CHECKPOINT into OUT: a folder, or demo, the bundled model, which is the default.

    Traces every component to ONNX, quantizes it if the precision says so, verifies it against
    PyTorch, builds the engines asked for and publishes OUT in one step. --precision auto is int8
    with as few layers in 16 bits as --max-drop allows.
    """
    compiler = _compiler()
    from internvl_edge.demo.scenes import samples_of

    _require_checkpoint(chosen["checkpoint"])
    _require_components(chosen["components"])
    is_auto = _is_searched(chosen["precision"], max_drop, metric)
    chosen |= {"samples": samples_of(chosen["checkpoint"])}
    chosen |= {} if is_auto else {"max_drop": max_drop}
    options = compiler.ExportOptions(**chosen | ({"precision": "int8"} if is_auto else {}))
    if dry_run:
        _dry_run(output, compiler, options)
        return
    with output.progress() as report:
        if not is_auto:
            artifact = compiler.export(options, report)
        else:
            artifact, search = compiler.export_auto(options, max_drop, metric or METRICS[0], report)
            output.lines(_search_lines(search))
    show_artifact(output, artifact)


def _is_searched(precision: str, max_drop: float | None, metric: str | None) -> bool:
    """Tell whether the layers in 16 bits are searched for; refuse options that go with another."""
    if "=" not in precision and precision not in OFFERED:
        raise UsageError(
            f"--precision {precision}: expected one of {', '.join(OFFERED)}, or one per tower "
            f"such as vision=int8,decoder=int4-wo{precision_hint(precision, OFFERED)}"
        )
    is_auto = precision == AUTO
    if is_auto and max_drop is None:
        raise UsageError(
            "--precision auto requires --max-drop, how much may be lost, such as --max-drop 1e-4"
        )
    if metric is not None and not is_auto:
        raise UsageError(f"--metric only applies to --precision auto (got --precision {precision})")
    return is_auto


def _require_checkpoint(path: Path | None) -> None:
    """Tell a folder of another kind from a checkpoint; what is wrong inside one is said later."""
    if path is None or not path.is_dir():
        return
    if (path / MANIFEST).exists():  # with --layout optimum it has a file of the other name too
        raise CheckpointError(
            f"{path} is a compiled directory ({MANIFEST}); expected a checkpoint, the folder "
            f"with {CHECKPOINT_FILE} and the weights it was made from"
        )
    if (path / CHECKPOINT_FILE).exists():
        return
    if "snapshots" in {path.name, *(file.name for file in path.iterdir())}:
        return  # of a Hugging Face cache: opening it says which snapshot to name
    is_pictures = any(file.suffix.lower() in SUFFIXES for file in path.iterdir())
    raise CheckpointError(
        f"{path}: expected a checkpoint, a folder with {CHECKPOINT_FILE} and weights; found no "
        f"{CHECKPOINT_FILE} in it{'; pictures to calibrate on go to --calib' * is_pictures}"
    )


def _require_components(chosen: tuple[str, ...] | None) -> None:
    """Refuse what no checkpoint has; whether this one has them is seen later."""
    for name in chosen or ():
        if name not in COMPONENTS:
            raise UsageError(
                f"component {name!r}: expected some of {', '.join(COMPONENTS)}"
                f"{did_you_mean(name, COMPONENTS)}"
            )


def _search_lines(search: Any) -> list[str]:
    chosen, total = search.chosen, len(search.ranking)
    return [
        f"{search.metric} drop {point.drop:.2g} with {point.num_layers} of {total} layers in 16 "
        f"bits, {point.nbytes / 1e6:.1f} MB{'  <- chosen' if point == chosen else ''}"
        for point in search.frontier
    ]


@click.command()
@click.argument("out", type=DIRECTORY)
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=("tensorrt-rtx",),
    show_default=True,
    callback=targets,
    help="tensorrt-rtx, tensorrt, or both, comma-separated.",
)
@click.option("--components", callback=names, help="Comma-separated; default: all there are.")
@click.option(
    "--batch",
    help="Smallest, usual, largest; 1,4,16; of a cache in place 1,1,4, of a chat decoder 1,1,1.",
)
@click.option("--length", help="The same, of texts; 1,32,80, of a chat model 1,320,3584.")
@click.option("--past", help="The same, of cached positions; 0,96,256, of a chat model 0,512,4096.")
@click.option("--expect-fused", is_flag=True, help=EXPECT_FUSED)
@click.option("--dry-run", is_flag=True, help="Say what it will take, and build nothing.")
@no_backend
@answers
def build(
    output: Output,
    out: Path,
    targets: tuple[str, ...],
    components: tuple[str, ...] | None,
    batch: str | None,
    length: str | None,
    past: str | None,
    expect_fused: bool,
    dry_run: bool,
    backend: str,
) -> None:
    """Build engines for the exported directory OUT; needs no GPU for tensorrt-rtx."""
    from internvl_edge import compiler

    profile = compiler.ranges_from(batch=batch, length=length, past=past)
    if dry_run:
        _dry_build(output, out, targets, components, profile)
        return
    before = engine_files(out)
    with output.progress() as report:
        engines = compiler.build(
            out,
            targets,
            components=components,
            profile=profile,
            expect_fused=expect_fused,
            report=report,
        )
    facts = [engine_facts(out, engine, is_new=engine.file not in before) for engine in engines]
    output.table(ENGINE_COLUMNS, [engine_row(engine) for engine in facts])
    output.result({"out": out, "engines": facts})


@click.command()
@click.argument("source", type=DIRECTORY)
@click.argument("out", type=DIRECTORY)
@click.option(
    "--layout",
    type=one_of(*LAYOUTS),
    help="Instead, write a chat checkpoint of safetensors in this layout: the original's, or that "
    "of transformers' own classes.",
)
@no_backend
@answers
def convert(output: Output, source: Path, out: Path, layout: str | None, backend: str) -> None:
    """Turn a checkpoint of pickle files (.bin, .pth) into safetensors, in a subprocess."""
    require_packages()
    from internvl_edge.export.convert.layout import convert_layout
    from internvl_edge.export.convert.pickles import convert_pickles

    if layout is not None:
        with output.progress():
            written = convert_layout(source, out, layout)
        output.lines([f"{out}: {written} tensors in the layout {layout}"])
        output.result({"out": out, "tensors": written})
        return
    with output.progress():
        done = convert_pickles(source, out)
    output.lines([*done.notes, f"{out}: {done.num_tensors} tensors of {', '.join(done.files)}"])
    output.result({"out": out, "tensors": done.num_tensors, "notes": done.notes})


def _compiler() -> Any:
    require_packages()
    from internvl_edge import compiler

    return compiler


def _dry_run(output: Output, compiler: Any, options: Any) -> None:
    """Show what an export will need, and refuse what it would refuse before it begins."""
    with output.progress() as report:
        compiler.rehearse(options, lambda forecast: _show(output, forecast), report)


def _dry_build(
    output: Output,
    out: Path,
    targets: tuple[str, ...],
    components: tuple[str, ...] | None,
    profile: Any,
) -> None:
    from internvl_edge.artifact import open_artifact
    from internvl_edge.compiler.steps.engines import forecast_build, require_buildable

    manifest = open_artifact(out, hash_files=False).manifest
    require_buildable(manifest, targets, components, profile)
    forecast = forecast_build(manifest, targets, components)
    _show(output, forecast)
    forecast.require_fit(out)


def _show(output: Output, forecast: Any) -> None:
    output.table(("step", "memory", "disk", "time"), forecast.rows())
    output.result(forecast.to_json())
