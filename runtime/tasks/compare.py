"""Images, videos and texts compared: classification, retrieval, matching.

Every task has the image transform its published numbers were measured with (docs/model.md,
section 7.1): ``"classification"`` crops, ``"retrieval"`` (also for matching) squeezes to a square,
``"clip"`` is for video frames.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_edge.artifact.components import MATCHER, TEXT_EMBED, VISION
from internvl_edge.errors import MediaError, UsageError, shortened
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.images.sources import Stream, image_list, image_stream, is_readable
from internvl_edge.runtime.images.video import dual_softmax
from internvl_edge.runtime.tasks.embed import (
    encode_image,
    encode_text,
    encode_video,
    image_embedder,
    text_classifier,
)
from internvl_edge.runtime.tasks.vectors import ranked, softmax
from internvl_edge.runtime.text.requests import (
    Template,
    distinct_labels,
    masked,
    one_place_templates,
    require_whole,
    text_list,
)
from internvl_edge.types import Array

if TYPE_CHECKING:
    from internvl_edge.runtime.text.tokenizer import OnLong

__all__ = [
    "Retrieval",
    "best_labels",
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
    templates: Sequence[Template],
    mode: str,
    batch_size: int,
    top_k: int | None = None,
    on_long: OnLong = "truncate",
) -> list[list[dict[str, Any]]]:
    """Rank labels for images; see ``Model.classify``."""
    require_whole("top_k", top_k, 1, none=True)
    names, templates = distinct_labels(labels), one_place_templates(templates)
    given = _embeddable(components, images, mode)
    weights = text_classifier(components, names, templates, on_long)
    embeds = encode_image(components, given, mode, True, batch_size, "classification")
    return best_labels(names, embeds, weights, top_k)


def retrieve(
    components: OpenComponents,
    images: Any,
    texts: Any,
    mode: str,
    batch_size: int,
    on_long: OnLong = "truncate",
) -> Retrieval:
    """Rank texts for images and images for texts; see ``Model.retrieve``."""
    given = _embeddable(components, images, mode)
    text_embeds = encode_text(components, texts, normalize=True, on_long=on_long)
    image_embeds = encode_image(components, given, mode, True, batch_size, "retrieval")
    similarity = image_embeds @ text_embeds.T
    return Retrieval(
        similarity=similarity,
        texts_of_image=ranked(similarity),
        images_of_text=ranked(similarity.T),
    )


def classify_videos(
    components: OpenComponents,
    videos: Iterable[Any],
    labels: Sequence[str],
    templates: Sequence[Template],
    mode: str,
    num_frames: int | None,
    batch_size: int,
    top_k: int | None = None,
    on_long: OnLong = "truncate",
) -> list[list[dict[str, Any]]]:
    """Rank labels for videos; see ``Model.classify_videos``."""
    require_whole("top_k", top_k, 1, none=True)
    names, templates = distinct_labels(labels), one_place_templates(templates)
    given = _embeddable_videos(components, videos, mode, num_frames)
    weights = text_classifier(components, names, templates, on_long)
    embeds = _video_embeds(components, given, num_frames, mode, batch_size)
    return best_labels(names, embeds, weights, top_k)


def retrieve_videos(
    components: OpenComponents,
    videos: Iterable[Any],
    texts: Any,
    mode: str,
    num_frames: int | None,
    batch_size: int,
    dual: bool,
    on_long: OnLong = "truncate",
) -> Retrieval:
    """Rank texts for videos and videos for texts; see ``Model.retrieve_videos``."""
    given = _embeddable_videos(components, videos, mode, num_frames)
    text_embeds = encode_text(components, texts, normalize=True, on_long=on_long)
    embeds = _video_embeds(components, given, num_frames, mode, batch_size)
    similarity = embeds @ text_embeds.T  # (videos, texts)
    weigh = dual_softmax if dual else np.asarray
    return Retrieval(
        similarity=similarity,
        texts_of_image=ranked(weigh(similarity)),
        images_of_text=ranked(weigh(similarity.T)),
    )


def match_stream(
    components: OpenComponents,
    images: Any,
    texts: Any,
    batch_size: int,
    on_long: OnLong = "truncate",
) -> Iterator[Array]:
    """Match every few pairs of an image and a text; see ``Model.match_stream``."""
    components.require(VISION, MATCHER)
    require_whole("batch_size", batch_size, 1)
    given, ids = image_stream(images), text_list(texts)
    if not isinstance(ids, np.ndarray):
        ids = components.tokenizer.match(ids, on_long=on_long)
    if isinstance(given, Stream) and len(ids) == 1:  # it may never end
        batches = components.hidden_batches(given, None, batch_size)
        return (
            _matched(components, hidden, np.broadcast_to(ids, (len(hidden), ids.shape[1])))
            for _, hidden in batches
        )
    given = image_list(given)
    count = max(len(given), len(ids))
    if {len(given), len(ids)} - {1, count}:
        raise UsageError(
            f"match: expected as many texts as images, or one of either, found {len(given)} "
            f"images and {len(ids)} texts"
        )
    ids = np.broadcast_to(ids, (count, ids.shape[1]))
    batches = components.hidden_batches(given, count, batch_size)
    return (
        _matched(components, hidden, ids[done : done + len(hidden)]) for done, hidden in batches
    )


def _matched(components: OpenComponents, hidden: Array, ids: Array) -> Array:
    feeds = {"last_hidden_state": hidden, **masked(ids)}
    logits = components.run(MATCHER, "match_logits", **feeds)  # (B, 2): no, yes
    return softmax(logits)[:, 1].copy()


def _embeddable(components: OpenComponents, images: Any, mode: str) -> Any:
    """Return the images, where nothing is known to refuse them after the texts were computed."""
    components.require(TEXT_EMBED)
    image_embedder(components, mode)
    return image_stream(images)


def _embeddable_videos(
    components: OpenComponents, videos: Iterable[Any], mode: str, num_frames: int | None
) -> Iterable[Any]:
    components.require(TEXT_EMBED)
    image_embedder(components, mode)
    require_whole("num_frames", num_frames, 1, none=True)
    is_one = isinstance(videos, (str, bytes, os.PathLike)) or is_readable(videos)
    is_one = is_one or (isinstance(videos, np.ndarray) and not videos.ndim)
    if is_one or not isinstance(videos, Iterable) or isinstance(videos, Mapping | set | frozenset):
        raise MediaError(
            f"videos: expected a list of one or more, found {shortened(videos)}; pass [video]"
        )
    if isinstance(videos, Sized) and not len(videos):
        raise MediaError("videos: expected a list of one or more, found none")
    return videos


def _video_embeds(
    components: OpenComponents,
    videos: Iterable[Any],
    num_frames: int | None,
    mode: str,
    batch_size: int,
) -> Array:
    """Embed videos one after the other, unit vectors [B, E]."""
    embeds = [encode_video(components, v, num_frames, mode, True, batch_size) for v in videos]
    if not embeds:
        raise MediaError("videos: expected a list of one or more, found none")
    return np.stack(embeds)


def best_labels(
    names: Sequence[str], embeds: Array, weights: Array, top_k: int | None
) -> list[list[dict[str, Any]]]:
    """Rank the labels of unit vectors (B, E), best first; ``weights`` are (K, E)."""
    logits = LOGIT_SCALE * embeds @ weights.T  # (B, K)
    return [
        [
            {"label": names[k], "score": float(row[k]), "cosine": float(logit[k]) / LOGIT_SCALE}
            for k in ranked(row)[:top_k]
        ]
        for row, logit in zip(softmax(logits), logits, strict=True)
    ]
