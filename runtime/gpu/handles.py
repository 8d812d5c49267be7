"""The resources that CUDA hands out: memory, streams, events, graphs.

Each is a ``Resource``, freed once: by ``close``, at the end of a ``with`` block, or with the last
reference to it. Work that is put into a stream runs later: memory that it reads or writes must
outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from internvl_edge.errors import InternVLError
from internvl_edge.runtime.gpu.device import Device
from internvl_edge.types import Array

__all__ = ["Buffer", "Event", "Graph", "PinnedBuffer", "Stream"]


class Resource:
    """Something that CUDA handed out, freed once."""

    FREE = ""
    handle: Any = None  # until CUDA gave one

    def __init__(self, device: Device, handle: Any) -> None:
        self.device, self.handle = device, handle

    def close(self) -> None:
        """Free it; may be called again."""
        handle, self.handle = self.handle, None
        if handle is not None:
            self.device.release(self.FREE, handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.handle is not None and not sys.is_finalizing():
            self.close()


class Buffer(Resource):
    """Device memory, aligned to 256 bytes."""

    FREE = "cudaFree"

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = max(nbytes, 1)  # an empty tensor still needs an address
        super().__init__(device, device.call("cudaMalloc", self.nbytes))
        self.pointer = int(self.handle)


class PinnedBuffer(Resource):
    """Page-locked host memory, which copies to and from the device without a stop-over."""

    FREE = "cudaFreeHost"

    def __init__(self, device: Device, nbytes: int) -> None:
        nbytes = max(nbytes, 1)
        super().__init__(device, device.call("cudaHostAlloc", nbytes, 0))
        self.pointer = int(self.handle)
        self._block = (ctypes.c_uint8 * nbytes).from_address(self.pointer)

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """View the beginning of the memory as an array; it lasts as long as this buffer."""
        return np.ndarray(shape, dtype, memoryview(self._block))


class Event(Resource):
    """A moment in a stream."""

    FREE = "cudaEventDestroy"

    def __init__(self, device: Device, *, timed: bool = False) -> None:
        flags = 0 if timed else device.cudart.cudaEventDisableTiming
        super().__init__(device, device.call("cudaEventCreateWithFlags", flags))

    def record(self, stream: Any) -> None:
        self.device.call("cudaEventRecord", self.handle, stream)

    def synchronize(self) -> None:
        """Wait until it has passed; at once where it was never recorded."""
        self.device.call("cudaEventSynchronize", self.handle)

    def hold(self, stream: Any) -> None:
        """Let later work of a stream wait until it has passed."""
        self.device.call("cudaStreamWaitEvent", stream, self.handle, 0)

    def fetch(self, target: int, source: int, nbytes: int) -> None:
        """Copy from the device to any memory of the host once it has passed; waits."""
        self.device.activate()
        self.synchronize()
        default = self.device.cudart.cudaMemcpyKind.cudaMemcpyDefault
        self.device.call("cudaMemcpy", target, source, nbytes, default)

    def elapsed_ms(self, since: Event) -> float:
        """Measure the GPU's time between two timed events that have passed."""
        return float(self.device.call("cudaEventElapsedTime", since.handle, self.handle))


class Graph(Resource):
    """Work of a stream, captured to be launched as one."""

    FREE = "cudaGraphExecDestroy"


class Stream(Resource):
    """A queue of the device's work, apart from the default stream."""

    FREE = "cudaStreamDestroy"

    def __init__(self, device: Device) -> None:
        flags = device.cudart.cudaStreamNonBlocking
        super().__init__(device, device.call("cudaStreamCreateWithFlags", flags))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between addresses of either side; unified addressing knows which is which."""
        if nbytes:
            default = self.device.cudart.cudaMemcpyKind.cudaMemcpyDefault
            self.device.call("cudaMemcpyAsync", target, source, nbytes, default, self.handle)

    def zero(self, target: int, nbytes: int) -> None:
        if nbytes:
            self.device.call("cudaMemsetAsync", target, 0, nbytes, self.handle)

    def wait_for(self, other: Any) -> None:
        """Let later work of this stream wait for what is queued in another."""
        with Event(self.device) as event:
            event.record(other)
            event.hold(self.handle)

    def synchronize(self) -> None:
        self.device.call("cudaStreamSynchronize", self.handle)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """Capture what ``enqueue`` puts into this stream as a graph; nothing of it runs yet.

        Raises:
            HardwareError: CUDA cannot capture it; the stream is usable again.
        """
        call = self.device.call
        # Thread-local: other threads may allocate meanwhile without breaking the capture.
        mode = self.device.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.handle, mode)
        try:
            enqueue()
        except BaseException:
            with contextlib.suppress(InternVLError):  # a capture that broke leaves no graph
                self.device.release("cudaGraphDestroy", call("cudaStreamEndCapture", self.handle))
            raise
        graph = call("cudaStreamEndCapture", self.handle)
        try:
            return Graph(self.device, call("cudaGraphInstantiate", graph, 0))
        finally:
            self.device.release("cudaGraphDestroy", graph)

    def launch(self, graph: Graph) -> None:
        self.device.call("cudaGraphLaunch", graph.handle, self.handle)
