"""Publishes in forked children that die, or fail, at their n-th step; run by test_publish.

Usage: python -m support.crash_driver DIRECTORY FAULT MODE. Imports nothing heavy: a point costs a
fork. The parent checks after each point that the directory is absent, the old or the new one, and
that the next run succeeds and leaves nothing else. Prints one JSON object of what it saw.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import artifacts
from support.artifacts import ENGINE, SIDECAR, contents, manifest_of, write_files

from internvl_edge.artifact.open import open_artifact
from internvl_edge.artifact.publish import update, write_manifest
from internvl_edge.errors import ArtifactError, InternVLError, ResourceError
from internvl_edge.files import disk

STEPS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir", "close")
READING = {"update": [ArtifactError.__name__]}  # it opens what is there
OLD, NEW = contents(bytes(192)), contents(b"\1" * 192, engine=b"plan")
ADDED = contents(bytes(192), engine=b"plan")


def publish(out: Path, files: dict[str, bytes]) -> None:
    artifacts.publish(out, files, force=True)


def add_engine(out: Path, files: dict[str, bytes]) -> None:
    with update(out):
        write_files(out, {name: files[name] for name in (ENGINE, SIDECAR)})
        write_manifest(out, manifest_of(files))


def inject(point: int, fault: str) -> Callable[[], int]:
    """Make the process die, or the call fail, at its ``point``-th step; how many there were."""
    count = 0

    def step(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == point:
                if fault == "KILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                code = getattr(errno, fault)
                named = args[:1] if name not in ("write", "fsync", "close") else ()
                raise OSError(code, os.strerror(code), *map(str, named))
            return real(*args, **kwargs)

        return wrapped

    for name in STEPS:
        setattr(os, name, step(name, getattr(os, name)))
    disk._renameat2 = step("renameat2", disk._renameat2)
    return lambda: count


def without_renameat2(source: Path, target: Path, flag: int) -> None:
    raise OSError(errno.EINVAL, "no such flag")


def state(out: Path) -> str:
    if not out.exists():
        return "absent"
    manifest = open_artifact(out).manifest  # raises if it is neither
    known = {"old": OLD, "new": NEW, "added": ADDED}
    return next(name for name, files in known.items() if manifest == manifest_of(files))


def run_child(work: Callable[[Path, dict[str, bytes]], None], out: Path, point: int, fault: str,
              files: dict[str, bytes]) -> tuple[str, str]:  # fmt: skip
    """How a child ended: "killed", "done", "untouched" or the error's class; and its message."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        result = ""
        try:
            steps = inject(point, fault)
            work(out, files)
            result = "done" if point <= steps() else "untouched"
        except InternVLError as error:
            result = f"{type(error).__name__} {error}"
        except BaseException as error:
            result = f"unexpected {type(error).__name__} {error}"
        finally:
            ctypes.CDLL(None).write(writer, result.encode(), len(result.encode()))
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read().decode()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return "killed", ""
    word, _, message = text.partition(" ")
    return word, message


def every_point(root: Path, fault: str, mode: str) -> dict[str, Any]:
    """One child for each step that it has, until one gets through untouched."""
    work, target = (add_engine, ADDED) if mode == "update" else (publish, NEW)
    if mode == "fallback":
        disk._renameat2 = without_renameat2
    seen: Counter[str] = Counter()
    for point in range(1, 10_000):
        out = root / "parent" / "out"
        shutil.rmtree(root / "parent", ignore_errors=True)
        if mode != "first":
            publish(out, OLD)
        ended, message = run_child(work, out, point, fault, target)
        after = state(out)
        seen[f"{ended}: {after}"] += 1
        if ended.startswith("unexpected"):
            raise AssertionError(f"point {point}: {ended} {message}")
        if ended not in ("killed", "done", "untouched"):
            reason = os.strerror(getattr(errno, fault))
            assert reason in message and str(root) in message and "\n" not in message, message
            assert ended in (ResourceError.__name__, *READING.get(mode, [])), (ended, message)
        if mode == "update" and after == "absent":
            raise AssertionError(f"point {point}: the directory is gone")
        work(out, target) if mode == "update" else publish(out, target)
        assert state(out) == ("added" if mode == "update" else "new")
        assert os.listdir(out.parent) == ["out"], os.listdir(out.parent)
        assert {p.name for p in out.iterdir()} == {"manifest.json", "engines", *_top(target)}
        if ended == "untouched":
            break
    return {"points": point - 1, "seen": seen}


def _top(files: dict[str, bytes]) -> set[str]:
    return {name for name in files if "/" not in name}


def random_kills(root: Path, seed: int) -> dict[str, Any]:
    """A child that publishes without end, killed at any moment."""
    random_ = random.Random(seed)
    out = root / "out"
    seen: Counter[str] = Counter()
    for _ in range(40):
        pid = os.fork()
        if pid == 0:
            while True:
                publish(out, OLD)
                publish(out, NEW)
        time.sleep(random_.uniform(0.001, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen[state(out)] += 1
    publish(out, NEW)
    assert os.listdir(root) == ["out"]
    return {"points": 40, "seen": seen}


def main() -> None:
    root, fault, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    result = random_kills(root, 7) if mode == "random" else every_point(root, fault, mode)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
