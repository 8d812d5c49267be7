"""``chat``: a conversation about images from the shell."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from internvl_edge.cli.console import Output, error_line
from internvl_edge.cli.inputs import STDIN, expand, source_of
from internvl_edge.cli.options import DIRECTORY, Running, answers, runs_model
from internvl_edge.cli.text import as_typed, generation, show, stream_option
from internvl_edge.errors import InternVLError, MediaError, SessionDead, UsageError
from internvl_edge.runtime.model import Model
from internvl_edge.runtime.tasks.chat import remembered
from internvl_edge.runtime.tasks.chat_prompt import VIDEO, has_place
from internvl_edge.runtime.text.templates import Turn

QUIT, CLEAR = "/quit", "/clear"
HELP = f"Ask; {CLEAR} forgets the conversation, {QUIT} or Ctrl-D ends it."


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("images", type=DIRECTORY, nargs=-1)
@click.option(
    "--question",
    "questions",
    multiple=True,
    help="Ask this and end; repeat to go on. Without it, questions are read from stdin.",
)
@click.option("--template", help="How the prompt is spelled; the checkpoint's own by default.")
@click.option("--system", help="Instead of the template's own sentence.")
@click.option(
    "--think",
    is_flag=True,
    help="Ask for a thought first, as InternVL3.5 knows it; shown apart from the answer.",
)
@click.option(
    "--max-tiles", type=int, help="Tiles of an image, 1 to 40; the model's own by default."
)
@click.option("--combined", is_flag=True, help="All IMAGES stand in one place of the question.")
@click.option(
    "--video",
    type=DIRECTORY,
    help="Talk about this video, a file or a folder of frames, in place of IMAGES.",
)
@click.option(
    "--frames", type=click.IntRange(min=1), default=8, show_default=True, help="Of the video."
)
@generation("1024, or as many as there is room for,")
@stream_option
@runs_model
@answers
def chat(
    output: Output,
    out: Path,
    images: tuple[Path, ...],
    questions: tuple[str, ...],
    template: str | None,
    system: str | None,
    think: bool,
    max_tiles: int | None,
    combined: bool,
    video: Path | None,
    frames: int,
    how: dict[str, Any],
    stream: bool,
    running: Running,
) -> None:
    """Talk about IMAGES, which are looked at once; the conversation is remembered.

    Of questions on stdin, one that fails is told and the next one asked; the exit code is that of
    the first failure. In a question, <image> is the place of an image, and <video> that of a
    video's frames; without, they stand before the first one. An InternVL-G, as the bundled
    demo, answers single questions about one image: what was said before is shown again with --json
    and not read by the model.
    """
    if stream and how.get("num_beams", 1) > 1:
        raise UsageError("--stream: only one beam can be streamed; leave --num-beams out")
    if video is not None and (images or combined or max_tiles is not None):
        raise UsageError(
            f"--video {video}: expected neither IMAGES nor --combined nor --max-tiles with it: a "
            "conversation is about a video, of which every frame is one tile, or about images"
        )
    options = {"template": template, "system": system, **how}
    if think:
        options["think"] = True
    _require_files(images)
    paths = expand(output, images).paths
    if STDIN in paths and not questions:
        raise UsageError("-: stdin is read for questions; add --question, or name a file")
    turns: list[dict[str, Any]] = []
    failed: list[InternVLError] = []
    with running.open(out) as model:
        seen = _seen(model, paths, max_tiles, video, frames, combined=combined)
        history: tuple[Turn, ...] = ()
        for question in questions or _typed(output):
            if question.strip() == CLEAR and not questions:
                history = ()
                continue
            if video is not None and not history and not has_place(question):
                question = f"{VIDEO}\n{question}"
            try:
                turn, history = _answer(
                    output, model, seen, question, history, options, stream=stream
                )
            except InternVLError as error:
                if questions or isinstance(error, SessionDead):
                    raise
                failed.append(error)
                turns.append({"question": question, "error": _told(error)})
                continue
            turns.append({"question": question, **turn})
    output.result({"images": paths, "video": video, "turns": turns})
    if failed and not _is_terminal():
        raise click.exceptions.Exit(failed[0].exit_code)


def _require_files(paths: Sequence[Path]) -> None:
    """Refuse what is no file before the model is opened: often it is the question.

    Raises:
        MediaError: with the option that asks.
    """
    for path in paths:
        if path != STDIN and not os.path.exists(path):  # False, too, of a name that is too long
            raise MediaError(
                f"{path}: expected an image, found no such file; a question is asked by --question"
            )


def _told(error: InternVLError) -> dict[str, Any]:
    """Say what is wrong with a question; the same for programs."""
    message = as_typed(str(error))
    error_line(message)
    return {"type": type(error).__name__, "message": message, "exit_code": error.exit_code}


def _seen(
    model: Model,
    paths: list[Path],
    max_tiles: int | None,
    video: Path | None,
    frames: int,
    *,
    combined: bool,
) -> Any:
    """Look at what the conversation is about; None: at nothing."""
    if video is not None:
        return model.see(model.chat_frames(video, frames), max_tiles=1)
    if not paths:
        return None
    images = [source_of(path) for path in paths]
    return model.see([images] if combined else images, max_tiles=max_tiles)


def _answer(
    output: Output,
    model: Model,
    seen: Any,
    question: str,
    history: tuple[Turn, ...],
    options: dict[str, Any],
    *,
    stream: bool,
) -> tuple[dict[str, Any], tuple[Turn, ...]]:
    """Answer one question: what is told of it, and the history after it."""
    if stream:
        pieces = model.chat_stream(seen, question, history, **options)
        text = show(output, pieces)
        thought, usage = pieces.thought, pieces.usage
        history = remembered(model.components, seen, question, history, text)
    else:
        reply = model.chat(seen, question, history, **options)
        text, thought, history = reply.text, reply.thought, reply.history
        usage = reply.usage
        output.text(text)
    told = {"answer": text, "usage": asdict(usage)}
    if thought is None:
        return told, history
    output.say(f"thought: {thought}")
    return {**told, "thought": thought}, history


def _typed(output: Output) -> Iterator[str]:
    """Read questions from stdin, line by line; on a terminal, ask for them."""
    if sys.stdin is None:  # closed: there are none
        return
    is_terminal = _is_terminal()
    if is_terminal:
        output.say(HELP)
    while True:
        if is_terminal:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line or line.strip() == QUIT:
            return
        if line.strip():
            yield line.strip()


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
