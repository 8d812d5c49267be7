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
from internvl_edge.runtime.generation.answers import Opening
from internvl_edge.runtime.generation.batch import Decoding, Generation, Prompt
from internvl_edge.runtime.generation.cache import empty_cache, start
from internvl_edge.runtime.generation.limits import num_positions, require_room, rows_at_once
from internvl_edge.runtime.generation.loop import generate_all
from internvl_edge.runtime.generation.prefixes import marks_of
from internvl_edge.runtime.tasks.chat_images import ChatSeen, see
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.runtime.text.embeddings import Embedding
from internvl_edge.runtime.text.requests import id_rows, require_vocabulary, slices
from internvl_edge.types import Array

__all__ = ["continued", "fitting", "joined", "opening_of", "padding_of", "require_chat_room"]

CHAT_TOKENS = 1024  # of an answer, as the published quick starts ask for
FEW_TOKENS = 128  # fewer are not worth keeping the rotary positions of short texts


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
        prompts: int [B,T], the tokenizer's padding id where padded on the left.
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
    padding = padding_of(components)
    rows = [_unpadded(row, place, padding) for row in id_rows(prompts)]
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
        _started(
            components,
            rows[part],
            tokens[ends[part.start] - counts[part.start] : ends[part.stop - 1]],
            part.start,
        )
        for part in slices(len(rows), size)
    )
    return generate_all(batches, how)


def _started(
    components: OpenComponents, rows: Sequence[list[int]], tokens: Array, first: int = 0
) -> tuple[Decoding, Prompt]:
    """Start a decoder on an empty cache with rows of ids; ``first`` is the number of the first."""
    session = components.session(CHAT_DECODER)
    embed = Embedding(components.token_table, tokens)
    cache = empty_cache(session, len(rows))
    decoding = start(session, cache, embed, _num_heads(components))
    return decoding, Prompt(rows=rows, first=first, long_positions=_long_positions(components))


def opening_of(components: OpenComponents, ids: list[int], seen: ChatSeen) -> tuple[Opening, int]:
    """Open the answer to a prompt after the longest beginning that is kept; also count that."""
    session, long_positions = components.session(CHAT_DECODER), _long_positions(components)
    # positions of long texts are others for the same ids, and NumPy has no bfloat16
    is_plain = long_positions == 0 and all(s.dtype != "bfloat16" for s in session.inputs.values())
    marks = marks_of(ids, seen.tokens) if is_plain else None
    reused, cache = (0, {}) if marks is None else components.answers.prefixes.find(marks)
    tokens = joined(components, seen)[ids[:reused].count(PLACE) :]
    opening = Opening(
        cache=cache or empty_cache(session, 1),
        prompt=Prompt(
            rows=[ids[reused:]],
            past=reused,
            before=[ids[:reused]],
            long_positions=long_positions,
        ),
        embed=Embedding(components.token_table, tokens),
        num_heads=_num_heads(components),
        marks=marks,
    )
    return opening, reused


def _num_heads(components: OpenComponents) -> int | None:
    llama = components.artifact.manifest.language_model or {}
    return llama.get("num_attention_heads")


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
    room, longest = num_positions(components.artifact.manifest, CHAT_DECODER), max(lengths)
    need = longest + how.max_new_tokens - 1  # the last token is not read
    if need > room:
        raise ContextLengthError(
            f"the cache has {room} positions, {need} are needed: {longest} for the conversation "
            f"with its images and {how.max_new_tokens} new tokens; clear the history, or lower "
            "max_new_tokens"
        )
    require_room(components.session(CHAT_DECODER), CHAT_DECODER, longest, 0, how)


def fitting(components: OpenComponents, length: int) -> int:
    """Choose the most new tokens after a prompt, where nobody says: as many as there is room for.

    Of a model with other rotary positions for long texts (LongRoPE), an answer keeps to those of
    short ones where it is not cut short by that.
    """
    rooms = [CHAT_TOKENS, num_positions(components.artifact.manifest, CHAT_DECODER) - length + 1]
    largest = components.session(CHAT_DECODER).largest
    if "past" in largest:
        rooms.append(largest["past"] - length + 2)
    short = _long_positions(components) - length + 1
    if short >= FEW_TOKENS:
        rooms.append(short)
    return max(1, min(rooms))


def joined(components: OpenComponents, seen: ChatSeen) -> Array:
    """Join the tokens of all images [M,D]."""
    none = np.zeros((0, components.token_table.shape[1]), np.float32)
    return np.concatenate((none, *seen.tokens))


def padding_of(components: OpenComponents) -> int | None:
    """Return the id that rows are padded with; None where nothing says one.

    Where the tokenizer's files name none, it is id 0 of a SentencePiece vocabulary, an unknown
    piece that no prompt begins with. In a byte-level one it is a letter.
    """
    manifest = components.artifact.manifest
    own = manifest.model["chat"].get("padding_id")
    is_bytes = any(name in manifest.files for name in ("tokenizer.json", "vocab.json"))
    if own is not None or is_bytes:
        return None if own is None else int(own)
    return 0


def _unpadded(row: Array, place: int | None, padding: int | None) -> list[int]:
    """Strip a row of ids of its padding, and mark places."""
    is_token = np.ones(len(row), bool) if padding is None else row != padding
    if not is_token.any():
        raise MediaError(f"a prompt: expected ids after {padding} as padding, found only {padding}")
    first = int(is_token.argmax())
    return [PLACE if i == place else i for i in row[first:].tolist()]
