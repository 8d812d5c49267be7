"""Reports that libraries would send to their vendors: off, unless their user decided otherwise.

ONNX Runtime (1.32 on Linux) looks up its vendor's host and keeps an id of the machine under the
home folder, from the moment it is imported, unless ``ORT_DISABLE_TELEMETRY`` is set by then; the
Hugging Face hub counts the names of libraries in its requests. Whatever imports anything of ours
before it imports them sends nothing. OpenVINO reports its import, from a module of its own
that a process may do without. PyTorch, onnxscript, SentencePiece, Pillow and TensorRT-RTX send
nothing of themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["SWITCHES", "turn_off", "without_reports"]

SWITCHES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY")


def turn_off() -> None:
    """Set the switches that the user has not set, for this process and those that it starts."""
    undecided = "ORT_DISABLE_TELEMETRY" not in os.environ
    for name in SWITCHES:
        os.environ.setdefault(name, "1")
    imported = sys.modules.get("onnxruntime")
    if undecided and imported is not None:  # too late for the id; no event leaves from now on
        getattr(imported, "disable_telemetry_events", lambda: None)()


@contextmanager
def without_reports(reporter: str) -> Iterator[None]:
    """Let a library be imported as if the module that reports for it were not installed.

    Where the program has imported that already, it is left as it is.
    """
    modules: dict[str, Any] = sys.modules
    if reporter in modules:
        yield
        return
    modules[reporter] = None  # importing it raises ImportError
    try:
        yield
    finally:
        if modules.get(reporter) is None:  # not where somebody has put it there meanwhile
            modules.pop(reporter, None)
