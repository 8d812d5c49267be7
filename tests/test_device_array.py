"""Arrays of other libraries on the GPU, and ours for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from internvl_edge.errors import FeedError
from internvl_edge.runtime.device_array import DeviceArray, as_device_array, is_on_device

ml_dtypes = pytest.importorskip("ml_dtypes")


class Capsule:
    """An array that says it is on a GPU and hands out DLPack, as a tensor of PyTorch does."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array, self.stream = array, 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        self.stream = stream or 0
        return self.array.__dlpack__()


def test_what_is_on_the_gpu() -> None:
    assert not is_on_device(np.zeros(2))
    assert not is_on_device([1, 2])
    assert not is_on_device(SimpleNamespace(__dlpack_device__=lambda: (1, 0)))
    assert is_on_device(SimpleNamespace(__cuda_array_interface__={}))
    assert is_on_device(Capsule(np.zeros(2)))
    assert is_on_device(DeviceArray(pointer=1, shape=(2,), dtype=np.dtype("f4")))


def test_dlpack_is_read_in_our_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("cuda.core.utils")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    class View:
        ptr, shape, strides, dtype, device_id = 4096, (2, 3), (3, 1), array.dtype, 0

        @classmethod
        def from_dlpack(cls, value: Any, stream_ptr: int) -> type[View]:
            value.__dlpack__(stream=stream_ptr)
            return cls

    monkeypatch.setattr(utils, "StridedMemoryView", View)
    value = Capsule(array)
    found = as_device_array("x", value, 77)
    assert value.stream == 77  # the producer was told to be done for our stream
    assert (found.pointer, found.shape, found.dtype) == (4096, (2, 3), array.dtype)
    assert found.owner[0] is value
    View.strides = (1, 2)
    with pytest.raises(FeedError, match=r"'x': strides \(1, 2\) of an array \[2, 3\]"):
        as_device_array("x", value, 77)


def test_the_real_view_reads_what_a_capsule_says() -> None:
    """On the host, since there may be no GPU: address, shape and dtype are the array's."""
    pytest.importorskip("cuda.core.utils")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = as_device_array("x", Capsule(array), 1)
    assert found.pointer == array.ctypes.data
    assert (found.shape, found.dtype, found.nbytes) == ((2, 3), array.dtype, 24)
    with pytest.raises(FeedError, match="strides"):
        as_device_array("x", Capsule(array.T), 1)


def test_an_exporter_that_raises() -> None:
    class Broken(Capsule):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("requires grad")

    with pytest.raises(FeedError, match="Broken on a GPU: requires grad"):
        as_device_array("x", Broken(np.zeros(2)), 1)


def test_strides_of_one_row_do_not_matter() -> None:
    told = {"shape": (1, 3), "typestr": "<f4", "data": (256, False), "strides": (99, 4)}
    found = as_device_array("x", SimpleNamespace(__cuda_array_interface__=told), 1)
    assert found.shape == (1, 3)
    told |= {"shape": (0, 3), "strides": (1, 1)}
    assert as_device_array("x", SimpleNamespace(__cuda_array_interface__=told), 1).nbytes == 0


def test_the_interface_has_no_bfloat16() -> None:
    array = DeviceArray(pointer=256, shape=(2,), dtype=np.dtype(ml_dtypes.bfloat16), device=1)
    assert not hasattr(array, "__cuda_array_interface__")
    assert array.__dlpack_device__() == (2, 1)


def test_ours_are_handed_out_by_dlpack(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("cuda.core.utils")

    class View:
        @classmethod
        def from_cuda_array_interface(cls, value: DeviceArray, stream_ptr: int) -> View:
            assert stream_ptr == -1
            assert value.__cuda_array_interface__["data"] == (256, False)
            return cls()

        def __dlpack__(self, **options: Any) -> dict[str, Any]:
            return options

    monkeypatch.setattr(utils, "StridedMemoryView", View)
    array = DeviceArray(pointer=256, shape=(2,), dtype=np.dtype("f4"))
    assert array.__dlpack__(stream=3, max_version=(1, 0)) == {"stream": 3, "max_version": (1, 0)}
