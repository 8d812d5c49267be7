"""Images to the ``pixel_values`` of a vision graph, equal to the original's to the last bit.

A picture is decoded, turned upright, made RGB, brought to S×S, and normalised. Three transforms
bring it to size (docs/model.md, section 7.1); all of them resize with Pillow's antialiased bicubic
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

How pictures are read, and what is refused, stands in `internvl_edge.runtime.images.decode`; how
they are resized where most of the result would be cropped away, in `resize`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvl_edge.errors import ArtifactError, InputError, MediaError, UsageError, shortened
from internvl_edge.files.cores import usable_cores
from internvl_edge.runtime.images.decode import DEFAULTS, ImageSource, load_image
from internvl_edge.runtime.images.options import MEAN, STD, WHOLE_PIXELS, ImageOptions
from internvl_edge.runtime.images.reading import contents
from internvl_edge.runtime.images.resize import cropped, resized
from internvl_edge.runtime.images.sources import (
    MAX_TILES,
    check_normalised,
    image_label,
    image_list,
    is_normalised,
    is_readable,
)
from internvl_edge.types import Array

__all__ = [
    "ImageSource",
    "Preprocessing",
    "Transform",
    "load_image",
    "nearest_levels",
    "normalised",
    "pixel_levels",
    "pixel_values",
    "put_levels",
    "squared",
    "tile",
    "tile_grid",
]

Transform = Literal["retrieval", "classification", "clip"]

TRANSFORMS = get_args(Transform)
MAX_SIZE = 4096  # S
MIN_STD = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """The transform that a model was trained with, and its numbers.

    Raises:
        InputError: a value that no image could be prepared with.
    """

    size: int  # S, of the square that goes in
    mean: tuple[float, float, float] = MEAN  # of R, G, B in 0..1
    std: tuple[float, float, float] = STD
    transform: Transform = "retrieval"

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= MAX_SIZE:
            raise InputError(f"size must be an integer from 1 to {MAX_SIZE}, found {self.size!r}")
        if not (_three(self.mean, -1e3) and _three(self.std, MIN_STD)):
            raise InputError(
                f"mean and std must be three numbers each (R, G, B), std at least {MIN_STD}, "
                f"found {self.mean!r} and {self.std!r}"
            )
        if self.transform not in TRANSFORMS:
            raise InputError(_not_a_transform(self.transform))

    def to_json(self) -> dict[str, Any]:
        """Write a JSON object that `from_json` reads back."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, raw: object) -> Preprocessing:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: not an object, unknown or missing keys, or a value that cannot be.
        """
        known = {field.name for field in fields(cls)}
        if not isinstance(raw, dict) or set(raw) - known or "size" not in raw:
            keys = sorted(map(str, raw)) if isinstance(raw, dict) else raw
            raise ArtifactError(
                f"preprocessing must be an object of {sorted(known)} with at least size, "
                f"found {keys!r}"
            )
        triples = {k: tuple(v) for k, v in raw.items() if isinstance(v, list)}
        try:
            return cls(**raw | triples)
        except InputError as error:
            raise ArtifactError(f"preprocessing: {error}") from error


def pixel_values(
    images: ImageSource | Iterable[ImageSource],
    preprocessing: Preprocessing,
    transform: Transform | None = None,
    *,
    before: int = 0,
    total: int | None = None,
    options: ImageOptions = DEFAULTS,
) -> NDArray[np.float32]:
    """Prepare images as a vision graph takes them: float32 [B, 3, S, S], contiguous.

    Args:
        images: one image or several (`load_image` says of which kinds), an array of several,
            such as uint8 [B, H, W, 3], or an already normalised array float32 [B, 3, S, S],
            which is checked and passed through.
        preprocessing: of the model.
        transform: instead of the model's own.
        before: images of the same request that came before these, for messages.
        total: images of the whole request, for messages; 0 where nobody knows.
        options: how pictures are read.

    Raises:
        MediaError: an image is not accepted; the message says which and why.
        UsageError: there is no such transform.
    """
    transform = preprocessing.transform if transform is None else transform
    if not isinstance(transform, str) or transform not in TRANSFORMS:
        raise UsageError(_not_a_transform(transform))
    given = image_list(images)
    if is_normalised(given):
        return _checked(given, preprocessing)
    levels = pixel_levels(
        given, preprocessing, transform, before=before, total=total, options=options
    )
    return normalised(levels, preprocessing)


def pixel_levels(
    images: ImageSource | Iterable[ImageSource],
    preprocessing: Preprocessing,
    transform: Transform | None = None,
    *,
    before: int = 0,
    total: int | None = None,
    options: ImageOptions = DEFAULTS,
) -> NDArray[np.uint8]:
    """Prepare images at the model's size, not normalised: uint8 [B, 3, S, S], contiguous.

    Several are decoded at once, in as many threads as there are cores; which one is refused, and
    every value, are as of one after the other.

    Args:
        images: as `pixel_values` takes them, without those that are normalised.
        preprocessing: of the model.
        transform: instead of the model's own.
        before: images of the same request that came before these, for messages.
        total: images of the whole request, for messages; 0 where nobody knows.
        options: how pictures are read.

    Raises:
        MediaError: an image is not accepted; the message says which and why.
        UsageError: there is no such transform.
    """
    transform = preprocessing.transform if transform is None else transform
    if not isinstance(transform, str) or transform not in TRANSFORMS:
        raise UsageError(_not_a_transform(transform))
    sources = image_list(images)
    if is_normalised(sources):
        raise MediaError(
            f"expected pictures, found an array {sources.dtype} {list(sources.shape)}, which is "
            "taken for normalised pixel_values; pass list(array) if these are pictures"
        )
    size = preprocessing.size
    count = (len(sources) if total is None else total) or None
    labels = [image_label(source, before + i, count) for i, source in enumerate(sources)]
    # an open file may stand there twice, and be no file that threads can share
    sources = [
        contents(source, label) if _is_open_file(source) else source
        for source, label in zip(sources, labels, strict=True)
    ]
    out = np.empty((len(sources), 3, size, size), np.uint8)

    def prepare(i: int) -> None:
        put_levels(out[i], sources[i], labels[i], transform, options)

    if len(sources) == 1:
        prepare(0)
        return out
    with ThreadPoolExecutor(min(len(sources), usable_cores()), "decode") as pool:
        for done in [pool.submit(prepare, i) for i in range(len(sources))]:
            done.result()
    return out


def put_levels(
    out: NDArray[np.uint8],
    source: ImageSource,
    label: str,
    transform: Transform,
    options: ImageOptions = DEFAULTS,
) -> None:
    """Prepare one image in place, as one of ``pixel_levels``.

    Args:
        out: uint8 [3, S, S].
        source: as `load_image` takes it.
        label: how messages name it.
        transform: of the model.
        options: how pictures are read.

    Raises:
        MediaError: the image is not accepted.
    """
    picture = load_image(source, label, options)
    size = out.shape[-1]
    if picture.size != (size, size):  # of which every transform gives what it was given
        picture = _fit(picture, size, transform)
    out[...] = np.frombuffer(picture.tobytes(), np.uint8).reshape(size, size, 3).transpose(2, 0, 1)


def normalised(levels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Normalise levels to ``pixel_values``, both [B, 3, S, S]."""
    mean, std = (
        np.array(values, np.float32)[:, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    out = np.divide(levels, np.float32(255), dtype=np.float32)
    np.subtract(out, mean, out=out)
    np.divide(out, std, out=out)
    return out


def nearest_levels(pixels: NDArray[np.float32], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Find the levels nearest to ``pixel_values``: exactly those that ``normalised`` was given."""
    mean, std = (
        np.array(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
    )
    levels: NDArray[np.uint8] = np.clip(np.rint((pixels * std + mean) * 255), 0, 255).astype(
        np.uint8
    )
    return levels


def tile(
    image: ImageSource,
    size: int,
    min_num: int = 1,
    max_num: int = 12,
    use_thumbnail: bool = True,
    options: ImageOptions = DEFAULTS,
) -> list[Image.Image]:
    """Cut an image into tiles of S×S, for chat models that look closely.

    The image is stretched to the grid whose aspect is nearest to its own and cut row by row;
    more than one tile are followed by the whole image at S×S (``use_thumbnail``).

    Args:
        image: as `load_image` takes it.
        size: S.
        min_num: the fewest tiles, without the thumbnail.
        max_num: the most.
        use_thumbnail: whether the whole image comes last.
        options: how the image is read.

    Raises:
        UsageError: the number of tiles or their size cannot be.
        MediaError: the image is not accepted, or would become too large.
    """
    if not (1 <= min_num <= max_num <= MAX_TILES and 1 <= size <= MAX_SIZE):
        raise UsageError(
            f"expected 1 <= min_num <= max_num <= {MAX_TILES} and 1 <= size <= {MAX_SIZE}, "
            f"found min_num {min_num}, max_num {max_num}, size {size}"
        )
    label = image_label(image)
    picture = load_image(image, label, options)
    columns, rows = tile_grid(picture.size, size, min_num, max_num)
    shape = size * columns, size * rows
    if math.prod(shape) > WHOLE_PIXELS:
        raise MediaError(
            f"{label}: {picture.width}x{picture.height} would be resized to {shape[0]}x{shape[1]}, "
            f"at most {WHOLE_PIXELS} pixels are accepted; crop it"
        )
    stretched = resized(picture, shape)
    tiles = [
        stretched.crop((x, y, x + size, y + size))
        for y in range(0, size * rows, size)
        for x in range(0, size * columns, size)
    ]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(resized(picture, (size, size)))
    return tiles


def squared(picture: Image.Image, mean: tuple[float, float, float]) -> Image.Image:
    """Pad a picture to a square of the mean colour, itself in the middle, as LLaVA does."""
    side = max(picture.size)
    if picture.size == (side, side):
        return picture
    if side * side > WHOLE_PIXELS:
        raise MediaError(
            f"{image_label(picture)}: padded to a square it has more than {WHOLE_PIXELS} pixels; "
            "crop it"
        )
    colour = tuple(int(255 * value) for value in mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def tile_grid(shape: tuple[int, int], size: int, min_num: int, max_num: int) -> tuple[int, int]:
    """Choose the (columns, rows) whose aspect is nearest to that of (width, height).

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


def _checked(array: Array, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Check ``pixel_values`` of a caller; return them, contiguous."""
    size = preprocessing.size
    if array.dtype != np.float32 or array.shape[1:] != (3, size, size) or not len(array):
        raise MediaError(
            f"expected images as uint8 [H, W, 3] or normalised float32 [B, 3, {size}, {size}], "
            f"found an array {array.dtype} {list(array.shape)}; pass list(array) if these are "
            "pictures with levels from 0 to 1, .astype(np.float32) if they are normalised"
        )
    check_normalised(array, preprocessing.mean, preprocessing.std)
    return np.ascontiguousarray(array)


def _fit(image: Image.Image, size: int, transform: Transform) -> Image.Image:
    if transform == "retrieval":
        return resized(image, (size, size))
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    halve = round if transform == "classification" else math.floor  # round: half to even
    left, top = halve((width - size) / 2), halve((height - size) / 2)
    return cropped(image, (width, height), (left, top, left + size, top + size))


def _is_open_file(source: object) -> bool:
    return is_readable(source) and not isinstance(source, str | os.PathLike | Image.Image)


def _three(values: object, lowest: float) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) == 3
        and all(isinstance(v, int | float) and lowest <= v <= 1e3 for v in values)
    )


def _not_a_transform(name: object) -> str:
    return f"transform must be one of {', '.join(TRANSFORMS)}, found {shortened(name)}"
