"""``caption`` and ``answer``: text about images from the shell."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from internvl_edge.cli.console import Output
from internvl_edge.cli.inputs import (
    Readable,
    expand,
    one_picture,
    recursive_option,
    skip_option,
    source_of,
)
from internvl_edge.cli.options import DIRECTORY, Finite, Running, answers, runs_model
from internvl_edge.errors import UsageError

Function = TypeVar("Function", bound=Callable[..., Any])

NUMBER = Finite()
OPTIONS: dict[str, tuple[Any, str]] = {
    "num_beams": (int, "Sentences kept under way, up to 128; 1 is greedy."),
    "max_new_tokens": (int, "The most tokens of a text; {tokens} by default."),
    "min_new_tokens": (int, "The fewest; 0 by default."),
    "length_penalty": (NUMBER, "Of beams: above 0, longer sentences gain; 1 by default."),
    "repetition_penalty": (NUMBER, "Above 1, what was there before is less likely; 1 by default."),
    "temperature": (NUMBER, "Draw tokens; 1: as likely as the model has them; 0: the likeliest."),
    "top_k": (int, "Draw from so many of the most likely; 0: from all."),
    "top_p": (NUMBER, "Draw from the most likely, until they have this share."),
    "seed": (int, "Draw the same tokens again."),
}
DRAWN = {"temperature", "top_k", "top_p"}  # of one beam
NAMES = re.compile(rf"(?<![\w./-])(?:{'|'.join([*OPTIONS, 'max_tiles'])})(?![\w/])")
stream_option = click.option("--stream", is_flag=True, help="Print text as it comes; greedy.")


def generation(max_new_tokens: int | str) -> Callable[[Function], Function]:
    """Add the options of generation; the command gets those given as ``how``.

    Args:
        max_new_tokens: the command's default, for its help.
    """

    def add(function: Function) -> Function:
        @functools.wraps(function)
        def wrapped(**given: Any) -> Any:
            asked = {name: given.pop(name) for name in OPTIONS}
            how = {name: value for name, value in asked.items() if value is not None}
            if "seed" in how and (not how.keys() & DRAWN or how.get("temperature") == 0):
                raise UsageError(
                    f"--seed {how['seed']}: nothing is drawn; add --temperature, --top-k or "
                    "--top-p, or leave --seed out"
                )
            try:
                return function(how=how, **given)
            except UsageError as error:
                raise UsageError(as_typed(str(error))) from error

        for name, (kind, text) in reversed(OPTIONS.items()):
            option = click.option(
                as_typed(name), name, type=kind, help=text.format(tokens=max_new_tokens)
            )
            wrapped = option(wrapped)
        return wrapped  # type: ignore[return-value]

    return add


def as_typed(message: str) -> str:
    """Write the names of options in a message of the library as they are typed."""
    return NAMES.sub(lambda found: f"--{found[0].replace('_', '-')}", message)


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("images", type=DIRECTORY, nargs=-1, required=True)
@click.option("--prompt", help="What the caption continues; 'English caption:' by default.")
@generation(30)
@stream_option
@recursive_option
@skip_option
@runs_model
@answers
def caption(
    output: Output,
    out: Path,
    images: tuple[Path, ...],
    prompt: str | None,
    how: dict[str, Any],
    stream: bool,
    recursive: bool,
    skip_errors: bool,
    running: Running,
) -> None:
    """Describe IMAGES (files, folders, or - for stdin), by five beams or as an option says.

    A picture that cannot be read ends no folder, as for embed.
    """
    found = expand(output, images, recursive=recursive)
    read = Readable(found.paths, skip=skip_errors)
    asked: dict[str, Any] = {} if prompt is None else {"prompt": prompt}
    with running.open(out) as model:
        if stream:
            _require_one("images", len(found.paths))
            picture, read.paths = source_of(found.paths[0]), found.paths
            captions = [show(output, model.stream(picture, **asked, **how))]
        else:
            captions = model.caption(read.pictures(model, "retrieval"), **asked, **how)
            pairs = zip(read.paths, captions, strict=True)
            output.lines([f"{path}: {text}" for path, text in pairs])
    results = [
        {"file": path, "caption": text} for path, text in zip(read.paths, captions, strict=True)
    ]
    output.result({"results": results, "errors": read.to_json(), "left_out": found.left_out})
    read.finish()


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("image", type=DIRECTORY)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    help="A text to continue, as 'Question: how many? Answer:'; repeat for several.",
)
@generation(30)
@stream_option
@runs_model
@answers
def answer(
    output: Output,
    out: Path,
    image: Path,
    prompts: tuple[str, ...],
    how: dict[str, Any],
    stream: bool,
    running: Running,
) -> None:
    """Continue prompts about IMAGE (or - for stdin), which is looked at once for all of them."""
    picture = one_picture(image)
    with running.open(out) as model:
        if stream:
            _require_one("prompts", len(prompts))
            texts = [show(output, model.stream(picture, prompts[0], **how))]
        else:
            texts = model.answer([picture], list(prompts), **how)
            for text in texts:
                output.text(text)
    pairs = zip(prompts, texts, strict=True)
    output.result({"file": image, "results": [{"prompt": p, "answer": t} for p, t in pairs]})


def show(output: Output, pieces: Iterator[str]) -> str:
    """Print pieces of a text as they come; all of it."""
    told = []
    for piece in pieces:
        output.piece(piece)
        told.append(piece)
    output.lines([""])
    return "".join(told)


def _require_one(what: str, count: int) -> None:
    if count != 1:
        raise UsageError(f"--stream: expected one of {what}, found {count}; leave --stream out")
