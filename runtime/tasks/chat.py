"""Conversations about images with a compiled InternVL-Chat.

The prompt keeps places for the tokens of every image (``chat_images``); the runtime puts them
there, and ``chat_decoder`` goes on after them (internvl-spec section 5). An InternVL-G answers
single questions about one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from internvl_edge.artifact.components import CHAT_DECODER
from internvl_edge.errors import MediaError, UsageError
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.generation.batch import Decoding, Generation, Prompt
from internvl_edge.runtime.generation.cache import empty_cache, start
from internvl_edge.runtime.generation.limits import require_room, rows_at_once
from internvl_edge.runtime.generation.loop import generate, generate_all, stream
from internvl_edge.runtime.generation.text import streamed, until_end
from internvl_edge.runtime.tasks import caption
from internvl_edge.runtime.tasks.caption import Seen
from internvl_edge.runtime.tasks.chat_images import ChatSeen, as_images, see
from internvl_edge.runtime.tasks.requests import (
    id_rows,
    require_vocabulary,
    slices,
    text_problem,
)
from internvl_edge.runtime.text.chat_tokenizer import IMAGE, PLACE
from internvl_edge.runtime.text.embeddings import Embedding
from internvl_edge.runtime.text.templates import Turn, conversation, find_template
from internvl_edge.types import Array

__all__ = [
    "Reply",
    "Turn",
    "continued",
    "is_chat",
    "remembered",
    "reply",
    "reply_pieces",
]

QUESTION = "Question: {} Answer:"  # of an InternVL-G, which was trained on single questions


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer, and the conversation that it ends."""

    text: str
    history: tuple[Turn, ...]


def is_chat(components: OpenComponents) -> bool:
    """Whether a directory is of an InternVL-Chat."""
    return bool(components.artifact.manifest.model.get("chat"))


def reply(
    components: OpenComponents,
    images: Any,
    question: str,
    history: Sequence[Turn],
    how: Generation,
    *,
    template: str | None = None,
    system: str | None = None,
) -> Reply:
    """The answer to a question in a conversation about images.

    Raises:
        UsageError: ``<image>`` stands in another number of places than there are images, an unknown
            template, a history of something else than turns, or too long a conversation.
        MediaError: an empty question, or an image that cannot be read.
    """
    if not is_chat(components):
        seen, prompt = _single(components, images, question, template, system)
        given = _as_turns(history)
        ids = caption.continued(components, seen, [prompt], how)
        (text,) = caption.texts_of(components, ids, how)
        return Reply(text=text, history=(*given, Turn(question=question, answer=text)))
    request = _request(components, images, question, history, how, template, system)
    new = generate(*request.started(components), request.how)
    text = components.chat_tokenizer.decode(until_end(new[0].tolist(), request.how))
    return Reply(text=text, history=_answered(request.turns, text))


def reply_pieces(
    components: OpenComponents,
    images: Any,
    question: str,
    history: Sequence[Turn],
    how: Generation,
    *,
    template: str | None = None,
    system: str | None = None,
) -> Iterator[str]:
    """As :func:`reply`, the text in pieces as they come; refused at once if it cannot be."""
    if not is_chat(components):
        seen, prompt = _single(components, images, question, template, system)
        return caption.pieces(components, seen, prompt, how)
    request = _request(components, images, question, history, how, template, system)
    tokens = stream(*request.started(components), request.how)
    return streamed(tokens, request.how, components.chat_tokenizer.decode)


def remembered(
    components: OpenComponents,
    seen: Seen | ChatSeen | None,
    question: str,
    history: Sequence[Turn],
    answer: str,
) -> tuple[Turn, ...]:
    """The history of a :class:`Reply`, for an answer that came in pieces."""
    turns = [*_as_turns(history), Turn(question=question)]
    count = len(seen) if isinstance(seen, ChatSeen) else 0
    return _answered(_with_places(turns, count) if is_chat(components) else turns, answer)


def continued(
    components: OpenComponents,
    images: Any,
    prompts: Array,
    how: Generation,
    batch_size: int = 8,
    image_token_id: int | None = None,
) -> Array:
    """New ids behind prompts of ids that keep places for image tokens, int64 [B,N].

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
    _require_room(components, [len(row) for row in rows], how)
    seen = ChatSeen(tokens=()) if images is None else see(components, images, batch_size)
    tokens = _joined(components, seen)
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


# --- prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A question that can be asked."""

    seen: ChatSeen
    turns: tuple[Turn, ...]  # every image in its place
    ids: list[int]
    how: Generation  # its stop ids are the template's too

    def started(self, components: OpenComponents) -> tuple[Decoding, Prompt]:
        return _started(components, [self.ids], _joined(components, self.seen))


def _request(
    components: OpenComponents,
    images: Any,
    question: str,
    history: Sequence[Turn],
    how: Generation,
    template: str | None,
    system: str | None,
) -> _Request:
    """Everything that an answer needs, checked."""
    components.require(CHAT_DECODER)
    _require_question(question)
    chosen = find_template(template or components.artifact.manifest.model["chat"]["template"])
    if system is not None and (problem := text_problem(system)) is not None:
        raise MediaError(f"system: {problem}")
    tokenizer = components.chat_tokenizer
    given = as_images(images)
    turns = _with_places([*_as_turns(history), Turn(question=question)], len(given))
    seen = see(components, given) if len(given) else ChatSeen(tokens=())
    pieces = conversation(chosen, turns, system)
    ids = tokenizer.encode(pieces, [len(tokens) for tokens in seen.tokens], chosen)
    _require_room(components, [len(ids)], how)
    stop = tokenizer.ids.get(chosen.stop)
    if stop is not None and stop not in how.stop_ids:
        how = replace(how, stop_ids=(stop, *how.stop_ids))
    return _Request(seen=seen, turns=turns, ids=ids, how=how)


def _started(
    components: OpenComponents, rows: Sequence[list[int]], tokens: Array, first: int = 0
) -> tuple[Decoding, Prompt]:
    """A decoder on an empty cache, and rows of ids as its prompt; ``first`` is the first one's."""
    session = components.session(CHAT_DECODER)
    embed = Embedding(components.token_table, tokens)
    decoding = start(session, empty_cache(session, len(rows)), embed)
    return decoding, Prompt(rows=rows, first=first)


def _unpadded(row: Array, place: int | None) -> list[int]:
    """A row of ids without its padding, places marked."""
    first = int((row != 0).argmax())
    if not row.any():
        raise MediaError("a prompt: expected ids behind zeros as padding, found only zeros")
    return [PLACE if i == place else i for i in row[first:].tolist()]


def _require_question(question: str) -> None:
    problem = text_problem(question)
    if problem is not None or not question.replace(IMAGE, "").strip():
        raise MediaError(f"question: {problem or 'expected text, found none'}")


def _require_room(components: OpenComponents, lengths: Sequence[int], how: Generation) -> None:
    room, longest = components.positions(CHAT_DECODER), max(lengths)
    need = longest + how.max_new_tokens - 1  # the last token is not read
    if need > room:
        raise UsageError(
            f"the cache has {room} positions, {need} are needed: {longest} for the conversation "
            f"with its images and {how.max_new_tokens} new tokens; clear the history, or lower "
            "max_new_tokens"
        )
    require_room(components.session(CHAT_DECODER), CHAT_DECODER, longest, 0, how)


def _joined(components: OpenComponents, seen: ChatSeen) -> Array:
    """The tokens of all images [M,D]."""
    none = np.zeros((0, components.token_table.shape[1]), np.float32)
    return np.concatenate((none, *seen.tokens))


# --- history -------------------------------------------------------------------------------------


def _as_turns(history: Sequence[Any]) -> list[Turn]:
    """A history of turns; a pair of question and answer is one too, as in the original.

    Raises:
        UsageError: something else.
    """
    found = []
    for i, given in enumerate(history):
        is_pair = isinstance(given, tuple | list) and len(given) == 2
        turn = Turn(question=given[0], answer=given[1]) if is_pair else given
        if not isinstance(turn, Turn) or text_problem(turn.question) or text_problem(turn.answer):
            raise UsageError(
                f"history, turn {i + 1} of {len(history)}: expected a Turn with question and "
                f"answer, or a pair of these, found {given!r:.80}"
            )
        found.append(turn)
    return found


def _with_places(turns: list[Turn], count: int) -> tuple[Turn, ...]:
    """Turns in which every image has its place; without any, all stand before the first question.

    Raises:
        UsageError: more or fewer places than images.
    """
    found = sum(turn.question.count(IMAGE) for turn in turns)
    if found == 0 and count:
        first = replace(turns[0], question=f"{IMAGE}\n" * count + turns[0].question)
        return (first, *turns[1:])
    if found != count:
        raise UsageError(
            f"the conversation has {found} {IMAGE}, expected one for each of {count} image(s)"
        )
    return tuple(turns)


def _answered(turns: Sequence[Turn], answer: str) -> tuple[Turn, ...]:
    """Turns, the last one with its answer."""
    return (*turns[:-1], replace(turns[-1], answer=answer))


# --- InternVL-G ----------------------------------------------------------------------------------


def _single(
    components: OpenComponents, images: Any, question: str, template: str | None, system: str | None
) -> tuple[Seen, str]:
    """The one image that an InternVL-G is asked about, and the prompt; ``<image>`` says nothing."""
    _require_question(question)
    if template is not None or system is not None:
        raise UsageError(
            f"template and system are for an InternVL-Chat: this model is asked {QUESTION!r}"
        )
    if (count := question.count(IMAGE)) > 1:
        raise UsageError(f"expected one {IMAGE} at most, found {count}: this model looks at one")
    if images is None:
        raise UsageError("expected an image: this model answers questions about one image")
    seen = caption.see(components, images)
    if len(seen) != 1:
        raise UsageError(f"expected one image, found {len(seen)}: this model looks at one")
    return seen, QUESTION.format(question.replace(IMAGE, "").strip() if count else question)
