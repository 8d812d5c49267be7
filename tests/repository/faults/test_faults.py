"""The fault matrix: whole commands whose system calls fail, and that die, at any of their points.

``make test-faults``. The tests of each module inject faults into its own calls; here the kernel
injects them (strace) into a whole ``export`` and ``build``, in the order in which the process
makes them. FAULT_POINTS is how many points of each command and fault are tried, spread evenly over
what it does to the disk. After each point:

1. OUT is absent, or complete by its hashes;
2. the same command then succeeds, with the bytes of a run that nothing happened to;
3. a failed call ends in exit code 5 and one line that says which call failed and on what;
4. nothing is left beside OUT, the checkpoint is what it was, and no process lives on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_internvl

from internvl_edge.artifact.open import open_artifact
from internvl_edge.errors import ArtifactError

POINTS = int(os.environ.get("FAULT_POINTS", "24"))
CALLS = (
    "write,pwrite64,copy_file_range,sendfile,ftruncate,fallocate,fsync,fdatasync,rename,renameat,"
)
CALLS += "renameat2,mkdir,mkdirat,openat,close,unlink,unlinkat,rmdir,linkat"
TRACED = re.compile(r"^(\d+) +(\w+)\(")


class Zygote:
    """The process that everything is forked from."""

    def __init__(self, stderr: Path) -> None:
        self.stderr = stderr
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(self, argv: list[str], **limits: int) -> int:
        """A child that waits for SIGCONT."""
        pid: int = self.ask({"argv": argv, "stderr": str(self.stderr), "limits": limits})["pid"]
        return pid

    def wait(self, pid: int) -> int:
        status: int = self.ask({"wait": pid})["status"]
        with pytest.raises(ProcessLookupError):  # nothing of its session lives on
            os.killpg(pid, 0)
        return status

    def run(self, argv: list[str], *tracing: str, **limits: int) -> int:
        pid = self.start(argv, **limits)
        with Attached(pid, *tracing) if tracing else nullcontext():
            os.kill(pid, signal.SIGCONT)
            return self.wait(pid)

    def said(self) -> str:
        return self.stderr.read_text(errors="replace")


class Attached:
    """strace on a stopped process until the block ends."""

    def __init__(self, pid: int, *options: str) -> None:
        self.command = ["strace", "-f", "-y", "-s", "200", "-p", str(pid), *options]

    def __enter__(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert "attached" in line, line

    def __exit__(self, *_: object) -> None:
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    if shutil.which("strace") is None:
        pytest.skip("strace, which injects the faults, is not installed")
    zygote = Zygote(tmp_path_factory.mktemp("z") / "stderr")
    yield zygote
    assert zygote.process.stdin is not None and zygote.process.stdout is not None
    zygote.process.stdin.close()
    zygote.process.stdout.close()
    zygote.process.wait(timeout=60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_internvl(tmp_path_factory.mktemp("c") / "checkpoint").path


def export(checkpoint: Path, out: Path, *more: str) -> list[str]:
    return ["export", str(checkpoint), "-o", str(out), "-p", "int8", "--components",
            "image_queries", "--verify", "none", *more]  # fmt: skip


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(zygote: Zygote, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes out when nothing happens."""
    out = tmp_path_factory.mktemp("w") / "out"
    assert zygote.run(export(checkpoint, out)) == 0, zygote.said()
    return out


def points(zygote: Zygote, argv: list[str], directory: Path, log: Path) -> list[tuple[str, int]]:
    """Calls on files below ``directory``: their names, and which of its kind each is."""
    assert zygote.run(argv, "-o", str(log), "-e", f"trace={CALLS}") == 0, zygote.said()
    counts: Counter[tuple[str, str]] = Counter()
    found, first = [], None
    for line in log.read_text(errors="replace").splitlines():
        matched = TRACED.match(line)
        if matched is None:
            continue
        first = first or matched[1]
        counts[matched[1], matched[2]] += 1
        reading = matched[2] == "openat" and "O_CREAT" not in line
        if str(directory) in line and matched[1] == first and not reading:  # the main thread's
            found.append((matched[2], counts[matched[1], matched[2]]))
    assert len(found) > POINTS, "too few points: does strace show the paths?"
    return [found[i * len(found) // POINTS] for i in range(POINTS)]


def is_valid_or_absent(out: Path, whole: dict[str, str]) -> bool:
    if not out.exists():
        return False
    open_artifact(out)
    assert contents(out) == whole
    return True


@pytest.mark.parametrize("fault", ["signal=KILL", "error=ENOSPC", "error=EIO"])
def test_export_at_any_point(
    fault: str, zygote: Zygote, checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    expected, original = contents(whole), contents(checkpoint)
    here = tmp_path / "here"
    here.mkdir()
    argv = export(checkpoint, here / "out")
    tried = points(zygote, argv, here, tmp_path / "log")
    ended: Counter[str] = Counter()
    for call, n in tried:
        shutil.rmtree(here)
        here.mkdir()
        injected = f"inject={call}:{fault}:when={n}"
        status = zygote.run(argv, "-o", "/dev/null", "-e", f"trace={call}", "-e", injected)
        where = f"{injected}: exit {status}: {zygote.said()}"
        published = is_valid_or_absent(here / "out", expected)
        ended[f"exit {status}, {'published' if published else 'absent'}"] += 1
        if fault == "signal=KILL":
            assert status == -signal.SIGKILL, where
        elif status:
            assert status == 5, where
            assert os.strerror(28 if "ENOSPC" in fault else 5) in zygote.said(), where
            assert "Traceback" not in zygote.said(), where
        else:
            assert published, where
            assert call in ("unlink", "unlinkat", "rmdir", "close"), where  # cleaning up may fail
        assert contents(checkpoint) == original
        if not published:
            assert zygote.run(argv) == 0, f"{where}\nafter it: {zygote.said()}"
            assert contents(here / "out") == expected, where
        else:
            assert zygote.run([*argv, "--force"]) == 0, f"{where}\nafter it: {zygote.said()}"
        assert os.listdir(here) == ["out"], where
    print(f"{fault}: {dict(ended)}")
    assert sum(ended[key] for key in ended if "absent" in key) > POINTS // 2


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_at_any_moment(
    kind: signal.Signals, zygote: Zygote, checkpoint: Path, whole: Path, tmp_path: Path
) -> None:
    """Twice in a row, as an impatient person does."""
    expected, random_ = contents(whole), random.Random(int(kind))
    here = tmp_path / "here"
    here.mkdir()
    argv = export(checkpoint, here / "out")
    started = time.monotonic()
    assert zygote.run(argv) == 0
    whole_seconds = time.monotonic() - started
    for _ in range(POINTS):
        shutil.rmtree(here)
        here.mkdir()
        pid = zygote.start(argv)
        os.kill(pid, signal.SIGCONT)
        time.sleep(random_.uniform(0.02, whole_seconds))
        for _ in range(2):
            os.kill(pid, kind)
            time.sleep(0.002)
        status = zygote.wait(pid)
        assert status in (0, 128 + kind), zygote.said()
        assert is_valid_or_absent(here / "out", expected) or status, zygote.said()
        if not (here / "out").exists():
            assert zygote.run(argv) == 0, zygote.said()
        assert contents(here / "out") == expected
        assert os.listdir(here) == ["out"]


def test_two_at_once(zygote: Zygote, checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    expected = contents(whole)
    for _ in range(POINTS // 2):
        here = tmp_path / "here"
        here.mkdir()
        pids = [zygote.start(export(checkpoint, here / "out")) for _ in range(2)]
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        statuses = [zygote.ask({"wait": pid})["status"] for pid in pids]
        assert sorted(statuses) == [0, 2], statuses
        assert contents(here / "out") == expected
        assert os.listdir(here) == ["out"]
        shutil.rmtree(here)


def test_without_memory(zygote: Zygote, checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    """From too little to begin with to enough: exit code 5 and nothing published, or all of it."""
    here = tmp_path / "here"
    here.mkdir()
    argv = export(checkpoint, here / "out")
    statuses = []
    floor = address_space(zygote.process.pid)
    for extra_mb in range(0, 1600, 100):
        status = zygote.run(argv, RLIMIT_AS=floor + extra_mb * 2**20)
        statuses.append(status)
        assert status in (0, 5), f"{extra_mb} MB: exit {status}: {zygote.said()}"
        assert is_valid_or_absent(here / "out", contents(whole)) == (status == 0)
        if status == 0:
            break
    assert 5 in statuses and statuses[-1] == 0, statuses


def address_space(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def test_few_files(zygote: Zygote, checkpoint: Path, tmp_path: Path) -> None:
    argv = export(checkpoint, tmp_path / "out")
    opened = len(os.listdir(f"/proc/{zygote.process.pid}/fd"))
    seen = set()
    for more in range(0, 24, 2):
        status = zygote.run([*argv, "--force"], RLIMIT_NOFILE=opened + more)
        seen.add(status)
        assert status in (0, 5), f"{opened + more} files: exit {status}: {zygote.said()}"
        if status:
            assert "Too many open files" in zygote.said()
        elif (tmp_path / "out").exists():
            open_artifact(tmp_path / "out")
    assert 5 in seen and 0 in seen


def test_files_cut_and_flipped(whole: Path, tmp_path: Path) -> None:
    """Truncations of the small files, and 2 000 single bits of all the manifest has hashes of."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    random_ = random.Random(1)
    files = [copy / name for name in open_artifact(copy).manifest.files]
    small = [copy / "manifest.json", *(path for path in files if path.suffix in (".json", ".onnx"))]
    for path in small:
        data = path.read_bytes()
        for length in range(0, len(data), max(1, len(data) // 500)):
            path.write_bytes(data[:length])
            with pytest.raises(ArtifactError):
                open_artifact(copy)
        path.write_bytes(data)
    for _ in range(2000):
        path = random_.choice(files)
        data = bytearray(path.read_bytes())
        at = random_.randrange(len(data))
        data[at] ^= 1 << random_.randrange(8)
        path.write_bytes(data)
        with pytest.raises(ArtifactError):
            open_artifact(copy)
        data[at] = (whole / path.relative_to(copy)).read_bytes()[at]
        path.write_bytes(data)
    open_artifact(copy)
