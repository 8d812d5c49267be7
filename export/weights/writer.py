"""Weights of a compiled directory: safetensors files that every component's graph points into.

An ONNX initializer stored outside its graph is (file, offset, length). A safetensors file is a
header and the tensors' bytes one after the other, so graphs can refer to its tensors in place:
all components of a directory share one weights file, tensors that they have in common are stored
once, and ordinary tools can read it.

Two ways to get there:
    link    the checkpoint's own shards, linked or copied (``link``)
    write   a new file in the dtypes that the graphs need, streamed tensor by tensor

Offsets are known before the first byte of data is written, since shapes and dtypes are; tensors
may therefore be written in any order, as a quantizer produces them. The format allows no holes:
where offsets must be multiples of more than the item size, tensors of zeros named
``__padding__.N`` fill the gaps; nothing reads them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from internvl_edge.errors import InternVLError
from internvl_edge.export.checkpoint.shards import DTYPES
from internvl_edge.types import Array

CODES = {dtype: code for code, dtype in DTYPES.items()}
# The header is padded so that the data begins at a page: aligned offsets are aligned in memory.
DATA_ALIGNMENT = 4096
PADDING = "__padding__"
Layout = Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]  # name → dtype and shape


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """The location of a tensor in a compiled directory."""

    location: str  # file name inside the directory
    offset: int
    nbytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class WeightsWriter:
    """A safetensors file whose tensors are written in any order, each exactly once.

    Args:
        path: the file.
        tensors: all tensors that will be written.
        align: a power of two; every tensor's offset in the file is a multiple of it. None: a
            multiple of its item size.
        done: names that an earlier writer of the same tensors has written to ``path``, which may
            then exist; None: it must not exist.
        metadata: strings for the header; transformers wants ``format`` there.

    Raises:
        InternVLError: some tensors are done, but the file is absent or has another size.
    """

    def __init__(
        self,
        path: Path,
        tensors: Layout,
        *,
        align: int | None = None,
        done: Collection[str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        raw, self.stored, size = _layout(path.name, tensors, align or 1, metadata)
        self._pending = set(tensors) - set(done or ())
        self._hashes: dict[str, Any] = {}
        if done and (not path.is_file() or path.stat().st_size != size):
            raise InternVLError(
                f"{path}: expected {size} bytes, some of which an earlier run has written; remove "
                f"{path.parent} to start again"
            )
        exclusive = os.O_EXCL if done is None else 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | exclusive
        self._descriptor = os.open(path, flags, 0o644)
        _pwrite(self._descriptor, raw, 0)
        os.ftruncate(self._descriptor, size)  # padding is never written

    @property
    def pending(self) -> list[str]:
        """The names not yet written, in file order."""
        return [name for name in self.stored if name in self._pending]

    def sha256_of(self, names: Iterable[str]) -> dict[str, str]:
        """Return the hashes of tensors that were written, for whoever takes them up."""
        return {name: self._hashes[name].hexdigest() for name in names}

    def write(self, name: str, values: Array) -> None:
        """Write one tensor, of the dtype and shape announced for it."""
        place = self.stored[name]
        if values.dtype != place.dtype or values.shape != place.shape or name not in self._pending:
            raise InternVLError(
                f"tensor {name!r}: expected {place.dtype}{place.shape} once, "
                f"found {values.dtype}{values.shape}, or written twice"
            )
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._hashes[name] = hashlib.sha256(data.data)
        _pwrite(self._descriptor, data.data, place.offset)
        self._pending.discard(name)

    def write_part(self, name: str, start: int, values: Array) -> None:
        """Write some elements of a flattened tensor from ``start`` on, one part after the other."""
        place = self.stored[name]
        itemsize = place.dtype.itemsize
        end = (start + values.size) * itemsize
        if values.dtype != place.dtype or end > place.nbytes:
            raise InternVLError(
                f"tensor {name!r}: expected {place.dtype} up to byte {place.nbytes}, found a part "
                f"in {values.dtype} up to byte {end}"
            )
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self._hashes.setdefault(name, hashlib.sha256()).update(data.data)
        _pwrite(self._descriptor, data.data, place.offset + start * itemsize)
        if end == place.nbytes:
            self._pending.discard(name)

    def sync(self) -> None:
        """Make what was written so far durable."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Finish the file; every announced tensor must have been written."""
        if self._pending:
            raise InternVLError(
                f"{self.path}: expected every tensor to be written, never written: "
                f"{sorted(self._pending)[:5]}"
            )
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif self._descriptor >= 0:
            os.close(self._descriptor)


def _layout(
    location: str, tensors: Layout, align: int, metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, StoredTensor], int]:
    """Lay out the file: the header's bytes, each tensor's location, and the file's size."""
    # wide types first, so that every tensor is aligned to its own item size
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        if gap := -end % align:
            padding = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            header[f"{PADDING}.{len(header)}"] = padding
            end += gap
        offsets = [end, end + math.prod(shape) * dtype.itemsize]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets}
        end = offsets[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    step = max(DATA_ALIGNMENT, align)
    start = -(-(8 + len(raw)) // step) * step
    stored = {
        name: StoredTensor(
            location=location,
            offset=start + header[name]["data_offsets"][0],
            nbytes=header[name]["data_offsets"][1] - header[name]["data_offsets"][0],
            dtype=tensors[name][0],
            shape=tensors[name][1],
        )
        for name in order
    }
    return (start - 8).to_bytes(8, "little") + raw.ljust(start - 8), stored, start + end


def _pwrite(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
