"""The CUDA layer: what its failures mean, and that nothing is left behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.gpu.fake_cuda import (
    CAPTURE_INVALIDATED,
    ILLEGAL_ADDRESS,
    INSUFFICIENT_DRIVER,
    MEMORY,
    FakeCuda,
)

from internvl_edge.errors import HardwareError, MissingDependency, ResourceError, SessionDead
from internvl_edge.runtime.gpu import device as device_module
from internvl_edge.runtime.gpu.device import BINDINGS, Device
from internvl_edge.runtime.gpu.handles import Buffer, Event, PinnedBuffer, Stream


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


def test_a_device_knows_itself(cuda: FakeCuda) -> None:
    device = Device(0, cuda)
    assert device.sm == 89
    assert device.free_nbytes() == cuda.total
    device.require(cuda.total, "all of it")
    with pytest.raises(ResourceError, match=r"too much needs 1\.07 GB of GPU memory, 1\.07 GB"):
        device.require(cuda.total + 1, "too much")


@pytest.mark.parametrize(
    ("driver", "message"),
    [(0, "no NVIDIA driver"), (12040, r"driver supports CUDA 12\.4 .* 13\.5: update")],
)
def test_a_driver_that_is_missing_or_too_old(cuda: FakeCuda, driver: int, message: str) -> None:
    cuda.driver = driver
    with pytest.raises(HardwareError, match=message):
        Device(0, cuda)


def test_an_older_driver_of_the_same_major_version_will_do(cuda: FakeCuda) -> None:
    cuda.driver = 13000
    Device(0, cuda)


def test_devices_that_are_not_there(cuda: FakeCuda) -> None:
    with pytest.raises(HardwareError, match="'cuda:1': found 1 CUDA devices"):
        Device(1, cuda)
    cuda.fail["cudaGetDeviceCount"] = 0, INSUFFICIENT_DRIVER
    with pytest.raises(HardwareError, match=r"cudaGetDeviceCount: .*CUDA error 35"):
        Device(0, cuda)


def test_bindings_that_are_missing_or_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, expected in [
        (ModuleNotFoundError("cuda"), MissingDependency),
        (ImportError("libcudart.so"), HardwareError),
        (RuntimeError("Failed to dlopen"), HardwareError),
    ]:

        def refuse(name: str, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(device_module.importlib, "import_module", refuse)
        with pytest.raises(expected):
            Device(0)


def test_the_real_bindings_have_what_is_called() -> None:
    """Names and enumerations of the installed release; on a machine without a GPU, its error."""
    cudart = pytest.importorskip(BINDINGS)
    called = {name for name in dir(FakeCuda) if name.startswith("cuda")}
    assert {name for name in called if not hasattr(cudart, name)} == set()
    for name in ("cudaDeviceAttr", "cudaMemoryType", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        members = vars(getattr(FakeCuda, name))
        assert all(hasattr(getattr(cudart, name), member) for member in members)
    assert cudart.cudaStreamNonBlocking == FakeCuda.cudaStreamNonBlocking
    assert cudart.cudaEventDisableTiming == FakeCuda.cudaEventDisableTiming
    assert cudart.cudaMemcpyKind.cudaMemcpyDefault == 4
    if cudart.cudaDriverGetVersion()[1] == 0:
        with pytest.raises(HardwareError, match="no NVIDIA driver"):
            Device(0)


def test_everything_is_freed_once(cuda: FakeCuda) -> None:
    device = Device(0, cuda)
    with Buffer(device, 0) as buffer, PinnedBuffer(device, 8), Stream(device), Event(device):
        assert buffer.nbytes == 1
        assert cuda.num_live == 4
        buffer.close()
        buffer.close()
        assert cuda.num_live == 3
    assert cuda.num_live == 0


def test_out_of_memory_is_not_the_end(cuda: FakeCuda) -> None:
    device = Device(0, cuda)
    cuda.fail["cudaMalloc"] = 0, MEMORY
    with pytest.raises(
        ResourceError, match=r"memory for 0\.00 GB, 1\.07 GB are free: cudaMalloc: out"
    ):
        Buffer(device, 8)
    cuda.fail.clear()
    device.activate()
    Buffer(device, 8).close()


def test_a_sticky_error_is(cuda: FakeCuda) -> None:
    device = Device(0, cuda)
    stream = Stream(device)
    stream.copy(0xBAD, 0xBAD, 4)
    with pytest.raises(SessionDead, match="illegal memory access"):
        stream.synchronize()
    with pytest.raises(SessionDead, match="failed before: cudaStreamSynchronize"):
        device.activate()
    assert cuda.calls.count("cudaSetDevice") == 1


def test_copies_happen_in_the_stream(cuda: FakeCuda) -> None:
    device = Device(0, cuda)
    source, target = PinnedBuffer(device, 8), PinnedBuffer(device, 8)
    view = source.view((2,), np.dtype(np.float32))
    with Buffer(device, 8) as buffer, Stream(device) as stream:
        view[:] = 1, 2
        stream.copy(buffer.pointer, source.pointer, 8)
        stream.zero(buffer.pointer + 4, 4)
        stream.copy(target.pointer, buffer.pointer, 8)
        stream.copy(target.pointer, buffer.pointer, 0)
        stream.synchronize()
    np.testing.assert_array_equal(target.view((2,), np.dtype(np.float32)), [1, 0])


def test_a_stream_waits_for_another(cuda: FakeCuda) -> None:
    device = Device(0, cuda)
    done: list[str] = []
    with Stream(device) as first, Stream(device) as second:
        cuda.queue(first.handle, lambda: done.append("first"))
        second.wait_for(first.handle)
        cuda.queue(second.handle, lambda: done.append("second"))
        second.synchronize()
        assert done == ["first", "second"]


def test_a_capture_runs_nothing_until_launched(cuda: FakeCuda) -> None:
    device = Device(0, cuda)
    done: list[int] = []
    with Stream(device) as stream:
        with stream.capture(lambda: cuda.queue(stream.handle, lambda: done.append(1))) as graph:
            stream.synchronize()
            assert done == []
            stream.launch(graph)
            stream.launch(graph)
            stream.synchronize()
        assert done == [1, 1]
    assert cuda.num_live == 0


def test_a_capture_that_fails_leaves_the_stream_usable(cuda: FakeCuda) -> None:
    device = Device(0, cuda)

    def refuse() -> None:
        raise ValueError("no")

    with Stream(device) as stream:
        with pytest.raises(ValueError, match="no"):
            stream.capture(refuse)
        cuda.fail["cudaGraphInstantiate"] = 0, CAPTURE_INVALIDATED
        with pytest.raises(HardwareError, match="901"):
            stream.capture(lambda: None)
        with pytest.raises(HardwareError, match="900"):  # waiting is not allowed in a capture
            stream.capture(stream.synchronize)
        stream.synchronize()


def test_whose_memory_an_address_is(cuda: FakeCuda) -> None:
    device = Device(0, cuda)
    with Buffer(device, 8) as buffer:
        assert device.owns(buffer.pointer)
        assert device.owns(buffer.pointer + 7)
        assert not device.owns(0x1234)
        for kind, index, owned in [("device", 1, False), ("managed", 1, True), ("host", 0, False)]:
            found = SimpleNamespace(type=kind, device=index)
            other = Device(0, cuda)
            other.cudart = SimpleNamespace(
                cudaMemoryType=cuda.cudaMemoryType,
                cudaPointerGetAttributes=lambda pointer, found=found: (0, found),
            )
            assert other.owns(buffer.pointer) is owned
        cuda.fail["cudaPointerGetAttributes"] = 0, ILLEGAL_ADDRESS
        assert not device.owns(buffer.pointer)
