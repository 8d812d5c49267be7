"""One image, from whatever it is handed over as to upright RGB pixels.

What arrives here comes from strangers. Only JPEG, PNG and WebP are decoded, chosen by their first
bytes, and by Pillow's own classes for them: `Image.open`, also where it is given these formats, has
a guard against decompression bombs that warns of some sizes where ours is an error. Sizes are
checked before anything is decompressed. No decoder ever warns: silencing warnings is not safe in
threads, so what could make Pillow warn does not reach it.

Two deviations from the original, which opens files with Pillow's defaults: the EXIF orientation is
applied (a phone's photograph is otherwise seen lying on its side), and 16-bit greyscale is refused
(it would be clipped to white).
"""

from __future__ import annotations

import io
import os
import stat
import struct
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from internvl_edge.errors import MediaError, ResourceError
from internvl_edge.types import Array

ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | Array
)

MAX_NBYTES = 64 << 20  # of a file
MAX_PIXELS = 50_000_000  # of a picture
# Where a flag does not exist, nothing needs it.
READ_FLAGS = os.O_RDONLY | sum(
    getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
)
ACCEPTED = "a path, bytes, a PIL image or an array uint8 [H, W, 3]"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf")
ORIENTATION_TAG = 0x0112
UPRIGHT = {  # EXIF orientation → what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource, label: str | None = None) -> Image.Image:
    """Decode one image: upright, RGB, at its own size.

    Args:
        source: the path of a JPEG, PNG or WebP file, its bytes, a PIL image of any format, or an
            array uint8 [H, W, 3]. Greyscale, palette, CMYK and 16-bit colour become RGB;
            transparency is dropped, not composited, as the original does; of an animation
            the first frame counts.
        label: how messages name it.

    Raises:
        MediaError: it is none of these, too large, truncated or corrupt.
        ResourceError: it does not fit into memory.
    """
    label = image_label(source) if label is None else label
    if isinstance(source, np.ndarray):
        return _image_from_array(source, label)
    if isinstance(source, str | os.PathLike):
        source = _read(source, label)
    if isinstance(source, bytes | bytearray | memoryview):
        source = _open(bytes(source), label)
    if not isinstance(source, Image.Image):
        raise MediaError(f"{label}: expected {ACCEPTED}")
    _check_shape(source.width, source.height, label)
    if source.mode not in MODES:
        raise MediaError(
            f"{label}: expected 8-bit pixels, found mode {source.mode}; convert it to RGB first"
        )
    return _decoding(_upright_rgb, source, label)


def image_size(data: bytes, label: str | None = None) -> tuple[int, int]:
    """Read the width and height of a JPEG, PNG or WebP file; no pixel is decompressed.

    Args:
        data: the file.
        label: how messages name it.

    Raises:
        MediaError: it is none of these, or broken as far as was read.
    """
    return _open(data, image_label(data) if label is None else label).size


def image_label(source: object, index: int = 0, count: int = 1) -> str:
    """Name an image for messages: what it is, and which of several."""
    if isinstance(source, str | os.PathLike):
        what = str(os.fspath(source))
    elif isinstance(source, bytes | bytearray | memoryview):
        what = f"bytes, {len(source)} bytes"
    elif isinstance(source, np.ndarray):
        what = f"array, {source.dtype} {list(source.shape)}"
    elif isinstance(source, Image.Image):
        what = f"PIL image, {source.mode} {source.width}x{source.height}"
    else:
        what = type(source).__name__
    return f"image {index + 1} of {count} ({what})" if count > 1 else f"image ({what})"


def _read(path: str | os.PathLike[str], label: str) -> bytes:
    """Read a regular file; a FIFO or a device is refused without waiting for it."""
    try:
        handle = os.open(path, READ_FLAGS)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise MediaError(f"{label}: expected an image file, found something else")
            with open(handle, "rb", closefd=False) as file:
                return file.read(MAX_NBYTES + 1)
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise MediaError(f"{label}: the image cannot be read: {reason}") from error


def _open(data: bytes, label: str) -> Image.Image:
    """Parse the header; nothing is decompressed yet."""
    if len(data) > MAX_NBYTES:
        raise MediaError(f"{label}: at most {MAX_NBYTES} bytes are accepted, found more")
    if data.startswith(b"\xff\xd8\xff"):
        return _decoding(_Jpeg, io.BytesIO(data), label)
    if data.startswith(PNG_MAGIC):
        return _decoding(PngImageFile, io.BytesIO(_png_picture(data, label)), label)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _decoding(WebPImageFile, io.BytesIO(data), label)
    told = f"a file that starts with {data[:12]!r}" if data else "an empty file"
    raise MediaError(f"{label}: expected a JPEG, PNG or WebP image, found {told}")


def _decoding(step: Any, source: Any, label: str) -> Image.Image:
    try:
        image: Image.Image = step(source)
    except MemoryError as error:
        raise ResourceError(f"{label}: not enough memory to decode it") from error
    except Exception as error:  # on corrupt data Pillow raises whatever its parsers run into
        reason = str(error) or type(error).__name__
        raise MediaError(f"{label}: the image is truncated or corrupt: {reason}") from error
    return image


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Decides no pixel, and warns of every oddity in the EXIF block."""


def _png_picture(data: bytes, label: str) -> bytearray:
    """Keep the chunks that make the picture, and its orientation.

    The others are text and profiles to unpack, and animation, of which Pillow warns when broken.
    """
    kept, at = bytearray(PNG_MAGIC), len(PNG_MAGIC)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end <= len(data) and kind in PNG_CHUNKS:
            kept += data[at:end]
        if kind == b"IEND":
            return kept
        at = end
    raise MediaError(f"{label}: the image is truncated: a PNG that ends before its last chunk")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    orientation = _orientation(image.info.get("exif"))
    if image.mode in ("P", "PA"):  # straight to RGB, Pillow warns of some kinds of transparency
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if orientation == 1 else image.transpose(UPRIGHT[orientation])


def _orientation(exif: object) -> int:
    """Read the orientation, 1 to 8, of an EXIF block; 1 where there is none or it is broken.

    `ImageOps.exif_transpose` would do, but that Pillow's parser warns of broken blocks or raises.
    """
    tiff = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}4xI", tiff)
        (count,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(count):
            at = directory + 2 + 12 * entry
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, at)
            if tag == ORIENTATION_TAG:
                return value if value in UPRIGHT else 1
    except struct.error:
        pass
    return 1


def _image_from_array(array: Array, label: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise MediaError(f"{label}: expected uint8 [H, W, 3] in RGB; repeat a grey channel thrice")
    _check_shape(array.shape[1], array.shape[0], label)
    return Image.fromarray(np.ascontiguousarray(array))


def _check_shape(width: int, height: int, label: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise MediaError(f"{label}: expected 1 to {MAX_PIXELS} pixels, found {width}x{height}")
