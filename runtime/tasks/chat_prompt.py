"""The prompt of a question in a conversation: turns, places of images, the system sentence.

``<image>`` in a question is the place of the next image, ``<video>`` that of all images that no
``<image>`` of the conversation takes, each after ``Frame1:``, ``Frame2:`` and so on, as the models
were trained; where no image is left, it is text. Without any place all images stand before
the first question.

The system sentence is the first there is of: the caller's, the one that asks for a thought
(``think``), the checkpoint's own, the template's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from internvl_edge.errors import MediaError, UsageError
from internvl_edge.runtime.components import OpenComponents
from internvl_edge.runtime.text.chat_tokenizer import IMAGE, PLACE, spelled
from internvl_edge.runtime.text.requests import require_flag, text_problem
from internvl_edge.runtime.text.templates import (
    NATIVE,
    TEMPLATES,
    THINKING,
    Piece,
    Template,
    Turn,
    conversation,
    find_template,
)

__all__ = [
    "ChatOptions",
    "ChatPrompt",
    "as_turns",
    "has_place",
    "make_prompt",
    "placed",
    "require_question",
]

VIDEO = "<video>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How a question is put, where a caller wants it otherwise than the checkpoint.

    Raises:
        UsageError: two system sentences, or a flag that is none.
    """

    template: str | None = None
    system: str | None = None
    think: bool = False  # ask for a thought before the answer
    max_tiles: int | None = None  # of an image, without the thumbnail
    fits: bool = False  # as many new tokens as there is room for, instead of a number

    def __post_init__(self) -> None:
        require_flag("think", self.think)
        if self.think and self.system is not None:
            raise UsageError(
                "system and think: expected one of the two; thinking is asked for by a system "
                "sentence of its own"
            )

    @property
    def given(self) -> list[str]:
        """The options that are not as the checkpoint has them."""
        names = ("template", "system", "think", "max_tiles")
        return [name for name in names if getattr(self, name) not in (None, False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation as the model reads it."""

    turns: tuple[Turn, ...]  # every image in its place
    ids: list[int]  # ``PLACE`` where an image's tokens stand
    text: str  # the same, spelled
    stop_id: int | None  # of the template; None: the tokenizer has no such token

    def ids_with(self, image_token_id: int | None) -> list[int]:
        """Return the ids with the checkpoint's own id for the places of image tokens."""
        place = PLACE if image_token_id is None else image_token_id
        return [place if i == PLACE else i for i in self.ids]


def make_prompt(
    components: OpenComponents,
    places: Sequence[int],
    question: str,
    history: Sequence[Any] | None,
    options: ChatOptions,
) -> ChatPrompt:
    """Spell a question in its conversation.

    Args:
        components: of a directory.
        places: tokens of every image of the conversation.
        question: what is asked now.
        history: turns, or pairs of question and answer.
        options: how it is spelled.

    Raises:
        UsageError: ``<image>`` stands in another number of places than there are images, an unknown
            template, none where the checkpoint has none that is known, or a history of something
            else than turns.
        MediaError: an empty question, or a sentence that is no text.
    """
    require_question(question)
    chat = components.artifact.manifest.model["chat"]
    template = _template(components, options)
    system = THINKING if options.think else options.system
    if system is None:
        system = chat.get("system")
    if system is not None and (problem := text_problem(system)) is not None:
        raise MediaError(f"system: {problem}")
    turns = placed([*as_turns(history), Turn(question=question)], len(places))
    tokenizer = components.chat_tokenizer
    pieces: list[Piece] = conversation(template, turns, system)
    return ChatPrompt(
        turns=turns,
        ids=tokenizer.encode(pieces, places, template),
        text=spelled(pieces, places, template),
        stop_id=tokenizer.ids.get(template.stop),
    )


def require_question(question: str) -> None:
    """Refuse a question that asks nothing.

    Raises:
        MediaError: it is empty but for places, or no text.
    """
    problem = text_problem(question)
    if problem is not None or not question.replace(IMAGE, "").replace(VIDEO, "").strip():
        raise MediaError(f"question: {problem or 'expected text, found none'}")


def has_place(question: str) -> bool:
    """Tell whether a question says where its images stand."""
    return IMAGE in question or VIDEO in question


def as_turns(history: Iterable[Any] | None) -> list[Turn]:
    """Read a history of turns; a pair of question and answer is one too, as in the original.

    Raises:
        UsageError: something else.
    """
    if history is None:  # as the original has it
        return []
    if isinstance(history, str | bytes | Mapping) or not isinstance(history, Iterable):
        raise UsageError(
            "history: expected a list of turns, or of pairs of question and answer, found "
            f"{type(history).__name__}"
        )
    turns, history = [], list(history)
    for i, given in enumerate(history):
        is_pair = isinstance(given, tuple | list) and len(given) == 2
        turn = Turn(question=given[0], answer=given[1]) if is_pair else given
        if not isinstance(turn, Turn) or any(
            text_problem(text)
            for text in (turn.question, turn.answer, "" if turn.thought is None else turn.thought)
        ):
            raise UsageError(
                f"history, turn {i + 1} of {len(history)}: expected a Turn with question and "
                f"answer, or a pair of these, found {given!r:.80}"
            )
        turns.append(turn)
    return turns


def placed(turns: Sequence[Turn], count: int) -> tuple[Turn, ...]:
    """Give every image its place; without any, all stand before the first question.

    Raises:
        UsageError: more or fewer places than images, or frames for two videos.
    """
    own = sum(turn.question.count(IMAGE) for turn in turns)
    videos = sum(turn.question.count(VIDEO) for turn in turns) if count > own else 0
    if videos > 1:
        raise UsageError(
            f"the conversation has {videos} {VIDEO}, expected one at most: say which frames are "
            f"whose by {IMAGE} for each of them"
        )
    if videos:
        frames = "\n".join(f"Frame{i + 1}: {IMAGE}" for i in range(count - own))
        turns = [replace(turn, question=turn.question.replace(VIDEO, frames)) for turn in turns]
        return tuple(turns)
    if own == 0 and count:
        first = replace(turns[0], question=f"{IMAGE}\n" * count + turns[0].question)
        return (first, *turns[1:])
    if own != count:
        raise UsageError(
            f"the conversation has {own} {IMAGE}, expected one for each of {count} image(s)"
        )
    return tuple(turns)


def _template(components: OpenComponents, options: ChatOptions) -> Template:
    own = components.artifact.manifest.model["chat"]["template"]
    if options.template is None and not own:
        raise UsageError(
            f"{components.artifact.path}: expected a template: the checkpoint's own chat template "
            f"is none that is known, and those of files are never run; choose one of "
            f"{', '.join(TEMPLATES)} ({NATIVE} is that of the published *-hf models)"
        )
    return find_template(options.template or own)
