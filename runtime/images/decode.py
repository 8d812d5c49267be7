"""One image, from whatever it is handed over as to upright RGB pixels.

What arrives here comes from strangers. Only JPEG, PNG and WebP are decoded, chosen by their first
bytes, and by Pillow's own classes for them: `Image.open`, also where it is given these formats, has
a guard against decompression bombs that warns of some sizes where ours is an error. Sizes are
checked before anything is decompressed, and how often a JPEG's scans go through its pixels. No
decoder ever warns: silencing warnings is not safe in threads, so what could make Pillow warn does
not reach it.

Deviations from the original, which opens files with Pillow's defaults:

    orientation    that of EXIF is applied: a phone's photograph is otherwise seen lying on its side
    transparency   a colour stands under it (``ImageOptions.background``); the original shows
                   whatever colour is stored there, mostly black
    grey, 16 bits  v / 257; the original clips all but the darkest levels to white
    large JPEGs    beyond what is decoded whole (``ImageOptions.max_megapixels``), libjpeg decodes
                   them at a half, a quarter or an eighth: memory stays bounded, and the pixels are
                   near those of the whole picture, not equal to them
"""

from __future__ import annotations

import io
import logging
import os
import struct
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from internvl_edge.errors import MediaError, ResourceError
from internvl_edge.runtime.images.arrays import (
    as_array,
    is_array_like,
    picture_levels,
    require_certain_white,
)
from internvl_edge.runtime.images.formats import (
    FORMATS,
    JPEG,
    PNG,
    PNG_MAGIC,
    FileFormat,
    count_scans,
    format_of,
    other_format,
)
from internvl_edge.runtime.images.options import ImageOptions
from internvl_edge.runtime.images.reading import MAX_NBYTES, contents
from internvl_edge.runtime.images.sources import ACCEPTED, image_label, is_readable, kind_problem
from internvl_edge.types import Array

__all__ = ["MAX_NBYTES", "ImageSource", "image_size", "load_image"]

ImageSource: TypeAlias = Any  # what ``load_image`` takes; other libraries' types among them

MAX_SIDE = 65_535  # of a picture, the longest that JPEG has
MAX_SCANS = 64  # of a JPEG; the most thorough encoders write 20
SCALES = (1, 2, 4, 8)  # at which libjpeg decodes: 1/s of each side
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", *TRANSPARENT)
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than 8 bits of grey
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")
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
DEFAULTS = ImageOptions()

logger = logging.getLogger(__name__)


def load_image(
    source: ImageSource, label: str | None = None, options: ImageOptions = DEFAULTS
) -> Image.Image:
    """Decode one image: upright, RGB, at its own size.

    Args:
        source: a JPEG, PNG or WebP file as a path, a ``data:`` URL, bytes or an open file; a PIL
            image of any format; or an array or tensor (``arrays`` says of which kinds). Greyscale,
            palette, CMYK and 16 bits become RGB; of an animation the first frame counts.
        label: how messages name it.
        options: what stands under transparency, and how large the picture may be.

    Raises:
        MediaError: it is none of these, too large, truncated or corrupt.
        ResourceError: it does not fit into memory.
    """
    label = image_label(source) if label is None else label
    if is_array_like(source):
        array = _array_of(source, label)
        return _decoding(lambda _: _from_array(array, label, options), source, label)
    if not isinstance(source, bytes | bytearray | memoryview | Image.Image):
        is_path = isinstance(source, str | os.PathLike)
        if not is_path and not is_readable(source):
            raise MediaError(f"{label}: expected {ACCEPTED}, found {kind_problem(source)}")
        source = contents(source, label)
    if not isinstance(source, Image.Image):
        source = _open(bytes(source), label, options)
    _check_shape(source.width, source.height, options.largest_pixels, "", label)
    if source.mode not in (*MODES, *DEEP):
        raise MediaError(
            f"{label}: expected grey, RGB, CMYK or YCbCr pixels, found mode {source.mode}; pass "
            "image.convert('RGB') if Pillow has that conversion"
        )
    return _decoding(lambda image: _upright_rgb(image, label, options), source, label)


def image_size(data: bytes, label: str | None = None) -> tuple[int, int]:
    """Read the width and height of a JPEG, PNG or WebP file; no pixel is decompressed.

    Args:
        data: the file.
        label: how messages name it.

    Raises:
        MediaError: it is none of these, or broken as far as was read.
    """
    return _header(data, image_label(data) if label is None else label)[1].size


def _header(data: bytes, label: str) -> tuple[FileFormat, Image.Image]:
    """Parse the header; nothing is decompressed yet."""
    kind = format_of(data)
    if kind is None:
        names = ", ".join(known.name for known in FORMATS[:-1])
        raise MediaError(
            f"{label}: expected a {names} or {FORMATS[-1].name} image, found {other_format(data)}"
        )
    if kind is PNG:
        return kind, _decoding(PngImageFile, io.BytesIO(_png_picture(data, label)), label)
    decoder: Any = _Jpeg if kind is JPEG else WebPImageFile
    return kind, _decoding(decoder, io.BytesIO(data), label)


def _open(data: bytes, label: str, options: ImageOptions) -> Image.Image:
    """Parse the header, and refuse what would cost too much; nothing is decompressed yet."""
    kind, image = _header(data, label)
    if isinstance(image, JpegImageFile):
        return _scaled_jpeg(data, image, label, options)
    _check_shape(*image.size, options.whole_pixels, kind.name, label)
    return image


def _scaled_jpeg(
    data: bytes, image: JpegImageFile, label: str, options: ImageOptions
) -> Image.Image:
    """Set the scale at which a JPEG will be decoded."""
    if (scans := count_scans(data)) > MAX_SCANS:
        raise MediaError(
            f"{label}: expected a JPEG of at most {MAX_SCANS} scans, found {scans}; save it anew"
        )
    width, height = image.size
    if "progressive" in image.info:  # whose coefficients are all in memory, whatever the scale
        _check_shape(width, height, options.whole_pixels, "progressive JPEG", label)
        return image
    _check_shape(width, height, options.largest_pixels, "JPEG", label)
    scale = next((s for s in SCALES if width * height <= s * s * options.whole_pixels), SCALES[-1])
    if scale > 1:
        image.draft(None, (max(width // scale, 1), max(height // scale, 1)))
        logger.info("%s: %dx%d is decoded at 1/%d of each side", label, width, height, scale)
    return image


def _decoding(step: Any, source: Any, label: str) -> Image.Image:
    try:
        image: Image.Image = step(source)
    except MemoryError as error:
        raise ResourceError(f"{label}: not enough memory to decode it") from error
    except MediaError:
        raise
    except Exception as error:  # on corrupt data Pillow raises whatever its parsers run into
        reason = str(error) or type(error).__name__
        raise MediaError(f"{label}: the image is truncated or corrupt: {reason}") from error
    return image


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Decides no pixel, and warns of every oddity in the EXIF block."""


def _png_picture(data: bytes, label: str) -> bytes:
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
            return bytes(kept)
        at = end
    raise MediaError(f"{label}: the image is truncated: a PNG that ends before its last chunk")


def _upright_rgb(image: Image.Image, label: str, options: ImageOptions) -> Image.Image:
    image.load()
    orientation = _orientation(image.info.get("exif"))
    if image.mode in DEEP:
        image = Image.fromarray(picture_levels(np.asarray(image), label)[:, :, 0])
    rgb = _flattened(image, options.colour)
    return rgb if orientation == 1 else rgb.transpose(UPRIGHT[orientation])


def _flattened(image: Image.Image, colour: tuple[int, int, int] | None) -> Image.Image:
    """Make a picture RGB, with a colour under what is transparent."""
    if image.mode == "P" or _is_transparent(image):  # Pillow warns of some palettes otherwise
        # Pillow has no other conversion of grey that is multiplied by its alpha already
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        alpha = image.getchannel("A")
        if colour is not None and alpha.getextrema() != (255, 255):
            canvas = Image.new("RGB", image.size, colour)
            canvas.paste(image, mask=alpha)
            return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    """Tell whether a picture has an alpha channel, or one level that is transparent."""
    if image.mode in TRANSPARENT:
        return True
    level = image.info.get("transparency")
    if image.mode == "RGB":
        return (
            isinstance(level, tuple)
            and len(level) == 3
            and all(type(value) is int and 0 <= value <= 255 for value in level)
        )
    return image.mode in ("1", "L") and type(level) is int and 0 <= level <= 255


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


def _array_of(source: Any, label: str) -> Array:
    try:
        return as_array(source)
    except MediaError as error:
        raise MediaError(f"{label}: {error}") from error


def _from_array(array: Array, label: str, options: ImageOptions) -> Image.Image:
    if array.ndim in (2, 3):  # whichever dimension the channels are
        width, height = sorted(array.shape, reverse=True)[:2]
        _check_shape(width, height, options.largest_pixels, "", label)
    require_certain_white(array, label)
    levels = picture_levels(array, label)
    picture = levels[:, :, 0] if levels.shape[2] == 1 else levels
    return _flattened(Image.fromarray(np.ascontiguousarray(picture)), options.colour)


def _check_shape(width: int, height: int, most: int, kind: str, label: str) -> None:
    if not 0 < width * height <= most:
        raise MediaError(
            f"{label}: expected 1 to {most} pixels{f' of a {kind}' if kind else ''}, found "
            f"{width}x{height}; shrink it, or raise max_megapixels (ImageOptions, --max-megapixels)"
        )
    if max(width, height) > MAX_SIDE:
        raise MediaError(
            f"{label}: expected sides of at most {MAX_SIDE} pixels, found {width}x{height}; crop it"
        )
