"""What people ask of a compiled directory: encode, classify, retrieve, match.

The embeddings (internvl-spec sections 3.3 and 6) are

    InternVL-C   u, the attention pool over the ViT's tokens
    InternVL-G   u/|u| + v/|v|, v from the queries that QLLaMA put to the image; |·| up to 2
    text         the last token of a causal LLaMA, projected

and none of them has unit length unless ``normalize=True``. A video is the mean of its frames'
embeddings. Each image goes through the ViT once per call, whatever else is computed from it; images
and texts are independent of what else is in their batch, up to float rounding.

Every task has the image transform its published numbers were measured with (section 4):
``"classification"`` crops, ``"retrieval"`` (also for matching) squeezes to a square, ``"clip"``
is for video frames.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from threading import RLock
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.errors import UsageError
from internvl_edge.runtime.requests import (
    batches_of,
    distinct_labels,
    fill_template,
    image_list,
    is_normalised,
    masked,
    one_place_templates,
    slices,
    text_list,
)
from internvl_edge.runtime.session import (
    Array,
    Session,
    did_you_mean,
    open_component,
    require_backend,
)
from internvl_edge.runtime.vectors import ranked, softmax, unit
from internvl_edge.runtime.video import pool_frames, read_frames, sample_frames

if TYPE_CHECKING:
    from internvl_edge.runtime.image import Preprocessing, Transform
    from internvl_edge.runtime.tokenizer import Tokenizer

__all__ = ["Model", "Retrieval", "load"]

TOKENIZER_FILE = "tokenizer.model"
TEXT_BATCH = 64
LOGIT_SCALE = 100.0  # of zero-shot classification; the learned scale is for training
DEFAULT_TEMPLATES = ("a photo of a {}",)
MAX_CLASSIFIERS = 16  # sets of labels whose text embeddings are kept
MODES = ("c", "g")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Images and texts, ranked by similarity both ways."""

    similarity: Array  # float32 [images, texts], cosine
    texts_of_image: Array  # int64 [images, texts]: indices of the texts, best first
    images_of_text: Array  # int64 [texts, images]: indices of the images, best first


def load(out: str | os.PathLike[str], backend: str = "auto", device: str = "auto") -> Model:
    """Open a compiled directory; components open when they are first used.

    Args:
        out: the directory that ``internvl-edge export`` published.
        backend: ``"auto"``, ``"onnxruntime"``, ``"tensorrt-rtx"`` or ``"tensorrt"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Raises:
        ArtifactError: the directory is not what its manifest says.
        UsageError, MissingDependency, HardwareError: the backend, unknown or not to be had here.
    """
    require_backend(backend)
    artifact = open_artifact(out)
    return Model(artifact, partial(open_component, artifact, backend=backend, device=device))


class Model:
    """The components of a directory, as one model. Thread-safe; a context manager.

    Images are paths, bytes, PIL images, HWC uint8 arrays, one or a sequence of them, or float32
    ``pixel_values`` [B,3,H,W] that are normalised already. Texts are strings, one or a sequence,
    or token ids, int [B,T] as an array or as lists of equal length, 0 where padded.

    Every method raises ``UsageError`` when the directory lacks a component it needs or the model
    is closed, ``MediaError`` when an image or text cannot be read, ``FeedError`` when an array
    does not fit the component, and ``HardwareError`` or ``ResourceError`` when a session does.

    Args:
        artifact: the open directory.
        open_one: opens the session of a component.
    """

    def __init__(self, artifact: Artifact, open_one: Callable[[str], Session]) -> None:
        self.artifact = artifact
        self._open_one = open_one
        self._sessions: dict[str, Session] = {}
        self._classifiers: OrderedDict[tuple[tuple[str, ...], ...], Array] = OrderedDict()
        self._lock = RLock()
        self._closed = False

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
        batches = self._pixel_batches(image_list(images), transform, batch_size)
        embeds = np.concatenate([embed(pixels) for pixels in batches])
        return unit(embeds) if normalize else embeds

    def encode_text(
        self, texts: Any, normalize: bool = False, batch_size: int = TEXT_BATCH
    ) -> Array:
        """Embeddings of texts, float32 [B,E]; strings get the prefix the model was trained with."""
        self._require("text_embed")
        embeds = np.concatenate(
            [
                self._run("text_embed", "text_embeds", **masked(self._contrastive(batch)))
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
            frames: a folder of frames, or a sequence of images.
            num_frames: sample at most so many of them; None takes all.
            mode: ``"c"`` or ``"g"``.
            normalize: give the mean unit length.
            batch_size: frames that are computed at a time.
        """
        chosen = _frames(frames, num_frames)
        mean = pool_frames(self.encode_image(chosen, mode, False, batch_size, "clip"))
        return unit(mean) if normalize else mean

    # --- compare ---------------------------------------------------------------------------------

    def text_classifier(
        self, labels: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES
    ) -> Array:
        """One unit vector per label, float32 [K,E]: the mean over the templates' unit vectors.

        The last sets of labels are remembered, so that classifying again costs no text.

        Raises:
            UsageError: no labels, a label twice, a template without one ``{}`` or ``{c}``.
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

    def classify(
        self,
        images: Any,
        labels: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        mode: str = "c",
        batch_size: int = 8,
    ) -> list[list[dict[str, Any]]]:
        """Zero-shot classification, softmax over 100 · cosine (internvl-spec section 6).

        Args:
            images: see ``Model``.
            labels: the classes.
            templates: each with ``{}`` or ``{c}`` where the label goes.
            mode: ``"c"`` or ``"g"``.
            batch_size: images that are computed at a time.

        Returns:
            For every image its labels, best first: ``{"label": str, "score": float}``.
        """
        names, templates = distinct_labels(labels), one_place_templates(templates)
        given = self._embeddable(images, mode)
        weights = self.text_classifier(names, templates)
        embeds = self.encode_image(given, mode, True, batch_size, "classification")
        scores = softmax(LOGIT_SCALE * embeds @ weights.T)  # (B, K)
        return [
            [{"label": names[k], "score": float(row[k])} for k in ranked(row)] for row in scores
        ]

    def retrieve(self, images: Any, texts: Any, mode: str = "c", batch_size: int = 8) -> Retrieval:
        """Rank texts for every image and images for every text by cosine similarity."""
        given = self._embeddable(images, mode)
        text_embeds = self.encode_text(texts, normalize=True)
        similarity = self.encode_image(given, mode, True, batch_size, "retrieval") @ text_embeds.T
        return Retrieval(
            similarity=similarity,
            texts_of_image=ranked(similarity),
            images_of_text=ranked(similarity.T),
        )

    def match(self, images: Any, texts: Any, batch_size: int = 8) -> Array:
        """How likely each text describes its image, float32 [B] in 0..1, from the ITM head.

        Image i goes with text i; one image or one text goes with all of the other. Slower and more
        precise than ``retrieve``: QLLaMA reads the text and the image together.
        """
        self._require("vision", "matcher")
        given, ids = image_list(images), text_list(texts)
        if not isinstance(ids, np.ndarray):
            ids = self.tokenizer.match(ids)
        count = max(len(given), len(ids))
        if {len(given), len(ids)} - {1, count}:
            raise UsageError(
                f"match: expected as many texts as images, or one of either, found {len(given)} "
                f"images and {len(ids)} texts"
            )
        ids = np.broadcast_to(ids, (count, ids.shape[1]))
        logits = []
        for rows, hidden in self._hidden_batches(given, count, batch_size):
            feeds = {"last_hidden_state": hidden, **masked(ids[rows])}
            logits.append(self._run("matcher", "match_logits", **feeds))
        return softmax(np.concatenate(logits))[:, 1].copy()  # of (B, 2): no, yes

    # --- sessions --------------------------------------------------------------------------------

    def session(self, component: str) -> Session:
        """The session of a component, opened when first asked for; the model closes it."""
        self._require(component)
        with self._lock:
            if self._closed:
                raise UsageError(f"the model of {self.artifact.path} is closed; load it again")
            if component not in self._sessions:
                self._sessions[component] = self._open_one(component)
            return self._sessions[component]

    def close(self) -> None:
        """Close every session; may be called again."""
        with self._lock:
            self._closed = True
            while self._sessions:
                self._sessions.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- parts -----------------------------------------------------------------------------------

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """The transforms of the directory."""
        from internvl_edge.runtime.image import Preprocessing

        return Preprocessing.from_json(self.artifact.manifest.preprocessing)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the directory; UsageError where its checkpoint had none."""
        from internvl_edge.runtime.tokenizer import Tokenizer

        if TOKENIZER_FILE not in self.artifact.manifest.files:
            raise UsageError(
                f"{self.artifact.path} has no {TOKENIZER_FILE}, as its checkpoint had none: texts "
                "must be token ids, int [B,T]; for strings, put the model's file beside the "
                "checkpoint's config.json and export again"
            )
        return Tokenizer(self.artifact.file(TOKENIZER_FILE))

    def _has(self, component: str) -> bool:
        return component in self.artifact.manifest.components

    def _require(self, *components: str) -> None:
        missing = [name for name in components if not self._has(name)]
        if missing:
            present = list(self.artifact.manifest.components)
            raise UsageError(
                f"{self.artifact.path} has no component {', '.join(missing)} (it has "
                f"{', '.join(present)}){did_you_mean(missing[0], present)}; run: internvl-edge "
                f"export CHECKPOINT -o OUT --components {','.join([*present, *missing])}"
            )

    def _run(self, component: str, output: str, **feeds: Array) -> Array:
        return self.session(component).run(feeds, outputs=[output])[output]

    def _hidden(self, pixels: Array) -> Array:
        return self._run("vision", "last_hidden_state", pixel_values=pixels)  # (B, N, C)

    def _embedder(self, mode: str) -> Callable[[Array], Array]:
        """What makes embeddings of ``pixel_values``; refused before any work if it cannot."""
        if mode not in MODES:
            raise UsageError(f"mode {mode!r}: expected 'c' (InternVL-C) or 'g' (InternVL-G)")
        if mode == "g":
            self._require("vision", "image_pool", "image_queries")
            return self._embed_g
        if self._has("vision") and self._has("image_pool") and not self._has("image_embed"):
            return lambda pixels: self._pool(self._hidden(pixels))
        self._require("image_embed")
        return lambda pixels: self._run("image_embed", "image_embeds", pixel_values=pixels)

    def _embeddable(self, images: Any, mode: str) -> Any:
        """The images, where nothing is known to refuse them later; texts are computed before."""
        self._require("text_embed")
        self._embedder(mode)
        return image_list(images)

    def _pool(self, hidden: Array) -> Array:
        return self._run("image_pool", "image_embeds", last_hidden_state=hidden)

    def _embed_g(self, pixels: Array) -> Array:
        hidden = self._hidden(pixels)
        v = self._run("image_queries", "query_embeds", last_hidden_state=hidden)
        return unit(self._pool(hidden)) + unit(v)

    def _hidden_batches(
        self, images: Any, count: int, batch_size: int
    ) -> Iterator[tuple[slice, Array]]:
        """Vision tokens of ``count`` pairs: of every image, or of the only one each time."""
        hiddens = map(self._hidden, self._pixel_batches(images, "retrieval", batch_size))
        if len(images) == count:
            yield from zip(slices(count, batch_size), hiddens, strict=True)
            return
        only = next(hiddens)
        for rows in slices(count, batch_size):
            yield rows, np.broadcast_to(only, (rows.stop - rows.start, *only.shape[1:]))

    def _pixel_batches(
        self, images: Any, transform: Transform | None, batch_size: int
    ) -> Iterator[Array]:
        """``pixel_values`` of a few images at a time, so that memory does not grow with them."""
        if is_normalised(images):
            yield from batches_of(images, batch_size)
            return
        from internvl_edge.runtime.image import pixel_values

        for rows in slices(len(images), batch_size):
            yield pixel_values(
                images[rows], self.preprocessing, transform, before=rows.start, total=len(images)
            )

    def _contrastive(self, texts: list[str] | Array) -> Array:
        """Token ids for ``text_embed``, int64 [B,T]."""
        if isinstance(texts, np.ndarray):
            return texts
        return self.tokenizer.contrastive(texts, pad_to="longest")


def _frames(frames: Any, num_frames: int | None) -> Any:
    """The frames of a video that are encoded."""
    if isinstance(frames, (str, os.PathLike)):
        return read_frames(frames, num_frames)
    given = image_list(frames)
    if num_frames is None:
        return given
    chosen = sample_frames(len(given), num_frames)
    return given[chosen] if isinstance(given, np.ndarray) else [given[i] for i in chosen]
