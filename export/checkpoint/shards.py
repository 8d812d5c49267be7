"""Safetensors files: found in a checkpoint, parsed, validated, and read tensor by tensor.

Headers are parsed as from a stranger: exactly one contiguous run of tensors from the header to
the end of the file, no name twice, and an index that agrees with what its shards hold. Tensors
are read with ``read`` into memory of their own. Mapping the files instead would turn a shard that
is truncated while we read into a bus error that kills the process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from internvl_edge.artifact.open import MAX_HEADER_NBYTES, header_sha256
from internvl_edge.errors import CheckpointError
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
        """The values, copied into memory of their own.

        Raises:
            CheckpointError: the file has gone or ended early: it was changed while we read it.
            OSError: the disk fails.
        """
        values = np.empty(self.shape, self.dtype)  # not a bytearray, which has small pages
        with open_shard(self.file) as file:
            file.seek(self.offset)
            done, view = 0, values.reshape(-1).view(np.uint8).data
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(
                        f"{self.file}: ends inside tensor {self.name!r} "
                        f"({done} of {self.nbytes} bytes); was it changed while being read?"
                    )
                done += count
        return values

    def finite_sha256(self) -> str | None:
        """The hash of the values; None if one of them is NaN or infinite."""
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
    """What changes when a file is written to or replaced; links may come and go."""

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
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}; {REMEDY}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a regular file; {REMEDY}")
    return FileIO(descriptor, "rb")


def file_state(path: Path) -> FileState | None:
    """The state of a file, through links; None if it has gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return FileState(nbytes=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino)


def find_shards(path: Path) -> list[Path]:
    """The safetensors files of a directory, by its index where it has one."""
    index = path / "model.safetensors.index.json"
    if index.exists() or index.is_symlink():  # one that leads nowhere is a broken download
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
        text = index.read_text(encoding="utf-8")
        weight_map = json.loads(text, object_pairs_hook=_no_duplicates)["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a shard index: {_reason(error)}; {REMEDY}") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard must be a plain *.safetensors name: {name!r}")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index}: names shard {name}, which is missing; {REMEDY}")
    raise_problems(index, _index_disagreements(index, weight_map))
    return names


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


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
    """The tensors of all shards; none may be in two of them."""
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
        descriptor = file.fileno()
        status = os.fstat(descriptor)
        prefix = os.pread(descriptor, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER_NBYTES, status.st_size - 8):
            raise CheckpointError(
                f"{path}: not a safetensors file, or truncated: header of {length} bytes in a file "
                f"of {status.st_size}; {REMEDY}"
            )
        raw = os.pread(descriptor, length, 8)
    return _parse_header(path, raw, 8 + length, status.st_size)


def header_fingerprint(path: Path) -> dict[str, Any]:
    """Size of a shard and sha256 of its header, which lists every tensor and its place."""
    with open_shard(path) as shard, open(shard.fileno(), "rb", closefd=False) as file:
        return {
            "nbytes": os.fstat(file.fileno()).st_size,
            "header_sha256": header_sha256(file),
        }


def _parse_header(path: Path, raw: bytes, start: int, size: int) -> dict[str, TensorEntry]:
    try:
        header = json.loads(_begins_with_brace(raw).decode(), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        entries = [_entry(path, name, item, start) for name, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: malformed safetensors header: {error}; {REMEDY}") from error
    end = start
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != end:
            raise CheckpointError(f"{path}: tensor {entry.name!r} overlaps or leaves a hole")
        end += entry.nbytes
    if end != size:
        raise CheckpointError(
            f"{path}: truncated or padded: tensors end at byte {end}, the file at {size}; {REMEDY}"
        )
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, item: dict[str, Any], start: int) -> TensorEntry:
    begin, end = item["data_offsets"]
    shape = tuple(item["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r}: shape and offsets must be non-negative integers")
    if item["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r}: dtype {item['dtype']!r} is not supported")
    dtype = DTYPES[item["dtype"]]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r}: {end - begin} bytes do not hold {shape} of {dtype}")
    return TensorEntry(
        name=name, dtype=dtype, shape=shape, file=path, offset=start + begin, nbytes=end - begin
    )


def _begins_with_brace(raw: bytes) -> bytes:
    """The format forbids white space in front; JSON would allow it."""
    if not raw.startswith(b"{"):
        raise ValueError("does not begin with {")
    return raw


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{len(twice)} name(s) stand twice: {', '.join(twice[:MAX_LISTED])}")
    return dict(pairs)


def raise_problems(path: Path, problems: list[str]) -> None:
    """Raise CheckpointError, if there are problems, with all that fit into a line."""
    if not problems:
        return
    listed = "; ".join(problems[:MAX_LISTED])
    more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    raise CheckpointError(f"{path}: {len(problems)} problem(s): {listed}{more}")
