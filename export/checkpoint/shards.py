"""The shards of a checkpoint, read tensor by tensor.

``choose`` says which files they are; no tensor may be in two of them. Headers are read by
``artifact.safetensors``; every refusal is a ``CheckpointError`` here. Tensors are read with
``read`` into memory of their own: mapping the files instead would turn a shard that is truncated
while we read into a bus error that kills the process.
"""

from __future__ import annotations

import hashlib
import math
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
from internvl_edge.files.content import content_of
from internvl_edge.files.reading import open_file
from internvl_edge.types import Array

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
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F6_E2M3": np.dtype(ml_dtypes.float6_e2m3fn),
    "F6_E3M2": np.dtype(ml_dtypes.float6_e3m2fn),
    "F4": np.dtype(ml_dtypes.float4_e2m1fn),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
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

    def checked_sha256(self, target: np.dtype[Any] | None = None) -> tuple[str, str | None]:
        """Hash the values, and find what keeps them from being used.

        Args:
            target: the float type that they will be converted to; None: as they are.

        Returns:
            The hash, and the problem; None: there is none.
        """
        values = self.read().reshape(-1)
        problem = _problem(_largest(values), values.dtype, target)
        return hashlib.sha256(values.view(np.uint8).data).hexdigest(), problem


def _largest(values: Array) -> float:
    """Return the largest magnitude; NaN or infinity if there is one.

    Without their sign, the bits of floats are ordered as their values are, infinity above all
    numbers and NaN above it.
    """
    bits = np.dtype(f"u{values.dtype.itemsize}")
    mask, most = bits.type(np.iinfo(bits).max >> 1), bits.type(0)
    for start in range(0, values.size, CHECKED_AT_ONCE):
        part = values[start : start + CHECKED_AT_ONCE].view(bits) & mask
        most = max(most, part.max())
    return float(np.array([most], bits).view(values.dtype)[0])


def _problem(largest: float, dtype: np.dtype[Any], target: np.dtype[Any] | None) -> str | None:
    if not math.isfinite(largest):
        return "holds NaN or infinity"
    if target is None or target == dtype:
        return None
    with np.errstate(over="ignore"):
        is_beyond = math.isinf(float(np.float64(largest).astype(target)))
    if is_beyond:
        return f"holds {largest:.6g}, beyond the range of {target.name}"
    return None


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


def all_entries(shards: Iterable[Path]) -> dict[str, TensorEntry]:
    """Collect the tensors of all shards; none may be in two of them."""
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in entries:
                raise CheckpointError(
                    f"tensor {name!r} is in two shards: {entries[name].file.name}, {shard.name}; "
                    "keep the one that is meant, and move the other away"
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
            content = content_of(path)
            if content is not None:
                raise CheckpointError(
                    f"{path}: not a safetensors file but {content.what}; {content.remedy}"
                ) from error
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


def raise_problems(path: Path, problems: list[str], remedy: str = "") -> None:
    """Raise CheckpointError, if there are problems, with all that fit into a line."""
    if not problems:
        return
    listed = "; ".join(problems[:MAX_LISTED])
    more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    raise CheckpointError(f"{path}: {len(problems)} problem(s): {listed}{more}{remedy}")
