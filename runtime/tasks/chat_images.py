"""The images of a conversation, as a compiled InternVL-Chat reads them.

``chat_vision`` turns every tile of an image into tokens, in front of which ``chat_queries`` puts
those of a model with QLLaMA. ``see`` keeps them, so that the vision tower runs once per image
however long the conversation becomes.

An image is one square of S×S; with dynamic tiling (``dynamic_image_size``) it is as many as its
size and aspect call for, followed by the whole of it as a thumbnail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_edge.artifact.components import CHAT_QUERIES, CHAT_VISION
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.images.sources import image_list, is_normalised
from internvl_edge.types import Array

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ChatSeen", "as_images", "see"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSeen:
    """The tokens of images that the language model reads."""

    tokens: tuple[Array, ...]  # of each image, float32 [N·tiles,D]

    def __len__(self) -> int:
        return len(self.tokens)


def see(components: OpenComponents, images: Any, batch_size: int = 8) -> ChatSeen:
    """Run the vision tower on images, once for all that will be asked.

    Args:
        components: of a directory.
        images: see ``Model``; an image of normalised ``pixel_values`` is one tile.
        batch_size: tiles at a time.

    Raises:
        UsageError: the directory lacks a component.
        MediaError: an image cannot be read.
    """
    if isinstance(images, ChatSeen):
        return images
    components.require(CHAT_VISION)
    if components.artifact.manifest.model["chat"]["num_queries"]:
        components.require(CHAT_QUERIES)
    given = image_list(images)
    if is_normalised(given):
        counts, tiles = [1] * len(given), given
    else:
        cut = [_tiles(components, image) for image in given]
        counts, tiles = [len(some) for some in cut], [tile for some in cut for tile in some]
    batches = components.pixel_batches(tiles, "retrieval", batch_size)
    tokens = np.concatenate([_image_tokens(components, pixels) for pixels in batches])
    ends = np.cumsum(counts)  # of tiles; tokens are (tiles, N, D)
    flat = (tokens[end - count : end] for count, end in zip(counts, ends, strict=True))
    return ChatSeen(tokens=tuple(some.reshape(-1, tokens.shape[-1]) for some in flat))


def as_images(images: Any) -> Any:
    """Return the images of a conversation as something that has a length."""
    if images is None or isinstance(images, ChatSeen):
        return images or ()
    return image_list(images)


def _image_tokens(components: OpenComponents, pixels: Array) -> Array:
    """Turn [B,3,H,W] into [B,N,D], queries before patches."""
    if not components.has(CHAT_QUERIES):
        return components.run(CHAT_VISION, "image_tokens", pixel_values=pixels)
    seen = components.session(CHAT_VISION).run({"pixel_values": pixels})
    queries = components.run(CHAT_QUERIES, "image_tokens", hidden_state=seen["hidden_state"])
    return np.concatenate((queries, seen["image_tokens"]), axis=1)


def _tiles(components: OpenComponents, image: Any) -> list[Image.Image]:
    """Cut an image into the squares that the vision tower reads."""
    from internvl_edge.runtime.images.transform import load_image, squared, tile

    chat, size = components.artifact.manifest.model["chat"], components.preprocessing.size
    picture = load_image(image)
    if chat["pad2square"]:
        picture = squared(picture, components.preprocessing.mean)
    if not chat["dynamic_image_size"]:
        return [picture]
    low, high = chat["min_dynamic_patch"], chat["max_dynamic_patch"]
    return tile(picture, size, low, high, chat["use_thumbnail"])
