"""The output of the command line: answers on stdout, everything else on stderr.

An answer is text for people, or one JSON object with ``--json``; ``--quiet`` never touches it.
Paths, labels and extras such as ``[trt]`` are printed as they are: rich's markup is off.
"""

from __future__ import annotations

import io
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from internvl_edge.errors import ResourceError
from internvl_edge.files.terminal import json_bytes, printable


class ReaderGone(Exception):
    """What read the answer has closed its end of the pipe, as ``head`` does."""


class _Stderr(Console):
    """The terminal of people; a reader of it that has gone ends no work."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


human = _Stderr(stderr=True, highlight=False)
SECONDS_BETWEEN_LINES = 10.0  # of progress in one step
UNLIMITED = 100_000  # columns: what is read by a program or a file is never cut


@dataclass(slots=True)
class Output:
    """How this run answers; kept in click's context."""

    as_json: bool = False
    quiet: bool = False

    def result(self, data: Mapping[str, Any]) -> None:
        """Print the answer for programs: one JSON object, the last line of stdout."""
        if self.as_json:
            _echo(json_bytes(_plain(data)))

    def lines(self, values: Sequence[str]) -> None:
        """Print the answer for people, in lines."""
        if not self.as_json:
            for value in values:
                _echo(printable(value))

    def text(self, value: str) -> None:
        """Print an answer for people that may have several lines, such as a model's reply."""
        if not self.as_json:
            _echo(printable(value, lines=True))

    def piece(self, shown: str, **fields: Any) -> None:
        """Print a part of the answer at once: as text for people, as a JSON object for programs.

        Args:
            shown: for people.
            fields: the same for programs, where it is more than text.
        """
        if self.as_json:
            _echo(json_bytes({"piece": _plain(fields) or shown}))
        else:
            _echo(printable(shown, lines=True), end=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print the answer for people, as a table."""
        if self.as_json:
            return
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(str(cell))) for cell in row))
        stdout, drawn = Console(highlight=False), io.StringIO()
        width = stdout.width if stdout.is_terminal else UNLIMITED
        Console(file=drawn, highlight=False, force_terminal=stdout.is_terminal, width=width).print(
            table
        )
        _echo(drawn.getvalue(), end=False)

    def say(self, text: str) -> None:
        """Print a line that is not the answer: on stderr, unless quiet."""
        if not self.quiet:
            with suppress(OSError):  # nothing depends on what is said here
                human.print(printable(text, lines=True), markup=False, soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Any]:
        """Give a callback for ``compiler.Progress``: bars on a terminal, elsewhere a few lines."""
        if self.quiet:
            yield lambda progress: None
            return
        if not human.is_terminal or os.environ.get("CI"):
            yield _Lines(self)
            return
        columns = (
            TextColumn("{task.description:>9}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
        )
        with Bar(*columns, console=human, transient=True) as bar:
            tasks: dict[str, Any] = {}

            def report(progress: Any) -> None:
                if progress.step not in tasks:
                    for task in tasks.values():
                        bar.update(task, completed=bar.tasks[task].total, detail="")
                    tasks[progress.step] = bar.add_task(
                        progress.step, total=progress.total, detail=""
                    )
                bar.update(
                    tasks[progress.step],
                    completed=progress.done,
                    total=progress.total,
                    detail=printable(progress.detail),
                )

            yield report


class _Lines:
    """Progress where nothing is drawn again: a line for every step, in a long one more of them."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._begun: set[str] = set()
        self._told = -math.inf

    def __call__(self, progress: Any) -> None:
        now = time.monotonic()
        if progress.step in self._begun and now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._begun.add(progress.step)
        self._told = now
        count = f" {progress.done}/{progress.total}" if progress.total > 1 else ""
        with suppress(MemoryError, OSError):  # a reader that has gone ends no export
            self._output.say(f"{progress.step}{count}: {progress.detail}")


class PrintableFormatter(logging.Formatter):
    """A log record's line, which may quote names and texts of others."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def error_line(message: str) -> None:
    """Print an error in one red line on stderr."""
    line = f"error: {printable(' '.join(message.split()))}"
    try:
        human.print(line, style="red", markup=False, soft_wrap=True)
    except (MemoryError, OSError):  # rich imports what it needs only here, and may find no room
        with suppress(OSError, ValueError):
            if sys.stderr is not None:
                sys.stderr.write(f"{line}\n")


def _plain(value: Any) -> Any:
    """Make data that JSON can carry: arrays as lists, paths as text, non-finite numbers as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | type(None)) else str(value)


class _Stdout(io.TextIOWrapper):
    """stdout, where what cannot be written is an error of ours, whoever writes it.

    click prints help and the version itself, and takes a closed pipe for an end of its own.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _lost(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _lost(error) from error


class _Closed(io.TextIOBase):
    """stdout that was closed before the start: an answer without a reader is no success."""

    def write(self, text: str) -> int:
        raise ResourceError(
            "stdout is closed: the answer cannot be printed; redirect it to a file or a pipe, or "
            "to /dev/null where only the exit code counts"
        )


def _echo(value: str | bytes, *, end: bool = True) -> None:
    """Write to stdout at once.

    Raises:
        ReaderGone: nobody reads it any more.
        ResourceError: it cannot be written.
    """
    try:
        click.echo(value, nl=end)
    except OSError as error:  # of bytes, which pass by the text stream
        raise _lost(error) from error


def flush() -> None:
    """Let what cannot be written fail here, where it is expected, and not at interpreter exit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _lost(error) from error


def _lost(error: OSError) -> Exception:
    """Make the error for an answer that is not written; what is left of it goes nowhere."""
    with suppress(OSError, ValueError):  # stdout may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return ReaderGone()
    return ResourceError(
        f"stdout: the answer cannot be written: {error.strerror or error}; redirect it to a file "
        "on a disk with space, or to a pipe"
    )


def prepare_streams() -> None:
    """Make stdin, stdout and stderr such that no name and no text ends in an error.

    What a stream's encoding lacks is spelled out. Where one was closed its descriptor is taken, as
    the next file that is opened would else stand there, and be written to. stdout has a buffer,
    also where Python was told to buffer nothing (PYTHONUNBUFFERED): without one the rest of a
    write that the system cut short is lost without an error.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = _Closed()
    elif isinstance(sys.stdout, io.TextIOWrapper):
        with suppress(io.UnsupportedOperation):  # of a program that keeps what is printed
            raw = io.FileIO(sys.stdout.fileno(), "w", closefd=False)
            sys.stdout.flush()
            sys.stdout = _Stdout(io.BufferedWriter(raw), encoding=sys.stdout.encoding)
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # of a program that has read from it already
                stream.reconfigure(errors=errors)
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Say a warning as people read it, without the line of code that gave it."""
    Output().say(f"warning: {message}")
