"""A stand-in for ``cuda.bindings.runtime``: a GPU of bytes, whose streams run late.

Nothing queued in a stream happens before that stream, or an event recorded after it, is
synchronised; copies read their source then, not when they were queued. So a missing wait, a
staging buffer written too early or freed too soon gives wrong results or fails, as on a GPU.
Memory has bounds: touching any other address is the sticky error 700.
"""

# ruff: noqa: N802, N815 - the names are CUDA's
from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

SUCCESS, INVALID_VALUE, MEMORY, INSUFFICIENT_DRIVER, ILLEGAL_ADDRESS = 0, 1, 2, 35, 700
INVALID_HANDLE, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 400, 900, 901
TEXTS = {MEMORY: b"out of memory", ILLEGAL_ADDRESS: b"an illegal memory access was encountered"}
DEVICE_BASE = 0x7F00_0000_0000
Work = Callable[[], None]


class Fault(Exception):
    """A kernel or a copy went wrong on the device."""


class Stream:
    def __init__(self) -> None:
        self.queue: list[Work] = []
        self.captured: list[Work] | None = None
        self.invalidated = False


class FakeCuda:
    """The module; ``fail`` says which call fails, and how."""

    cudaStreamNonBlocking, cudaEventDisableTiming = 1, 2
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
    cudaMemoryType = SimpleNamespace(cudaMemoryTypeDevice="device", cudaMemoryTypeManaged="managed")
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, total: int = 1 << 30, sm: int = 89, devices: int = 1) -> None:
        self.total, self.sm, self.devices = total, sm, devices
        self.driver, self.runtime = 13050, 13050
        self.memory: dict[int, Any] = {}  # device address → bytes
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, tuple[Stream, int] | None] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self.sticky = SUCCESS
        self.fail: dict[str, tuple[int, int]] = {}  # name → (calls that succeed first, error)
        self.calls: list[str] = []
        self.num_launches = 0
        self.now_ms = 0.0  # a copy takes a millisecond for every 1000 bytes
        self.timed: set[int] = set()  # events
        self._numbers = itertools.count(1)
        self._next_address = DEVICE_BASE
        self.lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        """Every function counts, and fails when told to or when the GPU is gone."""
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def call(*args: Any) -> Any:
            with self.lock:
                self.calls.append(name)
                error = self._scripted(name)
                if error == SUCCESS and name not in NEVER_FAIL:
                    error = self.sticky
                if error and name == "cudaStreamEndCapture":
                    value(*args)  # a failed capture has ended too
                return (error, None) if error else value(*args)

        return call

    def _scripted(self, name: str) -> int:
        if name not in self.fail:
            return SUCCESS
        remaining, error = self.fail[name]
        self.fail[name] = remaining - 1, error
        if remaining > 0:
            return SUCCESS
        if error == ILLEGAL_ADDRESS:
            self.sticky = error
        return error

    @property
    def num_live(self) -> int:
        """Everything handed out and not freed."""
        held = (self.memory, self.pinned, self.streams, self.events, self.graphs, self.executables)
        return sum(map(len, held))

    # --- the device ------------------------------------------------------------------------------

    def cudaDriverGetVersion(self) -> Any:
        return SUCCESS, self.driver

    def cudaRuntimeGetVersion(self) -> Any:
        return SUCCESS, self.runtime

    def cudaGetDeviceCount(self) -> Any:
        return SUCCESS, self.devices

    def cudaSetDevice(self, index: int) -> Any:
        return (SUCCESS,)

    def cudaDeviceGetAttribute(self, attribute: str, index: int) -> Any:
        return SUCCESS, self.sm // 10 if attribute == "major" else self.sm % 10

    def cudaGetLastError(self) -> Any:
        return (SUCCESS,)

    def cudaGetErrorString(self, error: int) -> Any:
        return SUCCESS, TEXTS.get(error, b"some error")

    def cudaMemGetInfo(self) -> Any:
        used = sum(len(block) for block in self.memory.values())
        return SUCCESS, self.total - used, self.total

    # --- memory ----------------------------------------------------------------------------------

    def cudaMalloc(self, nbytes: int) -> Any:
        if nbytes > self.cudaMemGetInfo()[1]:
            return MEMORY, None
        address = self._next_address
        self._next_address += -(-nbytes // 256) * 256 + 256  # a gap, so that overruns are seen
        self.memory[address] = np.full(nbytes, 0xCD, np.uint8)
        return SUCCESS, address

    def cudaFree(self, address: int) -> Any:
        del self.memory[address]
        return (SUCCESS,)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> Any:
        block = (ctypes.c_uint8 * nbytes)(*[0xCD] * min(nbytes, 64))
        address = ctypes.addressof(block)
        self.pinned[address] = block
        return SUCCESS, address

    def cudaFreeHost(self, address: int) -> Any:
        del self.pinned[address]
        return (SUCCESS,)

    def cudaPointerGetAttributes(self, address: int) -> Any:
        kind = "device" if self._block(address) else "unregistered"
        return SUCCESS, SimpleNamespace(type=kind, device=0)

    def _block(self, address: int) -> tuple[int, Any] | None:
        for base, block in self.memory.items():
            if base <= address < base + len(block):
                return base, block
        for base, pinned in self.pinned.items():
            if base <= address < base + len(pinned):
                return base, np.frombuffer(pinned, np.uint8)
        return None

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Memory of the device or pinned, as bytes that can be written."""
        found = self._block(address)
        if found is None or address + nbytes > found[0] + len(found[1]):
            raise Fault(f"{nbytes} bytes at {address:#x}")
        base, block = found
        view: np.ndarray[Any, np.dtype[np.uint8]] = block[address - base :][:nbytes]
        return view

    # --- streams ---------------------------------------------------------------------------------

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        assert flags == self.cudaStreamNonBlocking
        handle = 0x5000 + next(self._numbers)
        self.streams[handle] = Stream()
        return SUCCESS, handle

    def cudaStreamDestroy(self, handle: int) -> Any:
        del self.streams[handle]
        return (SUCCESS,)

    def queue(self, handle: int, work: Work) -> None:
        """Put work into a stream, or into what is being captured of it."""
        stream = self.streams[handle]
        (stream.queue if stream.captured is None else stream.captured).append(work)

    def cudaStreamSynchronize(self, handle: int) -> Any:
        if self.streams[handle].captured is not None:
            self.streams[handle].invalidated = True
            return (CAPTURE_UNSUPPORTED,)
        return (self._run(self.streams[handle], len(self.streams[handle].queue)),)

    def _run(self, stream: Stream, count: int) -> int:
        done, stream.queue = stream.queue[:count], stream.queue[count:]
        try:
            for work in done:
                work()
        except Fault:
            self.sticky = ILLEGAL_ADDRESS
            return ILLEGAL_ADDRESS
        return SUCCESS

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> Any:
        assert kind == 4

        def copy() -> None:
            self.bytes_at(target, nbytes)[:] = self.bytes_at(source, nbytes)
            self.now_ms += nbytes / 1000

        self.queue(stream, copy)
        return (SUCCESS,)

    def cudaMemcpy(self, target: int, source: int, nbytes: int, kind: int) -> Any:
        """To any memory of the host, at once."""
        assert kind == 4
        ctypes.memmove(target, self.bytes_at(source, nbytes).tobytes(), nbytes)
        return (SUCCESS,)

    def cudaMemsetAsync(self, target: int, value: int, nbytes: int, stream: int) -> Any:
        self.queue(stream, lambda: self.bytes_at(target, nbytes).fill(value))
        return (SUCCESS,)

    # --- events ----------------------------------------------------------------------------------

    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        handle = 0xE000 + next(self._numbers)
        self.events[handle] = None
        self.timed |= set() if flags & self.cudaEventDisableTiming else {handle}
        return SUCCESS, handle

    def cudaEventDestroy(self, handle: int) -> Any:
        del self.events[handle]
        return (SUCCESS,)

    def cudaEventRecord(self, event: int, stream: int) -> Any:
        mark: list[float] = []
        self.queue(stream, lambda: mark.append(self.now_ms))
        self.events[event] = self.streams[stream], mark  # type: ignore[assignment]
        return (SUCCESS,)

    def _pass(self, recorded: Any) -> None:
        """Run a stream until an event recorded in it has passed."""
        stream, mark = recorded
        while not mark and stream.queue:
            if self._run(stream, 1):
                raise Fault("in another stream")

    def cudaEventSynchronize(self, event: int) -> Any:
        recorded = self.events[event]
        if recorded is not None:
            try:
                self._pass(recorded)
            except Fault:
                return (ILLEGAL_ADDRESS,)
        return (SUCCESS,)

    def cudaEventElapsedTime(self, start: int, end: int) -> Any:
        marks = [recorded[1] for event in (start, end) if (recorded := self.events[event])]
        if not {start, end} <= self.timed or len(marks) < 2 or not all(marks):
            return INVALID_HANDLE, None
        return SUCCESS, marks[1][0] - marks[0][0]  # type: ignore[index]

    def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> Any:
        recorded = self.events[event]
        if recorded is not None:
            self.queue(stream, lambda: self._pass(recorded))
        return (SUCCESS,)

    # --- graphs ----------------------------------------------------------------------------------

    def cudaStreamBeginCapture(self, handle: int, mode: int) -> Any:
        assert mode == 1
        self.streams[handle].captured = []
        return (SUCCESS,)

    def cudaStreamEndCapture(self, handle: int) -> Any:
        stream = self.streams[handle]
        work, invalidated = stream.captured, stream.invalidated
        stream.captured, stream.invalidated = None, False
        if work is None or invalidated:
            return CAPTURE_INVALIDATED, None
        graph = 0x6000 + next(self._numbers)
        self.graphs[graph] = work
        return SUCCESS, graph

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:
        handle = 0x7000 + next(self._numbers)
        self.executables[handle] = list(self.graphs[graph])
        return SUCCESS, handle

    def cudaGraphDestroy(self, graph: int) -> Any:
        del self.graphs[graph]
        return (SUCCESS,)

    def cudaGraphExecDestroy(self, handle: int) -> Any:
        del self.executables[handle]
        return (SUCCESS,)

    def cudaGraphLaunch(self, handle: int, stream: int) -> Any:
        self.num_launches += 1
        for work in self.executables[handle]:
            self.queue(stream, work)
        return (SUCCESS,)


# Freeing works on a broken GPU too, as far as the caller can tell.
NEVER_FAIL = {
    "cudaGetErrorString",
    "cudaGetLastError",
    "cudaDriverGetVersion",
    "cudaRuntimeGetVersion",
    "cudaFree",
    "cudaFreeHost",
    "cudaStreamDestroy",
    "cudaEventDestroy",
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
    "cudaStreamEndCapture",
}
