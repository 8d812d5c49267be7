"""Images to the ``pixel_values`` of a vision graph, equal to the original's to the last bit.

A picture is decoded, turned upright, made RGB, brought to S×S, and normalised. Three transforms
bring it to size (internvl-spec section 4); all of them resize with Pillow's antialiased bicubic
filter, on 8-bit values:

    retrieval        resize to S×S, whatever the aspect        also captioning
    classification   shorter side to S, centre crop            as torchvision
    clip             shorter side to S, centre crop            as CLIPImageProcessor

The longer side becomes trunc(S · long / short). The last two differ in the crop alone: for an odd
excess, torchvision rounds excess/2 half to even, the processor rounds it down, and one column of
offset is worth up to 1.0 in normalised units. Each is what some published number was made with.

    y = (x / 255 - mean) / std           every operation in float32, in this order

is torchvision's arithmetic (ToTensor, Normalize). The processor multiplies by 1/255 in float64
before it rounds to float32; for the 256 values that exist, both give the same float32.

Two deviations from the original, which opens files with Pillow's defaults: the EXIF orientation is
applied (a photograph of a phone is otherwise seen lying on its side), and 16-bit greyscale is
refused (it would be clipped to white).

What arrives here comes from strangers. Only JPEG, PNG and WebP are decoded, chosen by their first
bytes, and by Pillow's own classes for them: `Image.open` tries more formats, and its guard against
decompression bombs is a warning where ours is an error. Sizes are checked before anything is
decompressed. No decoder ever warns: silencing warnings is not safe in threads, so what could make
Pillow warn does not reach it.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from internvl_edge.errors import ArtifactError, InputError, MediaError, ResourceError, UsageError

ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[Any]
)
Transform = Literal["retrieval", "classification", "clip"]

MAX_NBYTES = 64 << 20  # of an image file
MAX_PIXELS = 50_000_000  # of a picture, as given and after resizing
MAX_SIZE = 8192  # S
ACCEPTED = "a path, bytes, a PIL image or an array uint8 [H, W, 3]"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
UPRIGHT = {  # EXIF orientation → what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """How a model wants its images.

    Raises:
        InputError: a value that no image could be prepared with.
    """

    size: int  # S, of the square that goes in
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of R, G, B in 0..1: ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    transform: Transform = "retrieval"

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= MAX_SIZE:
            raise InputError(f"size must be an integer from 1 to {MAX_SIZE}, found {self.size!r}")
        if not (_three_numbers(self.mean) and _three_numbers(self.std) and min(self.std) > 0):
            raise InputError(
                "mean and std must be three finite numbers each (R, G, B) and std positive, "
                f"found {self.mean!r} and {self.std!r}"
            )
        if self.transform not in get_args(Transform):
            raise InputError(_not_a_transform(self.transform))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, raw: object) -> Preprocessing:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: not an object, unknown or missing keys, or a value that cannot be.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(raw, dict) or set(raw) - known or "size" not in raw:
            found = sorted(map(str, raw)) if isinstance(raw, dict) else raw
            raise ArtifactError(
                f"preprocessing must be an object of {sorted(known)}, size required; found {found!r}"
            )
        triples = {k: tuple(v) for k, v in raw.items() if isinstance(v, list)}
        try:
            return cls(**raw | triples)
        except InputError as error:
            raise ArtifactError(f"preprocessing: {error}") from error


def load_image(source: ImageSource) -> Image.Image:
    """Decode one image: upright, RGB, at its own size.

    Args:
        source: the path of a JPEG, PNG or WebP file, its bytes, a PIL image of any format, or an
            array uint8 [H, W, 3]. Greyscale, palette, CMYK and 16-bit colour become RGB;
            transparency is dropped, not composited, as the original does; of an animation
            the first frame counts.

    Raises:
        MediaError: it is none of these, too large, truncated or corrupt.
        ResourceError: it does not fit into memory.
    """
    return _load(source, _label(source))


def pixel_values(
    images: ImageSource | Iterable[ImageSource],
    preprocessing: Preprocessing,
    transform: Transform | None = None,
) -> NDArray[np.float32]:
    """Images as a vision graph takes them: float32 [B, 3, S, S], contiguous.

    Args:
        images: one image or several (`load_image` says of which kinds), an array uint8
            [B, H, W, 3], or an already normalised array float32 [B, 3, S, S], which is
            checked and passed through.
        preprocessing: of the model.
        transform: instead of the model's own.

    Raises:
        MediaError: an image is not accepted; the message says which and why.
        UsageError: there is no such transform.
    """
    transform = preprocessing.transform if transform is None else transform
    if transform not in get_args(Transform):
        raise UsageError(_not_a_transform(transform))
    size = preprocessing.size
    if isinstance(images, np.ndarray) and images.dtype != np.uint8:
        return _normalised(images, size)
    sources = _sources(images)
    mean, std = (
        np.array(values, np.float32)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    out = np.empty((len(sources), 3, size, size), np.float32)
    for i, source in enumerate(sources):
        label = _label(source, i, len(sources))
        picture = _fit(_load(source, label), size, transform, label)
        levels = np.asarray(picture).transpose(2, 0, 1)  # (3, S, S)
        np.divide(levels, np.float32(255), out=out[i])
        np.subtract(out[i], mean, out=out[i])
        np.divide(out[i], std, out=out[i])
    return out


def tile(
    image: Image.Image,
    size: int,
    min_num: int = 1,
    max_num: int = 12,
    use_thumbnail: bool = True,
) -> list[Image.Image]:
    """Cut an image into tiles of S×S, for chat models that look closely.

    The image is stretched to the grid whose aspect is nearest to its own and cut row by row;
    more than one tile are followed by the whole image at S×S (``use_thumbnail``).

    Args:
        image: RGB, as `load_image` returns it.
        size: S.
        min_num: the fewest tiles, without the thumbnail.
        max_num: the most.
        use_thumbnail: whether the whole image comes last.

    Raises:
        UsageError: ``1 <= min_num <= max_num`` does not hold.
        MediaError: the stretched image would be too large.
    """
    if not 1 <= min_num <= max_num:
        raise UsageError(f"1 <= min_num <= max_num must hold, found {min_num} and {max_num}")
    columns, rows = tile_grid(image.size, size, min_num, max_num)
    stretched = _resize(image, (size * columns, size * rows), "image to tile")
    tiles = [
        stretched.crop((x, y, x + size, y + size))
        for y in range(0, size * rows, size)
        for x in range(0, size * columns, size)
    ]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(_resize(image, (size, size), "image to tile"))
    return tiles


def tile_grid(shape: tuple[int, int], size: int, min_num: int, max_num: int) -> tuple[int, int]:
    """The (columns, rows) whose aspect is nearest to that of (width, height).

    Grids are compared from few tiles to many. Among equally near ones, a later grid wins if the
    image has more than half its pixels: small images are not blown up. The original compares
    grids of as many tiles in no defined order; that decides nothing with ``min_num`` 1.
    """
    width, height = shape
    grids = (
        (columns, count // columns)
        for count in range(min_num, max_num + 1)
        for columns in range(1, count + 1)
        if count % columns == 0
    )
    best, nearest = (1, 1), math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        roomy = width * height > 0.5 * size * size * columns * rows
        if distance < nearest or (distance == nearest and roomy):
            best, nearest = (columns, rows), distance
    return best


def _fit(image: Image.Image, size: int, transform: Transform, label: str) -> Image.Image:
    if transform == "retrieval":
        return _resize(image, (size, size), label)
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    resized = _resize(image, (width, height), label)
    halve = round if transform == "classification" else math.floor  # round: half to even
    left, top = halve((width - size) / 2), halve((height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


def _resize(image: Image.Image, shape: tuple[int, int], label: str) -> Image.Image:
    if math.prod(shape) > MAX_PIXELS:
        raise MediaError(
            f"{label}: {image.width}x{image.height} would be resized to {shape[0]}x{shape[1]}, at "
            f"most {MAX_PIXELS} pixels are accepted; crop it"
        )
    return image.resize(shape, Image.Resampling.BICUBIC)


def _sources(images: ImageSource | Iterable[ImageSource]) -> list[ImageSource]:
    """One image or several, as a list."""
    single = str | os.PathLike | bytes | bytearray | memoryview | Image.Image
    if isinstance(images, single) or (isinstance(images, np.ndarray) and images.ndim != 4):
        return [images]
    if not isinstance(images, Iterable):
        raise MediaError(f"expected {ACCEPTED}, or several; found {type(images).__name__}")
    sources = list(images)
    if not sources:
        raise MediaError("expected at least one image, found none")
    return sources


def _normalised(array: NDArray[Any], size: int) -> NDArray[np.float32]:
    if array.dtype != np.float32 or array.shape[1:] != (3, size, size) or not len(array):
        raise MediaError(
            f"expected images as uint8 [H, W, 3] or normalised float32 [B, 3, {size}, {size}], "
            f"found an array {array.dtype} {list(array.shape)}"
        )
    if not np.isfinite(array).all():
        raise MediaError("normalised images must be finite, found NaN or infinity")
    return np.ascontiguousarray(array)


def _load(source: object, label: str) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _image_from_array(source, label)
    if isinstance(source, str | os.PathLike):
        source = _read(source, label)
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) > MAX_NBYTES:
            raise MediaError(f"{label}: at most {MAX_NBYTES} bytes are accepted")
        source = _open(bytes(source), label)
    if not isinstance(source, Image.Image):
        raise MediaError(f"{label}: expected {ACCEPTED}")
    _check_shape(source.width, source.height, label)
    if source.mode not in MODES:
        raise MediaError(
            f"{label}: pixels of mode {source.mode} do not fit into 8 bits; convert it to RGB first"
        )
    return _decoding(_rgb, source, label)


def _read(path: str | os.PathLike[str], label: str) -> bytes:
    """The bytes of a regular file; a FIFO or a device is refused without waiting for it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise MediaError(f"{label}: expected an image file, found something else")
            return file.read(MAX_NBYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{label}: the image cannot be read: {reason}") from error


def _open(data: bytes, label: str) -> Image.Image:
    """Parse the header; nothing is decompressed yet."""
    if data.startswith(b"\xff\xd8\xff"):
        return _decoding(_Jpeg, io.BytesIO(data), label)
    if data.startswith(PNG_MAGIC):
        return _decoding(PngImageFile, io.BytesIO(_png_picture(data, label)), label)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _decoding(WebPImageFile, io.BytesIO(data), label)
    found = f"a file that starts with {data[:12]!r}" if data else "an empty file"
    raise MediaError(f"{label}: expected a JPEG, PNG or WebP image, found {found}")


def _decoding(step: Any, source: Any, label: str) -> Image.Image:
    try:
        image: Image.Image = step(source)
    except MemoryError as error:
        raise ResourceError(f"{label}: not enough memory to decode it") from error
    except Exception as error:  # on corrupt data Pillow raises whatever its parsers run into
        raise MediaError(f"{label}: the image is truncated or corrupt: {error}") from error
    return image


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Decides no pixel, and warns of every oddity in the EXIF block."""


def _png_picture(data: bytes, label: str) -> bytes:
    """The chunks that make the picture, and its orientation.

    The others are text and profiles to unpack, and animation, of which Pillow warns when broken.
    """
    kept, at = [PNG_MAGIC], len(PNG_MAGIC)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end <= len(data) and (kind[:1].isupper() or kind == b"eXIf"):
            kept.append(data[at:end])
        if kind == b"IEND":
            return b"".join(kept)
        at = end
    raise MediaError(f"{label}: the PNG is truncated: it ends before its last chunk")


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    orientation = _orientation(image.info.get("exif"))
    if image.mode in ("P", "PA"):  # straight to RGB, Pillow warns of some kinds of transparency
        image = image.convert("RGBA")
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if orientation == 1 else image.transpose(UPRIGHT[orientation])


def _orientation(exif: object) -> int:
    """The orientation, 1 to 8, in an EXIF block; 1 where there is none or the block is broken."""
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
            if tag == 0x0112:
                return value if value in UPRIGHT else 1
    except struct.error:
        pass
    return 1


def _image_from_array(array: NDArray[Any], label: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise MediaError(f"{label}: expected uint8 [H, W, 3] in RGB; repeat a grey channel thrice")
    _check_shape(array.shape[1], array.shape[0], label)
    return Image.fromarray(np.ascontiguousarray(array))


def _check_shape(width: int, height: int, label: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise MediaError(f"{label}: expected 1 to {MAX_PIXELS} pixels, found {width}x{height}")


def _label(source: object, index: int = 0, count: int = 1) -> str:
    """How messages name an image."""
    if isinstance(source, str | os.PathLike):
        what = os.fspath(source)
    elif isinstance(source, bytes | bytearray | memoryview):
        what = f"bytes, {len(source)} bytes"
    elif isinstance(source, np.ndarray):
        what = f"array, {source.dtype} {list(source.shape)}"
    elif isinstance(source, Image.Image):
        what = f"PIL image, {source.mode} {source.width}x{source.height}"
    else:
        what = type(source).__name__
    return f"image {index + 1} of {count} ({what})" if count > 1 else f"image ({what})"


def _three_numbers(values: object) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == 3
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
    )


def _not_a_transform(found: object) -> str:
    return f"transform must be one of {', '.join(get_args(Transform))}, found {found!r}"
