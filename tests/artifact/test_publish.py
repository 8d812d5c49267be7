"""Publication: whatever dies or fails, a directory is absent, the old one or the new one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.artifacts import (
    ENGINE,
    SIDECAR,
    contents,
    manifest_of,
    publish,
    write_artifact,
    write_files,
)
from support.paths import TESTS

from internvl_edge.artifact.manifest import FileRecord, Manifest
from internvl_edge.artifact.open import open_artifact
from internvl_edge.artifact.publish import (
    os_errors,
    record,
    require_free_disk,
    sound_engines,
    staging,
    update,
    verify_whole,
    write_atomically,
    write_manifest,
)
from internvl_edge.artifact.sidecar import EngineInfo, ShapeRanges
from internvl_edge.errors import ArtifactError, InternVLError, ResourceError, UsageError
from internvl_edge.files import disk

ENGINE_INFO = EngineInfo(
    component="vision",
    target="tensorrt-rtx",
    precision="int8",
    builder_version="1.7.1.116",
    tool_version="0.1.0",
    compute_capabilities=(),
    minimum_sm=80,
    profile=ShapeRanges(),
    onnx_sha256="ab" * 32,
    nbytes=12,
    sha256="cd" * 32,
    fused_attention=4,
    decomposed_attention=1,
    build_seconds=1.5,
    inputs=(),
    outputs=(),
)
OLD, NEW = contents(bytes(192)), contents(b"\1" * 192)


def is_now(out: Path, files: dict[str, bytes]) -> bool:
    assert sorted(os.listdir(out.parent)) == [out.name], "something was left behind"
    return open_artifact(out).manifest == manifest_of(files)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "out"


@pytest.fixture
def fast_disk() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of fsync calls."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as directory:
        yield Path(directory)


@pytest.fixture(params=["renameat2", "EINVAL", "ENOSYS"])
def rename(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernel's exchange, and where file system or kernel lacks it."""
    if request.param != "renameat2":

        def fails(source: Path, target: Path, flag: int) -> None:
            raise OSError(getattr(errno, request.param), "not here")

        monkeypatch.setattr(disk, "_renameat2", fails)
    return str(request.param)


# --- publishing ----------------------------------------------------------------------------------


def test_publish_and_replace(out: Path, rename: str) -> None:
    publish(out, OLD)
    assert is_now(out, OLD)
    publish(out, NEW, force=True)
    assert is_now(out, NEW)
    publish(out, OLD, force=True)
    assert is_now(out, OLD)


def test_published_like_any_directory(out: Path) -> None:
    before = os.umask(0o022)
    try:
        publish(out, OLD)
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o755
    assert (out / "manifest.json").stat().st_mode & 0o777 == 0o644


def test_force_without_anything_to_replace(out: Path) -> None:
    publish(out, OLD, force=True)
    assert is_now(out, OLD)


def test_nothing_is_there_before_the_end(out: Path) -> None:
    with staging(out, force=False) as directory:
        assert directory.parent == out.parent
        assert disk.sibling(out, "partial").suffix == ".partial" == directory.suffix
        write_files(directory, OLD)
        write_manifest(directory, manifest_of(OLD))
        assert not out.exists()
    assert is_now(out, OLD)


@pytest.mark.slow
def test_exchange_is_one_step(out: Path) -> None:
    """A reader sees the old or the new one at every moment, never none."""
    publish(out, OLD)
    done = threading.Event()
    missing = 0

    def read() -> None:
        nonlocal missing
        while not done.is_set():
            missing += not (out / "manifest.json").exists()

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        publish(out, NEW, force=True)
    done.set()
    reader.join()
    assert missing == 0


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(130)])
@pytest.mark.parametrize("there", [False, True])
def test_error_in_the_middle(out: Path, error: BaseException, there: bool) -> None:
    if there:
        publish(out, OLD)

    def fail() -> None:
        with staging(out, force=True) as directory:
            write_files(directory, NEW)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert is_now(out, OLD) if there else os.listdir(out.parent) == []


def test_parents_come_and_go(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(RuntimeError), staging(out, force=False):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    publish(out, OLD)
    assert is_now(out, OLD)


def test_relative_and_dotted_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish(Path("out"), OLD)
    assert open_artifact(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    publish(Path(), NEW, force=True)
    assert is_now(tmp_path / "out", NEW)


# --- refusals before any work --------------------------------------------------------------------


def refused(out: Path, message: str, *, force: bool = True) -> None:
    before = sorted(out.parent.iterdir()) if out.parent.is_dir() else None
    with pytest.raises(UsageError, match=message), staging(out, force=force):
        pytest.fail("work began")
    assert before is None or sorted(out.parent.iterdir()) == before


def test_exists(out: Path) -> None:
    publish(out, OLD)
    refused(out, "exists; pass --force", force=False)
    assert is_now(out, OLD)


def test_something_else_is_there(out: Path, tmp_path: Path) -> None:
    out.touch()
    refused(out, "is a file")
    out.unlink()
    publish(tmp_path / "other", OLD)
    out.symlink_to(tmp_path / "other")
    refused(out, "is a symbolic link")
    assert open_artifact(tmp_path / "other")
    out.unlink()
    out.symlink_to("nowhere")
    refused(out, "is a symbolic link")
    refused(tmp_path / "other" / "README.md" / "out", "ENOTDIR")
    refused(Path("/proc/self/fdinfo/out"), "ENOENT|EACCES|EPERM")
    refused(Path("/proc"), "mount point")


def test_somebody_elses_directory(out: Path) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("years")
    refused(out, "not written by internvl-edge")
    (out / "manifest.json").write_text('{"manifest_version": 3, "name": "an extension"}')
    refused(out, "not written by internvl-edge")
    assert (out / "thesis.txt").read_text() == "years"


def test_empty_and_damaged_directories_may_be_replaced(out: Path) -> None:
    out.mkdir()
    refused(out, "exists; pass --force", force=False)
    publish(out, OLD, force=True)
    (out / "weights.bin").unlink()
    (out / "manifest.json").write_bytes((out / "manifest.json").read_bytes()[:60])
    publish(out, NEW, force=True)
    assert is_now(out, NEW)


def test_name_too_long(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 250), "ENAMETOOLONG")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_unwritable_parent(fast_disk: Path) -> None:
    os.chmod(fast_disk, 0o555)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setuid(65534)
            refused(fast_disk / "out", r"Permission denied \(EACCES\).*choose a path")
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# --- what may not be published -------------------------------------------------------------------

INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "without manifest.json"),
    "missing": (lambda d: (d / "weights.bin").unlink(), "listed but not written"),
    "shorter": (lambda d: os.truncate(d / "weights.bin", 3), "192 bytes, found 3"),
    "unlisted": (lambda d: (d / "x").touch(), r"not listed: \['x'\]"),
    "unlisted in folder": (lambda d: _touch(d / "engines" / "x"), "'engines/x'"),
    "link": (lambda d: (d / "x").symlink_to("README.md"), "not listed"),
    "link to folder": (lambda d: (d / "x").symlink_to("/"), "not listed"),
    "link for file": (lambda d: _link(d / "README.md"), "listed as a file"),
}


def _touch(path: Path) -> None:
    path.parent.mkdir()
    path.touch()


def _link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


@pytest.mark.parametrize("case", INCOMPLETE)
def test_incomplete(out: Path, case: str) -> None:
    change, message = INCOMPLETE[case]

    def attempt() -> None:
        with staging(out, force=False) as directory:
            write_files(directory, OLD)
            write_manifest(directory, manifest_of(OLD))
            change(directory)

    with pytest.raises(InternVLError, match=message) as caught:
        attempt()
    assert caught.value.exit_code == 7
    assert not out.exists()


def test_manifest_comes_last(out: Path) -> None:
    refused_to = pytest.raises(InternVLError, match="listed but not written")
    with refused_to, staging(out, force=False) as directory:
        write_manifest(directory, manifest_of(OLD))


@pytest.mark.parametrize(
    "changed",
    [{"source": {"x": float("inf")}}, {"model": {"x": object()}}, {"image_size": "28"}],
)
def test_manifest_that_could_not_be_read(tmp_path: Path, changed: dict[str, Any]) -> None:
    write_files(tmp_path, OLD)
    with pytest.raises(InternVLError, match="not a manifest that can be read"):
        write_manifest(tmp_path, manifest_of(OLD, **changed))
    assert not (tmp_path / "manifest.json").exists()


# --- crashes -------------------------------------------------------------------------------------


def drive(directory: Path, fault: str, mode: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "support.crash_driver", str(directory), fault, mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=TESTS)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["first", "replace", "fallback", "update"])
@pytest.mark.parametrize("fault", ["KILL", "ENOSPC", "EIO"])
def test_fault_at_every_step(fast_disk: Path, fault: str, mode: str) -> None:
    result = drive(fast_disk, fault, mode)
    assert result["points"] >= 20
    before = "absent" if mode == "first" else "old"
    interrupted = "killed" if fault == "KILL" else "ResourceError"
    assert result["seen"][f"{interrupted}: {before}"] >= 4
    if mode == "replace":
        assert not any(key.endswith("absent") for key in result["seen"])


@pytest.mark.slow
def test_killed_at_any_moment(fast_disk: Path) -> None:
    seen = drive(fast_disk, "KILL", "random")["seen"]
    assert sum(seen.values()) == 40
    assert {"old", "new"} & set(seen)


def test_leftovers_of_the_dead_are_reclaimed(out: Path) -> None:
    for name in (".out.0123abcd.partial", ".out.0123abcd.old"):
        write_artifact(out.parent / name, OLD)
    kept = (".out.0123.partial", ".other.0123abcd.partial", ".out.0123abcd.partial.txt")
    for name in kept:
        (out.parent / name).mkdir()
    publish(out, NEW, force=True)
    assert sorted(os.listdir(out.parent)) == sorted((*kept, "out"))
    assert open_artifact(out).manifest == manifest_of(NEW)


def test_old_directory_left_aside_is_put_back(out: Path) -> None:
    """The process died between the two renames of a kernel without exchange."""
    write_artifact(out.parent / ".out.0123abcd.old", OLD)
    refused_by_force = pytest.raises(UsageError, match="exists; pass --force")
    with refused_by_force, staging(out, force=False):
        pytest.fail("work began")
    assert is_now(out, OLD)


def test_work_of_the_living_stays(out: Path) -> None:
    with staging(out, force=False) as first:
        write_files(first, OLD)
        publish(out, NEW)
        assert sorted(os.listdir(first)) == sorted(OLD)
        write_manifest(first, manifest_of(OLD))
        shutil.rmtree(out)
    assert is_now(out, OLD)


def test_locks_that_everybody_gets(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On such a file system nothing is reclaimed, and the last one to publish wins."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: None)
    publish(out, OLD)
    with staging(out, force=True) as first:
        write_files(first, NEW)
        publish(out, OLD, force=True)
        write_manifest(first, manifest_of(NEW))
    assert is_now(out, NEW)


def test_no_locks_at_all(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    publish(out, OLD)
    publish(out, NEW, force=True)
    assert is_now(out, NEW)


# --- several at once -----------------------------------------------------------------------------


def test_second_one_is_told(out: Path) -> None:
    publish(out, OLD)
    with staging(out, force=True) as directory:
        refused(out, "another run is writing to")
        with pytest.raises(UsageError, match="another run is writing to"), update(out):
            pytest.fail("work began")
        write_files(directory, NEW)
        write_manifest(directory, manifest_of(NEW))
    assert is_now(out, NEW)
    with update(out):
        refused(out, "another run is writing to")


def test_other_run_publishes_first(out: Path) -> None:
    told = pytest.raises(UsageError, match="exists; pass --force")
    with told, staging(out, force=False) as directory:
        write_files(directory, OLD)
        write_manifest(directory, manifest_of(OLD))
        publish(out, NEW)
    assert is_now(out, NEW)


@pytest.mark.slow
@pytest.mark.parametrize("locks", [True, False])
def test_race(fast_disk: Path, locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writers at once, twenty times: one valid directory, and nothing left."""
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: None)
    out = fast_disk / "out"
    for _ in range(20):
        children = []
        for files in (OLD, NEW):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    publish(out, files, force=True)
                    code = 0
                except UsageError:
                    code = 2
                finally:
                    os._exit(code)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert 0 in codes and 1 not in codes
        assert is_now(out, OLD) or is_now(out, NEW)


# --- adding engines ------------------------------------------------------------------------------


def add_engine(out: Path, engine: bytes) -> None:
    with update(out) as artifact:
        files = contents(engine=engine)
        write_files(out, {name: files[name] for name in (ENGINE, SIDECAR)})
        added = manifest_of(files)
        manifest = replace(artifact.manifest, engines=added.engines, files=added.files)
        write_manifest(out, manifest)


def test_update(out: Path) -> None:
    publish(out, OLD)
    inode = out.stat().st_ino
    add_engine(out, b"plan")
    assert is_now(out, contents(engine=b"plan"))
    assert out.stat().st_ino == inode
    add_engine(out, b"another plan")
    assert is_now(out, contents(engine=b"another plan"))


def test_update_that_fails(out: Path) -> None:
    publish(out, OLD)
    with pytest.raises(RuntimeError), update(out):
        write_files(out, {ENGINE: b"half a pl"})
        raise RuntimeError
    assert is_now(out, OLD)
    add_engine(out, b"plan")
    assert is_now(out, contents(engine=b"plan"))


def test_update_clears_what_others_left(out: Path) -> None:
    publish(out, contents(engine=b"plan"))
    for name in (".manifest.json.0123abcd.partial", "engines/.x.plan.partial"):
        (out / name).write_bytes(b"x")
    (out / "notes.partial").touch()
    with update(out):
        pass
    assert sorted(os.listdir(out / "engines")) == sorted(Path(n).name for n in (ENGINE, SIDECAR))
    assert sorted(os.listdir(out)) == sorted(
        ["README.md", "engines", "manifest.json", "notes.partial", "vision.onnx", "weights.bin"]
    )


def test_update_of_what_is_no_artifact(out: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a directory"), update(out):
        pytest.fail("work began")
    publish(out, OLD)
    (out / "weights.bin").write_bytes(b"\2" * 192)
    with pytest.raises(ArtifactError, match="the file was changed"), update(out):
        pytest.fail("work began")


def test_update_does_not_leave_the_directory(out: Path, tmp_path: Path) -> None:
    publish(out, OLD)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".x.partial").touch()
    (out / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="symbolic link"), update(out):
        pytest.fail("work began")
    assert os.listdir(tmp_path / "elsewhere") == [".x.partial"]


def test_directory_replaced_during_an_update(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system whose locks do nothing: the new directory keeps its own manifest."""
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: None)
    publish(out, OLD)
    with pytest.raises(UsageError, match="replaced by another run"), update(out) as artifact:
        publish(out, NEW, force=True)
        write_manifest(out, artifact.manifest)
    assert is_now(out, NEW)


# --- the disk ------------------------------------------------------------------------------------


def test_order_of_what_is_made_durable(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then their folder, then the rename, then the parent: a power loss finds no half."""
    publish(out, OLD)
    events: list[str] = []
    real = os.fsync, disk._renameat2

    def fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real[0](descriptor)

    def renameat2(source: Path, target: Path, flag: int) -> None:
        events.append(f"rename {flag}")
        real[1](source, target, flag)

    with staging(out, force=True) as directory:
        write_files(directory, contents(engine=b"plan"))
        write_manifest(directory, manifest_of(contents(engine=b"plan")))
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(disk, "_renameat2", renameat2)
    tops = {"sync README.md", "sync manifest.json", "sync vision.onnx", "sync weights.bin"}
    assert set(events[:2]) == {f"sync {Path(ENGINE).name}", f"sync {Path(SIDECAR).name}"}
    assert events[2] == "sync engines"
    assert set(events[3:7]) == tops
    assert events[7:] == [f"sync {directory.name}", "rename 1", "rename 2", "sync here"]


def test_file_size_limit(fast_disk: Path) -> None:
    """EFBIG in the middle of the work: our error, and nothing is left."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            publish(fast_disk / "out", contents(bytes(8192)))
        except ResourceError as error:
            code = 0 if "EFBIG" in str(error) and str(fast_disk / "out") in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert os.listdir(fast_disk) == []


FULL_DISK = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.artifacts import contents, publish
from internvl_edge.errors import ResourceError
root = Path({root!r})
publish(root / "out", contents(bytes(1 << 16)))
try:
    publish(root / "out", contents(bytes(1 << 19)), force=True)
except ResourceError as error:
    assert "ENOSPC" in str(error) and "free some disk space" in str(error), error
    assert os.listdir(root) == ["out"], os.listdir(root)
    publish(root / "out", contents(bytes(1 << 16)), force=True)
    print("refused")
"""


def test_full_disk(tmp_path: Path) -> None:
    """A real one, of 256 KiB, mounted in a namespace of its own."""
    script = FULL_DISK.format(tests=str(TESTS), root=str(tmp_path))
    mount = f'mount -t tmpfs -o size=256k tmpfs "{tmp_path}"'
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    possible = subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True)
    if possible.returncode != 0:
        pytest.skip(f"no mount namespaces here: {possible.stderr.decode().strip()}")
    command = ["unshare", "-Urm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable]
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused\n", done.stderr


def test_write_atomically(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(UsageError, match="ENOENT"):
        write_atomically(tmp_path / "absent" / "file", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="EISDIR"):
        write_atomically(tmp_path / "folder", b"")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_failed_fsync_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"old")
    calls = 0

    def fails(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(ResourceError, match=r"Input/output error \(EIO\)"):
        write_atomically(tmp_path / "file", b"new")
    assert calls == 1
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_record(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    assert record(tmp_path / "file") == FileRecord(nbytes=3, sha256=digest)
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(UsageError, match="ELOOP"):
        record(tmp_path / "link")


# --- hashes of linked shards ---------------------------------------------------------------------

SHARD = b"\x02\0\0\0\0\0\0\0{}" + bytes(9)
WHOLE = hashlib.sha256(SHARD).hexdigest()


def with_shard(sha256: str | None) -> dict[str, FileRecord]:
    header = hashlib.sha256(b"{}").hexdigest()
    shard = FileRecord(nbytes=len(SHARD), sha256=sha256, header_sha256=header)
    return manifest_of(OLD).files | {"w.safetensors": shard}


@pytest.fixture
def linked(out: Path) -> Path:
    return write_artifact(out, OLD | {"w.safetensors": SHARD}, files=with_shard(None))


def test_a_hash_that_was_not_known_is_recorded(linked: Path) -> None:
    artifact, recorded = verify_whole(linked)
    assert recorded == ("w.safetensors",)
    assert artifact == open_artifact(linked, whole=True)
    assert artifact.manifest.files == with_shard(WHOLE)
    again, recorded = verify_whole(linked)
    assert (again, recorded) == (artifact, ())
    assert sorted(os.listdir(linked)) == sorted([*OLD, "w.safetensors", "manifest.json"])


def test_a_changed_byte_is_found_from_then_on(linked: Path) -> None:
    verify_whole(linked)
    before = (linked / "manifest.json").read_bytes()
    (linked / "w.safetensors").write_bytes(SHARD[:-1] + b"\1")
    open_artifact(linked)
    with pytest.raises(ArtifactError, match=r"w\.safetensors.*the file was changed"):
        verify_whole(linked)
    assert (linked / "manifest.json").read_bytes() == before


def test_a_changed_file_is_found_before_anything_is_recorded(linked: Path) -> None:
    (linked / "README.md").write_bytes(b"# Tiny\n")
    with pytest.raises(ArtifactError, match="README"):
        verify_whole(linked)
    assert Manifest.from_bytes((linked / "manifest.json").read_bytes()).files == with_shard(None)


def test_recording_waits_for_no_one(linked: Path) -> None:
    with update(linked), pytest.raises(UsageError, match="another run"):
        verify_whole(linked)
    verify_whole(linked)
    with update(linked):
        assert verify_whole(linked)[1] == ()  # nothing to record, nothing to lock


def test_known_hashes_can_be_proved_where_nothing_can_be_written(
    linked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may do anything
    with pytest.raises(UsageError, match="cannot be written"):
        verify_whole(linked)
    monkeypatch.undo()
    verify_whole(linked)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    verify_whole(linked)


def test_only_an_unknown_hash_may_be_added(linked: Path) -> None:
    write_manifest(linked, manifest_of(OLD, files=with_shard(None)))
    write_manifest(linked, manifest_of(OLD, files=with_shard(WHOLE)))
    for other in ("a" * 64, None):
        with pytest.raises(UsageError, match="replaced by another run"):
            write_manifest(linked, manifest_of(OLD, files=with_shard(other)))
    without = {n: r for n, r in with_shard(WHOLE).items() if n != "w.safetensors"}
    with pytest.raises(UsageError, match="replaced by another run"):
        write_manifest(linked, manifest_of(OLD, files=without))


def test_require_free_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_free_disk(tmp_path / "not" / "yet", free // 2)
    with pytest.raises(ResourceError, match=r"needs 1000000\.00 GB of disk, [\d.]+ GB are free"):
        require_free_disk(tmp_path, 10**15)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ENOSPC", ResourceError),
        ("EDQUOT", ResourceError),
        ("EFBIG", ResourceError),
        ("EIO", ResourceError),
        ("EMFILE", ResourceError),
        ("EACCES", UsageError),
        ("EROFS", UsageError),
        ("EPERM", UsageError),
        ("EXDEV", InternVLError),
    ],
)
def test_os_errors(name: str, kind: type[InternVLError]) -> None:
    code = getattr(errno, name)
    raised = pytest.raises(InternVLError, match=rf"^a: {os.strerror(code)} \({name}\)")
    with raised as caught, os_errors(Path("a")):
        raise OSError(code, os.strerror(code), "b")
    assert type(caught.value) is kind
    assert "at b" in str(caught.value)


def test_other_errors_of_the_work_stay_what_they_are(out: Path) -> None:
    with pytest.raises(FileNotFoundError), staging(out, force=False):
        Path("/nonexistent/checkpoint").read_bytes()
    with pytest.raises(UsageError, match="ENOENT"), staging(out, force=False) as directory:
        (directory / "absent").read_bytes()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_published_files_are_for_nobody_else_to_write_to(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with staging(tmp_path / "new" / "out", force=False) as directory:
            write_files(directory, contents(engine=b"plan"))
            write_manifest(directory, manifest_of(contents(engine=b"plan")))
    finally:
        os.umask(before)
    out = tmp_path / "new" / "out"
    for path in (out.parent, out, *out.rglob("*")):
        most = (0o755 if path.is_dir() else 0o644) & ~mask
        assert path.stat().st_mode & 0o777 == most, path


def test_the_checkpoints_own_shard_keeps_its_mode(tmp_path: Path) -> None:
    (shard := tmp_path / "shard").write_bytes(contents()["weights.bin"])
    shard.chmod(0o666)
    with staging(tmp_path / "out", force=False) as directory:
        write_files(directory, {k: v for k, v in contents().items() if k != "weights.bin"})
        os.link(shard, directory / "weights.bin")
        write_manifest(directory, manifest_of(contents()))
    assert shard.stat().st_mode & 0o777 == 0o666


def engine_of(folder: Path, name: str, data: bytes, written: bytes) -> None:
    info = replace(ENGINE_INFO, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / f"{name}.plan").write_bytes(written)
    (folder / f"{name}.json").write_text(json.dumps(info.to_json()))


def test_an_engine_that_lost_its_pages_is_built_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = b"engine" * 1000
    engine_of(tmp_path, "sound", data, data)
    engine_of(tmp_path, "lost", data, data[:1000] + bytes(len(data) - 1000))
    engine_of(tmp_path, "short", data, data[:10])
    (tmp_path / "alone.plan").write_bytes(data)
    (tmp_path / "odd.json").write_text("{}")
    with caplog.at_level("WARNING"):
        assert sound_engines(tmp_path) == (tmp_path / "sound.plan", tmp_path / "sound.json")
    assert caplog.text.count("built again") == 3
    assert {path.stem for path in tmp_path.iterdir()} == {"sound"}
