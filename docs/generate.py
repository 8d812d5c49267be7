"""Write the reference pages that follow from the code: commands, Python, errors.

    python docs/generate.py

Commands come from click, Python from signatures and docstrings, errors from their classes. The
pages are kept in the repository, so that they can be read without a build; a test compares them
with what this script writes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import internvl_edge
from internvl_edge import artifact, compiler, errors, export, runtime
from internvl_edge.cli import app
from internvl_edge.integrations import bulk, ray
from internvl_edge.runtime.generation.text import Usage
from internvl_edge.runtime.tasks.chat import Reply

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py; change the code's own texts instead. -->\n\n"
EVERYWHERE = ("as_json", "quiet")  # options of every command


def main() -> None:
    """Write every page."""
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """File name → content of every generated page."""
    return {
        "cli.md": NOTE + commands_page(),
        "python.md": NOTE + python_page(),
        "errors.md": NOTE + errors_page(),
    }


# --- commands ------------------------------------------------------------------------------------

COMMANDS = """# Commands

`internvl-edge COMMAND`; `-h` or `--help` after any of them shows what stands here, `internvl-edge
--version` the version, and `internvl-edge --debug COMMAND` the Python traceback of an error.

Answers are on stdout: text, or with `--json` one JSON object on the last line, an error included.
Progress, warnings and error messages are on stderr; `-q` (`--quiet`) silences all of these but the
errors. Every command takes both options. `--dry-run` refuses what the command would refuse: options
and paths at once, memory, disk and calibration images after its forecast. What the command exits
with is in [errors](errors.md#exit-codes).
"""


def commands_page() -> str:
    """Write every command with its arguments and options."""
    context = click.Context(app, info_name="internvl-edge")
    return "\n".join([COMMANDS, *(_command(context, name) for name in app.list_commands(context))])


def _command(parent: click.Context, name: str) -> str:
    command = app.commands[name]
    context = click.Context(command, info_name=name, parent=parent)
    rows = [
        f"| {_cell(f'`{option}`')} | {_cell(help_text)} |"
        for option, help_text in _options(command, context)
    ]
    lines = [f"## {name}", "", f"    {command.get_usage(context).removeprefix('Usage: ')}", ""]
    lines += [*_paragraphs(command.help or ""), ""]
    return "\n".join([*lines, "| option | |", "|---|---|", *rows, ""])


def _options(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    for option in command.params:
        record = option.get_help_record(context)
        if record is not None and option.name not in EVERYWHERE:
            yield record


def _paragraphs(text: str) -> list[str]:
    """Join each paragraph of a docstring to one line."""
    joined = [" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n")]
    return "\n\n".join(joined).splitlines()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --- Python --------------------------------------------------------------------------------------

PYTHON = """# Python

What an application imports.
"""
RUNTIME: tuple[Any, ...] = (
    *(runtime.load, runtime.Model, runtime.Retrieval, Reply, Usage, runtime.open_session),
    *(runtime.Session, runtime.Batcher, internvl_edge.AnswerOptions, internvl_edge.ImageOptions),
    *(internvl_edge.OrtOptions, internvl_edge.OpenVinoOptions, internvl_edge.TrtOptions),
    internvl_edge.share_threads,
)
COMPILER: tuple[Any, ...] = (
    *(compiler.export, compiler.ExportOptions, compiler.verify, compiler.build),
    *(export.load_reference, artifact.open_artifact),
)
BULK: tuple[Any, ...] = (bulk.open_source, bulk.embed, bulk.How, bulk.Done, bulk.Progress)
RAY: tuple[Any, ...] = (ray.EmbedImages, ray.EmbedTexts, ray.embed, ray.connected, ray.deployment)


def python_page() -> str:
    """Write the classes and functions that applications import."""
    lines = [PYTHON, "## Run a compiled directory", "", *_members(RUNTIME)]
    lines += ["## Embed in bulk", "", 'With `pip install ".[ort,parquet]"`.', "", *_members(BULK)]
    lines += ["## On Ray", "", 'With `pip install ".[ort,ray]"`.', "", *_members(RAY)]
    lines += ["## Compile", "", 'With `pip install ".[export,quantize]"`.', "", *_members(COMPILER)]
    return "\n".join(lines)


def _members(members: tuple[Any, ...]) -> Iterator[str]:
    for member in members:
        yield from _class(member) if inspect.isclass(member) else _function(member, "###")


def _home(member: Any) -> str:
    """Find the shortest module that a name is imported from."""
    for door in (internvl_edge, compiler, export, artifact, runtime, bulk, ray):
        if member.__name__ in door.__all__ and getattr(door, member.__name__) is member:
            return door.__name__
    return str(member.__module__)


def _class(cls: type) -> Iterator[str]:
    yield from (f"### {cls.__name__}", "", f"`from {_home(cls)} import {cls.__name__}`", "")
    if dataclasses.is_dataclass(cls):
        yield from (*_docstring(cls), "", "```python", *_fields(cls), "```", "")
        return
    yield from (*_docstring(cls), "")
    for name, member in _public(cls):
        if isinstance(member, property):
            yield from (f"#### {cls.__name__}.{name}", "", *_docstring(member), "")
        else:
            yield from _function(member, f"#### {cls.__name__}.")


def _public(cls: type) -> Iterator[tuple[str, Any]]:
    """Public properties and methods, those of a base class before the class's own."""
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("internvl_edge"):
            for name, member in vars(base).items():
                if not name.startswith("_") and (callable(member) or isinstance(member, property)):
                    yield name, member


def _fields(cls: type) -> list[str]:
    """List the lines of a dataclass that declare fields, with their comments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    fields = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    start = fields[0].lineno - 1
    while lines[start - 1].lstrip().startswith("#"):
        start -= 1
    return textwrap.dedent("\n".join(lines[start : fields[-1].end_lineno])).splitlines()


def _function(function: Callable[..., Any], heading: str) -> Iterator[str]:
    is_method = heading.endswith(".")
    title = f"{heading}{function.__name__}" if is_method else f"{heading} {function.__name__}"
    yield from (title, "")
    if not is_method:
        yield from (f"`from {_home(function)} import {function.__name__}`", "")
    yield from ("```text", *_signature(function), "```", "", *_docstring(function), "")


def _signature(function: Callable[..., Any]) -> list[str]:
    """Copy a function's signature as it stands in the source."""
    source = textwrap.dedent(inspect.getsource(function))
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.FunctionDef)
    lines = source.splitlines()[definition.lineno - 1 : definition.body[0].lineno - 1]
    text = "\n".join(lines).removeprefix("def ").removesuffix(":").removesuffix(": ...")
    return re.sub(r"\(\s*self(,\s*|\b)", "(", text, count=1).splitlines()


def _docstring(member: Any) -> list[str]:
    """Turn a docstring into Markdown: Google's sections become lists."""
    lines: list[str] = []
    section = ""
    for line in inspect.cleandoc(member.__doc__ or "").splitlines():
        if line in ("Args:", "Raises:", "Returns:", "Yields:"):
            section = line
            lines += [f"**{line}**", ""]
        elif section in ("Args:", "Raises:") and re.match(r"    \S", line):
            name, colon, text = line.strip().partition(":")
            lines.append(f"- `{name}`{colon}{text}")
        else:
            lines.append(line.strip() if not section else re.sub(r"^    ", "", line))
    return [re.sub(r"``(.+?)``", r"`\1`", line) for line in lines]


# --- errors --------------------------------------------------------------------------------------

ERRORS = """# Errors and exit codes

Every error that internvl-edge raises on purpose is an `InternVLError`. A message says what was
expected, what was found and where, and what to do. The library raises; only the command line
prints, and exits with the error's code.

## Exit codes

| exit code | |
|---|---|
"""
EXIT_CODES = {
    "0": "done",
    "2": "options and names: an unknown one, a combination that cannot be, a path that cannot be "
    "written",
    "3": "contents of inputs: a checkpoint, compiled directory, image or file of texts is missing "
    "or broken, a text or label is empty",
    "4": "a package or a GPU is missing",
    "5": "memory or disk",
    "6": "a component disagrees with PyTorch; `lint` or `bisect` found something",
    "7": "a fault of ours",
    "130, 143": "interrupted by Ctrl-C, by SIGTERM; what is finished stays in `.OUT.work` beside "
    "OUT for the same command, the rest is cleaned up",
}
CLASSES = """
## Classes

`from internvl_edge.errors import …`; `InternVLError` is `internvl_edge.InternVLError` too.

| class | is a | exit code | |
|---|---|--:|---|
"""


def errors_page() -> str:
    """Exit codes, and the tree of errors."""
    codes = [f"| {code} | {text} |" for code, text in EXIT_CODES.items()]
    rows = _error_rows(errors.InternVLError)
    return ERRORS + "\n".join(codes) + "\n" + CLASSES + "\n".join(rows) + "\n"


def _error_rows(cls: type[errors.InternVLError]) -> Iterator[str]:
    above = "" if cls is errors.InternVLError else f"`{cls.__bases__[0].__name__}`"
    text = _cell((cls.__doc__ or "").replace("``", "`"))
    yield f"| `{cls.__name__}` | {above} | {cls.exit_code} | {text} |"
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _error_rows(child)


if __name__ == "__main__":
    main()
