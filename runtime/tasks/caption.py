"""Text about images: captions, answers, continued prompts.

The image reaches the language model once: ``vision`` and ``image_queries`` turn it into the first
positions of the decoder's cache, and any number of prompts go on from there (docs/model.md,
sections 2.5 and 3.6). ``see`` keeps these positions, so that the ViT runs once per image however
often it is asked about.

A prompt is ``<s> TEXT``; what a user types is text, also where it looks like a special token. The
cache has as many positions as the model has rotary positions, or as it was exported with: image,
prompt and new tokens must fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_edge.artifact.components import DECODER, IMAGE_QUERIES, VISION
from internvl_edge.errors import ContextLengthError, MediaError, UsageError, shortened
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.generation.answers import Opening
from internvl_edge.runtime.generation.batch import Decoding, Generation, Prompt
from internvl_edge.runtime.generation.cache import start
from internvl_edge.runtime.generation.limits import num_positions, require_room, rows_at_once
from internvl_edge.runtime.generation.loop import generate_all
from internvl_edge.runtime.generation.text import TextStream, Usage, until_end, usage_of
from internvl_edge.runtime.images.sources import (
    Stream,
    batches_of_images,
    image_list,
    image_stream,
)
from internvl_edge.runtime.tasks.keywords import unknown_keyword
from internvl_edge.runtime.text.requests import require_vocabulary, slices, text_list
from internvl_edge.types import Array

__all__ = [
    "Seen",
    "TextStream",
    "answered",
    "continued",
    "generation",
    "opening_of",
    "pieces",
    "see",
    "texts_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The first positions of a decoder's cache, which images fill."""

    cache: Mapping[str, Array]  # present.{i}.key and .value, [B,heads,nq,d]

    def __len__(self) -> int:
        return len(next(iter(self.cache.values())))

    def rows(self, rows: slice | list[int]) -> dict[str, Array]:
        """Return the cache of some images."""
        return {name: values[rows] for name, values in self.cache.items()}


def see(
    components: OpenComponents,
    images: Any,
    batch_size: int = 8,
    *,
    before: int = 0,
    total: int | None = None,
) -> Seen:
    """Run the ViT and the queries on images, once for all that will be asked.

    Args:
        components: of a directory.
        images: see ``Model``.
        batch_size: images at a time.
        before: images of the same request that came before these, for messages.
        total: images of the whole request, for messages; 0 where nobody knows.

    Raises:
        UsageError: the directory lacks a component.
        MediaError: an image cannot be read.
    """
    if isinstance(images, Seen):
        return images
    components.require(VISION, IMAGE_QUERIES, DECODER)
    given = image_stream(images)
    cache: dict[str, list[Array]] = {}
    session = components.session(IMAGE_QUERIES)
    names = [name for name in session.outputs if name.startswith("present.")]
    for pixels in components.pixel_batches(given, "retrieval", batch_size, before, total):
        feeds = {"last_hidden_state": components.hidden(pixels)}
        for name, values in session.run(feeds, outputs=names).items():
            cache.setdefault(name, []).append(values)
    return Seen(cache={name: np.concatenate(values) for name, values in cache.items()})


def generation(components: OpenComponents, **how: Any) -> Generation:
    """Make the options of a request, with the model's own stop and padding ids.

    Raises:
        UsageError: an unknown option, or a value that cannot be.
    """
    known = Generation.__dataclass_fields__
    llama = components.artifact.manifest.language_model or {}
    for name in how:
        if name not in known:
            raise unknown_keyword(name, known, "option")
    eos, pad = llama.get("eos_token_id", 2), llama.get("pad_token_id", 0)
    chat = components.artifact.manifest.model.get("chat") or {}
    if chat.get("padding_id") is not None:
        pad = chat["padding_id"]
    own = {
        "stop_ids": (eos, *llama.get("more_eos_ids", ())),
        "pad_id": max(pad, 0),  # LLaMA's configs say −1 where there is none
    }
    chosen = Generation(**{**own, **how})
    if "stop_ids" in how and llama:
        require_vocabulary(chosen.stop_ids, llama["vocab_size"], "stop_ids")
    return chosen


def continued(
    components: OpenComponents, images: Any, prompts: Any, how: Generation, batch_size: int = 8
) -> Array:
    """Generate the token ids after prompt i on image i, int64 [B,N], padded after the end.

    Args:
        components: of a directory.
        images: see ``Model``, or what ``see`` gave; one goes with all prompts.
        prompts: strings, or ids int [B,T], 0 where padded on the left; one goes with all images.
        how: the options.
        batch_size: rows at a time.

    Raises:
        UsageError: numbers of images and prompts that do not fit, or too long a prompt.
        MediaError: an image or a prompt cannot be used.
    """
    components.require(VISION, IMAGE_QUERIES, DECODER)
    given = images if isinstance(images, Seen) else image_stream(images)
    rows = _prompt_rows(components, prompts)
    if isinstance(given, Stream) and len(rows) == 1:  # it may never end
        _require_room(components, rows, how)
        return generate_all(_streamed(components, given, rows, how, batch_size), how)
    given = given if isinstance(given, Seen) else image_list(given)
    count = max(len(given), len(rows))
    if {len(given), len(rows)} - {1, count}:
        raise UsageError(
            f"expected as many prompts as images, or one of either, found {len(given)} images and "
            f"{len(rows)} prompts"
        )
    _require_room(components, rows, how)
    rows = rows * count if len(rows) == 1 else rows
    decoder = components.session(DECODER)
    caches = _caches(components, given, count, rows_at_once(decoder, batch_size, how))
    batches = (
        (start(decoder, cache), _prompt(rows[part], cache, part.start)) for part, cache in caches
    )
    return generate_all(batches, how)


def _streamed(
    components: OpenComponents,
    images: Stream,
    rows: list[list[int]],
    how: Generation,
    batch_size: int,
) -> Iterator[tuple[Decoding, Prompt]]:
    """Yield the batches of images that come one by one, each with the same prompt."""
    decoder = components.session(DECODER)
    size = rows_at_once(decoder, batch_size, how)
    for some, start_at, total in batches_of_images(images, size):
        seen = see(components, some, size, before=start_at, total=total or 0)
        cache = dict(seen.cache)
        yield start(decoder, cache), _prompt(rows * len(seen), cache, start_at)


def texts_of(components: OpenComponents, ids: Array, how: Generation) -> list[str]:
    """Decode new ids up to their end."""
    return [components.tokenizer.decode(until_end(row, how)) for row in ids.tolist()]


def pieces(components: OpenComponents, image: Any, prompt: Any, how: Generation) -> TextStream:
    """Yield the text after one prompt on one image, as it comes; the pieces are all of it.

    Raises:
        UsageError: several images or prompts, beams, or too long a prompt.
        MediaError: the image or the prompt cannot be used.
    """
    opening = opening_of(components, image, prompt, how)
    tokens = components.answers.tokens(components.session(DECODER), opening, how)
    return TextStream(tokens, how, components.tokenizer.decode, _length(opening))


def answered(
    components: OpenComponents, image: Any, prompt: Any, how: Generation
) -> tuple[str, Usage]:
    """Answer one prompt on one image, and say what it took.

    Raises:
        UsageError, MediaError: as for ``pieces``, but beams.
    """
    opening = opening_of(components, image, prompt, how)
    ids = components.answers.ids(components.session(DECODER), opening, how)
    text = components.tokenizer.decode(until_end(ids, how))
    return text, usage_of(ids, how, _length(opening), 0)


def opening_of(components: OpenComponents, image: Any, prompt: Any, how: Generation) -> Opening:
    """Open the answer to one prompt on one image.

    Raises:
        UsageError: several images or prompts, or too long a prompt.
        MediaError: the image or the prompt cannot be used.
    """
    seen, rows = see(components, image), _prompt_rows(components, prompt)
    if len(seen) != 1 or len(rows) != 1:
        raise UsageError(
            f"only one image and one prompt can be streamed, found {len(seen)} and {len(rows)}"
        )
    _require_room(components, rows, how)
    return Opening(cache=seen.cache, prompt=_prompt(rows, seen.cache))


def _length(opening: Opening) -> int:
    return opening.prompt.past + len(opening.prompt.rows[0])


def _caches(
    components: OpenComponents, images: Any, count: int, batch_size: int
) -> Iterator[tuple[slice, dict[str, Array]]]:
    """Yield the cache of every few rows; one image is looked at once."""
    if len(images) == 1:
        seen = see(components, images)
        for rows in slices(count, batch_size):
            yield rows, seen.rows([0] * (rows.stop - rows.start))
        return
    for rows in slices(count, batch_size):
        if isinstance(images, Seen):
            yield rows, images.rows(rows)
        else:
            some = see(components, images[rows], batch_size, before=rows.start, total=count)
            yield rows, dict(some.cache)


def _prompt_rows(components: OpenComponents, prompts: Any) -> list[list[int]]:
    """Return the ids of each prompt, without padding."""
    given = text_list(prompts, "prompt")
    if not isinstance(given, np.ndarray):
        return components.tokenizer.prompt_rows(given)
    llama = components.artifact.manifest.language_model or {}
    rows = []
    for i, row in enumerate(given):
        require_vocabulary(row.tolist(), llama["vocab_size"], f"prompt {i + 1} of {len(given)}")
        first = int((row > 0).argmax())
        if not row.any() or (row[first:] == 0).any():
            raise MediaError(
                f"prompt {i + 1} of {len(given)}: expected ids after zeros as padding, found "
                f"{shortened(row.tolist())}"
            )
        rows.append(row[first:].tolist())
    return rows


def _prompt(rows: list[list[int]], cache: Mapping[str, Array], first: int = 0) -> Prompt:
    """Make a prompt of rows of ids after a cache; ``first`` is the number of the first one."""
    return Prompt(rows=rows, past=next(iter(cache.values())).shape[2], first=first)


def _require_room(components: OpenComponents, rows: list[list[int]], how: Generation) -> None:
    room = num_positions(components.artifact.manifest, DECODER)
    image = components.artifact.manifest.model["internvl"]["num_query_token"]
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    need = image + len(rows[longest]) + how.max_new_tokens - 1  # the last token is not read
    if need > room:
        raise ContextLengthError(
            f"prompt {longest + 1} of {len(rows)}: the cache has {room} positions, {need} are "
            f"needed: {image} for the image, {len(rows[longest])} for the prompt and "
            f"{how.max_new_tokens} new tokens; shorten the prompt or lower max_new_tokens"
        )
    require_room(components.session(DECODER), DECODER, len(rows[longest]), image, how)
