"""A disk that fills up."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest


class FullDisk:
    """A file on a disk that takes ``room`` bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if len(data) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(data)
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def fill_disk(monkeypatch: pytest.MonkeyPatch, *, room: int) -> None:
    """Let every file that ``Path.open`` opens for writing hold ``room`` bytes."""
    opened = Path.open

    def open_full(path: Path, mode: str = "r") -> Any:
        return FullDisk(opened(path, mode), room) if mode == "wb" else opened(path, mode)

    monkeypatch.setattr(Path, "open", open_full)
