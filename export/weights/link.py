"""The checkpoint's own shards in a compiled directory, without reading them where that can be.

Who reads external data wants regular files beside the graph or below it; a symbolic link out of
the directory, as in a Hugging Face snapshot, is refused. That leaves

    reflink     a file of its own that shares its blocks until one of the two is written to
                (btrfs, XFS): nothing is read, nothing is written twice
    hard link   a second name of the same file: what edits one edits the other. ONNX Runtime and
                TensorRT accept it; onnx.checker and onnx-ir refuse a file of two names
    copy        hashed while it is copied

A linked shard is known by its size and the hash of its header. A Hugging Face cache names a large
file after its sha256, which is then known too, without reading 12 GB; ``verify --full`` proves it.
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

from internvl_edge.artifact.open import FileRecord
from internvl_edge.artifact.safetensors import header_sha256
from internvl_edge.errors import CheckpointError, UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.weights.writer import StoredTensor
from internvl_edge.files.disk import EXHAUSTED, FULL, nearest_existing, open_regular, os_errors

Transfer = Literal["auto", "link", "copy"]
How = Literal["reflink", "hard link", "copy"]
Copied = Callable[[str, int, int], None]  # told a shard's name, its bytes copied so far, and all

FICLONE = 0x40049409  # ioctl_ficlone(2)
AUTO_COPY_NBYTES = 2_000_000_000  # up to here, a file of its own is worth its bytes
CHUNK_NBYTES = 8 << 20
WAYS: dict[Transfer, tuple[How, ...]] = {
    "auto": ("reflink", "hard link", "copy"),
    "link": ("reflink", "hard link"),
    "copy": ("copy",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """A shard in the directory: how it came, and what the manifest says of it."""

    how: How
    record: FileRecord


def bring_shards(
    checkpoint: Checkpoint,
    names: Collection[str],
    directory: Path,
    transfer: Transfer,
    copied: Copied,
) -> tuple[dict[str, StoredTensor], dict[str, Brought]]:
    """Put the shards that hold some tensors into ``directory``, under their own names.

    Args:
        checkpoint: whose shards.
        names: the tensors, by canonical name.
        directory: where to.
        transfer: ``auto`` reflinks, else copies up to 2 GB, else hard-links, else copies.
        copied: told how far a copy is.

    Returns:
        Canonical name → place, and file name → how it came.

    Raises:
        UsageError: ``link``, and a shard can be neither reflinked nor hard-linked.
        CheckpointError: a shard is not what it was when the checkpoint was opened, or not what
            the name of its blob says.
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
    """How shards would come into OUT: tried with the first of them beside it, and undone.

    Args:
        shards: the files.
        out: what will be published; it need not exist.
        transfer: as in ``bring_shards``.

    Raises:
        UsageError: ``link``, and the shard can be neither reflinked nor hard-linked there.
        ResourceError: the disk is full or fails.
    """
    folder = nearest_existing(out.absolute().parent)
    source, why = shards[0].resolve(strict=True), ""
    # the name of what a run leaves that dies: the next one removes it
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
        f"{shard} can be neither reflinked nor hard-linked into {folder}: {why}; both must "
        "be on one file system, and the file yours or writable; or use --weights copy"
    )


def _bring(shard: Path, target: Path, ways: tuple[How, ...], copied: Copied) -> Brought:
    """Try one way after the other; a copy is the last that there is."""
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
    found = digest.hexdigest()
    if known not in (None, found):
        raise CheckpointError(
            f"{source}: a blob is named after its sha256, it has {found}: the file is damaged; "
            "download it again"
        )
    return FileRecord(nbytes=done, sha256=found)
