"""The shards of a checkpoint: found, held against their index, and read tensor by tensor.

An index has to agree with what its shards hold, and no tensor may be in two of them. Headers are
read by ``artifact.safetensors``; every refusal is a ``CheckpointError`` here. Tensors are read with
``read`` into memory of their own: mapping the files instead would turn a shard that is truncated
while we read into a bus error that kills the process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from internvl_edge.artifact.safetensors import (
    MalformedFile,
    fill,
    header_sha256,
    read_places,
)
from internvl_edge.errors import CheckpointError
from internvl_edge.files.reading import is_there, open_file, read_json
from internvl_edge.types import Array

MAX_INDEX_NBYTES = 64 << 20
CHECKED_AT_ONCE = 1 << 20  # elements; temporaries of this size stay in the cache
REMEDY = "download the checkpoint again"
MAX_LISTED = 20  # problems named one by one before the rest is counted
PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies on disk."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    offset: int  # from the start of the file
    nbytes: int

    def read(self) -> Array:
        """Read the values into memory of their own.

        Raises:
            CheckpointError: the file has gone or ended early: it was changed while we read it.
            OSError: the disk fails.
        """
        values = np.empty(self.shape, self.dtype)  # not a bytearray, which has small pages
        with open_shard(self.file) as file:
            count = fill(file, self.offset, values.reshape(-1).view(np.uint8).data)
        if count < self.nbytes:
            raise CheckpointError(
                f"{self.file}: ends inside tensor {self.name!r} ({count} of {self.nbytes} bytes); "
                "was it changed while being read?"
            )
        return values

    def finite_sha256(self) -> str | None:
        """Hash the values; None if one of them is NaN or infinite."""
        values = self.read().reshape(-1)
        for start in range(0, values.size, CHECKED_AT_ONCE):
            if not _is_finite(values[start : start + CHECKED_AT_ONCE]):
                return None
        return hashlib.sha256(values.view(np.uint8).data).hexdigest()


def _is_finite(values: Array) -> bool:
    if values.dtype == DTYPES["BF16"]:  # all exponent bits set; ml_dtypes' isfinite is slow
        return not bool(((values.view(np.uint16) & 0x7F80) == 0x7F80).any())
    return bool(np.isfinite(values).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class FileState:
    """A file's state, which changes when it is written to or replaced; links may come and go."""

    nbytes: int
    mtime_ns: int
    inode: int

    def __str__(self) -> str:
        return f"{self.nbytes} bytes of {self.mtime_ns / 1e9:.3f} s (inode {self.inode})"


def open_shard(path: Path) -> FileIO:
    """Open a shard to read, unbuffered; links are followed, pipes are not waited for.

    Raises:
        CheckpointError: it cannot be opened, or is not a regular file.
    """
    try:
        return open_file(path, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {REMEDY}") from error


def file_state(path: Path) -> FileState | None:
    """Read the state of a file, through links; None if it has gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return FileState(nbytes=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino)


def find_shards(path: Path) -> list[Path]:
    """List the safetensors files of a directory, by its index where it has one."""
    index = path / "model.safetensors.index.json"
    if is_there(index):  # one that leads nowhere is a broken download
        return [path / name for name in _indexed(index)]
    single = sorted(path.glob("*.safetensors"))
    if single:
        return single
    pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(
            f"{path}: holds pickle files only ({', '.join(pickles[:3])}), which can run code when "
            f"loaded; convert them first: internvl-edge convert {path} NEW_DIRECTORY"
        )
    raise CheckpointError(f"{path}: no *.safetensors file found; {REMEDY}")


def _indexed(index: Path) -> list[str]:
    try:
        raw = read_json(index, MAX_INDEX_NBYTES, CheckpointError, unique=True)
        weight_map = raw["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {REMEDY}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a shard index: {_reason(error)}; {REMEDY}") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: shard must be a plain *.safetensors name: {name!r:.200}"
            )
        if not os.path.exists(index.parent / name):  # nor is one of a name too long for any file
            raise CheckpointError(f"{index}: names shard {name:.200}, which is missing; {REMEDY}")
    raise_problems(index, _index_disagreements(index, weight_map))
    return names


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    return str(error)


def _index_disagreements(index: Path, weight_map: dict[str, str]) -> list[str]:
    held = {name: read_header(index.parent / name) for name in sorted(set(weight_map.values()))}
    absent = [
        f"{tensor}: the index places it in {shard}, which does not hold it"
        for tensor, shard in weight_map.items()
        if tensor not in held[shard]
    ]
    left_out = [
        f"{tensor}: {shard} holds it, the index does not name it"
        for shard, tensors in held.items()
        for tensor in tensors
        if tensor not in weight_map
    ]
    return absent + left_out


def all_entries(shards: Iterable[Path]) -> dict[str, TensorEntry]:
    """Collect the tensors of all shards; none may be in two of them."""
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in entries:
                raise CheckpointError(
                    f"tensor {name!r} is in two shards: {entries[name].file.name}, {shard.name}"
                )
            entries[name] = entry
    return entries


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and validate one safetensors file's header.

    Raises:
        CheckpointError: not a regular file, not safetensors, or offsets that are not exactly one
            contiguous run from the header to the end of the file.
    """
    with open_shard(path) as file:
        try:
            places = read_places(file)
        except MalformedFile as error:
            raise CheckpointError(f"{path}: {error}; {REMEDY}") from error
    return {
        name: TensorEntry(
            name=name,
            dtype=DTYPES[place.code],
            shape=place.shape,
            file=path,
            offset=place.offset,
            nbytes=place.nbytes,
        )
        for name, place in places.items()
    }


def header_fingerprint(path: Path) -> dict[str, Any]:
    """Measure a shard's size, and the sha256 of its header, which lists every tensor."""
    with open_shard(path) as shard, open(shard.fileno(), "rb", closefd=False) as file:
        return {
            "nbytes": os.fstat(file.fileno()).st_size,
            "header_sha256": header_sha256(file),
        }


def source_files(shards: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Take size and header hash of each shard, which tell a checkpoint without reading it."""
    return {path.name: header_fingerprint(path) for path in shards}


def raise_problems(path: Path, problems: list[str]) -> None:
    """Raise CheckpointError, if there are problems, with all that fit into a line."""
    if not problems:
        return
    listed = "; ".join(problems[:MAX_LISTED])
    more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    raise CheckpointError(f"{path}: {len(problems)} problem(s): {listed}{more}")
