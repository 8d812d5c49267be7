"""Options that several commands share."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from internvl_edge.cli.console import Output

Function = TypeVar("Function", bound=Callable[..., Any])

DIRECTORY = click.Path(path_type=Path)
BACKENDS = ("auto", "onnxruntime", "tensorrt-rtx", "tensorrt")


def answers(function: Function) -> Function:
    """Add ``--json`` and ``--quiet``; the command gets an ``Output`` as ``output``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Say nothing but the answer and errors.")
    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> Any:
        logging.getLogger("internvl_edge").setLevel(logging.ERROR if quiet else logging.NOTSET)
        return function(*args, output=Output(as_json=as_json, quiet=quiet), **kwargs)

    return wrapped  # type: ignore[return-value]


def one_of(*choices: str) -> click.Choice[str]:
    """One of these names, in whatever case."""
    return click.Choice(choices, case_sensitive=False)


backend = click.option(
    "--backend",
    type=one_of(*BACKENDS),
    default="auto",
    show_default=True,
    help="What runs the components.",
)


def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """A comma-separated list, or None."""
    return (
        None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())
    )


def targets(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Every name of an option that may be repeated, and each time be a comma-separated list."""
    found = [part.strip().lower() for text in value for part in text.split(",")]
    if not any(found):
        raise click.BadParameter("expected at least one name, found none")
    return tuple(dict.fromkeys(filter(None, found)))


def memory(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Bytes from a size such as ``3GB``, ``800 MB`` or ``2GiB``; None stays None."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"expected a size such as 3GB, found {value!r}")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
