"""Images, videos and texts compared: classification, retrieval, matching.

Every task has the image transform its published numbers were measured with (docs/model.md,
section 7.1): ``"classification"`` crops, ``"retrieval"`` (also for matching) squeezes to a square,
``"clip"`` is for video frames.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_edge.artifact.components import MATCHER, TEXT_EMBED, VISION
from internvl_edge.errors import MediaError, UsageError
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.images.sources import image_list
from internvl_edge.runtime.images.video import dual_softmax
from internvl_edge.runtime.tasks.embed import (
    encode_image,
    encode_text,
    encode_video,
    image_embedder,
    text_classifier,
)
from internvl_edge.runtime.tasks.requests import (
    distinct_labels,
    masked,
    one_place_templates,
    text_list,
)
from internvl_edge.runtime.tasks.vectors import ranked, softmax
from internvl_edge.types import Array

__all__ = [
    "Retrieval",
    "classify",
    "classify_videos",
    "match_stream",
    "retrieve",
    "retrieve_videos",
]

LOGIT_SCALE = 100.0  # of zero-shot classification; the learned scale is for training


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Images and texts, ranked by similarity both ways."""

    similarity: Array  # float32 [images, texts], cosine
    texts_of_image: Array  # int64 [images, texts]: indices of the texts, best first
    images_of_text: Array  # int64 [texts, images]: indices of the images, best first


def classify(
    components: OpenComponents,
    images: Any,
    labels: Sequence[str],
    templates: Sequence[str],
    mode: str,
    batch_size: int,
) -> list[list[dict[str, Any]]]:
    """Rank labels for images; see ``Model.classify``."""
    names, templates = distinct_labels(labels), one_place_templates(templates)
    given = _embeddable(components, images, mode)
    weights = text_classifier(components, names, templates)
    embeds = encode_image(components, given, mode, True, batch_size, "classification")
    return _best_labels(names, embeds, weights)


def retrieve(
    components: OpenComponents, images: Any, texts: Any, mode: str, batch_size: int
) -> Retrieval:
    """Rank texts for images and images for texts; see ``Model.retrieve``."""
    given = _embeddable(components, images, mode)
    text_embeds = encode_text(components, texts, normalize=True)
    image_embeds = encode_image(components, given, mode, True, batch_size, "retrieval")
    similarity = image_embeds @ text_embeds.T
    return Retrieval(
        similarity=similarity,
        texts_of_image=ranked(similarity),
        images_of_text=ranked(similarity.T),
    )


def classify_videos(
    components: OpenComponents,
    videos: Sequence[Any],
    labels: Sequence[str],
    templates: Sequence[str],
    mode: str,
    num_frames: int | None,
    batch_size: int,
) -> list[list[dict[str, Any]]]:
    """Rank labels for videos; see ``Model.classify_videos``."""
    names, templates = distinct_labels(labels), one_place_templates(templates)
    given = _embeddable_videos(components, videos, mode)
    weights = text_classifier(components, names, templates)
    embeds = [encode_video(components, v, num_frames, mode, True, batch_size) for v in given]
    return _best_labels(names, np.stack(embeds), weights)


def retrieve_videos(
    components: OpenComponents,
    videos: Sequence[Any],
    texts: Any,
    mode: str,
    num_frames: int | None,
    batch_size: int,
    dual: bool,
) -> Retrieval:
    """Rank texts for videos and videos for texts; see ``Model.retrieve_videos``."""
    given = _embeddable_videos(components, videos, mode)
    text_embeds = encode_text(components, texts, normalize=True)
    embeds = [encode_video(components, v, num_frames, mode, True, batch_size) for v in given]
    similarity = np.stack(embeds) @ text_embeds.T  # (videos, texts)
    weigh = dual_softmax if dual else np.asarray
    return Retrieval(
        similarity=similarity,
        texts_of_image=ranked(weigh(similarity)),
        images_of_text=ranked(weigh(similarity.T)),
    )


def match_stream(
    components: OpenComponents, images: Any, texts: Any, batch_size: int
) -> Iterator[Array]:
    """Match every few pairs of an image and a text; see ``Model.match_stream``."""
    components.require(VISION, MATCHER)
    given, ids = image_list(images), text_list(texts)
    if not isinstance(ids, np.ndarray):
        ids = components.tokenizer.match(ids)
    count = max(len(given), len(ids))
    if {len(given), len(ids)} - {1, count}:
        raise UsageError(
            f"match: expected as many texts as images, or one of either, found {len(given)} "
            f"images and {len(ids)} texts"
        )
    ids = np.broadcast_to(ids, (count, ids.shape[1]))
    batches = components.hidden_batches(given, count, batch_size)
    return (_matched(components, hidden, ids[rows]) for rows, hidden in batches)


def _matched(components: OpenComponents, hidden: Array, ids: Array) -> Array:
    feeds = {"last_hidden_state": hidden, **masked(ids)}
    logits = components.run(MATCHER, "match_logits", **feeds)  # (B, 2): no, yes
    return softmax(logits)[:, 1].copy()


def _embeddable(components: OpenComponents, images: Any, mode: str) -> Any:
    """Return the images, where nothing is known to refuse them after the texts were computed."""
    components.require(TEXT_EMBED)
    image_embedder(components, mode)
    return image_list(images)


def _embeddable_videos(components: OpenComponents, videos: Sequence[Any], mode: str) -> list[Any]:
    components.require(TEXT_EMBED)
    image_embedder(components, mode)
    if isinstance(videos, (str, os.PathLike)) or not len(videos):
        raise MediaError(f"videos: expected a list of one or more, found {videos!r}")
    return list(videos)


def _best_labels(names: Sequence[str], embeds: Array, weights: Array) -> list[list[dict[str, Any]]]:
    """Rank the labels of unit vectors (B, E), best first; ``weights`` are (K, E)."""
    scores = softmax(LOGIT_SCALE * embeds @ weights.T)  # (B, K)
    return [[{"label": names[k], "score": float(row[k])} for k in ranked(row)] for row in scores]
