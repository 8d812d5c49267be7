"""Images as callers hand them over: one, several, a stream of them, or ``pixel_values``.

Says what it was given before Pillow is needed: a model that is only asked with ``pixel_values``
never imports it. What is no image, and no collection of them, is refused by its type's name: a
mapping iterates over its keys, and a set in no order.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np

from internvl_edge.errors import MediaError, shortened
from internvl_edge.runtime.images.arrays import as_array, is_array_like
from internvl_edge.types import Array

__all__ = [
    "ACCEPTED",
    "MAX_TILES",
    "Stream",
    "batches_of_images",
    "check_normalised",
    "image_label",
    "image_list",
    "image_stream",
    "is_normalised",
    "is_readable",
    "kind_problem",
    "require_side",
]

ACCEPTED = "a path, bytes, an open file, a PIL image or an array uint8 [H, W, 3]"
MAX_SHOWN = 100  # characters of a path
MAX_TILES = 40  # of an image, its thumbnail not counted: the most that any published model reads
MARGIN = 2.0  # how far pixel_values may be from 0, in black's or white's distance


def is_normalised(images: Any) -> bool:
    """Tell ``pixel_values``, which are normalised already, from pictures: float [B, 3, H, W]."""
    return (
        isinstance(images, np.ndarray)
        and images.ndim == 4
        and images.dtype.kind == "f"
        and images.shape[1] == 3
    )


def check_normalised(pixels: Array, mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse ``pixel_values`` that no picture gives, and warn of those that look like levels.

    Noise has its place in tests and in attacks, so that as much again as black or white is taken.

    Raises:
        MediaError: NaN, infinity, or values beyond.
    """
    low, high = float(pixels.min()), float(pixels.max())  # NaN where there is any
    if not np.isfinite((low, high)).all():
        raise MediaError("normalised images must be finite, found NaN or infinity")
    most = MARGIN * max(max(m / s, (1 - m) / s) for m, s in zip(mean, std, strict=True))
    if max(-low, high) > most:
        raise MediaError(
            f"normalised images: expected values within ±{most:.3g}, found {low:.4g} to "
            f"{high:.4g}: these are not normalised; pass pictures as uint8 [B, H, W, 3], or "
            "normalise by (x / 255 - mean) / std"
        )
    if 0 <= low < high <= 1:
        warnings.warn(
            "float32 [B, 3, S, S] is taken as normalised pixel_values, and these all lie in 0 to "
            "1, as levels do that are not normalised: pass list(array) if they are pictures",
            stacklevel=2,
        )


def require_side(pixels: Array, side: int | None) -> None:
    """Refuse ``pixel_values`` [B,3,H,W] of another size than the graphs take.

    Raises:
        MediaError: they are most often pictures that are to be resized.
    """
    if side is not None and pixels.shape[2:] != (side, side):
        raise MediaError(
            f"a float array [B, 3, H, W] is taken as normalised pixel_values: expected "
            f"[B, 3, {side}, {side}], found {list(pixels.shape)}; pass list(array) if they are "
            "pictures with levels from 0 to 1, which are resized"
        )


def image_list(images: Any) -> Any:
    """Return one image or several as a list, and normalised ``pixel_values`` as they are.

    Raises:
        MediaError: none, or nothing that could be images.
    """
    given = image_stream(images)
    return list(given) if isinstance(given, Stream) else given


def image_stream(images: Any) -> Any:
    """Return images as ``image_list``, but those that come one by one as a ``Stream``.

    Raises:
        MediaError: none, or nothing that could be images.
    """
    if isinstance(images, Stream):
        return images
    if is_array_like(images):
        return _of_array(as_array(images))
    if _is_one(images):
        return [images]
    _require_collection(images)
    if isinstance(images, list | tuple):
        if not images:
            raise MediaError("expected at least one image, found none")
        return list(images)
    return Stream(images)


class Stream:
    """Images that are taken as they are needed, from a generator or another library's dataset."""

    def __init__(self, images: Iterable[Any]) -> None:
        self._images = iter(images)
        self.total = len(images) if isinstance(images, Sized) else None
        first = list(itertools.islice(self._images, 1))
        if not first:
            raise MediaError("expected at least one image, found none")
        self._images = itertools.chain(first, self._images)

    def __iter__(self) -> Iterator[Any]:
        return self._images


def batches_of_images(images: Any, size: int) -> Iterator[tuple[Any, int, int | None]]:
    """Yield images in batches of ``size``: them, how many came before, how many there are."""
    if not isinstance(images, Stream):
        for start in range(0, len(images), size):
            yield images[start : start + size], start, len(images)
        return
    before = 0
    while some := list(itertools.islice(images, size)):
        yield some, before, images.total
        before += len(some)


def image_label(source: Any, index: int = 0, count: int | None = 1) -> str:
    """Name an image for messages: what it is, and which of several; a count of None is unknown."""
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        what = shortened(os.fsdecode(path), MAX_SHOWN, quoted=False)
    elif isinstance(source, bytes | bytearray | memoryview):
        what = f"bytes, {len(source)} bytes"
    elif isinstance(source, np.ndarray):
        what = f"array, {source.dtype} {list(source.shape)}"
    elif _is_pillow(source):
        what = f"PIL image, {source.mode} {source.width}x{source.height}"
    else:
        what = shortened(type(source).__name__, quoted=False)
        shape = getattr(source, "shape", None)
        if isinstance(shape, tuple) and shape:
            what = f"{what}, {shortened(getattr(source, 'dtype', ''), quoted=False)} {list(shape)}"
        elif isinstance(name := getattr(source, "name", None), str):
            what = f"{what}, {shortened(name, MAX_SHOWN, quoted=False)}"
    if count == 1:
        return f"image ({what})"
    which = f"image {index + 1}" if count is None else f"image {index + 1} of {count}"
    return f"{which} ({what})"


def kind_problem(value: object) -> str:
    """Say what something is that is no image, by its type's name, and what to pass instead."""
    name = type(value).__name__
    if isinstance(value, Mapping):
        keys = shortened(", ".join(map(str, itertools.islice(value, 8))), quoted=False)
        hint = next(
            (
                f"; pass its {key!r}"
                for key in ("pixel_values", "image", "img", "images", "bytes", "path")
                if key in value and value[key] is not None
            ),
            "",
        )
        return f"a mapping ({name}) of {keys}{hint}" if keys else f"an empty mapping ({name})"
    if isinstance(value, set | frozenset):
        return f"a {name}, which has no order; pass a list"
    if callable(getattr(value, "__getitem__", None)) and not isinstance(value, Iterable):
        return f"{name}, which cannot be iterated over; pass [data[i] for i in range(len(data))]"
    return name


def _of_array(array: Array) -> Any:
    """Return an array of several pictures as a list, ``pixel_values`` as they are."""
    if array.dtype.kind in "UO" and array.ndim <= 1:  # paths, or whatever else
        return image_list(array.tolist() if array.ndim else [array.item()])
    if is_normalised(array):
        if not len(array):
            raise MediaError("expected at least one image, found none")
        return array
    if array.ndim != 4:
        return [array]
    if not len(array):
        raise MediaError("expected at least one image, found none")
    return list(array)


def _is_one(images: Any) -> bool:
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview):
        return True
    return _is_pillow(images) or is_readable(images)


def is_readable(source: object) -> bool:
    """Tell an open file, or what stands for a file, such as a member of an archive."""
    return any(callable(getattr(source, name, None)) for name in ("read", "read_bytes"))


def _require_collection(images: Any) -> None:
    is_collection = isinstance(images, Iterable) and not isinstance(
        images, Mapping | set | frozenset
    )
    # a table of pandas iterates over the names of its columns
    if not is_collection or hasattr(images, "columns"):
        raise MediaError(f"expected {ACCEPTED}, or several of them, found {kind_problem(images)}")


def _is_pillow(value: Any) -> bool:
    pillow = sys.modules.get("PIL.Image")  # what was never imported made no picture
    return pillow is not None and isinstance(value, pillow.Image)
