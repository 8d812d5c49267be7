"""Writing a compiled directory so that nobody ever sees half of one.

    .OUT.1a2b3c4d.partial    where it is written, beside OUT; the manifest last
    fsync                    every file, then every folder
    rename                   to OUT; an OUT that is there is exchanged in one step
    fsync                    the parent; then the old directory goes

So at any moment, whatever dies, OUT is absent, the old one or the complete new one. Where the
kernel cannot exchange two names, the old directory stands aside as .OUT.1a2b3c4d.old for the
length of one rename; should the process die right then, the next run puts it back.

Each run has a name of its own, and only the rename decides who wins: that holds on file systems
whose locks do nothing. Locks (flock on the directory itself, gone with its process) only tell
earlier that another run is at work, and which leftovers are of the dead and can be removed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from internvl_edge.artifact import Artifact, open_artifact, sha256
from internvl_edge.errors import ArtifactError, InternVLError, ResourceError, UsageError
from internvl_edge.manifest import FOLDERS, MANIFEST, FileRecord, Manifest
from internvl_edge.onnxfile import READ_FLAGS

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
EXHAUSTED = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
REFUSED |= {errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY}
LOCKED = {errno.EWOULDBLOCK, errno.EACCES}
NO_SUCH_RENAME = {errno.ENOSYS, errno.EINVAL}  # the kernel or the file system lacks the flag
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
AT_FDCWD = -100
ATTEMPTS = 16


@contextmanager
def staging(out: Path, *, force: bool) -> Iterator[Path]:
    """A directory to write into, which becomes ``out`` if the block succeeds.

    Args:
        out: what to publish; its parents are created.
        force: replace a compiled directory of that name, all of it.

    Raises:
        UsageError: before the block: ``out`` is there or cannot be written. After it: another run
            published first.
        ResourceError: the disk is full or fails.
        InternVLError: what was written is not what its manifest lists.
    """
    with ExitStack() as cleanup:
        with os_errors(out):
            out = out.parent.resolve() / out.name if out.name not in ("", "..") else out.resolve()
            _make_parents(out.parent, cleanup)
            _restore(out)
            _reclaim(out)
            _check_replaceable(out, force=force)
            if out.exists():
                cleanup.callback(os.close, _lock(out))
            directory = _make_staging(out, cleanup)
        try:
            yield directory
        except OSError as error:
            if error.errno in FULL or str(directory) in str(error.filename):
                raise _translated(error, out) from error
            raise
        with os_errors(out):
            _check_complete(directory)
            _sync_tree(directory)
            _publish(directory, out, force=force)
            sync_directory(out.parent)


@contextmanager
def update(out: Path) -> Iterator[Artifact]:
    """A published directory, checked and locked, to add engines to.

    Files are added under new names; ``write_manifest`` then makes them part of it in one step.

    Raises:
        ArtifactError: it is not what its manifest says.
        UsageError: another run is writing to it, or it cannot be written.
        ResourceError: the disk is full or fails.
    """
    artifact = open_artifact(out)
    with os_errors(out):
        descriptor = _lock(out)
    try:
        before = (out / MANIFEST).read_bytes()
        if before != artifact.manifest.to_bytes():  # somebody was faster than the lock
            artifact = open_artifact(out)
        with os_errors(out):
            _remove_partial_files(out)
        try:
            yield artifact
        except OSError as error:
            if error.errno in FULL or str(out) in str(error.filename):
                raise _translated(error, out) from error
            raise
    finally:
        os.close(descriptor)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, the last file of a directory; it must list what is there.

    A manifest that is already there must be of the same compilation: only engines may differ.

    Raises:
        InternVLError: a listed file is missing or of another size, or the manifest is not one
            that could be read again.
        UsageError: another compilation was published here meanwhile.
    """
    try:
        data = manifest.to_bytes()
        Manifest.from_bytes(data)
    except (ArtifactError, TypeError, ValueError) as error:
        raise InternVLError(f"{directory}: not a manifest that can be read: {error}") from error
    _check_listed(directory, manifest)
    if (directory / MANIFEST).exists():
        before = Manifest.from_bytes((directory / MANIFEST).read_bytes())
        if _without_engines(before) != _without_engines(manifest):
            raise UsageError(f"{directory} was replaced by another run meanwhile; run again")
    write_atomically(directory / MANIFEST, data)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is absent, the old one or the complete new one at any moment.

    Raises:
        ResourceError: the disk is full or fails.
        UsageError: the path cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with os_errors(path):
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def record(path: Path) -> FileRecord:
    """Size and sha256 of a file, for the manifest."""
    with os_errors(path), open(os.open(path, READ_FLAGS), "rb") as file:
        return FileRecord(nbytes=os.fstat(file.fileno()).st_size, sha256=sha256(file))


def require_free_disk(path: Path, nbytes: int) -> None:
    """Refuse to begin what the disk of ``path``, which need not be there yet, cannot hold.

    Raises:
        ResourceError: less than ``nbytes`` are free.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    with os_errors(path):
        free = shutil.disk_usage(place).free
    if free < nbytes:
        raise ResourceError(
            f"{path}: needs {nbytes / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
            "free some or choose another disk"
        )


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as an error of ours that names the path and the reason."""
    try:
        yield
    except OSError as error:
        raise _translated(error, path) from error


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _translated(error: OSError, path: Path) -> InternVLError:
    name = errno.errorcode.get(error.errno or 0, "no errno")
    text = f"{path}: {error.strerror or error} ({name})"
    if error.filename is not None and str(error.filename) != str(path):
        text += f" at {error.filename}"
    if error.errno in FULL:
        return ResourceError(f"{text}; free some disk space or choose another disk")
    if error.errno in EXHAUSTED:
        return ResourceError(text)
    if error.errno in REFUSED:
        return UsageError(f"{text}; choose a path that can be written")
    return InternVLError(text)


# --- before the work -----------------------------------------------------------------------------


def _make_parents(parent: Path, cleanup: ExitStack) -> None:
    """Create parents; those that are still empty at the end, because nothing came, go again."""
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        cleanup.callback(_remove_if_empty, path)


def _remove_if_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def _check_replaceable(out: Path, *, force: bool) -> None:
    """Refuse whatever is at ``out`` unless it is a directory of ours and may be replaced."""
    try:
        mode = out.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "a file"
        raise UsageError(f"{out} is {kind}; expected a directory that does not exist yet")
    if not force:
        raise UsageError(f"{out} exists; pass --force to replace it, or choose another name")
    if os.path.ismount(out):
        raise UsageError(f"{out} is a mount point and cannot be replaced; choose a folder in it")
    if any(out.iterdir()) and not _is_ours(out):
        raise UsageError(f"{out} was not written by internvl-edge; remove it or choose another")


def _is_ours(out: Path) -> bool:
    """Whether a directory has a manifest of ours; a damaged one counts."""
    try:
        with open(os.open(out / MANIFEST, READ_FLAGS), "rb") as file:
            return b'"schema_version"' in file.read(256)
    except FileNotFoundError:
        return False


def _make_staging(out: Path, cleanup: ExitStack) -> Path:
    """A new locked directory; whatever is under its name in the end is removed."""
    for _ in range(ATTEMPTS):
        directory = _sibling(out, "partial")
        directory.mkdir()
        try:
            descriptor = _lock(directory)
        except (UsageError, FileNotFoundError):  # taken for a leftover before it was locked
            continue
        cleanup.callback(os.close, descriptor)
        cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
        return directory
    raise InternVLError(f"{out}: other runs keep removing what this one creates")


def _sibling(out: Path, suffix: str) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(4)}.{suffix}")


def _leftovers(out: Path, suffix: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.{suffix}")
    return [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)]


def _restore(out: Path) -> None:
    """Put back what stood aside when a run died between two renames."""
    for aside in _leftovers(out, "old"):
        if _is_dead(aside) and not out.exists():
            _rename(aside, out, RENAME_NOREPLACE)


def _reclaim(out: Path) -> None:
    """Remove what dead runs left."""
    for path in _leftovers(out, "partial") + _leftovers(out, "old"):
        if _is_dead(path):
            shutil.rmtree(path, ignore_errors=True)


def _remove_partial_files(out: Path) -> None:
    for folder in (out, *(out / name for name in FOLDERS)):
        for path in folder.glob(".*.partial"):
            if stat.S_ISREG(path.lstat().st_mode):
                path.unlink(missing_ok=True)


# --- locks ---------------------------------------------------------------------------------------


def _lock(directory: Path) -> int:
    """Hold a directory until the descriptor is closed or the process dies.

    Raises:
        UsageError: another run holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _flock(descriptor)
        # what was locked may no longer be what has the name
        if not os.path.samestat(os.stat(directory), os.fstat(descriptor)):
            raise BlockingIOError(errno.EWOULDBLOCK, "replaced while being locked")
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and error.errno in LOCKED:
            raise UsageError(f"another run is writing to {directory}; wait for it") from error
        raise
    return descriptor


def _flock(descriptor: int) -> bool:
    """Lock; False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in LOCKED:
            raise
        return False
    return True


def _is_dead(directory: Path) -> bool:
    """Whether no process holds a directory, on a file system that can tell."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with ExitStack() as stack:
            first = os.open(directory, flags)
            stack.callback(os.close, first)
            second = os.open(directory, flags)
            stack.callback(os.close, second)
            if not _flock(first):
                return False
            # locks that everybody gets prove nothing
            try:
                _flock(second)
            except OSError:
                return True
            return False
    except OSError:
        return False


# --- publication ---------------------------------------------------------------------------------


def _check_complete(directory: Path) -> None:
    """Refuse to publish anything but the files that the manifest lists, and the manifest."""
    if not (directory / MANIFEST).exists():
        raise InternVLError(f"{directory}: nothing is published without {MANIFEST}")
    manifest = Manifest.from_bytes((directory / MANIFEST).read_bytes())
    _check_listed(directory, manifest)
    found = {
        (Path(folder) / name).relative_to(directory).as_posix()
        for folder, folders, names in os.walk(directory)
        for name in (*names, *(n for n in folders if (Path(folder) / n).is_symlink()))
    }
    if found != {*manifest.files, MANIFEST}:
        unlisted = sorted(found - {*manifest.files, MANIFEST})
        raise InternVLError(f"{directory}: written but not listed: {unlisted}")


def _check_listed(directory: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        path = directory / name
        try:
            status = path.lstat()
        except FileNotFoundError as error:
            raise InternVLError(f"{path}: listed but not written") from error
        if not stat.S_ISREG(status.st_mode) or status.st_size != expected.nbytes:
            raise InternVLError(
                f"{path}: listed as a file of {expected.nbytes} bytes, found {status.st_size}"
            )


def _without_engines(manifest: Manifest) -> dict[str, object]:
    """What two manifests of one compilation share."""
    raw = manifest.to_json()
    files = {n: r for n, r in raw["files"].items() if not n.startswith("engines/")}
    return {**raw, "files": files, "engines": [], "tool_version": ""}


def _sync_tree(directory: Path) -> None:
    """Make a directory's contents durable: files first, then the names that lead to them."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            descriptor = os.open(Path(folder) / name, READ_FLAGS)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))


def _publish(directory: Path, out: Path, *, force: bool) -> None:
    """Give the directory its name; an old one of that name is left under the staging name."""
    for _ in range(ATTEMPTS):
        try:
            _rename(directory, out, RENAME_NOREPLACE)
        except FileExistsError:
            _check_replaceable(out, force=force)
        else:
            return
        try:
            _rename(directory, out, RENAME_EXCHANGE)
        except FileNotFoundError:
            continue  # it has gone again
        return
    raise InternVLError(f"{out}: other runs keep replacing it")


def _rename(source: Path, target: Path, flag: int) -> None:
    """Rename without replacing, or exchange two names."""
    try:
        _renameat2(source, target, flag)
    except OSError as error:
        if error.errno not in NO_SUCH_RENAME:
            raise
        if flag == RENAME_EXCHANGE:
            _exchange_in_steps(source, target)
        elif target.exists():  # not atomic, but rename itself replaces empty directories only
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        else:
            os.rename(source, target)


def _renameat2(source: Path, target: Path, flag: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(target))


def _exchange_in_steps(source: Path, target: Path) -> None:
    aside = _sibling(target, "old")
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(aside, target)
        raise
    os.rename(aside, source)
