"""The parts that both TensorRT modules share: their log, their callbacks, their names of types.

``tensorrt`` and ``tensorrt_rtx`` share one interface, so the module is passed around. TensorRT
wants objects of its own classes to call back, and an exception that leaves one of them is lost in
native code: nothing given to ``callback`` may raise. Why a call failed is in its log alone.
"""

from __future__ import annotations

import importlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from internvl_edge.errors import HardwareError, MissingDependency
from internvl_edge.files.packages import PACKAGES

__all__ = ["DTYPES", "NativeLog", "callback", "decisive_lines", "import_tensorrt"]

logger = logging.getLogger(__name__)

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
}
MAX_ERRORS = 64
ERRORS = ("INTERNAL_ERROR", "ERROR")
# A builder without a GPU says this with every real error.
NOISE = ("CUDA driver version is insufficient",)
MAX_LINES, MAX_LINE_LENGTH = 6, 600


def callback(base: Any, **methods: Callable[..., Any]) -> Any:
    """Make an object of a builder's callback class whose methods are the given functions."""
    bodies = {name: _method(function) for name, function in methods.items()}
    # pybind11 requires the base's own __init__, called explicitly
    bodies["__init__"] = lambda self: base.__init__(self)
    return type(f"Our{base.__name__}", (base,), bodies)()


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: function(*args)


class NativeLog:
    """The last errors that TensorRT logged, and everything forwarded to Python's logging."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=MAX_ERRORS)  # a session logs for days

    def log(self, severity: Any, message: str) -> None:
        if severity.name in ERRORS:
            self.errors.append(message)
        logger.debug("%s: %s", severity.name, message)  # errors too: they are raised, once

    def mentions(self, text: str) -> bool:
        """Tell whether an error line contains ``text``."""
        return any(text in line for line in self.errors)

    def decisive(self) -> str:
        """Return the error lines that say what happened: no repetitions, no noise, not too many."""
        return decisive_lines(list(self.errors))


def decisive_lines(messages: list[str]) -> str:
    """Keep the lines that matter of native error messages; "" where there were none."""
    lines = [line.strip()[:MAX_LINE_LENGTH] for text in messages for line in text.splitlines()]
    lines = [line for line in dict.fromkeys(lines) if line]
    telling = [line for line in lines if not any(noise in line for noise in NOISE)]
    return "\n  ".join((telling or lines)[:MAX_LINES])


def import_tensorrt(backend: str) -> Any:
    """Import the module of TensorRT or of TensorRT-RTX.

    Raises:
        MissingDependency: it is not installed.
        HardwareError: it is, and its libraries do not load.
    """
    package = PACKAGES[backend]
    try:
        return importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        raise MissingDependency.of(package.name, package.extra) from error
    except (ImportError, OSError) as error:
        raise HardwareError(f"{backend} is installed but does not load: {error}") from error
