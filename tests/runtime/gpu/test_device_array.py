"""Arrays of other libraries on the GPU, and ours for them."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from internvl_edge.errors import FeedError
from internvl_edge.runtime.gpu.device_array import DeviceArray, as_device_array, is_on_device
from internvl_edge.runtime.gpu.dlpack import capsule_of
from internvl_edge.types import Array

ml_dtypes = pytest.importorskip("ml_dtypes")


class Capsule:
    """An array that says it is on a GPU and hands out DLPack, as a tensor of PyTorch does."""

    def __init__(self, array: Array) -> None:
        self.array, self.stream = array, 0

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int | None = None, **options: Any) -> Any:
        self.stream = stream or 0
        return self.array.__dlpack__()


def test_what_is_on_the_gpu() -> None:
    assert not is_on_device("x", np.zeros(2))
    assert not is_on_device("x", [1, 2])
    assert not is_on_device("x", SimpleNamespace(__dlpack_device__=lambda: (1, 0)))
    assert is_on_device("x", SimpleNamespace(__cuda_array_interface__={}))
    assert is_on_device("x", Capsule(np.zeros(2)))
    assert is_on_device("x", DeviceArray(pointer=1, shape=(2,), dtype=np.dtype("f4")))


def test_an_object_that_cannot_say_where_it_is() -> None:
    class Unplaced:
        def __dlpack_device__(self) -> tuple[int, int]:
            raise BufferError("on a meta device")

    with pytest.raises(FeedError, match="'x': Unplaced has no device: on a meta device"):
        is_on_device("x", Unplaced())


def test_dlpack_is_read_in_our_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("cuda.core.utils")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    class View:
        ptr, shape, strides, dtype, device_id = 4096, (2, 3), (3, 1), array.dtype, 0
        readonly = True

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
    assert found.readonly
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_ours_are_handed_out_by_dlpack(name: str) -> None:
    """On the host, since there may be no GPU; another library reads what the capsule says."""
    utils = pytest.importorskip("cuda.core.utils")
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    memory = np.ones((2, 3, 5), dtype)
    array = DeviceArray(
        pointer=memory.ctypes.data, shape=(2, 3, 5), dtype=dtype, device=1, owner=memory
    )
    view = utils.StridedMemoryView.from_dlpack(array, stream_ptr=-1)
    assert (view.ptr, view.shape, view.dtype) == (memory.ctypes.data, (2, 3, 5), dtype)
    assert (view.strides, view.device_id) == ((15, 5, 1), 1)


def test_another_library_reads_our_bfloat16() -> None:
    torch = pytest.importorskip("torch")
    memory = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
    taken = SimpleNamespace(
        __dlpack_device__=lambda: (1, 0),
        __dlpack__=lambda **_: capsule_of(memory.ctypes.data, (2, 3), memory.dtype, (1, 0), memory),
    )
    found = torch.from_dlpack(taken)
    assert found.dtype == torch.bfloat16
    np.testing.assert_array_equal(found.float().numpy(), memory.astype(np.float32))


@pytest.mark.slow
def test_memory_lives_until_its_consumer_is_done() -> None:
    class Owner:
        pass

    def capsule() -> tuple[Any, weakref.ref[Owner]]:
        owner = Owner()
        memory = np.zeros(3, np.float32)
        keeps = (owner, memory)
        made = capsule_of(memory.ctypes.data, (3,), memory.dtype, (1, 0), keeps)
        return made, weakref.ref(owner)

    made, owner = capsule()
    gc.collect()
    assert owner() is not None
    del made  # which nobody took
    assert owner() is None
    made, owner = capsule()
    capsules = [made]
    del made
    taken = np.from_dlpack(
        SimpleNamespace(__dlpack_device__=lambda: (1, 0), __dlpack__=lambda **_: capsules.pop())
    )
    gc.collect()
    assert owner() is not None
    np.testing.assert_array_equal(taken, 0)
    del taken
    assert owner() is None


def test_what_dlpack_cannot_say_is_refused() -> None:
    array = DeviceArray(pointer=256, shape=(2,), dtype=np.dtype("f4"))
    for options in ({"dl_device": (1, 0)}, {"copy": True}):
        with pytest.raises(BufferError, match="is handed out where it is"):
            array.__dlpack__(**options)
    array.__dlpack__(dl_device=(2, 0), copy=False, max_version=(1, 0))
    with pytest.raises(BufferError, match="readonly=True"):
        replace(array, readonly=True).__dlpack__()
    with pytest.raises(BufferError, match="no name for float8_e4m3fnuz"):
        replace(array, dtype=np.dtype(ml_dtypes.float8_e4m3fnuz)).__dlpack__()


def test_the_consumers_stream_is_held() -> None:
    held: list[int] = []
    ready: Any = SimpleNamespace(hold=held.append)
    array = DeviceArray(pointer=256, shape=(2,), dtype=np.dtype("f4"), ready=ready)
    for stream in (None, 0, 1, 2, 77, -1):
        array.__dlpack__(stream=stream)
    assert held == [1, 1, 1, 2, 77]  # None is the default stream, and -1 is not to wait
