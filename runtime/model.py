"""What people ask of a compiled directory: encode, classify, retrieve, match, caption, answer.

Every task has the image transform its published numbers were measured with (internvl-spec
section 4): ``"classification"`` crops, ``"retrieval"`` (also for matching and text about images)
squeezes to a square, ``"clip"`` is for video frames. ``embedding`` says what the embeddings are,
``speak`` how text is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_edge.artifact.open import open_artifact
from internvl_edge.errors import MediaError, UsageError
from internvl_edge.runtime.images.video import dual_softmax
from internvl_edge.runtime.session import open_component, require_backend
from internvl_edge.runtime.tasks import caption as speak
from internvl_edge.runtime.tasks import chat as chats
from internvl_edge.runtime.tasks.embed import DEFAULT_TEMPLATES, Embedder
from internvl_edge.runtime.tasks.requests import (
    distinct_labels,
    image_list,
    masked,
    one_place_templates,
    text_list,
)
from internvl_edge.runtime.tasks.vectors import ranked, softmax
from internvl_edge.runtime.text.tokenizer import CAPTION_PROMPT
from internvl_edge.types import Array

if TYPE_CHECKING:
    from internvl_edge.runtime.ort.options import OrtOptions
    from internvl_edge.runtime.trt.session import TrtOptions

__all__ = ["Model", "Retrieval", "load"]

CHAT_TOKENS = 128  # of an answer
LOGIT_SCALE = 100.0  # of zero-shot classification; the learned scale is for training


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Images and texts, ranked by similarity both ways."""

    similarity: Array  # float32 [images, texts], cosine
    texts_of_image: Array  # int64 [images, texts]: indices of the texts, best first
    images_of_text: Array  # int64 [texts, images]: indices of the images, best first


def load(
    out: str | os.PathLike[str],
    backend: str = "auto",
    device: str = "auto",
    *,
    options: OrtOptions | TrtOptions | None = None,
) -> Model:
    """Open a compiled directory; components open when they are first used.

    Args:
        out: the directory that ``internvl-edge export`` published.
        backend: ``"auto"``, ``"onnxruntime"``, ``"tensorrt-rtx"`` or ``"tensorrt"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        options: of every session, see ``open_session``; None: the backend's defaults.

    Raises:
        ArtifactError: the directory is not what its manifest says.
        UsageError, MissingDependency, HardwareError: the backend, unknown or not to be had here.
    """
    require_backend(backend)
    artifact = open_artifact(out)
    return Model(
        artifact,
        partial(open_component, artifact, backend=backend, device=device, options=options),
    )


class Model(Embedder):
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

    # --- compare ---------------------------------------------------------------------------------

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
        return _best_labels(names, embeds, weights)

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

    def classify_videos(
        self,
        videos: Sequence[Any],
        labels: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        mode: str = "c",
        num_frames: int | None = 8,
        batch_size: int = 8,
    ) -> list[list[dict[str, Any]]]:
        """As ``classify``, of videos as ``encode_video`` takes them."""
        names, templates = distinct_labels(labels), one_place_templates(templates)
        given = self._videos(videos, mode)
        weights = self.text_classifier(names, templates)
        embeds = [self.encode_video(v, num_frames, mode, True, batch_size) for v in given]
        return _best_labels(names, np.stack(embeds), weights)

    def retrieve_videos(
        self,
        videos: Sequence[Any],
        texts: Any,
        mode: str = "c",
        num_frames: int | None = 8,
        batch_size: int = 8,
        dual: bool = True,
    ) -> Retrieval:
        """As ``retrieve``, of videos as ``encode_video`` takes them.

        Args:
            videos: at least one.
            texts: see ``Model``.
            mode: ``"c"`` or ``"g"``.
            num_frames: sampled of each; None takes all.
            batch_size: frames that are computed at a time.
            dual: rank by ``video.dual_softmax`` over all that ask, as MSR-VTT's published results;
                ``similarity`` is the cosine in any case.
        """
        given = self._videos(videos, mode)
        text_embeds = self.encode_text(texts, normalize=True)
        embeds = [self.encode_video(v, num_frames, mode, True, batch_size) for v in given]
        similarity = np.stack(embeds) @ text_embeds.T  # (videos, texts)
        weigh = dual_softmax if dual else np.asarray
        return Retrieval(
            similarity=similarity,
            texts_of_image=ranked(weigh(similarity)),
            images_of_text=ranked(weigh(similarity.T)),
        )

    def _videos(self, videos: Sequence[Any], mode: str) -> list[Any]:
        self.parts.require("text_embed")
        self._embedder(mode)
        if isinstance(videos, (str, os.PathLike)) or not len(videos):
            raise MediaError(f"videos: expected a list of one or more, found {videos!r}")
        return list(videos)

    def match(self, images: Any, texts: Any, batch_size: int = 8) -> Array:
        """How likely each text describes its image, float32 [B] in 0..1, from the ITM head.

        Image i goes with text i; one image or one text goes with all of the other. Slower and more
        precise than ``retrieve``: QLLaMA reads the text and the image together.
        """
        return np.concatenate(list(self.match_stream(images, texts, batch_size)))

    def match_stream(self, images: Any, texts: Any, batch_size: int = 8) -> Iterator[Array]:
        """As ``match``, of every few pairs as soon as they are known: float32 [batch_size]."""
        self.parts.require("vision", "matcher")
        given, ids = image_list(images), text_list(texts)
        if not isinstance(ids, np.ndarray):
            ids = self.parts.tokenizer.match(ids)
        count = max(len(given), len(ids))
        if {len(given), len(ids)} - {1, count}:
            raise UsageError(
                f"match: expected as many texts as images, or one of either, found {len(given)} "
                f"images and {len(ids)} texts"
            )
        ids = np.broadcast_to(ids, (count, ids.shape[1]))
        batches = self.parts.hidden_batches(given, count, batch_size)
        return (self._matched(hidden, ids[rows]) for rows, hidden in batches)

    def _matched(self, hidden: Array, ids: Array) -> Array:
        feeds = {"last_hidden_state": hidden, **masked(ids)}
        logits = self.parts.run("matcher", "match_logits", **feeds)  # (B, 2): no, yes
        return softmax(logits)[:, 1].copy()

    # --- speak -----------------------------------------------------------------------------------

    def see(self, images: Any, batch_size: int = 8) -> speak.Seen | chats.ChatSeen:
        """Look at images once for many captions, answers and chats, which take the result."""
        if chats.is_chat(self.parts):
            return chats.see(self.parts, images, batch_size)
        return speak.see(self.parts, images, batch_size)

    def caption(
        self,
        images: Any,
        prompt: Any = CAPTION_PROMPT,
        *,
        num_beams: int = 5,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        batch_size: int = 8,
        **how: Any,
    ) -> list[str]:
        """A caption for each image; published ones have 5 beams and 8 to 30 new tokens.

        Args:
            images: see ``Model``, or what ``see`` gave.
            prompt: what the caption continues.
            num_beams: sentences kept under way; 1 is greedy.
            max_new_tokens: the most.
            min_new_tokens: the fewest.
            batch_size: images that are decoded and computed at a time.
            how: more fields of ``generation.batch.Generation``: ``length_penalty``, and of one
                beam ``temperature``, ``top_k``, ``top_p`` and ``seed``.

        Raises:
            UsageError: an option that cannot be, or more positions than the cache has.
        """
        how |= {"num_beams": num_beams, "min_new_tokens": min_new_tokens}
        options = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, **how}
        return self.answer(images, prompt, **options)

    def answer(
        self,
        images: Any,
        prompts: Any,
        *,
        max_new_tokens: int = 30,
        batch_size: int = 8,
        **how: Any,
    ) -> list[str]:
        """The text that continues prompt i on image i; greedy unless told otherwise.

        One image or one prompt goes with all of the other; the ViT runs once per image.

        Args:
            images: see ``Model``, or what ``see`` gave.
            prompts: strings such as ``"Question: how many digits? Answer:"``, or ids, padded in
                front with 0.
            max_new_tokens: the most.
            batch_size: rows that are computed at a time.
            how: as for ``caption``.
        """
        chosen = speak.generation(self.parts, max_new_tokens=max_new_tokens, **how)
        ids = speak.continued(self.parts, images, prompts, chosen, batch_size)
        return speak.texts_of(self.parts, ids, chosen)

    def generate(
        self,
        images: Any,
        prompts: Any,
        *,
        max_new_tokens: int = 30,
        batch_size: int = 8,
        **how: Any,
    ) -> Array:
        """As ``answer``, the new token ids: int64 [B,N], 0 behind the end.

        Of an InternVL-Chat, ``prompts`` are ids [B,T] with places for image tokens, which every
        image fills in order; ``image_token_id`` among ``how`` says which id a place has, if the
        checkpoint had no tokenizer files that do. ``images`` None: there are none.
        """
        place = how.pop("image_token_id", None)
        chosen = speak.generation(self.parts, max_new_tokens=max_new_tokens, **how)
        if chats.is_chat(self.parts):
            return chats.continued(self.parts, images, prompts, chosen, batch_size, place)
        return speak.continued(self.parts, images, prompts, chosen, batch_size)

    def stream(
        self, image: Any, prompt: Any = CAPTION_PROMPT, *, max_new_tokens: int = 30, **how: Any
    ) -> Iterator[str]:
        """As ``answer`` of one image and one prompt, in pieces as they come."""
        chosen = speak.generation(self.parts, max_new_tokens=max_new_tokens, **how)
        return speak.pieces(self.parts, image, prompt, chosen)

    def chat(
        self,
        images: Any,
        question: str,
        history: Sequence[chats.Turn] = (),
        *,
        template: str | None = None,
        system: str | None = None,
        max_new_tokens: int = CHAT_TOKENS,
        **how: Any,
    ) -> chats.Reply:
        """Answer a question in a conversation about images.

        Of an InternVL-Chat the history is part of the prompt, and questions say ``<image>`` where
        the next image stands; without it all images stand in front of the first question. An
        InternVL-G answers ``Question: … Answer:`` about one image: it was trained on single
        questions, so its history is kept for the caller and not read; it has neither templates nor
        system sentences.

        Args:
            images: all images of the conversation, see ``Model``, or what ``see`` gave; None: none.
            question: what is asked now.
            history: of the ``Reply`` before; also pairs of question and answer.
            template: how the prompt is spelled; the checkpoint's own by default.
            system: instead of the template's own sentence.
            max_new_tokens: the most.
            how: as for ``caption``.

        Returns:
            The answer, and the history to go on with, every image in its place.

        Raises:
            UsageError: places for images that are not as many as images, an unknown template, or
                more positions than the cache has.
            MediaError: an empty question, or an image that cannot be read.
        """
        chosen = speak.generation(self.parts, max_new_tokens=max_new_tokens, **how)
        options = {"template": template, "system": system}
        return chats.reply(self.parts, images, question, history, chosen, **options)

    def chat_stream(
        self,
        images: Any,
        question: str,
        history: Sequence[chats.Turn] = (),
        *,
        template: str | None = None,
        system: str | None = None,
        max_new_tokens: int = CHAT_TOKENS,
        **how: Any,
    ) -> Iterator[str]:
        """As ``chat``, the answer in pieces as they come."""
        chosen = speak.generation(self.parts, max_new_tokens=max_new_tokens, **how)
        options = {"template": template, "system": system}
        return chats.reply_pieces(self.parts, images, question, history, chosen, **options)


def _best_labels(names: Sequence[str], embeds: Array, weights: Array) -> list[list[dict[str, Any]]]:
    """The labels of every row of unit vectors (B, E), best first; ``weights`` are (K, E)."""
    scores = softmax(LOGIT_SCALE * embeds @ weights.T)  # (B, K)
    return [[{"label": names[k], "score": float(row[k])} for k in ranked(row)] for row in scores]
