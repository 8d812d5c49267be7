"""Arrays in GPU memory, exchanged without a copy: DLPack and ``__cuda_array_interface__``.

Whoever hands over an array says when it is complete: DLPack's producer is told the consumer's
stream and makes it wait, them for ours and ours for them; the CUDA array interface (version 3)
names the producer's stream, and the consumer's waits for that. Only C-contiguous arrays are taken:
an engine reads plain blocks of memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_edge.errors import FeedError, UsageError
from internvl_edge.runtime.gpu.dlpack import CUDA, CUDA_MANAGED, capsule_of
from internvl_edge.runtime.gpu.handles import Event
from internvl_edge.types import Array

__all__ = ["DeviceArray", "as_device_array", "is_on_device"]

LEGACY_STREAM, NO_STREAM = 1, -1  # DLPack's default stream, and its word for not waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceArray:
    """A C-contiguous array in GPU memory; valid as long as what owns the memory."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int = 0  # index of the GPU
    stream: int | None = None  # where it is being computed; None: it is complete
    ready: Event | None = None  # passes once it is computed; None: it did not come from a run
    readonly: bool = False
    owner: Any = None  # kept alive with the array

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.kind == "V":  # the interface has no name for bfloat16
            raise AttributeError(f"__cuda_array_interface__ cannot carry {self.dtype.name}")
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, self.readonly),
            "strides": None,
            "stream": self.stream,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Export a capsule; the consumer's stream waits until the array is computed.

        Raises:
            BufferError: it is asked for elsewhere, as a copy, or is read-only, which a capsule
                that every consumer takes cannot say.
        """
        if copy or self.readonly or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(
                f"an array in memory of cuda:{self.device} is handed out where it is, to be "
                f"written too: asked for copy={copy}, dl_device={dl_device}, "
                f"readonly={self.readonly}"
            )
        if self.ready is not None and stream != NO_STREAM:
            self.ready.hold(stream or LEGACY_STREAM)
        return capsule_of(self.pointer, self.shape, self.dtype, self.__dlpack_device__(), self)

    def numpy(self) -> Array:
        """Copy to the host an array that a run computed.

        Raises:
            UsageError: it did not come from a run.
        """
        if self.ready is None:
            raise UsageError("this array did not come from a run; only what one computed is copied")
        array = np.empty(self.shape, self.dtype)
        self.ready.fetch(array.ctypes.data, self.pointer, self.nbytes)
        return array


def is_on_device(name: str, value: object) -> bool:
    """Tell whether an object, to be an input of this name, says that it is GPU memory.

    Raises:
        FeedError: it raises something instead.
    """
    if isinstance(value, np.ndarray):
        return False
    if not hasattr(value, "__dlpack_device__"):
        return hasattr(value, "__cuda_array_interface__")
    try:
        return value.__dlpack_device__()[0] in (CUDA, CUDA_MANAGED)
    except Exception as error:  # foreign code
        raise FeedError(f"{name!r}: {type(value).__name__} has no device: {error}") from error


def as_device_array(name: str, value: Any, stream: int) -> DeviceArray:
    """Take an object that ``is_on_device``, safe to read in ``stream`` once that has waited.

    Args:
        name: of the input, for errors.
        value: the object.
        stream: what will read it.

    Raises:
        FeedError: it is strided or masked, or says nonsense.
    """
    if isinstance(value, DeviceArray):
        return value
    try:
        if hasattr(value, "__dlpack__"):
            return _from_dlpack(name, value, stream)
        return _from_interface(name, value)
    except FeedError:
        raise
    except Exception as error:  # foreign code: whatever its exporter raises
        raise FeedError(f"input {name!r}: {type(value).__name__} on a GPU: {error}") from error


def _from_dlpack(name: str, value: Any, stream: int) -> DeviceArray:
    from cuda.core.utils import StridedMemoryView

    view = StridedMemoryView.from_dlpack(value, stream_ptr=stream)  # which waits for the producer
    _require_contiguous(name, view.shape, view.strides, itemsize=1)  # DLPack counts in elements
    return DeviceArray(
        pointer=int(view.ptr),
        shape=tuple(view.shape),
        dtype=np.dtype(view.dtype),
        device=int(view.device_id),
        readonly=bool(view.readonly),
        owner=(value, view),
    )


def _from_interface(name: str, value: Any) -> DeviceArray:
    told = value.__cuda_array_interface__
    if told.get("mask") is not None:
        raise FeedError(f"input {name!r}: a masked array; expected a plain one")
    dtype, shape = np.dtype(told["typestr"]), tuple(map(int, told["shape"]))
    _require_contiguous(name, shape, told.get("strides"), dtype.itemsize)
    return DeviceArray(
        pointer=int(told["data"][0]),
        shape=shape,
        dtype=dtype,
        stream=told.get("stream"),
        readonly=bool(told["data"][1]),
        owner=value,
    )


def _require_contiguous(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...] | None, itemsize: int
) -> None:
    if strides is None or math.prod(shape) == 0:
        return
    expected = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            raise FeedError(
                f"input {name!r}: strides {tuple(strides)} of an array {list(shape)} on the GPU; "
                "expected a C-contiguous one, use .contiguous() or its like"
            )
        expected *= size
