"""Embeddings of images, texts and videos, from the components of a compiled directory.

The embeddings (docs/model.md, section 3.4) are

    InternVL-C   u, the attention pool over the ViT's tokens
    InternVL-G   u/|u| + v/|v|, v from the queries that QLLaMA put to the image; |·| up to 2
    text         the last token of a causal LLaMA, projected

and none of them has unit length unless ``normalize=True``. A video is the mean of its frames'
embeddings. Each image goes through the ViT once per call, whatever else is computed from it; images
and texts are independent of what else is in their batch, up to float rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_edge.artifact.components import (
    IMAGE_EMBED,
    IMAGE_POOL,
    IMAGE_QUERIES,
    TEXT_EMBED,
    to_embed_images,
)
from internvl_edge.errors import UsageError, shortened
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.images.reading import path_of
from internvl_edge.runtime.images.sources import image_list, image_stream
from internvl_edge.runtime.images.video import (
    pool_frames,
    read_frames,
    sample_frames,
    stream_frames,
)
from internvl_edge.runtime.tasks.vectors import unit
from internvl_edge.runtime.text.requests import (
    Template,
    batches_of,
    distinct_labels,
    fill_template,
    masked,
    one_place_templates,
    require_choice,
    require_flag,
    require_whole,
    text_list,
)
from internvl_edge.types import Array

if TYPE_CHECKING:
    from internvl_edge.runtime.images.transform import Transform
    from internvl_edge.runtime.text.tokenizer import OnLong

__all__ = [
    "DEFAULT_TEMPLATES",
    "TEXT_BATCH",
    "Template",
    "encode_image",
    "encode_text",
    "encode_video",
    "frames_of",
    "image_embedder",
    "text_classifier",
]

TEXT_BATCH = 64
DEFAULT_TEMPLATES = ("a photo of a {}",)
MODES = ("c", "g")


def encode_image(
    components: OpenComponents,
    images: Any,
    mode: str = "c",
    normalize: bool = False,
    batch_size: int = 8,
    transform: Transform | None = None,
) -> Array:
    """Embed images, float32 [B,E]; see ``Model.encode_image``."""
    embed = image_embedder(components, mode)
    require_flag("normalize", normalize)
    batches = components.pixel_batches(image_stream(images), transform, batch_size)
    embeds = np.concatenate([embed(pixels) for pixels in batches])
    return unit(embeds) if normalize else embeds


def encode_text(
    components: OpenComponents,
    texts: Any,
    normalize: bool = False,
    batch_size: int = TEXT_BATCH,
    on_long: OnLong = "truncate",
) -> Array:
    """Embed texts, float32 [B,E]; see ``Model.encode_text``."""
    components.require(TEXT_EMBED)
    require_flag("normalize", normalize)
    given = text_list(texts)
    require_choice("on_long", on_long, ("truncate", "error"))
    if on_long != "truncate" and not isinstance(given, np.ndarray):
        components.tokenizer.contrastive(given, on_long=on_long)  # of all, before any work
    embeds = np.concatenate(
        [
            components.run(TEXT_EMBED, "text_embeds", **masked(_text_ids(components, batch)))
            for batch in batches_of(given, batch_size)
        ]
    )
    return unit(embeds) if normalize else embeds


def encode_video(
    components: OpenComponents,
    frames: Any,
    num_frames: int | None = None,
    mode: str = "c",
    normalize: bool = False,
    batch_size: int = 8,
) -> Array:
    """Embed one video, float32 [E]; see ``Model.encode_video``."""
    image_embedder(components, mode)
    require_flag("normalize", normalize)
    chosen = frames_of(frames, num_frames)
    mean = pool_frames(encode_image(components, chosen, mode, False, batch_size, "clip"))
    return unit(mean) if normalize else mean


def text_classifier(
    components: OpenComponents,
    labels: Sequence[str],
    templates: Sequence[Template] = DEFAULT_TEMPLATES,
    on_long: OnLong = "truncate",
) -> Array:
    """Embed labels, one unit vector each, float32 [K,E]; see ``Model.text_classifier``."""
    names, chosen = distinct_labels(labels), one_place_templates(templates)
    texts = tuple(template for template in chosen if isinstance(template, str))
    prompts: tuple[str, ...] = ()
    if len(texts) < len(chosen):  # what a function gives is known by its texts alone
        prompts = tuple(fill_template(template, label) for label in names for template in chosen)
    key = names, prompts or texts
    remembered = components.classifiers.get(key)
    if remembered is not None:
        return remembered
    prompts = prompts or tuple(
        fill_template(template, label) for label in names for template in chosen
    )
    embeds = encode_text(components, prompts, normalize=True, on_long=on_long)
    weights = unit(embeds.reshape(len(names), len(chosen), -1).mean(axis=1))  # (K, E)
    weights.flags.writeable = False  # it is shared from here on
    components.classifiers.keep(key, weights)
    return weights


def image_embedder(components: OpenComponents, mode: str) -> Callable[[Array], Array]:
    """Choose how ``pixel_values`` become embeddings.

    Raises:
        UsageError: an unknown mode, or one for which components are missing.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise UsageError(f"mode {shortened(mode)}: expected 'c' (InternVL-C) or 'g' (InternVL-G)")
    needed = to_embed_images(components.artifact.manifest.components, mode)
    components.require(*needed)
    if mode == "g":
        return lambda pixels: _embed_g(components, pixels)
    if IMAGE_POOL in needed:
        return lambda pixels: _pool(components, components.hidden(pixels))
    return lambda pixels: components.run(IMAGE_EMBED, "image_embeds", pixel_values=pixels)


def _pool(components: OpenComponents, hidden: Array) -> Array:
    return components.run(IMAGE_POOL, "image_embeds", last_hidden_state=hidden)


def _embed_g(components: OpenComponents, pixels: Array) -> Array:
    hidden = components.hidden(pixels)
    v = components.run(IMAGE_QUERIES, "query_embeds", last_hidden_state=hidden)
    return unit(_pool(components, hidden)) + unit(v)


def _text_ids(components: OpenComponents, texts: list[str] | Array) -> Array:
    """Return token ids for ``text_embed``, int64 [B,T]."""
    if isinstance(texts, np.ndarray):
        return texts
    return components.tokenizer.contrastive(texts, pad_to="longest")


def frames_of(frames: Any, num_frames: int | None) -> Any:
    """Choose the frames of a video that are encoded."""
    require_whole("num_frames", num_frames, 1, none=True)
    if isinstance(frames, (str, os.PathLike)):
        path = path_of(frames, "video", "pass its path")
        return (stream_frames if os.path.isfile(path) else read_frames)(path, num_frames)
    given = image_stream(frames)
    if num_frames is None:
        return given
    given = image_list(given)
    chosen = sample_frames(len(given), num_frames)
    return given[chosen] if isinstance(given, np.ndarray) else [given[i] for i in chosen]
