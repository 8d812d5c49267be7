"""What a forked child must leave alone: threads stay in the parent, and locks stay taken.

An object that waits for its threads when it is destroyed waits for ever in a child, which has none
of them: when it is deleted, or at the child's exit. Such objects are never destroyed there, only
forgotten. They cost what they hold; the child shares the pages with its parent.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from internvl_edge.errors import UsageError

__all__ = ["in_children", "never_destroyed_in_children", "require_own_process"]

T = TypeVar("T")

_actions: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()


def in_children(owner: T, action: Callable[[T], None]) -> None:
    """Call ``action(owner)`` in every child that is forked while there is ``owner``."""
    _actions[owner] = action


def never_destroyed_in_children(native: Any) -> None:
    """Keep an object that has threads for ever in every child that is forked while it is there."""
    in_children(native, _keep_for_ever)


def require_own_process(process: int, name: str) -> None:
    """Refuse to run with threads that a fork left in the parent.

    Args:
        process: the id of the process that started them.
        name: what has them, for the message.

    Raises:
        UsageError: this is another process.
    """
    if os.getpid() != process:
        raise UsageError(
            f"{name} was opened before a fork and its threads did not come along; open it in the "
            "process that runs it: load the model in each worker, as in gunicorn without "
            "--preload, or start workers by spawn"
        )


def _keep_for_ever(native: Any) -> None:
    """Take a reference that is never given back, so that not even the interpreter's end frees it.

    A list of a module would not do: modules are cleared at exit.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))


def _after_fork() -> None:
    for owner, action in list(_actions.items()):
        action(owner)


if hasattr(os, "register_at_fork"):  # elsewhere nothing forks
    os.register_at_fork(after_in_child=_after_fork)
