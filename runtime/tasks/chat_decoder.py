"""Ids after ids with the decoder of a compiled InternVL-Chat.

A prompt keeps places for the tokens of images; they are put there, and ``chat_decoder`` goes on
after them (docs/model.md, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from internvl_edge.artifact.components import CHAT_DECODER
from internvl_edge.errors import ContextLengthError, MediaError, UsageError
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.generation.batch import Decoding, Generation, Prompt
from internvl_edge.runtime.generation.cache import empty_cache, start
from internvl_edge.runtime.generation.limits import require_room, rows_at_once
from internvl_edge.runtime.generation.loop import generate_all
from internvl_edge.runtime.tasks.chat_images import ChatSeen, see
from internvl_edge.runtime.tasks.requests import id_rows, require_vocabulary, slices
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.runtime.text.embeddings import Embedding
from internvl_edge.types import Array

__all__ = ["continued", "joined", "require_chat_room", "started"]


def continued(
    components: OpenComponents,
    images: Any,
    prompts: Array,
    how: Generation,
    batch_size: int = 8,
    image_token_id: int | None = None,
) -> Array:
    """Generate the ids after prompts of ids with places for image tokens, int64 [B,N].

    Args:
        components: of a directory.
        images: see ``Model``; their tokens fill the places row by row, in order. None: no places.
        prompts: int [B,T], 0 where padded on the left.
        how: the options.
        batch_size: rows at a time.
        image_token_id: the id of a place; None: what the checkpoint's tokenizer says.

    Raises:
        UsageError: no such id is known, another number of places than of image tokens, an id that
            the model does not have, or too long a prompt.
        MediaError: prompts that are not ids.
    """
    components.require(CHAT_DECODER)
    chat = components.artifact.manifest.model["chat"]
    place = chat["image_token_id"] if image_token_id is None else image_token_id
    if place is None and images is not None:
        raise UsageError(
            "expected image_token_id, the id of places for image tokens: the checkpoint had no "
            "tokenizer files that say it"
        )
    rows = [_unpadded(row, place) for row in id_rows(prompts)]
    for i, row in enumerate(rows):
        ids = (token for token in row if token != PLACE)
        require_vocabulary(ids, components.token_table.shape[0], f"prompt {i + 1} of {len(rows)}")
    require_chat_room(components, [len(row) for row in rows], how)
    seen = ChatSeen(tokens=()) if images is None else see(components, images, batch_size)
    tokens = joined(components, seen)
    counts = [row.count(PLACE) for row in rows]
    if sum(counts) != len(tokens):
        raise UsageError(
            f"the prompts have {sum(counts)} places for image tokens (id {place}), the images "
            f"have {len(tokens)}"
        )
    ends = np.cumsum(counts)
    size = rows_at_once(components.session(CHAT_DECODER), batch_size, how)
    batches = (
        started(
            components,
            rows[part],
            tokens[ends[part.start] - counts[part.start] : ends[part.stop - 1]],
            part.start,
        )
        for part in slices(len(rows), size)
    )
    return generate_all(batches, how)


def started(
    components: OpenComponents, rows: Sequence[list[int]], tokens: Array, first: int = 0
) -> tuple[Decoding, Prompt]:
    """Start a decoder on an empty cache with rows of ids; ``first`` is the number of the first."""
    session = components.session(CHAT_DECODER)
    embed = Embedding(components.token_table, tokens)
    decoding = start(session, empty_cache(session, len(rows)), embed)
    return decoding, Prompt(rows=rows, first=first, long_positions=_long_positions(components))


def _long_positions(components: OpenComponents) -> int:
    """Say where the positions of long texts begin; 0 where the model has no others for them."""
    llama = components.artifact.manifest.language_model or {}
    if llama.get("rope_type") != "longrope":
        return 0
    original: int = llama["original_max_position_embeddings"]
    return original if original < llama["max_position_embeddings"] else 0


def require_chat_room(components: OpenComponents, lengths: Sequence[int], how: Generation) -> None:
    """Refuse, before any work, prompts of more positions than the cache or the engine has.

    Raises:
        UsageError: how many there are, and how many are needed.
    """
    room, longest = components.positions(CHAT_DECODER), max(lengths)
    need = longest + how.max_new_tokens - 1  # the last token is not read
    if need > room:
        raise ContextLengthError(
            f"the cache has {room} positions, {need} are needed: {longest} for the conversation "
            f"with its images and {how.max_new_tokens} new tokens; clear the history, or lower "
            "max_new_tokens"
        )
    require_room(components.session(CHAT_DECODER), CHAT_DECODER, longest, 0, how)


def joined(components: OpenComponents, seen: ChatSeen) -> Array:
    """Join the tokens of all images [M,D]."""
    none = np.zeros((0, components.token_table.shape[1]), np.float32)
    return np.concatenate((none, *seen.tokens))


def _unpadded(row: Array, place: int | None) -> list[int]:
    """Strip a row of ids of its padding, and mark places."""
    first = int((row != 0).argmax())
    if not row.any():
        raise MediaError("a prompt: expected ids after zeros as padding, found only zeros")
    return [PLACE if i == place else i for i in row[first:].tolist()]
