"""``python -m internvl_edge.demo``: the main job on the bundled model, end to end.

First it compiles the trained model to INT8 and lets it classify, caption and answer on a picture
that it was never trained on. Then it compiles the other precisions, two at a time, builds
TensorRT-RTX engines of the INT8 directory where the package is installed, and prints what each
precision costs and keeps: accuracy on held-out scans, agreement with PyTorch, size, and latency on
this machine's CPU, all contenders in turns. The chat model follows: a conversation about two
pictures, and how many answers in conversations are right at each precision.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

import internvl_edge
from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.artifact.components import COMPONENTS, IMAGE_EMBED
from internvl_edge.artifact.publish import check_out
from internvl_edge.benchmark.machine import environment
from internvl_edge.benchmark.timing import Timing, measure_many
from internvl_edge.compiler.plan import demo_checkpoint
from internvl_edge.demo.compare import (
    NUM_DIALOGUES,
    NUM_PAIRS,
    NUM_SCENES,
    NUM_TEXTS,
    compare,
    export,
)
from internvl_edge.demo.picture import ask, drawn, talk
from internvl_edge.errors import InternVLError
from internvl_edge.files.disk import write_atomically

PRECISIONS = ("fp32", "fp16", "int8", "fp8", "int4-wo")
CHAT, CHAT_PRECISIONS = "demo-chat", ("fp32", "int8", "fp8", "int4-wo")
FIRST = "int8"  # compiled before the others, asked about a picture, and built into engines
SECONDS = 2.0  # of latency measurement
UNLIMITED = 100_000  # columns
TASKS = {  # of the report, by what ``quality`` calls them
    "zero_shot": "zero-shot digits",
    "recall_at_1_c": "image to text, InternVL-C",
    "recall_at_1_g": "image to text, InternVL-G",
    "matching": "image-text matching",
    "captions": "captions, word for word",
    "answers": "answers, word for word",
}

human = Console(stderr=True, highlight=False)


def show_picture(artifact: Artifact, out: Path) -> dict[str, Any]:
    """Let the compiled model look at a picture; show both, and return them for programs."""
    answers = ask(artifact.path)
    file = out / "picture.png"
    Image.fromarray(answers.image).save(file)
    if human.is_terminal and human.color_system == "truecolor":
        human.print(drawn(answers.image))
    for line in answers.lines():
        say(line)
    say(f"by {artifact.path}, in {1e3 * answers.seconds:.0f} ms; the picture is {file}")
    return {
        "picture": str(file),
        "truth": answers.truth,
        "classes": dict(answers.classes),
        "caption": answers.caption,
        "question": answers.question,
        "answer": answers.answer,
    }


def show_conversation(out: Path) -> dict[str, Any]:
    """Let the compiled chat model talk about two pictures; show it, and return it for programs."""
    conversation = talk(out)
    if human.is_terminal and human.color_system == "truecolor":
        for image in conversation.images:
            human.print(drawn(image))
    for line in conversation.lines():
        say(line)
    say(f"by {out}, about two pictures, in {1e3 * conversation.seconds:.0f} ms")
    return {
        "questions": conversation.questions,
        "answers": conversation.answers,
        "truths": conversation.truths,
    }


def latencies(artifacts: dict[str, Artifact]) -> dict[str, Any]:
    """Time one image through ``image_embed`` at every precision and in PyTorch, in turns."""
    import torch

    from internvl_edge.export.checkpoint.load import load_reference
    from internvl_edge.export.components import build_component

    model = load_reference(demo_checkpoint())
    reference = build_component(COMPONENTS[IMAGE_EMBED], model)
    size = next(iter(artifacts.values())).manifest.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    tensor = torch.from_numpy(pixels)

    def eager() -> object:
        with torch.inference_mode():
            return reference(tensor)

    any_speed = internvl_edge.OrtOptions(allow_slow=True)  # also INT8 on a GPU, for comparison
    with ExitStack() as stack:
        contenders: dict[str, Any] = {"pytorch": eager}
        for precision, artifact in artifacts.items():
            session = internvl_edge.open_session(artifact.path, IMAGE_EMBED, options=any_speed)
            stack.callback(session.close)
            contenders[precision] = lambda s=session: s.run({"pixel_values": pixels})
        return measure_many(contenders, min_duration_s=SECONDS)


def weights_nbytes(artifact: Artifact) -> int:
    """Sum the sizes of a directory's weights files."""
    files = artifact.manifest.files
    return sum(file.nbytes for name, file in files.items() if name.endswith(".safetensors"))


def write_report(
    out: Path, artifacts: dict[str, Artifact], figures: dict[str, dict[str, float]]
) -> None:
    """Write the INT8 directory's report with the accuracy of all, as ``OUT/report.html``."""
    from internvl_edge.compiler.report.report import AccuracyFigures, report_with

    accuracy = AccuracyFigures(
        on=f"held-out scans: {NUM_SCENES} scenes, {NUM_PAIRS} pairs, {NUM_TEXTS} texts",
        precisions=tuple(figures),
        tasks=tuple(
            (name, tuple(of[key] for of in figures.values())) for key, name in TASKS.items()
        ),
    )
    artifact = artifacts.get("int8") or next(iter(artifacts.values()))
    text = report_with(artifact.path, artifact.manifest, accuracy=accuracy)
    write_atomically(out / "report.html", text.encode())


def row(artifact: Artifact, figures: dict[str, float], timing: Timing) -> tuple[str, ...]:
    """Show one precision as a row of the table."""
    percent = {name: f"{100 * share:.1f}" for name, share in figures.items()}
    return (
        artifact.path.name,
        f"{percent['zero_shot']} %",
        f"{percent['recall_at_1_c']} / {percent['recall_at_1_g']} %",
        f"{percent['matching']} %",
        f"{percent['captions']} / {percent['answers']} %",
        f"{figures['cosine']:.5f}",
        f"{weights_nbytes(artifact) / 1e6:.2f} MB",
        f"{timing.percentile_ms(50):.2f} ms",
    )


COLUMNS = (
    *("precision", "zero-shot", "R@1 C / G", "matching", "captions / VQA"),
    *("cosine", "weights", "CPU p50"),
)
CHAT_COLUMNS = ("precision", f"answers in {NUM_DIALOGUES} conversations", "cosine", "weights")


def chat_row(artifact: Artifact, figures: dict[str, float]) -> tuple[str, ...]:
    """Show one precision of the chat model as a row of its table."""
    return (
        artifact.path.name,
        f"{100 * figures['dialogues']:.1f} %",
        f"{figures['cosine']:.5f}",
        f"{weights_nbytes(artifact) / 1e6:.2f} MB",
    )


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout; what a program or a file reads is never cut."""
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for cells in rows:
        table.add_row(*cells)
    answers = Console(highlight=False)
    answers.width = answers.width if answers.is_terminal else UNLIMITED
    answers.print(table)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option("--force", is_flag=True, help="Replace what an earlier run left there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def main(out: Path, force: bool, as_json: bool) -> None:
    """Compile the bundled models at every precision and compare."""
    chats = out / "chat"
    for place in (*(out / p for p in PRECISIONS), *(chats / p for p in CHAT_PRECISIONS)):
        check_out(place, force=force)
    picture = show_picture(export(out, FIRST, say, force=force), out)
    figures = compare(out, PRECISIONS, FIRST, force=force)
    artifacts = {precision: open_artifact(out / precision) for precision in PRECISIONS}
    timings = latencies(artifacts)
    write_report(out, artifacts, figures)
    if not as_json:
        print_table(COLUMNS, (row(a, figures[p], timings[p]) for p, a in artifacts.items()))
    say(f"PyTorch eager fp32, the same image: {timings['pytorch'].percentile_ms(50):.2f} ms")
    talked = compare(chats, CHAT_PRECISIONS, force=force, model=CHAT)
    conversation = show_conversation(chats / FIRST)
    compiled_chats = {precision: open_artifact(chats / precision) for precision in CHAT_PRECISIONS}
    if not as_json:
        print_table(CHAT_COLUMNS, (chat_row(a, talked[p]) for p, a in compiled_chats.items()))
    card = environment()
    packages = ", ".join(
        f"{name} {version}" for name, version in card["packages"].items() if version
    )
    say(f"the same in a browser: {out / 'report.html'}")
    say(f"{card['cpu']}, {card['cores_usable']} cores; {packages}")
    if as_json:
        result = {
            "out": str(out),
            "picture": picture,
            "conversation": conversation,
            "quality": figures,
            "chat_quality": talked,
            "latency": {name: timing.to_json() for name, timing in timings.items()},
            "weights_nbytes": {name: weights_nbytes(a) for name, a in artifacts.items()},
            "chat_weights_nbytes": {n: weights_nbytes(a) for n, a in compiled_chats.items()},
            "environment": card,
        }
        click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))


def say(text: str) -> None:
    """Print a line for people on stderr, without markup."""
    human.print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except (click.ClickException, InternVLError) as failure:
        message = failure.format_message() if isinstance(failure, click.ClickException) else failure
        human.print(f"error: {message}", style="red", markup=False, soft_wrap=True)
        sys.exit(failure.exit_code)
