"""Disks as they may be: one that fills up, and with reflinks and hard links or without."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.files import disk


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
    """Let every file that ``files.disk`` opens for writing hold ``room`` bytes."""

    def open_full(path: Path, mode: str = "r", **how: Any) -> Any:
        file = open(path, mode, **how)  # noqa: SIM115
        return FullDisk(file, room) if mode in ("wb", "xb") else file

    monkeypatch.setattr(disk, "open", open_full, raising=False)


def no_reflinks(monkeypatch: pytest.MonkeyPatch, code: int = errno.EOPNOTSUPP) -> None:
    def refuse(target: int, request: int, source: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuse)


def reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file system with reflinks does, but for sharing blocks."""

    def clone(target: int, request: int, source: int) -> int:
        assert request == 0x40049409
        os.sendfile(target, source, 0, os.fstat(source).st_size)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)


def no_hard_links(monkeypatch: pytest.MonkeyPatch, code: int = errno.EXDEV) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(code, os.strerror(code), str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)
