"""Writing a compiled directory so that nobody ever sees half of one.

    .OUT.1a2b3c4d.partial    where it is written, next to OUT; the manifest last
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

import contextlib
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from internvl_edge.artifact.manifest import FOLDERS, MANIFEST, FileRecord, Manifest
from internvl_edge.artifact.open import Artifact, open_artifact, sha256
from internvl_edge.artifact.sidecar import read_engine_info
from internvl_edge.errors import ArtifactError, InternVLError, UsageError
from internvl_edge.files.disk import (
    exchange,
    is_abandoned,
    lock,
    nearest_existing,
    open_regular,
    os_errors,
    rename_new,
    require_free_disk,
    sibling,
    sync,
    sync_tree,
    work_errors,
    write_atomically,
)
from internvl_edge.files.reading import require_unicode

__all__ = [
    "check_out",
    "check_parent",
    "hold",
    "is_compiled",
    "limit_modes",
    "make_parents",
    "os_errors",
    "placed",
    "record",
    "require_free_disk",
    "sound_engines",
    "staging",
    "update",
    "verify_whole",
    "write_atomically",
    "write_manifest",
]

logger = logging.getLogger(__name__)

ATTEMPTS = 16
FILE_MODE, FOLDER_MODE = 0o644, 0o755  # at most, whatever the umask


def is_compiled(directory: Path) -> bool:
    """Tell whether a directory has a manifest of ours; a damaged one counts."""
    try:
        with open_regular(directory / MANIFEST) as file:
            return b'"schema_version"' in file.read(256)
    except FileNotFoundError:
        return False


@contextmanager
def staging(
    out: Path,
    *,
    force: bool,
    check: Callable[[Path], None] | None = None,
    is_ours: Callable[[Path], bool] = is_compiled,
) -> Iterator[Path]:
    """Give a directory to write into, which becomes ``out`` if the block succeeds.

    Args:
        out: what to publish; its parents are created.
        force: replace a directory of ours of that name, with all that is in it.
        check: makes sure that it is complete; None: that it is what its manifest lists.
        is_ours: tells whether a directory may be replaced.

    Raises:
        UsageError: before the block: ``out`` exists or cannot be written. After it: another run
            published first.
        ResourceError: the disk is full or fails.
        InternVLError: what was written is not what its manifest lists.
    """
    with ExitStack() as cleanup:
        with os_errors(out):
            out = placed(out)
            make_parents(out.parent, cleanup)
            _restore(out)
            _reclaim(out)
            check_out(out, force=force, is_ours=is_ours)
            held = hold(out, cleanup) if out.exists() else None
            directory = _make_staging(out, cleanup)
        with work_errors(out, directory):
            yield directory
        with os_errors(out):
            (check or _check_complete)(directory)
            limit_modes(directory)
            sync_tree(directory)
            check_again = partial(check_out, out, force=force, is_ours=is_ours)
            _publish(directory, out, check_again, held, cleanup)
            sync(out.parent)


@contextmanager
def update(out: Path) -> Iterator[Artifact]:
    """Open a published directory, checked and locked, to add engines to.

    Files are added under new names; ``write_manifest`` then makes them part of it in one step.

    Raises:
        ArtifactError: it is not what its manifest says.
        UsageError: another run is writing to it, or it cannot be written.
        ResourceError: the disk is full or fails.
    """
    open_artifact(out, hash_files=False)
    with ExitStack() as cleanup:
        with os_errors(out):
            hold(out.resolve(), cleanup)
            if not os.access(out, os.W_OK | os.X_OK):
                raise UsageError(f"{out} cannot be written; copy it to a place that can")
            _remove_partial_files(out)
        artifact = open_artifact(out)  # again: only now does nobody else write to it
        with work_errors(out, out):
            yield artifact


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, the last file of a directory; it must list what is there.

    Where there is one already, only files in folders, such as engines, may differ, and hashes
    may be there that were not known.

    Raises:
        InternVLError: a listed file is missing or of another size, or the manifest is not one
            that could be read again.
        UsageError: another compilation was published here meanwhile, or it cannot be written.
        ResourceError: the disk is full or fails.
    """
    try:
        data = manifest.to_bytes()
        Manifest.from_bytes(data)
    except (ArtifactError, TypeError, ValueError) as error:
        raise InternVLError(f"{directory}: not a manifest that can be read: {error}") from error
    _check_listed(directory, manifest)
    if (directory / MANIFEST).exists():
        before = Manifest.from_bytes((directory / MANIFEST).read_bytes())
        if not _same_compilation(before, manifest):
            raise UsageError(f"{directory} was replaced by another run meanwhile; run again")
        with os_errors(directory):
            _sync_added(directory, manifest)
    write_atomically(directory / MANIFEST, data)


def verify_whole(out: Path) -> tuple[Artifact, tuple[str, ...]]:
    """Hash every file of a published directory whole, the checkpoint's own shards too.

    Returns:
        The directory, and the shards whose hash was not known: the manifest has it from now on.

    Raises:
        ArtifactError: a file is not what the manifest says.
        UsageError: a hash is not known, and the directory cannot be written.
        ResourceError: the disk is full or fails.
    """
    artifact = open_artifact(out, whole=True)
    if not _unproved(artifact.manifest):
        return artifact, ()
    with update(out) as artifact:
        names = _unproved(artifact.manifest)
        records = {
            name: replace(artifact.manifest.files[name], sha256=record(out / name).sha256)
            for name in names
        }
        manifest = replace(artifact.manifest, files={**artifact.manifest.files, **records})
        write_manifest(out, manifest)
    return replace(artifact, manifest=manifest), names


def _unproved(manifest: Manifest) -> tuple[str, ...]:
    return tuple(name for name, file in manifest.files.items() if file.sha256 is None)


def record(path: Path) -> FileRecord:
    """Measure size and sha256 of a file, for the manifest."""
    with os_errors(path), open_regular(path) as file:
        return FileRecord(nbytes=os.fstat(file.fileno()).st_size, sha256=sha256(file))


def sound_engines(folder: Path) -> tuple[Path, ...]:
    """List the engines and sidecars that an earlier run finished; remove what is damaged.

    A sidecar has its engine's hash, and is written after the engine was synced.
    """
    sound: list[Path] = []
    for sidecar in sorted(folder.glob("*.json")):
        plan = sidecar.with_suffix(".plan")
        try:
            info, found = read_engine_info(sidecar), record(plan)
        except InternVLError as error:
            logger.warning("an engine that an earlier run built is built again: %s", error)
            continue
        if (found.nbytes, found.sha256) == (info.nbytes, info.sha256):
            sound += (plan, sidecar)
        else:
            logger.warning("%s is damaged and is built again", plan)
    for path in set(folder.iterdir()) - set(sound):
        path.unlink()
    return tuple(sound)


# --- before the work -----------------------------------------------------------------------------


def placed(out: Path) -> Path:
    """Return the absolute path of a directory that may not exist, without following a final link.

    Raises:
        UsageError: the root of the file system, which has no folder around it.
    """
    absolute = out.resolve() if out.name in ("", "..") else out.parent.resolve() / out.name
    if not absolute.name:
        raise UsageError(f"{out} is the root of the file system; choose a folder in it")
    return absolute


def check_parent(out: Path) -> None:
    """Refuse, before any work, a place where ``out`` cannot be made.

    Raises:
        UsageError: the folder around it is none, or cannot be written, or a name is not UTF-8.
    """
    require_unicode(out)
    place = nearest_existing(out.absolute().parent)
    if not place.is_dir():
        raise UsageError(f"{out}: {place} is not a folder; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"{out}: {place} cannot be written; choose a folder that can")


def make_parents(parent: Path, cleanup: ExitStack) -> None:
    """Create parents; those that are still empty in the end are removed."""
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)
        cleanup.callback(_remove_if_empty, path)


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def check_out(out: Path, *, force: bool, is_ours: Callable[[Path], bool] = is_compiled) -> None:
    """Refuse whatever is at ``out`` unless it is a directory of ours and may be replaced.

    Raises:
        UsageError: it says what is there.
    """
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
    if any(out.iterdir()) and not is_ours(out):
        raise UsageError(f"{out} was not written by internvl-edge; remove it or choose another")


def hold(directory: Path, cleanup: ExitStack) -> int:
    """Lock a directory until ``cleanup`` is closed.

    Raises:
        UsageError: another run holds it.
    """
    descriptor = lock(directory)
    cleanup.callback(_release, descriptor)
    return descriptor


def _release(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


def _make_staging(out: Path, cleanup: ExitStack) -> Path:
    """Make a new locked directory; whatever has its name in the end is removed."""
    for _ in range(ATTEMPTS):
        directory = sibling(out, "partial")
        directory.mkdir(mode=FOLDER_MODE)
        try:
            hold(directory, cleanup)
        except (UsageError, FileNotFoundError):  # taken for a leftover before it was locked
            continue
        cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
        return directory
    raise InternVLError(f"{out}: other runs keep removing what this one creates")


def _leftovers(out: Path, suffix: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.{suffix}")
    return [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)]


def _restore(out: Path) -> None:
    """Put back what stood aside when a run died between two renames."""
    for aside in _leftovers(out, "old"):
        if not out.exists():
            rename_new(aside, out)


def _reclaim(out: Path) -> None:
    """Remove what dead runs left."""
    for path in _leftovers(out, "partial") + _leftovers(out, "old"):
        if is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _remove_partial_files(out: Path) -> None:
    for folder in (out, *(out / name for name in FOLDERS)):
        if folder.is_symlink() and folder != out:
            raise ArtifactError(f"{folder} is a symbolic link; files must lie in {out} itself")
        for path in folder.glob(".*.partial"):
            if stat.S_ISREG(path.lstat().st_mode):
                path.unlink(missing_ok=True)


# --- after it ------------------------------------------------------------------------------------


def _check_complete(directory: Path) -> None:
    """Refuse to publish anything but the manifest and the files that it lists."""
    if not (directory / MANIFEST).exists():
        raise InternVLError(f"{directory}: nothing is published without {MANIFEST}")
    manifest = Manifest.from_bytes((directory / MANIFEST).read_bytes())
    _check_listed(directory, manifest)
    written = {
        (Path(folder) / name).relative_to(directory).as_posix()
        for folder, folders, names in os.walk(directory)
        for name in (*names, *(n for n in folders if (Path(folder) / n).is_symlink()))
    }
    if unlisted := sorted(written - {*manifest.files, MANIFEST}):
        raise InternVLError(f"{directory}: written but not listed: {unlisted}")


def limit_modes(directory: Path) -> None:
    """Take from others what an open umask gave them: files are 0644 at most, folders 0755.

    A file of two names, such as a checkpoint's own shard, is not only ours to change.
    """
    for folder, _, names in os.walk(directory):
        _limit_mode(Path(folder), FOLDER_MODE)
        for name in names:
            path = Path(folder) / name
            if path.lstat().st_nlink == 1:
                _limit_mode(path, FILE_MODE)


def _limit_mode(path: Path, most: int) -> None:
    mode = stat.S_IMODE(path.lstat().st_mode)
    if mode & ~most:
        path.chmod(mode & most)


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


def _sync_added(directory: Path, manifest: Manifest) -> None:
    """Make what is new in a published directory durable before the manifest promises it."""
    added = [directory / name for name in manifest.files if "/" in name]
    for path in added:
        sync(path)
    for folder in sorted({path.parent for path in added}):
        sync(folder)


def _same_compilation(before: Manifest, after: Manifest) -> bool:
    """Tell whether two manifests list the same files, but for engines, reports and new hashes."""
    old, new = (
        {name: record for name, record in manifest.files.items() if "/" not in name}
        for manifest in (before, after)
    )
    for name, known in old.items():
        if known.sha256 is None and name in new:
            new[name] = replace(new[name], sha256=None)
    return old == new


def _publish(
    directory: Path,
    out: Path,
    check_again: Callable[[], None],
    held: int | None,
    cleanup: ExitStack,
) -> None:
    """Give the directory its name; an old one of that name is left under the staging name."""
    for _ in range(ATTEMPTS):
        try:
            rename_new(directory, out)
        except FileExistsError:
            check_again()
        else:
            return
        try:
            if held is None or not os.path.samestat(out.stat(), os.fstat(held)):
                held = hold(out, cleanup)  # it appeared while this run was at work
            exchange(directory, out)
        except FileNotFoundError:
            continue  # it has gone again
        return
    raise InternVLError(f"{out}: other runs keep replacing it")
