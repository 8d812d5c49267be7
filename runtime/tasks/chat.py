"""Conversations about images.

A template spells the conversation as a prompt, with places for the tokens of every image
(``chat_images``), and an InternVL-Chat goes on from there (``chat_decoder``). An InternVL-G answers
single questions about one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from internvl_edge.artifact.components import CHAT_DECODER
from internvl_edge.errors import MediaError, UsageError
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.generation.batch import Decoding, Generation, Prompt
from internvl_edge.runtime.generation.loop import generate, stream
from internvl_edge.runtime.generation.text import TextStream, until_end
from internvl_edge.runtime.tasks import caption
from internvl_edge.runtime.tasks.caption import Seen
from internvl_edge.runtime.tasks.chat_decoder import joined, require_chat_room, started
from internvl_edge.runtime.tasks.chat_images import ChatSeen, as_images, see
from internvl_edge.runtime.tasks.requests import text_problem
from internvl_edge.runtime.text.chat_tokenizer import IMAGE
from internvl_edge.runtime.text.templates import Turn, conversation, find_template

__all__ = [
    "Reply",
    "Turn",
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
    """Tell whether a directory is of an InternVL-Chat."""
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
    """Answer a question in a conversation about images.

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
) -> TextStream:
    """Answer as :func:`reply`, in pieces as they come; refuse at once what cannot be."""
    if not is_chat(components):
        seen, prompt = _single(components, images, question, template, system)
        return caption.pieces(components, seen, prompt, how)
    request = _request(components, images, question, history, how, template, system)
    tokens = stream(*request.started(components), request.how)
    decode = components.chat_tokenizer.decode
    return TextStream(tokens, request.how, decode, len(request.ids))


def remembered(
    components: OpenComponents,
    seen: Seen | ChatSeen | None,
    question: str,
    history: Sequence[Turn],
    answer: str,
) -> tuple[Turn, ...]:
    """Return the history of a :class:`Reply` for an answer that came in pieces."""
    turns = [*_as_turns(history), Turn(question=question)]
    count = len(seen) if isinstance(seen, ChatSeen) else 0
    return _answered(_with_places(turns, count) if is_chat(components) else turns, answer)


# --- prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A question that can be asked."""

    seen: ChatSeen
    turns: tuple[Turn, ...]  # every image in its place
    ids: list[int]
    how: Generation  # its stop ids are the template's too

    def started(self, components: OpenComponents) -> tuple[Decoding, Prompt]:
        return started(components, [self.ids], joined(components, self.seen))


def _request(
    components: OpenComponents,
    images: Any,
    question: str,
    history: Sequence[Turn],
    how: Generation,
    template: str | None,
    system: str | None,
) -> _Request:
    """Check a question and everything that its answer needs."""
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
    require_chat_room(components, [len(ids)], how)
    stop = tokenizer.ids.get(chosen.stop)
    if stop is not None and stop not in how.stop_ids:
        how = replace(how, stop_ids=(stop, *how.stop_ids))
    return _Request(seen=seen, turns=turns, ids=ids, how=how)


def _require_question(question: str) -> None:
    problem = text_problem(question)
    if problem is not None or not question.replace(IMAGE, "").strip():
        raise MediaError(f"question: {problem or 'expected text, found none'}")


# --- history -------------------------------------------------------------------------------------


def _as_turns(history: Sequence[Any]) -> list[Turn]:
    """Read a history of turns; a pair of question and answer is one too, as in the original.

    Raises:
        UsageError: something else.
    """
    turns = []
    for i, given in enumerate(history):
        is_pair = isinstance(given, tuple | list) and len(given) == 2
        turn = Turn(question=given[0], answer=given[1]) if is_pair else given
        if not isinstance(turn, Turn) or text_problem(turn.question) or text_problem(turn.answer):
            raise UsageError(
                f"history, turn {i + 1} of {len(history)}: expected a Turn with question and "
                f"answer, or a pair of these, found {given!r:.80}"
            )
        turns.append(turn)
    return turns


def _with_places(turns: list[Turn], count: int) -> tuple[Turn, ...]:
    """Give every image its place; without any, all stand before the first question.

    Raises:
        UsageError: more or fewer places than images.
    """
    places = sum(turn.question.count(IMAGE) for turn in turns)
    if places == 0 and count:
        first = replace(turns[0], question=f"{IMAGE}\n" * count + turns[0].question)
        return (first, *turns[1:])
    if places != count:
        raise UsageError(
            f"the conversation has {places} {IMAGE}, expected one for each of {count} image(s)"
        )
    return tuple(turns)


def _answered(turns: Sequence[Turn], answer: str) -> tuple[Turn, ...]:
    """Give the last turn its answer."""
    return (*turns[:-1], replace(turns[-1], answer=answer))


# --- InternVL-G ----------------------------------------------------------------------------------


def _single(
    components: OpenComponents, images: Any, question: str, template: str | None, system: str | None
) -> tuple[Seen, str]:
    """Look at the one image of an InternVL-G, and make its prompt; ``<image>`` says nothing."""
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
