"""Conversations about images.

A template spells the conversation as a prompt, with places for the tokens of every image
(``chat_prompt``, ``chat_images``), and an InternVL-Chat goes on from there (``chat_decoder``). An
InternVL-G answers single questions about one image.

A model that was asked to think writes ``<think>``, its thought, ``</think>``, and the answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from internvl_edge.artifact.components import CHAT_DECODER
from internvl_edge.errors import UsageError, shortened
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.generation.answers import Opening
from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.runtime.generation.text import (
    TextStream,
    Usage,
    split_thought,
    until_end,
    usage_of,
)
from internvl_edge.runtime.tasks import caption
from internvl_edge.runtime.tasks.caption import Seen
from internvl_edge.runtime.tasks.chat_decoder import (
    continued,
    fitting,
    opening_of,
    require_chat_room,
)
from internvl_edge.runtime.tasks.chat_images import ChatSeen, ChatTiles, as_images, see
from internvl_edge.runtime.tasks.chat_prompt import (
    ChatOptions,
    ChatPrompt,
    as_turns,
    make_prompt,
    placed,
    require_question,
)
from internvl_edge.runtime.text.chat_tokenizer import IMAGE
from internvl_edge.runtime.text.requests import require_whole
from internvl_edge.runtime.text.templates import Turn

__all__ = [
    "ANSWER_TOKENS",
    "THINKING_DRAW",
    "ChatOptions",
    "ChatSeen",
    "Reply",
    "Turn",
    "Usage",
    "continued",
    "frames_of",
    "generation",
    "is_chat",
    "prompt_of",
    "remembered",
    "reply",
    "reply_pieces",
    "see_images",
]

THINKING_DRAW = {"temperature": 0.6, "top_p": 0.95}  # as InternVL3.5 is recommended to think
ANSWER_TOKENS = 128  # of an InternVL-G, and of a server's answers, where nobody says
IMAGES_AT_ONCE = 8
MOST_FRAMES = 1024  # of a video; a frame is 256 tokens
NATIVE_LAYOUT = "internvl_hf"
QUESTION = "Question: {} Answer:"  # of an InternVL-G, which was trained on single questions


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer, and the conversation that it ends.

    A thought is not part of the history: models are asked on without their earlier ones.
    """

    text: str
    history: tuple[Turn, ...]
    usage: Usage = field(default_factory=Usage)  # what it took
    thought: str | None = None  # what the model wrote between <think> and </think>; None: nothing


def is_chat(components: OpenComponents) -> bool:
    """Tell whether a directory is of an InternVL-Chat."""
    return bool(components.artifact.manifest.model.get("chat"))


def see_images(
    components: OpenComponents, images: Any, batch_size: int | None, max_tiles: int | None
) -> Seen | ChatSeen:
    """Look at images, for an InternVL-Chat or an InternVL-G.

    Raises:
        UsageError: the directory lacks a component, or an option cannot be.
        MediaError: an image cannot be read.
    """
    if is_chat(components):
        return see(components, images, batch_size, max_tiles)
    if max_tiles is not None:
        raise UsageError(f"max_tiles {max_tiles}: this model looks at whole images")
    return caption.see(components, images, IMAGES_AT_ONCE if batch_size is None else batch_size)


def frames_of(
    components: OpenComponents, video: str | os.PathLike[str], num_frames: int
) -> list[Any]:
    """Read the frames of a video, chosen as the checkpoint's layout does.

    Raises:
        MissingDependency: PyAV is not installed, and it is a video file.
        MediaError: it is no video.
        UsageError: no frame is wanted, or more than any context holds.
    """
    from internvl_edge.runtime.images.video import load_chat_frames

    require_whole("num_frames", num_frames, 1)
    if num_frames > MOST_FRAMES:
        raise UsageError(f"num_frames {shortened(num_frames)}: expected at most {MOST_FRAMES}")

    chat = components.artifact.manifest.model.get("chat") or {}
    return [*load_chat_frames(video, num_frames, native=chat.get("layout") == NATIVE_LAYOUT)]


def generation(
    components: OpenComponents,
    options: ChatOptions,
    max_new_tokens: int | None,
    how: dict[str, Any],
) -> Generation:
    """Make the options of an answer; a thought is drawn where nobody says otherwise.

    Raises:
        UsageError: an unknown option, or a value that cannot be.
    """
    is_free = not how.keys() & {"temperature", "top_k", "top_p", "num_beams", "do_sample"}
    drawn = THINKING_DRAW if options.think and is_free else {}
    count = ANSWER_TOKENS if max_new_tokens is None else max_new_tokens
    return caption.generation(components, **{"max_new_tokens": count, **drawn, **how})


def reply(
    components: OpenComponents,
    images: Any,
    question: str,
    history: Sequence[Turn] | None,
    how: Generation,
    options: ChatOptions,
) -> Reply:
    """Answer a question in a conversation about images.

    Raises:
        UsageError: ``<image>`` stands in another number of places than there are images, an unknown
            template, a history of something else than turns, or too long a conversation.
        MediaError: an empty question, or an image that cannot be read.
    """
    if not is_chat(components):
        seen, prompt = _single(components, images, question, options)
        given = as_turns(history)
        text, usage = caption.answered(components, seen, prompt, how)
        turns = (*given, Turn(question=question, answer=text))
        return Reply(text=text, history=turns, usage=usage)
    request = _request(components, images, question, history, how, options)
    opening, reused = request.opening(components)
    new = components.answers.ids(components.session(CHAT_DECODER), opening, request.how)
    told = components.chat_tokenizer.decode(until_end(new, request.how))
    thought, text = split_thought(told)
    return Reply(
        text=text,
        thought=thought,
        history=_answered(request.prompt.turns, text),
        usage=usage_of(new, request.how, len(request.prompt.ids), reused),
    )


def reply_pieces(
    components: OpenComponents,
    images: Any,
    question: str,
    history: Sequence[Turn] | None,
    how: Generation,
    options: ChatOptions,
) -> TextStream:
    """Answer as :func:`reply`, in pieces as they come; refuse at once what cannot be."""
    if not is_chat(components):
        seen, prompt = _single(components, images, question, options)
        return caption.pieces(components, seen, prompt, how)
    request = _request(components, images, question, history, how, options)
    opening, reused = request.opening(components)
    tokens = components.answers.tokens(components.session(CHAT_DECODER), opening, request.how)
    decode = components.chat_tokenizer.decode
    return TextStream(tokens, request.how, decode, len(request.prompt.ids), reused)


def prompt_of(
    components: OpenComponents,
    images: Any,
    question: str,
    history: Sequence[Turn] | None,
    options: ChatOptions,
) -> tuple[str, list[int]]:
    """Spell a conversation, and give its ids, exactly as the model reads them.

    Raises:
        UsageError: as for :func:`reply`.
        MediaError: as for :func:`reply`.
    """
    if not is_chat(components):
        raise UsageError(
            f"{components.artifact.path}: expected an InternVL-Chat, whose conversations are "
            f"prompts; this model is asked {QUESTION!r}"
        )
    given = as_images(components, images, options.max_tiles)
    prompt = make_prompt(components, given.places, question, history, options)
    place = components.artifact.manifest.model["chat"]["image_token_id"]
    return prompt.text, prompt.ids_with(place)


def remembered(
    components: OpenComponents,
    seen: Seen | ChatSeen | None,
    question: str,
    history: Sequence[Turn] | None,
    answer: str,
) -> tuple[Turn, ...]:
    """Return the history of a :class:`Reply` for an answer that came in pieces."""
    turns = [*as_turns(history), Turn(question=question)]
    count = len(seen) if isinstance(seen, ChatSeen) else 0
    return _answered(placed(turns, count) if is_chat(components) else turns, answer)


# --- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A question that can be asked."""

    images: ChatSeen | ChatTiles
    prompt: ChatPrompt
    how: Generation  # its stop ids are the template's too

    def opening(self, components: OpenComponents) -> tuple[Opening, int]:
        """Look at the images; open the answer, and count the positions that are not read again."""
        seen = self.images
        if len(seen) and isinstance(seen, ChatTiles):
            seen = see(components, seen)
        tokens = seen.tokens if isinstance(seen, ChatSeen) else ()
        return opening_of(components, self.prompt.ids, ChatSeen(tokens=tokens))


def _request(
    components: OpenComponents,
    images: Any,
    question: str,
    history: Sequence[Turn] | None,
    how: Generation,
    options: ChatOptions,
) -> _Request:
    """Check a question and everything that its answer needs."""
    components.require(CHAT_DECODER)
    given = as_images(components, images, options.max_tiles)
    prompt = make_prompt(components, given.places, question, history, options)
    if options.fits:
        fits = fitting(components, len(prompt.ids))
        how = replace(how, max_new_tokens=max(fits, how.min_new_tokens))
    require_chat_room(components, [len(prompt.ids)], how)
    if prompt.stop_id is not None and prompt.stop_id not in how.stop_ids:
        how = replace(how, stop_ids=(prompt.stop_id, *how.stop_ids))
    return _Request(images=given, prompt=prompt, how=how)


def _answered(turns: Sequence[Turn], answer: str) -> tuple[Turn, ...]:
    """Give the last turn its answer."""
    return (*turns[:-1], replace(turns[-1], answer=answer))


# --- InternVL-G ----------------------------------------------------------------------------------


def _single(
    components: OpenComponents, images: Any, question: str, options: ChatOptions
) -> tuple[Seen, str]:
    """Look at the one image of an InternVL-G, and make its prompt; ``<image>`` says nothing."""
    require_question(question)
    if options.given:
        raise UsageError(
            f"{' and '.join(options.given)}: for an InternVL-Chat, but this model is asked "
            f"{QUESTION!r}"
        )
    if (count := question.count(IMAGE)) > 1:
        raise UsageError(f"expected one {IMAGE} at most, found {count}: this model looks at one")
    if images is None:
        raise UsageError("expected an image: this model answers questions about one image")
    seen = caption.see(components, images)
    if len(seen) != 1:
        raise UsageError(f"expected one image, found {len(seen)}: this model looks at one")
    return seen, QUESTION.format(question.replace(IMAGE, "").strip() if count else question)
