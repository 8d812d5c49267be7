"""Between NumPy's arrays and ONNX Runtime's values, of every dtype.

ONNX Runtime gives no array of bfloat16 and takes none, as NumPy has no such type of its own. Its
bits are handed over as float16, which are as many, and the value is told what they are by DLPack:
the same memory under another type, on the host as on a GPU.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnxruntime

from internvl_edge.artifact import TensorSpec
from internvl_edge.runtime.feeds import numpy_dtype
from internvl_edge.runtime.gpu.device_array import DeviceArray
from internvl_edge.runtime.gpu.dlpack import CPU, CUDA, capsule_of
from internvl_edge.types import Array

__all__ = [
    "BFLOAT16",
    "Place",
    "array_of",
    "copied",
    "described",
    "is_numpy",
    "is_value",
    "spec_of",
    "value_like",
    "value_of",
]

Place = tuple[str, int]  # a device's type, as ONNX Runtime names it, and its index

BFLOAT16 = "bfloat16"
# ONNX Runtime's name of a type → NumPy's, where they differ.
NUMPY_NAMES = {"float": "float32", "double": "float64"}
SAME_BITS = np.dtype(np.float16)


def array_of(value: Any, place: Place) -> Array:
    """Copy a value of this place, or of the CPU, to the host."""
    if value.data_type() == f"tensor({BFLOAT16})":
        return array_of(_viewed(value, SAME_BITS, place), place).view(numpy_dtype(BFLOAT16))
    array: Array = value.numpy()
    return array


def value_of(array: Array, place: Place) -> Any:
    """Make an ``OrtValue`` of an array, at a place; on the CPU it may share the array's memory."""
    if array.dtype.name == BFLOAT16:
        return _viewed(value_of(array.view(SAME_BITS), place), array.dtype, place)
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), *place)


def value_like(value: Any, place: Place) -> Any:
    """Make a value of the same type and shape, at a place; what is in it is left open."""
    shape = tuple(value.shape())
    if value.data_type() == f"tensor({BFLOAT16})":
        bits = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, SAME_BITS, *place)
        return _viewed(bits, numpy_dtype(BFLOAT16), place)
    dtype = numpy_dtype(_dtype(value.data_type()))
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype, *place)


def copied(value: Any, place: Place) -> Any:
    """Copy a value to memory of its own, at a place."""
    copy = value_like(value, place)
    copy.update_inplace(value)
    return copy


def _viewed(value: Any, dtype: np.dtype[Any], place: Place) -> Any:
    """View the same memory as another type."""
    device = (CPU, 0) if value.device_name() == "cpu" else (CUDA, place[1])
    capsule = capsule_of(value.data_ptr(), tuple(value.shape()), dtype, device, value)
    return onnxruntime.OrtValue.from_dlpack(capsule)


def is_value(value: object) -> bool:
    return isinstance(value, onnxruntime.OrtValue)


def described(value: Any) -> DeviceArray:
    """Describe an OrtValue so that it can be checked like an array."""
    dtype = _dtype(value.data_type())
    return DeviceArray(
        pointer=value.data_ptr(), shape=tuple(value.shape()), dtype=numpy_dtype(dtype), owner=value
    )


def spec_of(value: Any) -> TensorSpec:
    """Describe a graph input or output; a dimension without a name gets one of its own."""
    shape = tuple(
        size if isinstance(size, (int, str)) and size != "" else f"{value.name}.{axis}"
        for axis, size in enumerate(value.shape)
    )
    return TensorSpec(name=value.name, dtype=_dtype(value.type), shape=shape)


def _dtype(kind: str) -> str:
    """Return NumPy's name of a type such as ``tensor(float)``."""
    inner = re.fullmatch(r"tensor\((\w+)\)", kind)
    name = inner[1] if inner else kind
    return NUMPY_NAMES.get(name, name)


def is_numpy(session: Any) -> bool:
    """Tell whether NumPy has a type for all that ONNX Runtime's session takes and gives."""
    values = (*session.get_inputs(), *session.get_outputs())
    return all(spec_of(value).dtype != BFLOAT16 for value in values)
