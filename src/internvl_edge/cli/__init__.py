"""The command line: ``internvl-edge COMMAND``.

A command answers on stdout, with ``--json`` as one JSON object on the last line, and says
everything else on stderr. Exit codes are those of ``internvl_edge.errors``; Ctrl-C exits with 130
and SIGTERM with 143, both after cleaning up.

    export     export, build, convert;  inspect  verify, inspect;  debug  lint, bisect
    embed      embed, classify, retrieve, match;  bulk  embed with -o
    text       caption, answer;  chat  chat
    serve      serve, triton;  benchmark  benchmark;  doctor  doctor
    console    answers, progress and errors on the terminal;  options  shared options
    inputs     pictures, texts and labels that a command line names
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from internvl_edge._version import __version__
from internvl_edge.cli import benchmark, chat, debug, doctor, embed, export, inspect, serve, text
from internvl_edge.cli.console import (
    Output,
    PrintableFormatter,
    ReaderGone,
    error_line,
    flush,
    prepare_streams,
)
from internvl_edge.errors import InternVLError, ResourceError
from internvl_edge.files.disk import EXHAUSTED, translated
from internvl_edge.runtime.ort.options import share_threads

__all__ = ["app", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="internvl-edge")
@click.option("--debug", is_flag=True, help="Show the Python traceback of an error.")
def app(debug: bool) -> None:
    """Compile InternVL checkpoints into fast inference engines, and run them."""


for command in (
    export.export,
    export.build,
    inspect.verify,
    inspect.inspect,
    export.convert,
    debug.lint,
    debug.bisect,
    embed.embed,
    embed.classify,
    embed.retrieve,
    embed.match,
    text.caption,
    text.answer,
    chat.chat,
    serve.serve,
    serve.triton,
    benchmark.benchmark,
    doctor.doctor,
):
    app.add_command(command)


class Terminated(KeyboardInterrupt):
    """SIGTERM, as an exception: what cleans up after Ctrl-C cleans up after this."""


READER_GONE = 141  # as a shell tells of SIGPIPE
OUT_OF_MEMORY = ("allocate memory", "failed to map segment")  # of torch, and of the dynamic linker


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    given = sys.argv[1:] if arguments is None else arguments
    prepare_streams()
    signal.signal(signal.SIGTERM, _terminate)
    share_threads()
    code = run(given)
    if code == READER_GONE and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it
        os.kill(os.getpid(), signal.SIGPIPE)
    sys.exit(code)


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: cleaning up is not interrupted
    raise Terminated


def run(arguments: list[str]) -> int:
    """Run the command line; its exit code."""
    output = Output(as_json="--json" in arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("warning: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        code = app.main(arguments, prog_name="internvl-edge", standalone_mode=False)
        flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except ReaderGone:
        return READER_GONE
    except click.exceptions.NoArgsIsHelpError as error:
        return run([*error.ctx.command_path.split()[1:], "--help"])
    except click.ClickException as error:
        return _fail(output, error.format_message(), error.exit_code, "UsageError")
    except (click.Abort, KeyboardInterrupt) as stop:  # click makes Aborts of KeyboardInterrupts
        if isinstance(stop, Terminated) or isinstance(stop.__cause__, Terminated):
            return _fail(output, "terminated", 143, "Terminated")
        return _fail(output, "interrupted", 130, "Interrupted")
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        ours = as_ours(error, arguments)
        return _fail(output, str(ours), ours.exit_code, type(ours).__name__)
    return code if isinstance(code, int) else 0  # click returns what a command exits with


def as_ours(error: Exception, arguments: Sequence[str]) -> InternVLError:
    """Turn any failure into one of our errors, so that none leaves without its exit code."""
    if isinstance(error, InternVLError):
        cause = error.__cause__  # whatever a file was read for, it may be the system that ran out
        is_exhausted = isinstance(cause, OSError) and cause.errno in EXHAUSTED
        return ResourceError(str(error)) if is_exhausted else error
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return ResourceError("out of memory; --dry-run says what is needed")
    if isinstance(error, OSError):
        return translated(error, Path(str(error.filename or "")))
    command = shlex.join(["internvl-edge", "--debug", *(a for a in arguments if a != "--debug")])
    return InternVLError(f"unexpected {type(error).__name__}: {error}; to see where: {command}")


def _fail(output: Output, message: str, code: int, kind: str) -> int:
    error_line(message)
    details: dict[str, Any] = {"type": kind, "message": message, "exit_code": code}
    with suppress(ReaderGone, ResourceError):  # where stdout is what failed
        output.result({"error": details})
    return code
