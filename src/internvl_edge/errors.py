"""Every error that internvl-edge raises on purpose, and the exit code of each.

    InternVLError                7  the root; on its own: a fault inside internvl-edge
    ├── UsageError               2  an option, a name or a combination that cannot be
    ├── InputError               3  something we were handed is not what we accept
    │   ├── CheckpointError      3  config, tensors, tokenizer of a checkpoint
    │   ├── ArtifactError        3  a compiled directory: manifest, hashes, ONNX, plans
    │   ├── CalibrationError     3  calibration images, captions or statistics
    │   ├── MediaError           3  an image, video or text of a request
    │   └── FeedError            3  what a session was asked to run on
    ├── MissingDependency        4  a package that an extra installs
    ├── HardwareError            4  a device, driver or engine that does not fit this machine
    │   └── SessionDead          4  a fault of the GPU that only a new process recovers from
    ├── ResourceError            5  memory or disk
    ├── VerificationError        6  a compiled component disagrees with its reference
    └── BuildError               7  TensorRT refused a graph of ours

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
]

SIMILAR = 0.75  # of difflib's ratio, 0 to 1: a typo, not another name of the same family


class InternVLError(Exception):
    """The root of every error raised by internvl-edge."""

    exit_code: int = 7


class UsageError(InternVLError):
    """An option, a name or a combination of them that cannot be."""

    exit_code = 2


class InputError(InternVLError):
    """Something handed to us is not what we accept."""

    exit_code = 3


class CheckpointError(InputError):
    """A checkpoint's config, tensors or tokenizer."""


class ArtifactError(InputError):
    """A compiled directory: its manifest, hashes, ONNX files or engines."""


class CalibrationError(InputError):
    """Calibration images, captions or statistics."""


class MediaError(InputError):
    """An image, a video or a text of a request."""


class FeedError(InputError):
    """Arrays that a session was asked to run on."""


class MissingDependency(InternVLError):
    """A package that one of the extras installs."""

    exit_code = 4

    @classmethod
    def of(cls, package: str, extra: str) -> MissingDependency:
        """The error for ``package``, which ``pip install "internvl-edge[extra]"`` brings."""
        return cls(f'{package} is not installed; run: pip install "internvl-edge[{extra}]"')


class HardwareError(InternVLError):
    """A device, driver or engine that does not fit this machine."""

    exit_code = 4


class SessionDead(HardwareError):
    """A fault of the GPU after which this process cannot use it; a new one can."""


class ResourceError(InternVLError):
    """Memory or disk that is not there."""

    exit_code = 5


class VerificationError(InternVLError):
    """A compiled component disagrees with its reference."""

    exit_code = 6


class BuildError(InternVLError):
    """TensorRT refused a graph of ours."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return a hint to append to an error, "" where no option is similar."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=SIMILAR)
    return f"; did you mean {close[0]!r}?" if close else ""
