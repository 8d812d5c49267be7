"""Results copied from a GPU to page-locked memory of the host, which is used again.

A copy to memory that was just allocated waits for the system to find every page of it: 2.4 ms for
the 3.3 MB that InternViT-6B makes of an image, on an H200, where the copy itself takes 0.07 ms. So
a result lies in a block that is locked in memory, and goes back to its pool with the last array
that shows it. A caller who keeps many results gets further ones in ordinary memory.

The driver is called through ``ctypes``; without it there is no pool, and every copy is ordinary.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, cast

import numpy as np

from internvl_edge.runtime.gpu.probe import cuda_driver
from internvl_edge.types import Array

__all__ = ["PinnedPool"]

MAX_BLOCKS = 4  # of a pool, on loan or not
PORTABLE = 1  # CU_MEMHOSTALLOC_PORTABLE: for every context
SUCCESS = 0


class PinnedPool:
    """Blocks for copies of one size, each lent out as an array.

    Args:
        nbytes: the size.
        driver: the library of CUDA's driver; None: there is none.
    """

    def __init__(self, nbytes: int, driver: Any = None) -> None:
        self._driver = cuda_driver() if driver is None else driver
        self._nbytes = nbytes
        self._left = 0 if self._driver is None or nbytes == 0 else MAX_BLOCKS
        self._idle: list[int] = []  # addresses

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
        """Lend an array that is to be filled; None where no block is left."""
        address = self._idle.pop() if self._idle else self._new_block()
        if address is None:
            return None
        block = (ctypes.c_uint8 * self._nbytes).from_address(address)
        # every view of the array keeps the block; the pool may be gone by then
        end = weakref.finalize(block, _give_back, weakref.ref(self), self._driver, address)
        end.atexit = False
        return np.ndarray(shape, dtype, memoryview(block))

    def fetch(self, pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array | None:
        """Copy this many bytes from an address of the GPU; None where no block is left."""
        array = self.empty(shape, dtype)
        if array is None:
            return None
        target, source = ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(pointer)
        status = self._driver.cuMemcpyDtoH_v2(target, source, ctypes.c_size_t(self._nbytes))
        return array if status == SUCCESS else None

    def _new_block(self) -> int | None:
        if not self._left:
            return None
        address = ctypes.c_void_p()
        size = ctypes.c_size_t(self._nbytes)
        if self._driver.cuMemHostAlloc(ctypes.byref(address), size, PORTABLE) != SUCCESS:
            self._left = 0
            return None
        self._left -= 1
        return cast(int, address.value)

    def __del__(self) -> None:
        for address in self._idle:
            self._driver.cuMemFreeHost(ctypes.c_void_p(address))


def _give_back(pool: weakref.ref[PinnedPool], driver: Any, address: int) -> None:
    """Let a block be lent again, or free it where its pool is gone."""
    alive = pool()
    if alive is not None:
        alive._idle.append(address)
    else:
        driver.cuMemFreeHost(ctypes.c_void_p(address))
