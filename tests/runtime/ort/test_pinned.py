"""Results in page-locked memory, over a driver that hands out ordinary memory."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import pytest

from internvl_edge.runtime.ort.pinned import MAX_BLOCKS, PinnedPool

FLOAT32 = np.dtype(np.float32)


class Driver:
    """CUDA's driver, as far as a pool needs it."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.blocks: dict[int, Any] = {}

    def cuMemHostAlloc(self, address: Any, nbytes: Any, flags: int) -> int:  # noqa: N802
        if self.fails == "allocation":
            return 2
        block = ctypes.create_string_buffer(nbytes.value)
        self.blocks[ctypes.addressof(block)] = block
        address._obj.value = ctypes.addressof(block)
        return 0

    def cuMemFreeHost(self, address: Any) -> int:  # noqa: N802
        del self.blocks[address.value]
        return 0

    def cuMemcpyDtoH_v2(self, target: Any, source: Any, nbytes: Any) -> int:  # noqa: N802
        if self.fails == "copy":
            return 700
        ctypes.memmove(target.value, source.value, nbytes.value)
        return 0


def pool_of(driver: Driver | None, values: np.ndarray[Any, Any]) -> PinnedPool:
    return PinnedPool(values.nbytes, driver)


@pytest.mark.slow
def test_a_block_is_used_again_once_nothing_shows_it() -> None:
    driver, values = Driver(), np.arange(6, dtype=np.float32).reshape(2, 3)
    pool = pool_of(driver, values)
    first = pool.fetch(values.ctypes.data, (2, 3), FLOAT32)
    assert first is not None
    np.testing.assert_array_equal(first, values)
    view = first[1:, ::2]
    del first
    values += 1
    second = pool.fetch(values.ctypes.data, (2, 3), FLOAT32)
    np.testing.assert_array_equal(view, [[3, 5]])  # a view keeps its block
    assert len(driver.blocks) == 2
    del view, second
    gc.collect()
    for _ in range(10):
        assert pool.fetch(values.ctypes.data, (2, 3), FLOAT32) is not None
    assert len(driver.blocks) == 2


def test_a_caller_who_keeps_results_gets_the_others_in_ordinary_memory() -> None:
    driver, values = Driver(), np.arange(4, dtype=np.float32)
    pool = pool_of(driver, values)
    kept = [pool.fetch(values.ctypes.data, (4,), FLOAT32) for _ in range(MAX_BLOCKS)]
    assert all(array is not None for array in kept)
    assert pool.fetch(values.ctypes.data, (4,), FLOAT32) is None


@pytest.mark.slow
def test_arrays_outlive_their_pool_and_all_is_freed() -> None:
    driver, values = Driver(), np.arange(4, dtype=np.float32)
    pool = pool_of(driver, values)
    idle, kept = (pool.fetch(values.ctypes.data, (4,), FLOAT32) for _ in range(2))
    del idle, pool
    gc.collect()
    np.testing.assert_array_equal(kept, values)
    assert len(driver.blocks) == 1
    del kept
    gc.collect()
    assert not driver.blocks


@pytest.mark.parametrize("fails", ["allocation", "copy"])
def test_where_the_driver_refuses_the_copy_is_an_ordinary_one(fails: str) -> None:
    values = np.arange(4, dtype=np.float32)
    assert pool_of(Driver(fails), values).fetch(values.ctypes.data, (4,), FLOAT32) is None


def test_without_a_driver_or_bytes_there_is_nothing_to_lend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("internvl_edge.runtime.ort.pinned.cuda_driver", lambda: None)
    assert PinnedPool(16).empty((4,), FLOAT32) is None
    assert PinnedPool(0, Driver()).empty((0,), FLOAT32) is None
