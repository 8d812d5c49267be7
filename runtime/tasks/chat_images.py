"""The images of a conversation, as a compiled InternVL-Chat reads them.

An image is one square of S×S; with dynamic tiling (``dynamic_image_size``) it is as many as its
size and aspect call for, followed by the whole of it as a thumbnail. ``cut`` makes these tiles, so
that the places of their tokens are known before anything is computed.

``chat_vision`` turns every tile into tokens, before which ``chat_queries`` puts those of a
model with QLLaMA. ``see`` keeps them, so that the vision tower runs once per image however long the
conversation becomes. It runs on a few tiles at a time, as many as memory and engine allow.

Several images in a list of their own stand in one place, tiles after tiles, as do the frames of a
video in ``Frame1: <image>``, each in its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from internvl_edge.artifact.components import CHAT_QUERIES, CHAT_VISION
from internvl_edge.errors import MediaError, UsageError, shortened
from internvl_edge.files.memory import available_memory
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.images.sources import MAX_TILES, image_label, image_list, is_normalised
from internvl_edge.types import Array

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ChatSeen", "ChatTiles", "as_images", "cut", "see"]

AT_ONCE = 8  # tiles, where memory allows
SHARE = 4  # tiles at a time take at most one part in so many of the memory that is free


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSeen:
    """The tokens of images that the language model reads."""

    tokens: tuple[Array, ...]  # of each image, float32 [N·tiles,D]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def places(self) -> list[int]:
        """How many tokens each image has."""
        return [len(tokens) for tokens in self.tokens]


Tiles: TypeAlias = "list[Image.Image] | Array"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTiles:
    """Images cut into the squares that the vision tower reads."""

    tiles: tuple[Tiles, ...]  # of each image: pictures, or pixel_values [B,3,S,S]
    per_tile: int  # tokens

    def __len__(self) -> int:
        return len(self.tiles)

    @property
    def places(self) -> list[int]:
        """How many tokens each image will have."""
        return [len(tiles) * self.per_tile for tiles in self.tiles]


def cut(components: OpenComponents, images: Any, max_tiles: int | None = None) -> ChatTiles:
    """Cut images into tiles.

    Args:
        components: of a directory.
        images: see ``Model``. An image of normalised ``pixel_values`` is one tile; of several
            images, one may be a list of images that share a place, or ``pixel_values`` of tiles.
        max_tiles: the most tiles of an image, without the thumbnail; None: the model's own.

    Raises:
        UsageError: the directory lacks a component, or ``max_tiles`` cannot be.
        MediaError: an image cannot be read.
    """
    components.require(CHAT_VISION)
    if components.artifact.manifest.model["chat"]["num_queries"]:
        components.require(CHAT_QUERIES)
    most = _max_tiles(components, max_tiles)
    given = image_list(images)
    if is_normalised(given):
        tiles: list[Tiles] = [given[i : i + 1] for i in range(len(given))]
    else:
        labels = [image_label(image, i, len(given)) for i, image in enumerate(given)]
        tiles = [
            _tiles_of(components, image, most, label)
            for image, label in zip(given, labels, strict=True)
        ]
    return ChatTiles(tiles=tuple(tiles), per_tile=_tokens_per_tile(components))


def see(
    components: OpenComponents,
    images: Any,
    batch_size: int | None = None,
    max_tiles: int | None = None,
) -> ChatSeen:
    """Run the vision tower on images, once for all that will be asked.

    Args:
        components: of a directory.
        images: as for ``cut``, or what it gave.
        batch_size: tiles at a time; None: 8, or fewer where memory or the engine has less room.
        max_tiles: as for ``cut``.

    Raises:
        UsageError: the directory lacks a component, or an option cannot be.
        MediaError: an image cannot be read.
    """
    if isinstance(images, ChatSeen):
        return images
    given = images if isinstance(images, ChatTiles) else cut(components, images, max_tiles)
    size = _tiles_at_once(components) if batch_size is None else batch_size
    kept = components.answers.images
    if kept.budget_nbytes == 0:
        return ChatSeen(tokens=tuple(_seen(components, given.tiles, size)))
    digests = [_digest(tiles) for tiles in given.tiles]
    known = {digest: tokens for digest in digests if (tokens := kept.find(digest)) is not None}
    new = dict(zip(digests, given.tiles, strict=True))  # each of them once
    new = {digest: tiles for digest, tiles in new.items() if digest not in known}
    if new:
        for digest, tokens in zip(new, _seen(components, [*new.values()], size), strict=True):
            kept.keep(digest, tokens)
            known[digest] = tokens
    return ChatSeen(tokens=tuple(known[digest] for digest in digests))


def _seen(components: OpenComponents, images: Sequence[Tiles], size: int) -> Iterator[Array]:
    """Yield the tokens of each image [N·tiles,D], of which a few tiles run at a time."""
    tokens = np.concatenate(
        [_image_tokens(components, pixels) for pixels in _pixels(components, images, size)]
    )
    end = 0
    for tiles in images:
        start, end = end, end + len(tiles)
        yield tokens[start:end].reshape(-1, tokens.shape[-1])  # (tiles, N, D)


def _digest(tiles: Tiles) -> bytes:
    """Tell tiles apart by all of their bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for tile in tiles:
        pixels = np.asarray(tile)
        digest.update(f"{type(tiles).__name__} {pixels.dtype} {pixels.shape}".encode())
        digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def as_images(components: OpenComponents, images: Any, max_tiles: int | None) -> Any:
    """Return the images of a conversation with their places: seen already, or cut into tiles."""
    if isinstance(images, ChatSeen | ChatTiles):
        return images
    if images is None or (isinstance(images, list | tuple) and not images):
        _max_tiles(components, max_tiles)
        return ChatSeen(tokens=())
    return cut(components, images, max_tiles)


def _max_tiles(components: OpenComponents, asked: int | None) -> int:
    chat = components.artifact.manifest.model["chat"]
    if asked is None:
        return int(chat["max_dynamic_patch"])
    if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= MAX_TILES:
        raise UsageError(
            f"max_tiles {shortened(asked)}: expected 1 to {MAX_TILES} tiles of an image"
        )
    if not chat["dynamic_image_size"] and asked > 1:
        raise UsageError(
            f"max_tiles {asked}: this model reads one square of an image, and cuts no tiles"
        )
    return asked


def _pixels(components: OpenComponents, images: Sequence[Tiles], size: int) -> Iterator[Array]:
    """Yield ``pixel_values`` of a few tiles at a time, in order, across images."""
    if isinstance(images[0], np.ndarray):
        flat: Any = np.concatenate([np.asarray(tiles) for tiles in images])
    else:
        flat = [tile for tiles in images for tile in tiles]
    yield from components.pixel_batches(flat, "retrieval", size)


def _image_tokens(components: OpenComponents, pixels: Array) -> Array:
    """Turn [B,3,H,W] into [B,N,D], queries before patches."""
    if not components.has(CHAT_QUERIES):
        return components.run(CHAT_VISION, "image_tokens", pixel_values=pixels)
    seen = components.session(CHAT_VISION).run({"pixel_values": pixels})
    queries = components.run(CHAT_QUERIES, "image_tokens", hidden_state=seen["hidden_state"])
    return np.concatenate((queries, seen["image_tokens"]), axis=1)


def _tiles_of(components: OpenComponents, image: Any, most: int, label: str) -> Tiles:
    """Cut what stands in one place."""
    if is_normalised(image):
        return np.asarray(image)
    if not isinstance(image, list | tuple):
        return _tiles(components, image, most, label)
    if not image:
        raise MediaError("expected images in a list that shares a place, found none")
    return [
        tile
        for i, one in enumerate(image)
        for tile in _tiles(components, one, most, image_label(one, i, len(image)))
    ]


def _tiles(components: OpenComponents, image: Any, most: int, label: str) -> list[Image.Image]:
    """Cut an image into the squares that the vision tower reads."""
    from internvl_edge.runtime.images.transform import load_image, squared, tile

    chat, size = components.artifact.manifest.model["chat"], components.preprocessing.size
    picture = load_image(image, label, components.images)
    if chat["pad2square"]:
        picture = squared(picture, components.preprocessing.mean)
    if not chat["dynamic_image_size"]:
        return [picture]
    low = min(chat["min_dynamic_patch"], most)
    return tile(picture, size, low, most, chat["use_thumbnail"])


def _tokens_per_tile(components: OpenComponents) -> int:
    """Count the tokens of a tile: the projector's, and the queries of a model with QLLaMA."""
    manifest = components.artifact.manifest
    (shape,) = (
        spec.shape
        for spec in manifest.components[CHAT_VISION].outputs
        if spec.name == "image_tokens"
    )
    return int(shape[1]) + int(manifest.model["chat"]["num_queries"])


def _tiles_at_once(components: OpenComponents) -> int:
    """Choose how many tiles run together: 8, or what memory and engine have room for.

    A tile takes its tokens at every width of a block at once, and its attention's weights.
    """
    vision, size = components.artifact.manifest.model["vision"], components.preprocessing.size
    tokens = 1 + (size // vision["patch_size"]) ** 2
    widths = 8 * vision["hidden_size"] + 2 * vision["intermediate_size"]
    nbytes = 4 * tokens * (widths + vision["num_attention_heads"] * tokens)
    room = max(1, available_memory() // SHARE // nbytes)
    limit = components.session(CHAT_VISION).largest.get("batch", AT_ONCE)
    return int(min(AT_ONCE, room, limit))
