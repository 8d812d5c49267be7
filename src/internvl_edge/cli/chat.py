"""``chat``: a conversation about images from the shell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from internvl_edge.cli.console import Output, error_line
from internvl_edge.cli.embed import expand, open_model
from internvl_edge.cli.options import DIRECTORY, answers, backend
from internvl_edge.cli.text import as_typed, generation, show, stream_option
from internvl_edge.errors import InternVLError, SessionDead, UsageError
from internvl_edge.runtime.model import CHAT_TOKENS, Model
from internvl_edge.runtime.tasks.chat import remembered
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
@generation(CHAT_TOKENS)
@stream_option
@backend
@answers
def chat(
    output: Output,
    out: Path,
    images: tuple[Path, ...],
    questions: tuple[str, ...],
    template: str | None,
    system: str | None,
    how: dict[str, Any],
    stream: bool,
    backend: str,
) -> None:
    """Talk about IMAGES, which are looked at once; the conversation is remembered.

    Of questions on stdin, one that fails is told and the next one asked; the exit code is that of
    the first failure. An InternVL-G, as the bundled demo, answers single questions about one image:
    what was said before is shown again with --json and not read by the model.
    """
    if stream and how.get("num_beams", 1) > 1:
        raise UsageError("--stream: only one beam can be streamed; leave --num-beams out")
    options = {"template": template, "system": system, **how}
    paths = expand(images) if images else []
    turns: list[dict[str, Any]] = []
    failed: list[InternVLError] = []
    with open_model(out, backend) as model:
        seen = model.see(paths) if paths else None
        history: tuple[Turn, ...] = ()
        for question in questions or _typed(output):
            if question.strip() == CLEAR and not questions:
                history = ()
                continue
            try:
                text, history = _answer(
                    output, model, seen, question, history, options, stream=stream
                )
            except InternVLError as error:
                if questions or isinstance(error, SessionDead):
                    raise
                failed.append(error)
                turns.append({"question": question, "error": _told(error)})
                continue
            turns.append({"question": question, "answer": text})
    output.result({"images": paths, "turns": turns})
    if failed and not sys.stdin.isatty():
        raise click.exceptions.Exit(failed[0].exit_code)


def _told(error: InternVLError) -> dict[str, Any]:
    """Say what is wrong with a question; the same for programs."""
    message = as_typed(str(error))
    error_line(message)
    return {"type": type(error).__name__, "message": message, "exit_code": error.exit_code}


def _answer(
    output: Output,
    model: Model,
    seen: Any,
    question: str,
    history: tuple[Turn, ...],
    options: dict[str, Any],
    *,
    stream: bool,
) -> tuple[str, tuple[Turn, ...]]:
    if stream:
        text = show(output, model.chat_stream(seen, question, history, **options))
        return text, remembered(model.components, seen, question, history, text)
    reply = model.chat(seen, question, history, **options)
    output.text(reply.text)
    return reply.text, reply.history


def _typed(output: Output) -> Iterator[str]:
    """Read questions from stdin, line by line; on a terminal, ask for them."""
    is_terminal = sys.stdin.isatty()
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
