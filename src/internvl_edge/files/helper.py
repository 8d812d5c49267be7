"""Processes of our own that help: isolated from the current folder, and from what loads code.

``python -c`` and ``-m`` put the current folder first on the import path, and variables such as
PYTHONPATH and PYTHONSTARTUP name code to run. A helper gets neither: it imports from where this
process does, and that is all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["helper_call", "run_helper"]

START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from importlib import import_module; import_module(sys.argv.pop(1)).main()"
)
LOADS_CODE = (
    "PYTHONBREAKPOINT",
    "PYTHONEXECUTABLE",
    "PYTHONHOME",
    "PYTHONINSPECT",
    "PYTHONPATH",
    "PYTHONPLATLIBDIR",
    "PYTHONSTARTUP",
    "PYTHONUSERBASE",
    "PYTHONWARNINGS",
)


def run_helper(module: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a module's ``main`` in a process of its own, and wait; it finds ``sys.argv[1:]``."""
    command, environment = helper_call(module, arguments)
    return subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=environment,
    )


def helper_call(module: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment of ``run_helper``, for who starts it otherwise."""
    command = [sys.executable, "-E", "-P", "-c", START, json.dumps(_import_path()), module]
    environment = {name: v for name, v in os.environ.items() if name not in LOADS_CODE}
    return [*command, *arguments], environment


def _import_path() -> list[str]:
    """List where this process imports from, without the current folder."""
    ours = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
    here = os.path.realpath(os.curdir)
    return [
        place
        for place in sys.path
        if place and (os.path.realpath(place) != here or os.path.realpath(place) == ours)
    ]
