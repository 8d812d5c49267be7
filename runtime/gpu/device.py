"""One GPU: how CUDA is called for it, and what its failures mean.

A thin layer over ``cuda.bindings.runtime``, which links the CUDA runtime statically: the driver is
all that a machine has to bring.

    no driver, one too old, no GPU     HardwareError, when a ``Device`` is made
    out of memory                      ResourceError; the device goes on
    an error that CUDA never clears    SessionDead, from this call on: an illegal address leaves
                                       the process's CUDA context unusable
    any other                          HardwareError

A process that forks takes the device along but not the driver's state: every use in the child is
refused, and what the child closes stays allocated in the parent.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from internvl_edge.errors import (
    HardwareError,
    InternVLError,
    MissingDependency,
    ResourceError,
    SessionDead,
    UsageError,
)

__all__ = ["GB", "Device"]

BINDINGS = "cuda.bindings.runtime"
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
# Errors after which the context stays broken: ECC, NVLink, illegal address, launch timeout,
# destroyed context, assert, stack, instruction, alignment, address space, program counter, launch.
STICKY = frozenset({214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999})
GB = 1e9


class Device:
    """One GPU, and the thread-safe way to call CUDA for it.

    Args:
        index: of the GPU.
        cudart: the module ``cuda.bindings.runtime``; None imports it.

    Raises:
        MissingDependency: the bindings are not installed.
        HardwareError: their libraries, the driver or the GPU are missing or too old.
    """

    def __init__(self, index: int = 0, cudart: Any = None) -> None:
        self.cudart = _import_cudart() if cudart is None else cudart
        self.index = index
        self._process = os.getpid()
        self._dead: str | None = None
        _require_driver(self.cudart)
        count = self.call("cudaGetDeviceCount")
        if index >= count:
            raise HardwareError(f"device 'cuda:{index}': found {count} CUDA devices, from cuda:0")
        self.activate()
        attribute = self.cudart.cudaDeviceAttr
        numbers = (
            attribute.cudaDevAttrComputeCapabilityMajor,
            attribute.cudaDevAttrComputeCapabilityMinor,
        )
        major, minor = (self.call("cudaDeviceGetAttribute", n, index) for n in numbers)
        self.sm: int = 10 * major + minor  # 89 is compute capability 8.9

    def activate(self) -> None:
        """Make this the calling thread's device; to be called before work in any thread.

        It stays the thread's: to set the one before would start CUDA on that GPU, which may never
        have been used and whose memory that takes.

        Raises:
            SessionDead, UsageError: see ``require_usable``.
        """
        self.require_usable()
        self.call("cudaSetDevice", self.index)

    def require_usable(self) -> None:
        """Refuse work that would hang or fail.

        Raises:
            SessionDead: an earlier error ended the device for this process.
            UsageError: the process was forked since.
        """
        if self.is_forked():
            raise UsageError(
                "the GPU was opened before a fork, and CUDA does not survive one; open the "
                "session in the process that runs it (multiprocessing: start method 'spawn')"
            )
        if self._dead is not None:
            raise SessionDead(f"the GPU failed before: {self._dead}; restart the process")

    def call(self, name: str, *args: object) -> Any:
        """Call a function of CUDA; return its value, or values as a tuple."""
        status, *values = getattr(self.cudart, name)(*args)
        if int(status):
            self.cudart.cudaGetLastError()  # or a library would find it later, as its own
            raise self._failure(name, args, status)
        return values[0] if len(values) == 1 else tuple(values)

    def release(self, name: str, handle: object) -> None:
        """Call a function that frees; where that fails there is nothing left to free."""
        if not self.is_forked():
            getattr(self.cudart, name)(handle)

    @property
    def is_dead(self) -> bool:
        """True once an error ended it for this process."""
        return self._dead is not None

    def is_forked(self) -> bool:
        """Tell whether this is a child of the process that opened the device."""
        return os.getpid() != self._process

    def free_nbytes(self) -> int:
        """Count the bytes of device memory that are free now."""
        free, _ = self.call("cudaMemGetInfo")
        return int(free)

    def require(self, nbytes: int, what: str) -> None:
        """Refuse work whose memory is not there, before it begins.

        Raises:
            ResourceError: fewer than ``nbytes`` are free.
        """
        free = self.free_nbytes()
        if nbytes > free:
            raise ResourceError(
                f"{what} needs {nbytes / GB:.2f} GB of GPU memory, {free / GB:.2f} GB are free"
            )

    def owns(self, pointer: int) -> bool:
        """Tell whether an address is memory of this GPU, or managed memory."""
        kind = self.cudart.cudaMemoryType
        status, attributes = self.cudart.cudaPointerGetAttributes(pointer)
        if int(status):
            self.cudart.cudaGetLastError()
            return False
        if attributes.type == kind.cudaMemoryTypeDevice:
            return bool(attributes.device == self.index)
        return bool(attributes.type == kind.cudaMemoryTypeManaged)

    def _failure(self, name: str, args: tuple[Any, ...], status: Any) -> InternVLError:
        _, text = self.cudart.cudaGetErrorString(status)
        told = f"{name}: {text.decode()} (CUDA error {int(status)})"
        if int(status) == OUT_OF_MEMORY:
            return ResourceError(f"{self._lack(name, args)}: {told}")
        if int(status) in STICKY:
            self._dead = told
            return SessionDead(f"the GPU failed: {told}; restart the process")
        return HardwareError(f"CUDA refused a call: {told}")

    def _lack(self, name: str, args: tuple[Any, ...]) -> str:
        """Say which memory ran out, and how much was asked for."""
        if name == "cudaHostAlloc":
            return f"not enough page-locked host memory for {args[0] / GB:.2f} GB"
        if name != "cudaMalloc":
            return "not enough GPU memory"
        status, *memory = self.cudart.cudaMemGetInfo()
        free = 0 if int(status) else memory[0]
        return f"not enough GPU memory for {args[0] / GB:.2f} GB, {free / GB:.2f} GB are free"


def _import_cudart() -> Any:
    try:
        return importlib.import_module(BINDINGS)
    except ModuleNotFoundError as error:
        raise MissingDependency.of("cuda-core", "rtx") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise HardwareError(f"{BINDINGS} is installed but does not load: {error}") from error


def _require_driver(cudart: Any) -> None:
    """Refuse a driver older than the bindings' major version of CUDA: it runs no newer programs."""
    _, driver = cudart.cudaDriverGetVersion()
    _, runtime = cudart.cudaRuntimeGetVersion()
    if driver == 0:
        raise HardwareError(
            "no NVIDIA driver on this machine, and engines need one; use backend 'onnxruntime'"
        )
    if driver // 1000 < runtime // 1000:
        raise HardwareError(
            f"the NVIDIA driver supports CUDA {_version(driver)} and the CUDA bindings are "
            f'{_version(runtime)}: update the driver, or pip install "cuda-bindings'
            f'<{driver // 1000 + 1}"'
        )


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
