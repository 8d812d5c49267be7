"""Safetensors files: the one reader of their headers, and of the bytes of one tensor.

    8 bytes   the length of the header, little-endian
    header    JSON: name → dtype, shape, and the tensor's first and last byte in the data
    data      the tensors, one after another

Headers are parsed as a stranger's: exactly one contiguous run of tensors from the header to the
end of the file, and no name twice.

Dtypes stay the codes of the format here: NumPy has no bfloat16 of its own.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from io import BufferedReader, FileIO
from typing import Any

from internvl_edge.files.reading import parse_json
from internvl_edge.types import Shape

__all__ = [
    "ITEM_NBYTES",
    "MAX_HEADER_NBYTES",
    "MalformedFile",
    "TensorPlace",
    "fill",
    "header_sha256",
    "read_places",
]

MAX_HEADER_NBYTES = 100_000_000  # the format's own limit
MAX_RANK = 64  # dimensions of a tensor
ITEM_NBYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

File = BufferedReader | FileIO


class MalformedFile(ValueError):
    """A file that is not safetensors, with the reason; whoever reads it names the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies in its file."""

    name: str
    code: str  # of its dtype, a key of ITEM_NBYTES
    shape: Shape
    offset: int  # from the start of the file
    nbytes: int


def read_places(file: File) -> dict[str, TensorPlace]:
    """Parse and validate a file's header: the tensors by name, in its order.

    Raises:
        MalformedFile: not safetensors, or offsets that are not exactly one contiguous run from the
            header to the end of the file.
        OSError: the disk fails.
    """
    descriptor = file.fileno()
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER_NBYTES, size - 8):
        raise MalformedFile(
            f"not a safetensors file, or truncated: header of {length} bytes in a file of {size}"
        )
    return _parsed(os.pread(descriptor, length, 8), 8 + length, size)


def header_sha256(file: BufferedReader) -> str:
    """Hash the header, which lists every tensor and its place."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    return hashlib.sha256(file.read(min(length, MAX_HEADER_NBYTES))).hexdigest()


def fill(file: FileIO, offset: int, buffer: memoryview) -> int:
    """Read from an offset on until the buffer is full; returns fewer bytes where the file ends."""
    file.seek(offset)
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            break
        done += count
    return done


def _parsed(raw: bytes, start: int, size: int) -> dict[str, TensorPlace]:
    try:
        header = parse_json(_begins_with_brace(raw), unique=True)
        header.pop("__metadata__", None)
        places = [_place(name, item, start) for name, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedFile(f"malformed safetensors header: {error}") from error
    end = start
    for place in sorted(places, key=lambda place: (place.offset, place.nbytes)):
        if place.offset != end:
            raise MalformedFile(f"tensor {place.name!r} overlaps or leaves a hole")
        end += place.nbytes
    if end != size:
        raise MalformedFile(f"truncated or padded: tensors end at byte {end}, the file at {size}")
    return {place.name: place for place in places}


def _place(name: str, item: dict[str, Any], start: int) -> TensorPlace:
    begin, end = item["data_offsets"]
    shape = tuple(item["shape"])
    if len(shape) > MAX_RANK:
        raise ValueError(f"tensor {name!r:.80}: {len(shape)} dimensions, at most {MAX_RANK}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r}: shape and offsets must be non-negative integers")
    code = item["dtype"]
    if code not in ITEM_NBYTES:
        raise ValueError(f"tensor {name!r}: dtype {code!r} is not supported")
    if end - begin != math.prod(shape) * ITEM_NBYTES[code]:
        raise ValueError(f"tensor {name!r}: {end - begin} bytes do not hold {shape} of {code}")
    return TensorPlace(name=name, code=code, shape=shape, offset=start + begin, nbytes=end - begin)


def _begins_with_brace(raw: bytes) -> bytes:
    """Refuse white space in front, which the format forbids and JSON allows."""
    if not raw.startswith(b"{"):
        raise ValueError("does not begin with {")
    return raw
