"""The open components of a compiled directory: sessions, tokenizer, image transforms.

Everything opens when it is first used. Each image goes through the ViT once per call, whatever
else is computed from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_edge.artifact import Artifact
from internvl_edge.artifact.components import VISION, components_of
from internvl_edge.errors import UsageError, did_you_mean
from internvl_edge.files.forks import in_children
from internvl_edge.runtime.generation.answers import AnswerOptions, Answers
from internvl_edge.runtime.images.options import MEAN, STD, ImageOptions, image_options
from internvl_edge.runtime.images.sources import (
    batches_of_images,
    check_normalised,
    is_normalised,
    require_side,
)
from internvl_edge.runtime.session import Session
from internvl_edge.runtime.text.requests import batches_of, require_whole, slices
from internvl_edge.types import Array

if TYPE_CHECKING:
    from internvl_edge.runtime.images.transform import Preprocessing, Transform
    from internvl_edge.runtime.text.chat_tokenizer import ChatTokenizer
    from internvl_edge.runtime.text.embeddings import TokenTable
    from internvl_edge.runtime.text.tokenizer import Tokenizer

__all__ = ["AnswerOptions", "Classifiers", "ImageOptions", "OpenComponents"]

MAX_CLASSIFIERS = 16
Labels = tuple[tuple[str, ...], tuple[str, ...]]  # and their templates, or prompts


def _why_impossible(model: Mapping[str, Any], components: Sequence[str]) -> str | None:
    """Say why a checkpoint of this configuration has no such components; None if it can."""
    if chat := model.get("chat"):
        kind = "an InternVL-Chat"
        possible = components_of("chat", [key for key, value in chat.items() if value])
    elif model.get("internvl") is not None:
        kind, possible = "an InternVL with QLLaMA", components_of("internvl")
    else:
        kind, possible = "a vision tower alone", components_of("vit")
    missing = [name for name in components if name not in possible]
    return f"its checkpoint is {kind}, which has no {', '.join(missing)}" if missing else None


class Classifiers:
    """The text embeddings of the last sets of labels; thread-safe."""

    def __init__(self) -> None:
        self._weights: OrderedDict[Labels, Array] = OrderedDict()  # the last used is last
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._weights)

    def get(self, labels: Labels) -> Array | None:
        """Return what was kept for these labels and templates; None where nothing was."""
        with self._lock:
            if labels not in self._weights:
                return None
            self._weights.move_to_end(labels)
            return self._weights[labels]

    def keep(self, labels: Labels, weights: Array) -> None:
        """Keep these, and drop those of least recent use beyond the limit."""
        with self._lock:
            self._weights[labels] = weights
            while len(self._weights) > MAX_CLASSIFIERS:
                self._weights.popitem(last=False)


class OpenComponents:
    """The components of a directory, opened as they are used; thread-safe.

    Args:
        artifact: the open directory.
        open_one: opens the session of a component.
        images: how pictures are read; None: the defaults.
        opened_by: how to open the same in another process; None: it cannot be.
        answers: how it answers; None: the defaults.

    Raises:
        UsageError: ``images`` or ``answers`` is something else.
    """

    def __init__(
        self,
        artifact: Artifact,
        open_one: Callable[[str], Session],
        images: ImageOptions | None = None,
        opened_by: tuple[Any, str] | None = None,
        answers: AnswerOptions | None = None,
    ) -> None:
        self.artifact = artifact
        self.answers = Answers(answers)
        self.images = image_options(images)
        self._opened_by = opened_by
        self._open_one = open_one
        self.classifiers = Classifiers()
        self._sessions: dict[str, Session] = {}
        self._lock = RLock()
        in_children(self, OpenComponents._renew_lock)
        self._closed = False

    def session(self, component: str) -> Session:
        """Return the session of a component, opened when first asked for."""
        self.require(component)
        with self._lock:
            if self._closed:
                raise UsageError(f"the model of {self.artifact.path} is closed; load it again")
            if component not in self._sessions:
                self._sessions[component] = self._open_one(component)
            return self._sessions[component]

    def opened_by(self) -> tuple[Any, str]:
        """Return how to open the same in another process.

        Raises:
            UsageError: they were not opened by ``load``.
        """
        if self._opened_by is None:
            raise UsageError(
                f"the model of {self.artifact.path} was not opened by load, so it cannot be "
                "opened again in another process; load it there"
            )
        return self._opened_by

    def _renew_lock(self) -> None:
        """Replace the lock, which a thread of the parent may have held at a fork."""
        self._lock = RLock()

    def close(self) -> None:
        """Close every session; may be called again."""
        self.answers.close()
        with self._lock:
            self._closed = True
            while self._sessions:
                self._sessions.popitem()[1].close()

    def has(self, component: str) -> bool:
        return component in self.artifact.manifest.components

    def require(self, *names: str) -> None:
        """Refuse, before any work, a task whose components are missing.

        Raises:
            UsageError: which ones, and how to get them.
        """
        missing = [name for name in names if not self.has(name)]
        if missing:
            present = list(self.artifact.manifest.components)
            impossible = _why_impossible(self.artifact.manifest.model, missing)
            remedy = impossible or (
                "run: internvl-edge export CHECKPOINT -o OUT --components "
                f"{','.join([*present, *missing])}"
            )
            raise UsageError(
                f"{self.artifact.path} has no component {', '.join(missing)} (it has "
                f"{', '.join(present)}){did_you_mean(missing[0], present)}; {remedy}"
            )

    def run(self, component: str, output: str, **feeds: Array) -> Array:
        """Compute one output of a component."""
        return self.session(component).run(feeds, outputs=[output])[output]

    def hidden(self, pixels: Array) -> Array:
        """Turn ``pixel_values`` [B,3,H,W] into the vision tower's tokens [B,N,C]."""
        return self.run(VISION, "last_hidden_state", pixel_values=pixels)

    def hidden_batches(
        self, images: Any, count: int | None, batch_size: int
    ) -> Iterator[tuple[int, Array]]:
        """Yield vision tokens of ``count`` pairs: of every image, or of the only one each time.

        Each batch comes with the number of pairs before it; a count of None is that of a stream.
        """
        hiddens = map(self.hidden, self.pixel_batches(images, "retrieval", batch_size))
        if count is None or len(images) == count:
            done = 0
            for hidden in hiddens:
                yield done, hidden
                done += len(hidden)
            return
        only = next(hiddens)
        for rows in slices(count, batch_size):
            yield rows.start, np.broadcast_to(only, (rows.stop - rows.start, *only.shape[1:]))

    def pixel_batches(
        self,
        images: Any,
        transform: Transform | None,
        batch_size: int,
        before: int = 0,
        total: int | None = None,
    ) -> Iterator[Array]:
        """Prepare a few images at a time, so that memory does not grow with their number.

        Args:
            images: what ``image_stream`` gave.
            transform: instead of the directory's own.
            batch_size: images at a time.
            before: images of the same request that came before these, for messages.
            total: images of the whole request, for messages; 0 where nobody knows.

        Raises:
            UsageError: the images are normalised, and the graphs do that themselves.
            MediaError: an image is not accepted; the message says which and why.
        """
        require_whole("batch_size", batch_size, 1)
        if is_normalised(images):
            if self.takes_levels:
                raise UsageError(
                    f"{self.artifact.path} normalises inside its graphs (--input uint8): expected "
                    f"pictures, found an array {images.dtype} {list(images.shape)}"
                )
            told = self.artifact.manifest.preprocessing
            require_side(images, told.get("size"))
            check_normalised(images, told.get("mean", MEAN), told.get("std", STD))
            yield from batches_of(images, batch_size)
            return
        from internvl_edge.runtime.images.transform import pixel_levels, pixel_values

        prepare = pixel_levels if self.takes_levels else pixel_values
        for some, start, count in batches_of_images(images, batch_size):
            yield prepare(
                some,
                self.preprocessing,
                transform,
                before=before + start,
                total=(count or 0) if total is None else total,
                options=self.images,
            )

    @cached_property
    def takes_levels(self) -> bool:
        """True where the graphs take uint8 and normalise it themselves."""
        records = self.artifact.manifest.components.values()
        return any(
            spec.name == "pixel_values" and spec.dtype == "uint8"
            for record in records
            for spec in record.inputs
        )

    @cached_property
    def embedding_size(self) -> int | None:
        """The numbers of an embedding, E; None where nothing is embedded."""
        sizes = (
            int(spec.shape[-1])
            for record in self.artifact.manifest.components.values()
            for spec in record.outputs
            if spec.name in ("image_embeds", "text_embeds")
        )
        return next(sizes, None)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """The transforms of the directory."""
        from internvl_edge.runtime.images.transform import Preprocessing

        return Preprocessing.from_json(self.artifact.manifest.preprocessing)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the directory; UsageError where its checkpoint had none."""
        from internvl_edge.runtime.text.tokenizer import (
            MAX_MODEL_NBYTES,
            TOKENIZER_FILE,
            Tokenizer,
        )

        if TOKENIZER_FILE not in self.artifact.manifest.files:
            raise UsageError(
                f"{self.artifact.path} has no {TOKENIZER_FILE}, as its checkpoint had none: texts "
                "must be token ids, int [B,T]; for strings, put the model's file beside the "
                "checkpoint's config.json and export again"
            )
        path, data = (
            self.artifact.file(TOKENIZER_FILE),
            self.artifact.read(TOKENIZER_FILE, MAX_MODEL_NBYTES),
        )
        return Tokenizer(data, name=str(path))

    @cached_property
    def chat_tokenizer(self) -> ChatTokenizer:
        """The tokenizer of an InternVL-Chat's directory."""
        from internvl_edge.runtime.text.chat_tokenizer import open_chat_tokenizer

        return open_chat_tokenizer(self.artifact)

    @cached_property
    def token_table(self) -> TokenTable:
        """The token embedding of an InternVL-Chat's directory."""
        from internvl_edge.runtime.text.embeddings import open_table

        return open_table(self.artifact)
