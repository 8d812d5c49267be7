"""A folder of pictures that can be searched: embedded at the start, and shown small by number.

The files belong to whoever started the server. They are read once; a client gives a number, never a
name, and gets a picture that was made from what was read. What is no picture is left out.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
from PIL import Image

from internvl_edge.artifact.components import IMAGE_EMBED, IMAGE_POOL, TEXT_EMBED, VISION
from internvl_edge.errors import InputError, UsageError
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.images.transform import load_image
from internvl_edge.runtime.tasks.embed import encode_image
from internvl_edge.runtime.tasks.vectors import ranked
from internvl_edge.types import Array

__all__ = ["Gallery", "pictures_in"]

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MOST = 10_000  # pictures
SIDE = 192  # of a small picture, at most
BATCH = 8


def pictures_in(folder: Path) -> list[Path]:
    """List the pictures of a folder, by name.

    Raises:
        UsageError: it cannot be read, has none, or more than are searched.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"--gallery {folder}: cannot be read: {reason}") from error
    if not 1 <= len(found) <= MOST:
        raise UsageError(
            f"--gallery {folder}: expected 1 to {MOST} pictures ({', '.join(SUFFIXES)}) in it, "
            f"found {len(found)}"
        )
    return found


class Gallery:
    """Pictures, small and as vectors of every model that embeds."""

    def __init__(self) -> None:
        self.small: list[bytes] = []  # as JPEG
        self._vectors: dict[str, Array] = {}  # of unit length, [N,E]

    def fill(
        self, paths: Sequence[Path], models: Iterable[tuple[str, OpenComponents]], pool: Executor
    ) -> None:
        """Read the pictures, and embed them with every model that can.

        Args:
            paths: of the pictures.
            models: names and their components.
            pool: threads that decode.
        """
        embedding = [(name, components) for name, components in models if can_search(components)]
        parts: dict[str, list[Array]] = {name: [] for name, _ in embedding}
        left_out = 0
        for start in range(0, len(paths), BATCH):
            read = list(pool.map(_read, paths[start : start + BATCH]))
            pictures = [picture for picture in read if picture is not None]
            left_out += len(read) - len(pictures)
            if not pictures:
                continue
            self.small += pool.map(_small, pictures)
            for name, components in embedding:
                rows = encode_image(components, pictures, normalize=True, transform="retrieval")
                parts[name].append(rows)
        self._vectors = {name: np.concatenate(rows) for name, rows in parts.items() if rows}
        if left_out:
            logger.warning("%d files of the gallery are no pictures, and are left out", left_out)

    def has(self, model: str) -> bool:
        """Tell whether a model can search it."""
        return model in self._vectors

    def search(self, model: str, vector: Array, count: int) -> list[tuple[int, float]]:
        """Find the pictures that fit a vector of unit length best: numbers and cosines."""
        scores = self._vectors[model] @ vector
        return [(int(i), float(scores[i])) for i in ranked(scores)[:count]]


def can_search(components: OpenComponents) -> bool:
    """Tell whether a directory embeds pictures and texts."""
    has = components.has
    return has(TEXT_EMBED) and (has(IMAGE_EMBED) or (has(VISION) and has(IMAGE_POOL)))


def _read(path: Path) -> Image.Image | None:
    """Read a picture; None where it is none."""
    try:
        return load_image(path)
    except InputError:
        return None


def _small(picture: Image.Image) -> bytes:
    """Make the JPEG of a small picture, without whatever else was in the file."""
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
