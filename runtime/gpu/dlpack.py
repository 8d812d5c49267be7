"""DLPack, the producer's half: memory as the capsule that other libraries take.

Written out, since what NumPy and CUDA's Python packages export goes by NumPy's names of types and
so has no bfloat16, which is what a decoder's cache is made of. The capsule points to a
``DLManagedTensor``; its consumer renames it, and calls the deleter when it is done. One that nobody
took calls it itself.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

__all__ = ["CPU", "CUDA", "CUDA_MANAGED", "capsule_of"]

CPU, CUDA, CUDA_MANAGED = 1, 2, 13  # kDLCPU, kDLCUDA, kDLCUDAManaged
# The kind of a NumPy dtype, or its name where NumPy has none → DLDataTypeCode.
CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6, "bfloat16": 4, "float8_e4m3fn": 10}
NAME = b"dltensor"


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class _DataType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements
        ("byte_offset", ctypes.c_uint64),
    ]


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]


def _function(name: str, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))


# The destructor's capsule is being freed: as an address, or Python would count references to it.
_is_valid = _function("PyCapsule_IsValid", ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
_pointer = _function("PyCapsule_GetPointer", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)
_new = _function(
    "PyCapsule_New", ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)
_handed_out: dict[int, Any] = {}  # address of a DLManagedTensor → all that it needs


def _forget(address: int) -> None:
    _handed_out.pop(address, None)


def _destroy(capsule: int) -> None:
    if _is_valid(capsule, NAME):  # under its own name: nobody took it
        _forget(_pointer(capsule, NAME))


_deleter, _destructor = _Deleter(_forget), _Deleter(_destroy)


def capsule_of(
    pointer: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int], owner: Any
) -> Any:
    """Make a capsule of a C-contiguous array.

    Args:
        pointer: its address.
        shape: its sizes.
        dtype: of its values.
        device: DLPack's type and the index.
        owner: kept alive until the consumer is done.

    Raises:
        BufferError: DLPack has no name for the dtype.
    """
    code = CODES.get(dtype.name, CODES.get(dtype.kind))
    if code is None:
        raise BufferError(f"DLPack has no name for {dtype.name}")
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    numbers = (ctypes.c_int64 * (2 * len(shape)))(*shape, *strides)
    sizes = ctypes.cast(numbers, ctypes.POINTER(ctypes.c_int64))
    tensor = _Tensor(
        data=pointer,
        device=_Device(*device),
        ndim=len(shape),
        dtype=_DataType(code, 8 * dtype.itemsize, 1),
        shape=sizes,
        strides=ctypes.cast(
            ctypes.addressof(numbers) + ctypes.sizeof(numbers) // 2, ctypes.POINTER(ctypes.c_int64)
        ),
    )
    managed = _Managed(tensor=tensor, deleter=_deleter)
    address = ctypes.addressof(managed)
    _handed_out[address] = managed, numbers, owner
    return _new(address, NAME, ctypes.cast(_destructor, ctypes.c_void_p))
