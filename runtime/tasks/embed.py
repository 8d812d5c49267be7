"""Embeddings of images, texts and videos, from the sessions of a compiled directory.

The embeddings (internvl-spec sections 3.3 and 6) are

    InternVL-C   u, the attention pool over the ViT's tokens
    InternVL-G   u/|u| + v/|v|, v from the queries that QLLaMA put to the image; |·| up to 2
    text         the last token of a causal LLaMA, projected

and none of them has unit length unless ``normalize=True``. A video is the mean of its frames'
embeddings. Each image goes through the ViT once per call, whatever else is computed from it; images
and texts are independent of what else is in their batch, up to float rounding.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import RLock
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from internvl_edge.artifact.components import (
    IMAGE_EMBED,
    IMAGE_POOL,
    IMAGE_QUERIES,
    TEXT_EMBED,
    VISION,
)
from internvl_edge.artifact.open import Artifact
from internvl_edge.errors import UsageError
from internvl_edge.runtime.components import Parts
from internvl_edge.runtime.images.video import (
    decode_frames,
    pool_frames,
    read_frames,
    sample_frames,
)
from internvl_edge.runtime.session import Session
from internvl_edge.runtime.tasks.requests import (
    batches_of,
    distinct_labels,
    fill_template,
    image_list,
    masked,
    one_place_templates,
    text_list,
)
from internvl_edge.runtime.tasks.vectors import unit
from internvl_edge.types import Array

if TYPE_CHECKING:
    from internvl_edge.runtime.images.transform import Preprocessing, Transform
    from internvl_edge.runtime.text.tokenizer import Tokenizer

__all__ = ["DEFAULT_TEMPLATES", "Embedder"]

TEXT_BATCH = 64
DEFAULT_TEMPLATES = ("a photo of a {}",)
MAX_CLASSIFIERS = 16  # sets of labels whose text embeddings are kept
MODES = ("c", "g")


class Embedder:
    """What a directory embeds; see ``Model`` for what its methods take and raise.

    Args:
        artifact: the open directory.
        open_one: opens the session of a component.
    """

    def __init__(self, artifact: Artifact, open_one: Callable[[str], Session]) -> None:
        self.parts = Parts(artifact, open_one)
        self._classifiers: OrderedDict[tuple[tuple[str, ...], ...], Array] = OrderedDict()
        self._lock = RLock()

    # --- encode ----------------------------------------------------------------------------------

    def encode_image(
        self,
        images: Any,
        mode: str = "c",
        normalize: bool = False,
        batch_size: int = 8,
        transform: Transform | None = None,
    ) -> Array:
        """Embeddings of images, float32 [B,E].

        Args:
            images: see ``Model``.
            mode: ``"c"`` (InternVL-C) or ``"g"`` (InternVL-G).
            normalize: give them unit length.
            batch_size: images that are decoded and computed at a time.
            transform: ``"retrieval"``, ``"classification"`` or ``"clip"``; None is the
                directory's own.
        """
        embed = self._embedder(mode)
        batches = self.parts.pixel_batches(image_list(images), transform, batch_size)
        embeds = np.concatenate([embed(pixels) for pixels in batches])
        return unit(embeds) if normalize else embeds

    def encode_text(
        self, texts: Any, normalize: bool = False, batch_size: int = TEXT_BATCH
    ) -> Array:
        """Embeddings of texts, float32 [B,E]; strings get the prefix the model was trained with."""
        self.parts.require(TEXT_EMBED)
        embeds = np.concatenate(
            [
                self.parts.run(TEXT_EMBED, "text_embeds", **masked(self._contrastive(batch)))
                for batch in batches_of(text_list(texts), batch_size)
            ]
        )
        return unit(embeds) if normalize else embeds

    def encode_video(
        self,
        frames: Any,
        num_frames: int | None = None,
        mode: str = "c",
        normalize: bool = False,
        batch_size: int = 8,
    ) -> Array:
        """The embedding of one video, float32 [E]: the mean of its frames' embeddings.

        Args:
            frames: a folder of frames, a video file (with PyAV, extra ``video``), or images.
            num_frames: sample at most so many of them; None takes all.
            mode: ``"c"`` or ``"g"``.
            normalize: give the mean unit length.
            batch_size: frames that are computed at a time.
        """
        chosen = _frames(frames, num_frames)
        mean = pool_frames(self.encode_image(chosen, mode, False, batch_size, "clip"))
        return unit(mean) if normalize else mean

    def text_classifier(
        self, labels: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
    ) -> Array:
        """One unit vector per label, float32 [K,E]: the mean over the templates' unit vectors.

        The last sets of labels are remembered, so that classifying again costs no text.

        Raises:
            UsageError: a label twice, a template without one ``{}`` or ``{c}``.
            MediaError: no labels, or an empty one.
        """
        key = (distinct_labels(labels), one_place_templates(templates))
        with self._lock:
            if key in self._classifiers:
                self._classifiers.move_to_end(key)
                return self._classifiers[key]
        prompts = [fill_template(template, label) for label in key[0] for template in key[1]]
        embeds = self.encode_text(prompts, normalize=True)
        weights = unit(embeds.reshape(len(key[0]), len(key[1]), -1).mean(axis=1))  # (K, E)
        weights.flags.writeable = False  # it is shared from here on
        with self._lock:
            self._classifiers[key] = weights
            while len(self._classifiers) > MAX_CLASSIFIERS:
                self._classifiers.popitem(last=False)
        return weights

    # --- sessions --------------------------------------------------------------------------------

    @property
    def artifact(self) -> Artifact:
        """The open directory."""
        return self.parts.artifact

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the directory; UsageError where its checkpoint had none."""
        return self.parts.tokenizer

    @property
    def preprocessing(self) -> Preprocessing:
        """The image transforms of the directory."""
        return self.parts.preprocessing

    def session(self, component: str) -> Session:
        """The session of a component, opened when first asked for; the model closes it."""
        return self.parts.session(component)

    def close(self) -> None:
        """Close every session; may be called again."""
        self.parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- parts -----------------------------------------------------------------------------------

    def _embedder(self, mode: str) -> Callable[[Array], Array]:
        """What makes embeddings of ``pixel_values``; refused before any work if it cannot."""
        if mode not in MODES:
            raise UsageError(f"mode {mode!r}: expected 'c' (InternVL-C) or 'g' (InternVL-G)")
        if mode == "g":
            self.parts.require(VISION, IMAGE_POOL, IMAGE_QUERIES)
            return self._embed_g
        has = self.parts.has
        if has(VISION) and has(IMAGE_POOL) and not has(IMAGE_EMBED):
            return lambda pixels: self._pool(self.parts.hidden(pixels))
        self.parts.require(IMAGE_EMBED)
        return lambda pixels: self.parts.run(IMAGE_EMBED, "image_embeds", pixel_values=pixels)

    def _embeddable(self, images: Any, mode: str) -> Any:
        """The images, where nothing is known to refuse them later; texts are computed before."""
        self.parts.require(TEXT_EMBED)
        self._embedder(mode)
        return image_list(images)

    def _pool(self, hidden: Array) -> Array:
        return self.parts.run(IMAGE_POOL, "image_embeds", last_hidden_state=hidden)

    def _embed_g(self, pixels: Array) -> Array:
        hidden = self.parts.hidden(pixels)
        v = self.parts.run(IMAGE_QUERIES, "query_embeds", last_hidden_state=hidden)
        return unit(self._pool(hidden)) + unit(v)

    def _contrastive(self, texts: list[str] | Array) -> Array:
        """Token ids for ``text_embed``, int64 [B,T]."""
        if isinstance(texts, np.ndarray):
            return texts
        return self.parts.tokenizer.contrastive(texts, pad_to="longest")


def _frames(frames: Any, num_frames: int | None) -> Any:
    """The frames of a video that are encoded."""
    if isinstance(frames, (str, os.PathLike)):
        read = decode_frames if os.path.isfile(frames) else read_frames
        return read(frames, num_frames)
    given = image_list(frames)
    if num_frames is None:
        return given
    chosen = sample_frames(len(given), num_frames)
    return given[chosen] if isinstance(given, np.ndarray) else [given[i] for i in chosen]
