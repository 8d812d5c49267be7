"""Arrays as pictures, where their meaning is certain.

The dtype says what white is: 255 of uint8, 65535 of uint16, 1.0 of a float, True of bool. Integers
of 32 or 64 bits say nothing: one channel of them with levels above 255 is 16-bit grey, as Pillow's
mode I mostly is, and everything else is refused with the conversion that would do. 16 bits become 8
by v / 257 and floats by 255 v, both rounded to the nearest.

Channels are last, 1 to 4 of them (grey, grey and alpha, RGB, RGB and alpha); where the last
dimension cannot be channels and the first one can, they are first, as PyTorch has them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.errors import MediaError, shortened
from internvl_edge.types import Array

__all__ = [
    "ARRAYS",
    "LAYOUTS",
    "ArrayKind",
    "as_array",
    "is_array_like",
    "picture_levels",
    "require_certain_white",
]

CHANNELS = (1, 2, 3, 4)
CHANNELS_FIRST = (1, 3, 4)
LAYOUTS = ("[H, W]", "[H, W, 1]", "[H, W, 2]", "[H, W, 3]", "[H, W, 4]") + (
    "[1, H, W]",
    "[3, H, W]",
    "[4, H, W]",
)
WHITE = np.uint8(255)
HALF_A_LEVEL = 1 / 510  # of a float: what is rounded away


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayKind:
    """A row of the table of arrays that are pictures."""

    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    white: float  # the level of it; black is 0
    note: str


FLOAT_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != "[H, W, 2]")
ARRAYS = (
    ArrayKind(dtypes=("uint8",), layouts=LAYOUTS, white=255, note="as they are"),
    ArrayKind(
        dtypes=("uint16",),
        layouts=LAYOUTS,
        white=65535,
        note="divided by 257 and rounded; all 0, or one above 255",
    ),
    ArrayKind(
        dtypes=("float16", "float32", "float64"),
        layouts=FLOAT_LAYOUTS,
        white=1,
        note="times 255 and rounded; all within 0 and 1",
    ),
    ArrayKind(dtypes=("bool",), layouts=("[H, W]",), white=1, note="False is black"),
    ArrayKind(
        dtypes=("int32", "uint32", "int64", "uint64"),
        layouts=("[H, W]", "[H, W, 1]"),
        white=65535,
        note="as uint16; the largest level from 256 to 65535",
    ),
)


def is_array_like(value: Any) -> bool:
    """Tell tensors and other libraries' arrays, which NumPy can read, without importing them."""
    if isinstance(value, np.ndarray):
        return True
    if isinstance(value, np.generic | str | bytes | list | tuple) or _is_pillow(value):
        return False
    return hasattr(value, "__array__")


def as_array(value: Any) -> Array:
    """Return an array, or a tensor of another library, as a NumPy array.

    Raises:
        MediaError: NumPy has no such dtype, or the values cannot be had.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise MediaError("a masked array, whose mask nothing here would see; use .filled(...)")
    if isinstance(value, np.ndarray):
        return value
    try:
        for step in ("detach", "cpu"):  # of PyTorch
            if callable(getattr(value, step, None)):
                value = getattr(value, step)()
        return np.asarray(value)
    except Exception as error:  # whatever another library raises
        raise MediaError(
            f"{_described(value)}: NumPy cannot read it ({shortened(str(error), 120)}); "
            "convert it first, such as with .float() or .numpy()"
        ) from error


def require_certain_white(array: Array, label: str) -> None:
    """Refuse 16-bit levels that would all be black or next to it: 8 bits in a wider type.

    A file says itself how many bits it has; an array only has the type that somebody gave it.

    Raises:
        MediaError: every level of a uint16 array is within 255, and some are above 0.
    """
    if array.dtype == np.uint16 and array.size and 0 < (highest := int(array.max())) <= WHITE:
        raise MediaError(
            f"{label}: white is 65535 in uint16, found levels up to {highest}, which would all be "
            "black; pass .astype(np.uint8) if they are 0 to 255"
        )


def picture_levels(array: Array, label: str) -> NDArray[np.uint8]:
    """Return the levels of a picture, uint8 [H, W, C] with 1 to 4 channels.

    Raises:
        MediaError: a meaning that is not certain; the message says which argument would do.
    """
    if not array.dtype.isnative:  # of files of other machines
        array = array.astype(array.dtype.newbyteorder("="))
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise MediaError(f"{label}: expected one picture, [H, W] or [H, W, C]{_batch_hint(array)}")
    if array.shape[2] not in CHANNELS and array.shape[0] in CHANNELS_FIRST:
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in CHANNELS or (array.shape[2] == 2 and array.dtype.kind not in "u"):
        raise MediaError(
            f"{label}: expected 1, 3 or 4 channels, [H, W, C] or [C, H, W]; pass such an array"
        )
    if not array.size:
        raise MediaError(f"{label}: expected at least one pixel, found none")
    if array.dtype == np.uint8:
        levels: NDArray[np.uint8] = array
        return levels
    if array.dtype == np.bool_:
        if array.shape[2] != 1:
            raise MediaError(f"{label}: expected one channel of bool; pass .astype(np.uint8) * 255")
        return np.where(array, WHITE, np.uint8(0))
    if array.dtype.kind == "f":
        return _of_floats(array, label)
    if array.dtype.kind in "iu":
        return _of_integers(array, label)
    raise MediaError(f"{label}: expected integers or floats; pass uint8 [H, W, 3]")


def _of_floats(array: Array, label: str) -> NDArray[np.uint8]:
    low, high = float(array.min()), float(array.max())  # NaN where there is any
    if not np.isfinite((low, high)).all():
        raise MediaError(f"{label}: expected finite levels, found NaN or infinity")
    if low < -HALF_A_LEVEL or high > 1 + HALF_A_LEVEL:
        if low < 0 and high < 10:
            remedy = (
                "pixel_values that are normalised already are one array float32 [B, 3, S, S]: "
                "pass array[None]; levels beyond black and white are cut by .clip(0, 1)"
            )
        else:
            remedy = "pass .astype(np.uint8) if they are 0 to 255, or divide by their white"
        raise MediaError(
            f"{label}: expected float levels from 0 to 1, found {low:.4g} to {high:.4g}; {remedy}"
        )
    scaled = np.rint(array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32) * 255)
    levels: NDArray[np.uint8] = scaled.clip(0, 255).astype(np.uint8)
    return levels


def _of_integers(array: Array, label: str) -> NDArray[np.uint8]:
    if array.dtype != np.uint16:
        low, high = int(array.min()), int(array.max())
        if array.itemsize < 4 or array.shape[2] != 1 or low < 0 or not 255 < high <= 65535:
            raise MediaError(
                f"{label}: {array.dtype} does not say what white is, found levels {low} to {high}; "
                "pass .astype(np.uint8) if they are 0 to 255, .astype(np.uint16) if 0 to 65535"
            )
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _batch_hint(array: Array) -> str:
    if array.ndim == 4:
        return "; a batch stands alone, not in a list: pass it as it is, or list(batch)"
    return ""


def _is_pillow(value: object) -> bool:
    pillow = sys.modules.get("PIL.Image")  # what was never imported made no picture
    return pillow is not None and isinstance(value, pillow.Image)


def _described(value: object) -> str:
    dtype, shape = getattr(value, "dtype", ""), getattr(value, "shape", "")
    return shortened(f"{type(value).__name__} {dtype} {list(shape) if shape else ''}".strip())
