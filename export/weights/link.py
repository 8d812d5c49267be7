"""The checkpoint's own shards in a compiled directory, linked where possible instead of copied.

Readers of external data require regular files in the graph's folder or below it; a symbolic link
out of the directory, as in a Hugging Face snapshot, is refused. That leaves

    reflink     a separate file that shares its blocks until one of the two is written to
                (btrfs, XFS): nothing is read or written twice
    hard link   a second name of the same file: an edit of one is an edit of the other. ONNX
                Runtime and TensorRT accept it; onnx.checker and onnx-ir refuse a file of two names
    copy        hashed while it is copied

A linked shard is identified by its size and the hash of its header. A Hugging Face cache names a
large file after its sha256, which is then known too, without reading 12 GB; ``verify --full``
checks it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from internvl_edge.artifact import FileRecord
from internvl_edge.artifact.safetensors import header_sha256
from internvl_edge.errors import CheckpointError, UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.weights.writer import StoredTensor
from internvl_edge.files.disk import EXHAUSTED, FULL, nearest_existing, open_regular, os_errors

Transfer = Literal["auto", "link", "copy"]
How = Literal["reflink", "hard link", "copy"]
Copied = Callable[[str, int, int], None]  # called with a shard's name, bytes copied, bytes in all

FICLONE = 0x40049409  # ioctl_ficlone(2)
AUTO_COPY_NBYTES = 2_000_000_000  # up to here, a separate file is worth the space
CHUNK_NBYTES = 8 << 20
WAYS: dict[Transfer, tuple[How, ...]] = {
    "auto": ("reflink", "hard link", "copy"),
    "link": ("reflink", "hard link"),
    "copy": ("copy",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """A shard in the directory: how it got there, and its record for the manifest."""

    how: How
    record: FileRecord


def bring_shards(
    checkpoint: Checkpoint,
    names: Collection[str],
    directory: Path,
    transfer: Transfer,
    copied: Copied,
) -> tuple[dict[str, StoredTensor], dict[str, Brought]]:
    """Link or copy the shards that hold the named tensors into ``directory``, under their names.

    Args:
        checkpoint: the owner of the shards.
        names: the tensors, by canonical name.
        directory: the destination.
        transfer: ``auto`` reflinks, else copies up to 2 GB, else hard-links, else copies.
        copied: called with the progress of a copy.

    Returns:
        Canonical name → location, and file name → how it got there.

    Raises:
        UsageError: ``link``, and a shard can be neither reflinked nor hard-linked.
        CheckpointError: a shard has changed since the checkpoint was opened, or does not match
            the hash in its blob's name.
    """
    checkpoint.require_unchanged()
    entries = {name: checkpoint.tensors[name] for name in names}
    shards = sorted({entry.file for entry in entries.values()})
    ways = _ways(shards, transfer)
    brought = {shard.name: _bring(shard, directory / shard.name, ways, copied) for shard in shards}
    checkpoint.require_unchanged()
    stored = {
        name: StoredTensor(
            location=entry.file.name,
            offset=entry.offset,
            nbytes=entry.nbytes,
            dtype=entry.dtype,
            shape=entry.shape,
        )
        for name, entry in entries.items()
    }
    return stored, brought


def way_of(shards: Sequence[Path], out: Path, transfer: Transfer) -> How:
    """Find out how shards would get into OUT, by linking the first next to it and undoing that.

    Args:
        shards: the files.
        out: the directory to be published; it need not exist.
        transfer: as in ``bring_shards``.

    Raises:
        UsageError: ``link``, and the shard can be neither reflinked nor hard-linked there.
        ResourceError: the disk is full or fails.
    """
    folder = nearest_existing(out.absolute().parent)
    source, why = shards[0].resolve(strict=True), ""
    # named like the remains of a killed run, which the next run removes
    with os_errors(out), TemporaryDirectory(".partial", f".{out.name}.", folder) as place:
        for how in _ways(shards, transfer):
            if how == "copy":
                return how
            try:
                _link(how, source, Path(place) / source.name)
            except OSError as error:
                if error.errno in FULL | EXHAUSTED:
                    raise
                why = error.strerror or str(error)
            else:
                return how
    raise _unlinked(shards[0], folder, why)


def _ways(shards: Sequence[Path], transfer: Transfer) -> tuple[How, ...]:
    if transfer == "auto" and sum(s.stat().st_size for s in shards) <= AUTO_COPY_NBYTES:
        return ("reflink", "copy")
    return WAYS[transfer]


def _link(how: How, source: Path, target: Path) -> None:
    (_reflink if how == "reflink" else os.link)(source, target)


def _unlinked(shard: Path, folder: Path, why: str) -> UsageError:
    return UsageError(
        f"{shard} can be neither reflinked nor hard-linked into {folder}: {why}; both must be on "
        "one file system, and you must own the file or be able to write it; or use --weights copy"
    )


def _bring(shard: Path, target: Path, ways: tuple[How, ...], copied: Copied) -> Brought:
    """Try one way after the other; if there is a copy, it comes last."""
    source = shard.resolve(strict=True)  # a cache snapshot is a link to a blob
    known = source.name if re.fullmatch("[0-9a-f]{64}", source.name) else None
    why = ""
    for how in ways:
        if how == "copy":
            return Brought(how=how, record=_copy(source, target, known, copied))
        try:
            _link(how, source, target)
        except OSError as error:
            if error.errno in FULL | EXHAUSTED:
                raise
            why = error.strerror or str(error)
        else:
            return Brought(how=how, record=_record(target, known))
    raise _unlinked(shard, target.parent, why)


def _record(path: Path, sha256: str | None) -> FileRecord:
    with open_regular(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        return FileRecord(nbytes=nbytes, sha256=sha256, header_sha256=header_sha256(file))


def _reflink(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, open(target, "xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        except BaseException:
            target.unlink()
            raise


def _copy(source: Path, target: Path, known: str | None, copied: Copied) -> FileRecord:
    digest, done = hashlib.sha256(), 0
    with open(source, "rb", buffering=0) as reader, open(target, "xb") as writer:
        total = os.fstat(reader.fileno()).st_size
        while chunk := reader.read(CHUNK_NBYTES):
            copied(target.name, done, total)
            digest.update(chunk)
            writer.write(chunk)
            done += len(chunk)
    copied(target.name, done, total)
    sha256 = digest.hexdigest()
    if known not in (None, sha256):
        raise CheckpointError(
            f"{source}: expected a file with the sha256 that it is named after, found {sha256}: "
            "the file is damaged; download it again"
        )
    return FileRecord(nbytes=done, sha256=sha256)
