"""Files on disk: whole ones, durable names, locks, and the disk's errors as ours.

A name is durable once its directory was synced, contents once the file was; rename is the one
step that is atomic. A failed fsync is final: the kernel may have dropped the data, and a second
call would report success.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from internvl_edge.errors import InternVLError, ResourceError, UsageError

logger = logging.getLogger(__name__)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
EXHAUSTED = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
REFUSED |= {errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG, errno.EBUSY}
NO_SUCH_RENAME = {errno.ENOSYS, errno.EINVAL}  # the kernel or the file system lacks the flag
NO_HARD_LINK = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not block
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
PRIVATE = 0o700  # the mode of a folder that work is taken up from: nobody else writes to it
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2  # renameat2(2)


# --- errors --------------------------------------------------------------------------------------


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raise an OSError of the block as an error of ours that names the path and the reason.

    Raises:
        ResourceError: the disk is full or fails, or descriptors or memory ran out.
        UsageError: the path cannot be written.
        InternVLError: anything else.
    """
    try:
        yield
    except OSError as error:
        raise translated(error, path) from error


@contextlib.contextmanager
def work_errors(path: Path, directory: Path) -> Iterator[None]:
    """Do the same where other files are touched too: a bad disk, and errors in a directory.

    Args:
        path: what the errors name.
        directory: where the block writes.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL | EXHAUSTED or str(error.filename).startswith(str(directory)):
            raise translated(error, path) from error
        raise


def translated(error: OSError, path: Path) -> InternVLError:
    """Turn an operating system's error into ours, naming ``path``."""
    name = errno.errorcode.get(error.errno or 0, "no errno")
    text = f"{path}: {error.strerror or error} ({name})"
    if error.filename is not None and str(error.filename) != str(path):
        text += f" at {error.filename}"
    if error.errno in FULL:
        return ResourceError(f"{text}; free some disk space or choose another disk")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError(
            f"{text}; close files of this process, or allow more of them: ulimit -n 4096"
        )
    if error.errno in EXHAUSTED:
        return ResourceError(text)
    if error.errno in REFUSED:
        return UsageError(f"{text}; choose a path that can be written")
    return InternVLError(text)


def require_free_disk(path: Path, nbytes: int) -> None:
    """Refuse to begin what the disk of ``path``, which need not exist yet, cannot hold.

    Raises:
        ResourceError: less than ``nbytes`` are free.
    """
    with os_errors(path):
        free = shutil.disk_usage(nearest_existing(path)).free
    if free < nbytes:
        raise ResourceError(
            f"{path}: needs {_sized(nbytes)} of disk, {_sized(free)} are free; "
            "free some or choose another disk"
        )


def _sized(nbytes: int) -> str:
    """Write a size in the unit in which it is not zero."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"


def nearest_existing(path: Path) -> Path:
    """Find the path, or the nearest folder above it that exists."""
    place = path.absolute()
    while not os.path.exists(place) and place != place.parent:  # False where not allowed to look
        place = place.parent
    return place


def open_regular(path: str | Path, *, directory: int | None = None) -> io.BufferedReader:
    """Open a regular file to read, through no final link; nothing else is ever waited for.

    Args:
        path: the file; relative to ``directory``, a descriptor, where that is given.
        directory: what a relative path begins at.

    Raises:
        OSError: it cannot be opened, or is a link, a folder, a pipe or a device.
    """
    descriptor = os.open(path, READ_FLAGS, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


# --- unfinished work ----------------------------------------------------------------------------


def make_private(folder: Path, descriptor: int) -> None:
    """Refuse a folder of somebody else; empty one that others could look into or write to.

    Args:
        folder: of work that a run may take up.
        descriptor: of it, open.

    Raises:
        UsageError: it is not this user's.
    """
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"{folder} belongs to another user (uid {status.st_uid}), whose work is not taken up; "
            "remove it or choose another name"
        )
    if stat.S_IMODE(status.st_mode) & ~PRIVATE:
        if any(folder.iterdir()):
            logger.warning("%s was open to others, and what is in it is dropped", folder)
        os.fchmod(descriptor, PRIVATE)  # first, so that nobody adds to what is emptied
        empty(folder)


def strange_entry(folder: Path) -> str | None:
    """Say what in a folder a run of this user would not have written; None: nothing is."""
    for entry in folder.rglob("*"):
        status = entry.lstat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            return f"{entry.name} is neither a file nor a folder"
        if status.st_uid != os.geteuid():
            return f"{entry.name} belongs to another user"
    return None


def empty(folder: Path) -> None:
    """Remove everything in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


# --- durable writing -----------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is absent, the old one or the complete new one at any moment.

    Raises:
        ResourceError: the disk is full or fails.
        UsageError: the path cannot be written.
    """
    partial = sibling(path, "partial")
    with os_errors(path):
        try:
            with open(partial, "xb", opener=new_file) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def new_file(name: str, flags: int) -> int:
    """Open a new file that others may read at most, whatever the umask: an ``opener``."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


class StreamedFile:
    """A file that appears whole or not at all, hashed as its pieces are written.

    It is written under a temporary name; ``publish`` syncs and renames it. Left as a context
    manager without that, it disappears. A builder of engines calls ``write`` from native code,
    where exceptions are lost: a failed write raises nothing there, but in ``publish``.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        self.nbytes = 0
        self.error: OSError | None = None  # the first failed write
        self._sha256 = hashlib.sha256()
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.partial.unlink(missing_ok=True)  # of a run that died, or a link
            self._file = open(self.partial, "xb", opener=new_file)  # noqa: SIM115
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
        """Append; returns the number of bytes taken, 0 after a failure."""
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
            sync(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ResourceError:
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some disk space" if full else "choose a directory that can be written"
        return ResourceError(
            f"{self.path}: could not be written after {self.nbytes:,} bytes: {reason}; {advice}"
        )


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file of ours a second name; copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_HARD_LINK:
            raise
        shutil.copyfile(source, target)


def sibling(path: Path, suffix: str) -> Path:
    """Make a hidden unique name in the folder of ``path``: ``.NAME.1a2b3c4d.SUFFIX``."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{suffix}")


def sync(path: Path) -> None:
    """Make a file's contents, or the names in a directory, durable."""
    descriptor = os.open(path, READ_FLAGS)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync directories, and need not
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Make a directory durable: files first, then the names that lead to them."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


def rename_new(source: Path, target: Path) -> None:
    """Rename a directory.

    Raises:
        FileExistsError: the target exists.
    """
    try:
        _renameat2(source, target, RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in NO_SUCH_RENAME:
            raise
        if target.exists():  # where this is not atomic, rename still replaces only what is empty
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        os.rename(source, target)


def exchange(source: Path, target: Path) -> None:
    """Exchange two directories' names in one step.

    Where that cannot be, the target stands aside as a sibling ``.old`` between two renames.
    """
    try:
        _renameat2(source, target, RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in NO_SUCH_RENAME:
            raise
    else:
        return
    aside = sibling(target, "old")
    os.rename(target, aside)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(aside, target)
        raise
    os.rename(aside, source)


def _renameat2(source: Path, target: Path, flag: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(source), None, str(target))


# --- locks ---------------------------------------------------------------------------------------


def lock(directory: Path) -> int:
    """Hold a directory until the descriptor is closed or the process dies.

    Where the file system has no locks, the descriptor holds nothing.

    Raises:
        UsageError: another run holds it.
        OSError: it cannot be opened, or is no longer what has the name.
    """
    descriptor = os.open(directory, FOLDER_FLAGS)
    try:
        flock(descriptor)
        same = os.path.samestat(os.stat(directory), os.fstat(descriptor))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise _busy(directory) from error
        raise
    if not same:  # replaced between open and lock
        os.close(descriptor)
        raise _busy(directory)
    return descriptor


def _busy(directory: Path) -> UsageError:
    return UsageError(f"another run is writing to {directory}; wait until it is done")


def flock(descriptor: int) -> bool:
    """Lock without waiting; False where the file system has no locks.

    Raises:
        BlockingIOError: it is locked.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def is_abandoned(directory: Path) -> bool:
    """Tell whether no process holds a directory, on a file system whose locks can tell."""
    try:
        with contextlib.ExitStack() as stack:
            first, second = (os.open(directory, FOLDER_FLAGS) for _ in range(2))
            stack.callback(os.close, first)
            stack.callback(os.close, second)
            if not flock(first):
                return False
            try:
                flock(second)
            except BlockingIOError:
                return True
            return False  # locks that everybody gets prove nothing
    except OSError:
        return False
