"""What a TensorRT builder calls back: its log, the engine's bytes, its progress.

TensorRT wants objects of its own classes. An exception that leaves one of them is lost in native
code, and the build goes on to report success: a writer that raised or wrote too little still ends
in ``True``. So nothing raises here. Each object keeps what went wrong, and the caller asks for it
when the builder has returned.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from internvl_edge.errors import ResourceError
from internvl_edge.files.memory import trim


class Monitor:
    """A builder's progress, told to a function that may stop the build by raising.

    Args:
        report: takes the phase, steps done, steps.
        signals: those that came and wait; the build stops for one.
    """

    def __init__(
        self, report: Callable[[str, int, int], None], signals: Sequence[int] = ()
    ) -> None:
        self.report, self._signals = report, signals
        self.stopped_by: BaseException | None = None
        self._steps: dict[str, int] = {}

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        self._steps[phase] = steps
        self._tell(phase, 0, steps)

    def step_complete(self, phase: str, step: int) -> bool:
        """True to go on."""
        return self._tell(phase, step + 1, self._steps.get(phase, step + 1))

    def phase_finish(self, phase: str) -> None:
        trim()  # 10 MB a block of what lowering took, before the engine's bytes are made
        steps = self._steps.pop(phase, 0)
        self._tell(phase, steps, steps)

    def _tell(self, phase: str, done: int, steps: int) -> bool:
        if self.stopped_by is None:
            try:
                self.report(phase, done, steps)
            except BaseException as error:  # an interrupt too; raised again after the build
                self.stopped_by = error
        return not self.is_stopped

    @property
    def is_stopped(self) -> bool:
        """Whether the build is to end without an engine."""
        return self.stopped_by is not None or bool(self._signals)


class StreamedFile:
    """A file that appears whole or not at all, hashed as its pieces are written.

    It is written under a temporary name; ``publish`` syncs and renames it. Left as a context
    manager without that, it disappears.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        self.nbytes = 0
        self.error: OSError | None = None  # the first failed write
        self._sha256 = hashlib.sha256()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("wb")
        except OSError as error:
            raise self._failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # the flush of what did not fit
            self._file.close()
        self.partial.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def write(self, data: bytes) -> int:
        """Append; the number of bytes taken, 0 after a failure."""
        if self.error is not None:
            return 0
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            return 0
        self._sha256.update(data)
        self.nbytes += len(data)
        return len(data)

    def publish(self) -> None:
        """Make the file durable under its own name.

        Raises:
            ResourceError: some of it could not be written; nothing appears.
        """
        try:
            if self.error is not None:
                raise self.error
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.partial.replace(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ResourceError:
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some disk space" if full else "choose a directory that can be written"
        return ResourceError(
            f"{self.path}: could not be written after {self.nbytes:,} bytes: {reason}; {advice}"
        )


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the system has such a call."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
