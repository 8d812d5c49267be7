"""Arrays that are too many for memory: kept while a budget lasts, read from a file afterwards.

Calibration carries the activations of all samples from block to block. Their size follows the
number of samples, not the model, so they are what a budget of memory has to bound. A spool takes
arrays in order and gives them back in order, as often as asked:

    held in memory    while the budget, shared by all spools of a run, has bytes left
    in the file       what the budget does not hold, or everything with ``write_through``, which
                      makes the file a complete copy that a later process can ``reopen``

Files are read with pread into fresh memory and never mapped, so what is not held costs nothing.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import BinaryIO, overload

import numpy as np

from internvl_edge.errors import InternVLError, ResourceError
from internvl_edge.types import Array

FLOAT32 = np.dtype(np.float32)


@dataclass(slots=True)
class Budget:
    """Bytes of memory that spools may still hold; of several threads."""

    free_nbytes: int
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def take(self, nbytes: int) -> bool:
        """Take ``nbytes`` if they are there."""
        with self._lock:
            if nbytes > self.free_nbytes:
                return False
            self.free_nbytes -= nbytes
            return True

    def give_back(self, nbytes: int) -> None:
        """Let others have what was taken."""
        with self._lock:
            self.free_nbytes += nbytes


class Spool(Sequence[Array]):
    """Float32 arrays in the order they came."""

    def __init__(self, file: BinaryIO, budget: Budget, *, write_through: bool = False) -> None:
        """Begin an empty spool on an empty file, opened for reading and writing, unbuffered."""
        self._file, self._budget = file, budget
        self._write_through = write_through
        self._held: list[Array | None] = []
        self._offsets: list[int] = []
        self._end = 0
        self._sha256 = hashlib.sha256()  # of the file, where all is written to it
        self.shapes: list[tuple[int, ...]] = []

    @classmethod
    def reopen(cls, file: BinaryIO, shapes: Sequence[Sequence[int]], budget: Budget) -> Spool:
        """Open the spool that an earlier process wrote through to ``file``.

        Raises:
            InternVLError: the file is not of the size that the shapes add up to.
        """
        spool = cls(file, budget, write_through=True)
        for shape in shapes:
            spool._place(tuple(shape), None, is_written=True)
        size = os.fstat(file.fileno()).st_size
        if size != spool._end:
            raise InternVLError(f"{file.name}: expected {spool._end} bytes, found {size}")
        return spool

    def append(self, values: Array) -> None:
        """Take in one array, copied unless it is float32 and contiguous.

        Raises:
            OSError: the disk is full.
        """
        values = np.ascontiguousarray(values, FLOAT32)
        is_held = self._budget.take(values.nbytes)
        is_written = self._write_through or not is_held
        if is_written:
            offset = self._end
            data = values.reshape(-1).view(np.uint8).data
            if self._write_through:
                self._sha256.update(data)
            while data:
                count = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[count:], offset + count
        self._place(values.shape, values if is_held else None, is_written=is_written)

    @property
    def sha256(self) -> str:
        """The hash of what was written through to the file."""
        return self._sha256.hexdigest()

    @property
    def name(self) -> str:
        """The path of its file."""
        return str(self._file.name)

    @property
    def is_closed(self) -> bool:
        """True once ``close`` was called."""
        return self._file.closed

    def sync(self) -> None:
        """Make what was written durable."""
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        """Give back the memory; the arrays are gone, the file of a write-through spool is not."""
        self._budget.give_back(sum(a.nbytes for a in self._held if a is not None))
        self._held.clear()
        self._file.close()

    def __len__(self) -> int:
        return len(self._held)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> list[Array]: ...
    def __getitem__(self, index: int | slice) -> Array | list[Array]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        held = self._held[index]
        return self._read(index) if held is None else held

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))

    def _place(self, shape: tuple[int, ...], held: Array | None, *, is_written: bool) -> None:
        self._held.append(held)
        self._offsets.append(self._end)
        self.shapes.append(shape)
        self._end += is_written * math.prod(shape) * FLOAT32.itemsize

    def _read(self, index: int) -> Array:
        shape, offset = self.shapes[index], self._offsets[index]
        values = np.empty(shape, FLOAT32)
        data = values.reshape(-1).view(np.uint8).data
        while data:
            count = os.preadv(self._file.fileno(), [data], offset)
            if count == 0:
                raise ResourceError(f"{self._file.name}: spooled activations were cut off")
            data, offset = data[count:], offset + count
        return values
