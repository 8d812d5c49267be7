"""Every error that internvl-edge raises on purpose, and its exit code.

    InternVLError                7  the root; on its own, a fault inside internvl-edge
    ├── UsageError               2  an invalid option, name or combination
    │   └── ContextLengthError   2  more positions than a decoder has
    ├── InputError               3  an input that cannot be accepted
    │   ├── CheckpointError      3  a checkpoint's config, tensors or tokenizer
    │   ├── ArtifactError        3  a compiled directory: manifest, hashes, ONNX, engines
    │   ├── CalibrationError     3  calibration images, captions or statistics
    │   ├── MediaError           3  an image, video or text of a request
    │   └── FeedError            3  the arrays given to a session
    ├── MissingDependency        4  a package that an extra installs
    ├── HardwareError            4  a device, driver or engine that does not fit this machine
    │   └── SessionDead          4  a GPU fault that only a new process recovers from
    ├── ResourceError            5  not enough memory or disk space
    ├── VerificationError        6  a compiled component that disagrees with its reference
    └── BuildError               7  a graph that TensorRT refused to build

A message says what was expected, what was found and where, and what to do. The library raises;
only the command line prints, and turns the class into the exit code of the process.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "BuildError",
    "CalibrationError",
    "CheckpointError",
    "ContextLengthError",
    "FeedError",
    "HardwareError",
    "InputError",
    "InternVLError",
    "MediaError",
    "MissingDependency",
    "ResourceError",
    "SessionDead",
    "UsageError",
    "VerificationError",
    "did_you_mean",
    "shortened",
]

SIMILAR = 0.75  # of difflib's ratio, 0 to 1: a typo, not another name of the same family
MAX_NAME = 100  # characters of what may be a typo
MAX_SHOWN = 80  # characters of a value in a message


class InternVLError(Exception):
    """The root of every error raised by internvl-edge."""

    exit_code: int = 7


class UsageError(InternVLError):
    """An invalid option or name, or an invalid combination of them."""

    exit_code = 2


class ContextLengthError(UsageError):
    """A prompt and its answer that need more positions than a decoder has."""


class InputError(InternVLError):
    """An input that cannot be accepted."""

    exit_code = 3


class CheckpointError(InputError):
    """An error in a checkpoint's config, tensors or tokenizer."""


class ArtifactError(InputError):
    """An error in a compiled directory: its manifest, hashes, ONNX files or engines."""


class CalibrationError(InputError):
    """An error in calibration images, captions or statistics."""


class MediaError(InputError):
    """An error in an image, video or text of a request."""


class FeedError(InputError):
    """An error in the arrays given to a session."""


class MissingDependency(InternVLError):
    """A missing package that one of the extras installs."""

    exit_code = 4

    @classmethod
    def of(cls, package: str, extra: str) -> MissingDependency:
        """Make the error for ``package``, which ``pip install "internvl-edge[extra]"`` installs."""
        return cls(f'{package} is not installed; run: pip install "internvl-edge[{extra}]"')


class HardwareError(InternVLError):
    """A device, driver or engine that does not fit this machine."""

    exit_code = 4


class SessionDead(HardwareError):
    """A GPU fault after which this process can no longer use the GPU; a new process can."""


class ResourceError(InternVLError):
    """Not enough memory or disk space."""

    exit_code = 5


class VerificationError(InternVLError):
    """A compiled component that disagrees with its reference."""

    exit_code = 6


class BuildError(InternVLError):
    """A graph that TensorRT refused to build."""


def did_you_mean(name: object, options: Iterable[str]) -> str:
    """Return a hint to append to an error, "" where no option is similar."""
    if not isinstance(name, str) or len(name) > MAX_NAME:
        return ""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=SIMILAR)
    return f"; did you mean {close[0]!r}?" if close else ""


def shortened(value: object, most: int = MAX_SHOWN, *, quoted: bool = True) -> str:
    """Write a value for a message: of a long one the beginning, and how long it is.

    Args:
        value: whatever was handed over; a text alone is cut before it is copied.
        most: characters that are shown.
        quoted: as in code, as ``repr`` writes it; else as text.
    """
    if isinstance(value, str | bytes | bytearray):
        text = value[:most] if isinstance(value, str) else bytes(value[:most])
        shown = repr(text) if quoted or not isinstance(text, str) else text
        unit = "characters" if isinstance(value, str) else "bytes"
        return shown if len(value) <= most else f"{shown}… ({len(value)} {unit})"
    if isinstance(value, list | tuple) and len(value) > most:
        return f"{shortened(value[:8], most)}… ({len(value)} items)"
    text = repr(value) if quoted else str(value)
    return text if len(text) <= most else f"{text[:most]}…"
