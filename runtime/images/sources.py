"""Images as callers hand them over: one, several, or ``pixel_values``.

Says what it was given before Pillow is needed: a model that is only asked with ``pixel_values``
never imports it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from internvl_edge.errors import MediaError

__all__ = ["MAX_TILES", "image_list", "is_normalised"]

MAX_TILES = 40  # of an image, its thumbnail not counted: the most that any published model reads


def is_normalised(images: Any) -> bool:
    """Tell ``pixel_values``, which are normalised already, from pictures, such as uint8 arrays."""
    return isinstance(images, np.ndarray) and images.ndim == 4 and images.dtype != np.uint8


def image_list(images: Any) -> Any:
    """Return one image or several as a list, and normalised ``pixel_values`` as they are.

    Raises:
        MediaError: none, or nothing that could be images.
    """
    is_one = _is_one(images)
    if not is_one and not isinstance(images, Iterable):
        raise MediaError(f"expected an image or several, found {type(images).__name__}")
    given = [images] if is_one else images if is_normalised(images) else list(images)
    if not len(given):
        raise MediaError("expected at least one image, found none")
    return given


def _is_one(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview):
        return True
    if isinstance(images, list | tuple):
        return False
    from PIL import Image

    return isinstance(images, Image.Image)
