"""What was verified is what runs: files identified when they are checked, compared when used.

Components open when they are first used, possibly hours after a directory was verified, and native
code opens them by name. A ``Pin`` is what the system says of a file and what changes when the file
is written to or replaced; a ``Watch`` holds files open and compares, before native code opens them
by name, after it did, and whenever it runs on what it mapped of them. A mapped file shows what
others write to it later, and ends the process where they cut it off: comparing before each run
leaves the moments of the run itself, and copies (``OrtOptions.copy``) leave nothing.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from internvl_edge.errors import ArtifactError

__all__ = ["Pin", "Watch", "changed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A file and its content, as long as nobody turns back the system's clock."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, file: io.BufferedReader) -> Pin:
        status = os.fstat(file.fileno())
        return cls(
            device=status.st_dev,
            inode=status.st_ino,
            nbytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
        )

    def has_content_of(self, other: Pin) -> bool:
        """Tell whether nothing was written in between; one more hard link or a mode is nothing."""
        return replace(self, ctime_ns=other.ctime_ns) == other


class Watch:
    """Verified files, held open while native code has them mapped."""

    def __init__(self, path: Path, files: Mapping[str, io.BufferedReader]) -> None:
        """Take over open files, which are closed with the watch."""
        self._path = path
        # Descriptors: files that lie in one cycle with their owner may be finalized before it.
        self._descriptors: list[int] = []
        self._expected: list[tuple[int, int, int, str]] = []
        try:
            for file in files.values():  # of descriptors the process may have no more
                self._descriptors.append(os.dup(file.fileno()))
        finally:
            for file in files.values():
                file.close()
        self.files = {
            name: open(descriptor, "rb", closefd=False)  # noqa: SIM115
            for name, descriptor in zip(files, self._descriptors, strict=True)
        }
        self._pins = {name: Pin.of(file) for name, file in self.files.items()}
        self._expected = [
            (descriptor, pin.nbytes, pin.mtime_ns, name)
            for descriptor, (name, pin) in zip(self._descriptors, self._pins.items(), strict=True)
        ]

    @property
    def pins(self) -> Mapping[str, Pin]:
        return self._pins

    def require_unchanged(self) -> None:
        """Make sure that nothing was written to the files; costs a microsecond for each.

        Raises:
            ArtifactError: it was.
        """
        for descriptor, nbytes, mtime_ns, name in self._expected:
            status = os.fstat(descriptor)
            if status.st_size != nbytes or status.st_mtime_ns != mtime_ns:
                raise changed(self._path, f"{name} was written to")

    def close(self) -> None:
        descriptors, self._descriptors, self._expected = self._descriptors, [], []
        for descriptor in descriptors:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def changed(path: Path, reason: str) -> ArtifactError:
    """Make the error for a directory that is no longer what was opened."""
    return ArtifactError(f"{path} changed since it was opened: {reason}; load it again")
