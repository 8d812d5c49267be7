"""A served model: its components, and what they compute, awaited.

Each component that embeds has a queue in which requests share batches (``batches``). A request
computes one batch at a time, so that a large one takes no more places than a small one, and how
many requests may come is decided before any work: beyond it they are refused, and none fails half
done. Pictures are decoded by a pool of threads, one after the other in each.

What is computed equals ``internvl_edge.runtime``: bit for bit where the batches are the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from internvl_edge.artifact.components import (
    CHAT_DECODER,
    DECODER,
    IMAGE_EMBED,
    IMAGE_POOL,
    IMAGE_QUERIES,
    MATCHER,
    TEXT_EMBED,
    VISION,
    find_component,
)
from internvl_edge.runtime.images.transform import Transform, pixel_levels, pixel_values
from internvl_edge.runtime.model import Model, load
from internvl_edge.runtime.session import options_for
from internvl_edge.runtime.tasks.embed import TEXT_BATCH, image_embedder
from internvl_edge.runtime.tasks.vectors import softmax, unit
from internvl_edge.runtime.text.requests import fill_template, masked, slices
from internvl_edge.serve.http.images import ImageUrl, decoded
from internvl_edge.serve.http.meters import Meters, Stages
from internvl_edge.serve.http.problems import blamed, overloaded
from internvl_edge.serve.models.batches import Batched
from internvl_edge.serve.models.chats import Chats
from internvl_edge.serve.options import ServeOptions
from internvl_edge.types import Array

__all__ = ["ServedModel"]

Answer = TypeVar("Answer")

REMEMBERED_CHARACTERS = 1 << 17  # of a set of labels
MOST_SLOTS = 4  # chats at once, where they share a decoder
FEW_CHARACTERS = 4096  # tokenized at once; more by the pool


class ServedModel:
    """A compiled directory under a name, and the queues of its components.

    Args:
        name: its id.
        out: the directory; it is checked here, and its components are opened by ``open``.
        options: of the server.
        pool: threads that decode pictures.

    Raises:
        InternVLError: as ``internvl_edge.load``.
    """

    def __init__(self, name: str, out: Path, options: ServeOptions, pool: Executor) -> None:
        self.name, self._options, self._pool = name, options, pool
        # Threads that wait in a loop would take the cores of those that decode and answer.
        given = options_for(
            options.backend, options.num_threads, spin=False, allow_slow=options.allow_slow
        )
        self.model: Model = load(out, options.backend, options.device, options=given)
        self._batched: dict[str, Batched] = {}
        self.chats: Chats | None = None
        self._under_way = 0
        components = self.components = self.model.components
        manifest = components.artifact.manifest
        self.is_chat = bool(manifest.model.get("chat"))
        self.embedding_size = components.embedding_size

    # --- opening and closing ---------------------------------------------------------------------

    def open(self, meters: Meters) -> None:
        """Open every component, and the queues that lead to them."""
        options, manifest = self._options, self.components.artifact.manifest
        meters.serves(self.name, options.backend, manifest.precision)
        for component in manifest.components:
            session = self.components.session(component)
            outputs = find_component(component).outputs
            if self.is_chat or component == DECODER or not outputs:
                continue  # a conversation runs these, or nothing does
            batched = Batched(
                session,
                outputs[0],
                _stage_of(component),
                max_batch=TEXT_BATCH if component == TEXT_EMBED else options.max_batch,
                max_delay_ms=options.max_delay_ms,
                max_queued=self._places,
                coming=lambda: self._under_way,
                ran=meters.batch_rows.labels(model=self.name, component=component).observe,
            )
            meters.watches_queue(self.name, component, partial(getattr, batched, "queue_length"))
            self._batched[component] = batched
        if self.components.has(DECODER) or self.components.has(CHAT_DECODER):
            self.chats = Chats(self.model, options.max_chats, self._shared_slots())
            meters.watches_queue(
                self.name, "chats", lambda: self.chats.waiting if self.chats else 0
            )

    def _shared_slots(self) -> int:
        """Let chats share the decoder where it can be shared; return how many are at once."""
        decoder = self.components.session(DECODER if self.components.has(DECODER) else CHAT_DECODER)
        count = min(MOST_SLOTS, self._options.max_chats)
        return max(1, self.components.answers.share(decoder, count))

    def close(self) -> None:
        """Run what is queued, then close every session."""
        if self.chats is not None:
            self.chats.close()
        for batched in self._batched.values():
            batched.close()
        self.model.close()

    @property
    def _places(self) -> int:
        """The requests that may be under way: those that wait, and a batch."""
        return self._options.max_queued + self._options.max_batch

    @contextmanager
    def place(self) -> Iterator[None]:
        """Take one of the places of requests under way.

        Raises:
            Problem: there is none.
        """
        if self._under_way >= self._places:
            raise overloaded(f"{self._under_way} requests are under way; try again later")
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    # --- what it computes ------------------------------------------------------------------------

    async def embed_images(
        self, urls: Sequence[ImageUrl], mode: str, transform: Transform | None, stages: Stages
    ) -> Array:
        """Embed pictures, float32 [B,E], not of unit length."""
        require_mode(self, mode)
        if len(urls) == 1 and self._under_way == 1:
            return await self._threaded(self._embed_alone, urls[0], mode, transform, stages)
        parts = [
            await self._embed_pixels(pixels, mode, stages)
            async for pixels in self._pixels(urls, transform, stages)
        ]
        return np.concatenate(parts)

    async def embed_texts(self, texts: Sequence[str], stages: Stages) -> tuple[Array, int]:
        """Embed texts, float32 [B,E], not of unit length; also count their tokens."""
        require_components(self, TEXT_EMBED)
        text_embed, parts, count = self._batched[TEXT_EMBED], [], 0
        for rows in slices(len(texts), text_embed.max_batch):
            ids = await self._ids(texts[rows], self.components.tokenizer.contrastive)
            count += int((ids > 0).sum())
            parts.append(await text_embed.run(masked(ids), stages))
        return np.concatenate(parts), count

    async def label_weights(
        self, labels: tuple[str, ...], templates: tuple[str, ...], stages: Stages
    ) -> Array:
        """Embed labels as ``Model.text_classifier``, float32 [K,E]; it is remembered there."""
        kept = self.components.classifiers.get((labels, templates))
        if kept is not None:
            return kept
        prompts = [fill_template(template, label) for label in labels for template in templates]
        embeds, _ = await self.embed_texts(prompts, stages)
        shape = (len(labels), len(templates), -1)
        weights = unit(unit(embeds).reshape(shape).mean(axis=1))  # (K, E)
        if sum(map(len, labels)) <= REMEMBERED_CHARACTERS:
            weights.flags.writeable = False  # it is shared from here on
            self.components.classifiers.keep((labels, templates), weights)
        return weights

    async def match(
        self, urls: Sequence[ImageUrl], texts: Sequence[str], stages: Stages
    ) -> tuple[Array, int]:
        """Compute how likely each text describes its picture, float32 [B]; also count tokens.

        One picture goes with all texts, or one text with all pictures.
        """
        require_components(self, VISION, MATCHER)
        ids = await self._ids(texts, self.components.tokenizer.match)
        tokens, count = int((ids > 0).sum()), max(len(urls), len(texts))
        matcher, vision = self._batched[MATCHER], self._batched[VISION]
        size = min(matcher.max_batch, vision.max_batch)
        hiddens = [
            await vision.run({"pixel_values": pixels}, stages)
            async for pixels in self._pixels(urls, "retrieval", stages)
        ]
        hidden, parts = np.concatenate(hiddens), []
        for rows in slices(count, size):
            number = rows.stop - rows.start
            some = ids[rows] if len(texts) > 1 else ids.repeat(number, axis=0)
            seen = hidden[rows] if len(urls) > 1 else hidden.repeat(number, axis=0)
            feeds = {"last_hidden_state": seen, **masked(some)}
            parts.append(softmax(await matcher.run(feeds, stages))[:, 1])
        return np.concatenate(parts), tokens

    async def picture_bytes(self, urls: Sequence[ImageUrl], stages: Stages) -> list[bytes]:
        """Decode the base64 of pictures and look at their sizes."""
        limit = self._options.max_pixels
        with stages.stage("decode"):
            return [await self._threaded(decoded, url, limit) for url in urls]

    # --- parts of it -----------------------------------------------------------------------------

    async def _pixels(
        self, urls: Sequence[ImageUrl], transform: Transform | None, stages: Stages
    ) -> Any:
        """Decode pictures, as many at a time as make a batch."""
        size = min(b.max_batch for b in self._batched.values())
        for rows in slices(len(urls), size):
            with stages.stage("decode"):
                jobs = [self._threaded(self._prepared, url, transform) for url in urls[rows]]
                pixels = await gathered(jobs)
            yield np.concatenate(pixels) if len(pixels) > 1 else pixels[0]

    def _prepared(self, url: ImageUrl, transform: Transform | None) -> Array:
        """Make one picture what the graphs take, [1,3,S,S]; in a thread of the pool."""
        picture = decoded(url, self._options.max_pixels)
        prepare = pixel_levels if self.components.takes_levels else pixel_values
        with blamed(url.param, "invalid_image"):
            return prepare([picture], self.components.preprocessing, transform)

    async def _embed_pixels(self, pixels: Array, mode: str, stages: Stages) -> Array:
        """Embed a batch, as ``runtime.tasks.embed.image_embedder`` does."""
        feeds = {"pixel_values": pixels}
        if mode == "c" and IMAGE_EMBED in self._batched:
            return await self._batched[IMAGE_EMBED].run(feeds, stages)
        hidden = {"last_hidden_state": await self._batched[VISION].run(feeds, stages)}
        u = await self._batched[IMAGE_POOL].run(hidden, stages)
        if mode == "c":
            return u
        return unit(u) + unit(await self._batched[IMAGE_QUERIES].run(hidden, stages))

    def _embed_alone(
        self, url: ImageUrl, mode: str, transform: Transform | None, stages: Stages
    ) -> Array:
        """Embed one picture in one thread: while nobody else asks, nobody is waited for."""
        with stages.stage("decode"):
            pixels = self._prepared(url, transform)
        with stages.stage(IMAGE_EMBED):
            return image_embedder(self.components, mode)(pixels)

    async def _ids(self, texts: Sequence[str], encode: Callable[..., Array]) -> Array:
        """Tokenize texts."""
        if sum(map(len, texts)) <= FEW_CHARACTERS:
            return encode(texts, pad_to="longest")
        return await self._threaded(partial(encode, texts, pad_to="longest"))

    async def _threaded(self, work: Callable[..., Answer], *given: Any) -> Answer:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, work, *given)


def require_mode(served: ServedModel, mode: str) -> None:
    """Refuse a kind of image embedding that the directory has no components for.

    Raises:
        Problem: which are missing.
    """
    with blamed("mode" if mode == "g" else "model", "missing_component"):
        image_embedder(served.components, mode)


def require_components(served: ServedModel, *names: str) -> None:
    """Refuse what the directory has no components for.

    Raises:
        Problem: which are missing.
    """
    with blamed("model", "missing_component"):
        served.components.require(*names)


async def gathered(jobs: Sequence[Awaitable[Answer]]) -> list[Answer]:
    """Wait for all; the first that fails, in their order, fails the whole."""
    if len(jobs) == 1:
        return [await jobs[0]]
    done = await asyncio.gather(*jobs, return_exceptions=True)
    failed = next((one for one in done if isinstance(one, BaseException)), None)
    if failed is None:
        return done  # type: ignore[return-value]
    try:
        raise failed
    finally:
        del done, failed  # its traceback has this frame


def _stage_of(component: str) -> str:
    """Name what a component's time is called: pictures become embeddings in several ways."""
    if component == MATCHER:
        return "match"
    return TEXT_EMBED if component == TEXT_EMBED else IMAGE_EMBED
