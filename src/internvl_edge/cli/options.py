"""Options that several commands share."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from internvl_edge.artifact import CHECKPOINT_FILE, MANIFEST
from internvl_edge.cli.console import Output
from internvl_edge.demo import bundled
from internvl_edge.files.cores import MAX_THREADS
from internvl_edge.runtime.images.options import ImageOptions
from internvl_edge.runtime.ort.options import choose_providers
from internvl_edge.runtime.session import BACKENDS, options_for, require_device

if TYPE_CHECKING:
    from internvl_edge.runtime.model import Model

Function = TypeVar("Function", bound=Callable[..., Any])

CHOICES = ("auto", *BACKENDS)
OURS = (CHECKPOINT_FILE, MANIFEST)  # either is in a folder that a command takes


class Place(click.Path):
    """A path; an empty text, which ``pathlib`` takes for the current folder, is none."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | Any:
        if value == "":
            self.fail("expected a path, found an empty text; the current folder is '.'", param, ctx)
        return super().convert(value, param, ctx)


class CheckpointPlace(Place):
    """A checkpoint's folder, or the name of a bundled model; a folder of that name wins."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | Any:
        path = super().convert(value, param, ctx)
        if isinstance(value, str) and not any((path / name).exists() for name in OURS):
            return bundled(value) or path
        return path


class NewFile(Place):
    """A file that will be written, in a folder that is there: seen before any work."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | Any:
        path = super().convert(value, param, ctx)
        folder = path.absolute().parent
        if path.is_dir():
            self.fail(f"{path}: expected a file to write, found a folder", param, ctx)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            what = "a symbolic link" if path.is_symlink() else "a pipe or a device"
            self.fail(f"{path}: expected the name of a file, found {what}", param, ctx)
        if not os.access(folder, os.W_OK | os.X_OK):
            self.fail(f"{path}: {folder} cannot be written or is missing", param, ctx)
        if path.exists() and not os.access(path, os.W_OK):
            self.fail(f"{path}: cannot be written", param, ctx)
        return path


DIRECTORY, CHECKPOINT, NEW_FILE = Place(), CheckpointPlace(), NewFile()


def answers(function: Function) -> Function:
    """Add ``--json`` and ``--quiet``; the command gets an ``Output`` as ``output``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Say nothing but the answer and errors.")
    @functools.wraps(function)
    def wrapped(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> Any:
        logger = logging.getLogger("internvl_edge")
        before = logger.level
        logger.setLevel(logging.ERROR if quiet else before)
        try:
            with warnings.catch_warnings():
                if quiet:
                    warnings.simplefilter("ignore", UserWarning)
                return function(*args, output=Output(as_json=as_json, quiet=quiet), **kwargs)
        finally:
            logger.setLevel(before)

    return wrapped  # type: ignore[return-value]


def one_of(*choices: str) -> click.Choice[str]:
    """Make a type of option: one of these names, in whatever case."""
    return click.Choice(choices, case_sensitive=False)


def _backend(text: str) -> Callable[[Function], Function]:
    return click.option(
        "--backend", type=one_of(*CHOICES), default="auto", show_default=True, help=text
    )


class Finite(click.FloatRange):
    """A number within a range; infinity and NaN, which compare as no number, are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"expected a finite number, found {value}", param, ctx)
        return number


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """How a command runs its model, and reads its pictures."""

    backend: str
    device: str
    threads: int | None
    allow_slow: bool
    images: ImageOptions

    def open(self, out: Path) -> Model:
        """Open the model of a compiled directory."""
        from internvl_edge.runtime.model import load

        options = options_for(self.backend, self.threads, allow_slow=self.allow_slow)
        return load(out, self.backend, self.device, options=options, images=self.images)

    def for_pool(self) -> Running:
        """Return the same for a pool of threads, each of which runs the model by itself."""
        if self.backend not in ("auto", "onnxruntime"):
            return self
        return replace(self, threads=1)


device = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, or cuda:1 of several."
)
threads = click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="On the processor, at once; default: the cores that this process may use.",
)


def _found(_: click.Context, __: click.Parameter, value: str) -> str:
    """Refuse a device that is not here, before any work."""
    device = require_device(value)
    if device != "cpu":
        choose_providers(device)
    return device


def on_hardware(function: Function) -> Function:
    """Add the options of a command that compares graphs with PyTorch."""
    chosen = click.option(
        "--device",
        default="cpu",
        show_default=True,
        callback=_found,
        help="What runs the graphs: auto, cpu, cuda, or cuda:1 of several. PyTorch is on cpu.",
    )
    return chosen(threads(function))


allow_slow = click.option(
    "--allow-slow",
    is_flag=True,
    help="On a GPU, let ONNX Runtime run INT8 and FP8, which it computes in more bits.",
)


def runs_model(function: Function) -> Function:
    """Add the options of a command that runs a model; it gets a ``Running`` as ``running``."""

    @backend
    @device
    @threads
    @allow_slow
    @click.option(
        "--background",
        default="white",
        show_default=True,
        help="The colour under what is transparent: white, black or #rrggbb; none: leave it out.",
    )
    @click.option(
        "--max-megapixels",
        type=Finite(min=0, min_open=True),
        help="The largest picture, and decoded whole up to there; default: 50 are decoded whole, "
        "larger JPEGs, up to 256, at a fraction.",
    )
    @functools.wraps(function)
    def wrapped(
        *args: Any,
        backend: str,
        device: str,
        threads: int | None,
        allow_slow: bool,
        background: str,
        max_megapixels: float | None,
        **kwargs: Any,
    ) -> Any:
        images = ImageOptions(
            background=None if background.lower() == "none" else background,
            max_megapixels=max_megapixels,
        )
        running = Running(
            backend=backend,
            device=require_device(device),
            threads=threads,
            allow_slow=allow_slow,
            images=images,
        )
        options_for(backend, threads, allow_slow=allow_slow)  # refused before any work
        return function(*args, running=running, **kwargs)

    return wrapped  # type: ignore[return-value]


backend = _backend("What runs the components.")
no_backend = _backend("Taken by every command; it changes nothing in this one.")


def names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Split a comma-separated list; None stays None."""
    return (
        None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())
    )


def targets(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Collect the names of an option that may be repeated, each time a comma-separated list."""
    chosen = [part.strip().lower() for text in value for part in text.split(",")]
    if not any(chosen):
        raise click.BadParameter("expected at least one name, found none")
    return tuple(dict.fromkeys(filter(None, chosen)))


def memory(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Read a size such as ``3GB``, ``800 MB`` or ``2GiB`` as bytes; None stays None."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"expected a size such as 3GB, found {value!r}")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
