"""``python -m internvl_edge.demo``: the main job on the bundled model, end to end.

Exports the trained demo at several precisions, builds TensorRT-RTX engines of the INT8 one where
the package is installed, and prints what each precision costs and keeps: accuracy on held-out
scans, agreement with PyTorch, size, and latency on this machine's CPU, all contenders in turns.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

import internvl_edge
from internvl_edge import compiler
from internvl_edge.artifact.open import Artifact
from internvl_edge.benchmark.machine import environment
from internvl_edge.benchmark.timing import measure_many
from internvl_edge.cli.console import Output, error_line
from internvl_edge.compiler.plan import demo_checkpoint
from internvl_edge.demo import evaluate, scenes
from internvl_edge.errors import InternVLError
from internvl_edge.files.disk import write_atomically

PRECISIONS = ("fp32", "fp16", "int8", "fp8", "int4-wo")
ENGINES_AT = "int8"
NUM_SCENES = 300  # held-out single digits to classify
NUM_CAPTIONS = 100  # distinct captions to retrieve among
NUM_TEXTS = 300  # captions, and as many answers, that must be right word for word
NUM_PAIRS = 300  # of image and text to match, half of them near misses
SECONDS = 2.0  # of latency measurement
TASKS = {  # of the report, by what ``quality`` calls them
    "zero_shot": "zero-shot digits",
    "recall_at_1_c": "image to text, InternVL-C",
    "recall_at_1_g": "image to text, InternVL-G",
    "matching": "image-text matching",
    "captions": "captions, word for word",
    "answers": "answers, word for word",
}


def export_all(out: Path, *, force: bool, output: Output) -> dict[str, Artifact]:
    """Export every precision into a directory of its own."""
    engines = ("tensorrt-rtx",) if importlib.util.find_spec("tensorrt_rtx") else ()
    artifacts = {}
    for precision in PRECISIONS:
        started = time.perf_counter()
        options = compiler.ExportOptions(
            out=out / precision,
            precision=precision,
            samples=scenes.calibration_set,
            targets=("onnx", *(engines if precision == ENGINES_AT else ())),
            force=force,
        )
        with output.progress() as report:
            artifacts[precision] = compiler.export(options, report)
        built = len(artifacts[precision].manifest.engines)
        output.say(
            f"{out / precision}: {len(artifacts[precision].manifest.components)} components"
            + (f", {built} TensorRT-RTX engines" if built else "")
            + f" in {time.perf_counter() - started:.0f} s"
        )
    if not engines:
        output.say('no engines: tensorrt-rtx is missing; pip install "internvl-edge[rtx]"')
    return artifacts


def quality(artifact: Artifact) -> dict[str, float]:
    """Accuracy on held-out scans, and the image embedding's agreement with PyTorch."""
    verification = artifact.manifest.components["image_embed"].verification or {}
    with internvl_edge.load(artifact.path) as model:
        return {
            "zero_shot": evaluate.zero_shot_accuracy(model, NUM_SCENES),
            "recall_at_1_c": evaluate.retrieval_recall_at_1(model, NUM_CAPTIONS, mode="c"),
            "recall_at_1_g": evaluate.retrieval_recall_at_1(model, NUM_CAPTIONS, mode="g"),
            "matching": evaluate.matching_accuracy(model, NUM_PAIRS),
            "captions": evaluate.caption_exact_match(model, NUM_TEXTS),
            "answers": evaluate.vqa_accuracy(model, NUM_TEXTS),
            "cosine": float(verification["cosine"]),
        }


def latencies(artifacts: dict[str, Artifact]) -> dict[str, Any]:
    """Time one image through ``image_embed`` at every precision and in PyTorch, in turns."""
    import torch

    from internvl_edge.export.checkpoint.checkpoint import load_reference
    from internvl_edge.export.components import COMPONENTS, build_component

    model = load_reference(demo_checkpoint())
    reference = build_component(COMPONENTS["image_embed"], model)
    size = next(iter(artifacts.values())).manifest.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    tensor = torch.from_numpy(pixels)

    def eager() -> object:
        with torch.inference_mode():
            return reference(tensor)

    with ExitStack() as stack:
        contenders: dict[str, Any] = {"pytorch": eager}
        for precision, artifact in artifacts.items():
            session = stack.enter_context(internvl_edge.open_session(artifact.path, "image_embed"))
            contenders[precision] = lambda s=session: s.run({"pixel_values": pixels})
        return measure_many(contenders, min_duration_s=SECONDS)


def weights_nbytes(artifact: Artifact) -> int:
    """Size of a directory's weights files."""
    files = artifact.manifest.files
    return sum(file.nbytes for name, file in files.items() if name.endswith(".safetensors"))


def write_report(
    out: Path, artifacts: dict[str, Artifact], found: dict[str, dict[str, float]]
) -> None:
    """The INT8 directory's report with the accuracy of all, as ``OUT/report.html``."""
    from internvl_edge.compiler.report.report import AccuracyFigures, report_with

    accuracy = AccuracyFigures(
        on=f"held-out scans: {NUM_SCENES} scenes, {NUM_PAIRS} pairs, {NUM_TEXTS} texts",
        precisions=tuple(found),
        tasks=tuple(
            (name, tuple(figures[key] for figures in found.values())) for key, name in TASKS.items()
        ),
    )
    artifact = artifacts.get("int8") or next(iter(artifacts.values()))
    text = report_with(artifact.path, artifact.manifest, accuracy=accuracy)
    write_atomically(out / "report.html", text.encode())


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option("--force", is_flag=True, help="Replace what an earlier run left there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def main(out: Path, force: bool, as_json: bool) -> None:
    """Compile the bundled model at every precision and compare."""
    output = Output(as_json=as_json)
    artifacts = export_all(out, force=force, output=output)
    found = {precision: quality(artifact) for precision, artifact in artifacts.items()}
    timings = latencies(artifacts)
    rows = [
        (
            precision,
            f"{100 * found[precision]['zero_shot']:.1f} %",
            f"{100 * found[precision]['recall_at_1_c']:.1f} / "
            f"{100 * found[precision]['recall_at_1_g']:.1f} %",
            f"{100 * found[precision]['matching']:.1f} %",
            f"{100 * found[precision]['captions']:.1f} / {100 * found[precision]['answers']:.1f} %",
            f"{found[precision]['cosine']:.5f}",
            f"{weights_nbytes(artifact) / 1e6:.2f} MB",
            f"{timings[precision].percentile_ms(50):.2f} ms",
        )
        for precision, artifact in artifacts.items()
    ]
    write_report(out, artifacts, found)
    columns = (
        *("precision", "zero-shot", "R@1 C / G", "matching", "captions / VQA"),
        *("cosine", "weights", "CPU p50"),
    )
    output.table(columns, rows)
    output.say(f"PyTorch eager fp32, the same image: {timings['pytorch'].percentile_ms(50):.2f} ms")
    card = environment()
    packages = ", ".join(
        f"{name} {version}" for name, version in card["packages"].items() if version
    )
    output.say(f"the same in a browser: {out / 'report.html'}")
    output.say(f"{card['cpu']}, {card['cores_usable']} cores; {packages}")
    output.result(
        {
            "out": out,
            "quality": found,
            "latency": {name: timing.to_json() for name, timing in timings.items()},
            "weights_nbytes": {name: weights_nbytes(a) for name, a in artifacts.items()},
            "environment": card,
        }
    )


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except click.ClickException as refusal:
        error_line(refusal.format_message())
        sys.exit(refusal.exit_code)
    except InternVLError as failure:
        error_line(str(failure))
        sys.exit(failure.exit_code)
