"""Conversations as OpenAI spells them: messages with a role, of texts and pictures.

A picture is put where its part stands. ``<image>`` stands for a picture in the prompt of an
InternVL-Chat, and ``<video>`` for all of them, so that a text which has one is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from internvl_edge.runtime.tasks.chat_prompt import VIDEO
from internvl_edge.runtime.text.chat_tokenizer import IMAGE
from internvl_edge.runtime.text.requests import text_problem
from internvl_edge.runtime.text.templates import Turn
from internvl_edge.serve.http.fields import MAX_TEXT, Fields, require_text
from internvl_edge.serve.http.images import ImageUrl, image_url
from internvl_edge.serve.http.problems import Problem, bad_request

__all__ = ["Conversation", "one_item", "read_messages"]

MAX_MESSAGES = 1024
MAX_PARTS = 256  # of a message
MAX_CHARACTERS = 1 << 20  # of a conversation
ROLES = ("system", "developer", "user", "assistant")


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What a client asks, and what was said before."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)  # the last one has no answer
    urls: list[ImageUrl] = field(default_factory=list)


def one_item(raw: Any) -> ImageUrl | str:
    """Read the one text or image of one message, which is to be embedded.

    Raises:
        Problem: more than one, or none.
    """
    if not isinstance(raw, list) or len(raw) != 1:
        text = "messages: expected one message to embed"
        raise bad_request("invalid_value", text, "messages")
    fields = Fields(raw[0], "messages[0]")
    fields.choice("role", ("user",), "user")
    fields.ignore("name")
    parts = _parts(fields)
    fields.end()
    if len(parts) != 1:
        text = (
            f"messages[0].content: expected one text or one image, found {len(parts)} parts: there "
            "is no joint embedding"
        )
        raise bad_request("invalid_value", text, "messages[0].content")
    return parts[0]


def read_messages(raw: Any, max_images: int, *, has_places: bool) -> Conversation:
    """Read a conversation that ends with a question.

    Args:
        raw: the messages.
        max_images: of all of them.
        has_places: whether ``<image>`` marks the places of images in questions.

    Raises:
        Problem: messages that cannot be, out of order, or with too many images.
    """
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_MESSAGES:
        text = f"messages: expected a list of 1 to {MAX_MESSAGES} messages"
        raise bad_request("invalid_value", text, "messages")
    read, count = Conversation(), 0
    for i, message in enumerate(raw):
        at = f"messages[{i}]"
        fields = Fields(message, at)
        role = fields.choice("role", ROLES, "")
        fields.ignore("name", "refusal", "annotations")
        fields.neutral("tool_calls", [])
        fields.neutral("function_call")
        fields.neutral("audio")
        parts = _parts(fields, role)
        fields.end()
        count += sum(len(part) for part in parts if isinstance(part, str))
        if count > MAX_CHARACTERS:
            text = f"messages: expected at most {MAX_CHARACTERS} characters, found more"
            raise bad_request("context_length_exceeded", text, "messages")
        _add(read, role, parts, at, has_places)
    if not read.turns or read.turns[-1].answer is not None:
        text = "messages: expected the last one to be of the user"
        raise bad_request("invalid_value", text, "messages")
    if len(read.urls) > max_images:
        text = f"messages: expected at most {max_images} images, found {len(read.urls)}"
        raise bad_request("invalid_value", text, "messages")
    return read


def _parts(fields: Fields, role: str = "user") -> list[ImageUrl | str]:
    """Read the content of a message: a text, or parts of texts and images."""
    content, name = fields.need("content"), fields.name("content")
    if not isinstance(content, list):
        return [_said(content, name)]
    if len(content) > MAX_PARTS:
        raise fields.wrong("content", f"expected at most {MAX_PARTS} parts, found {len(content)}")
    parts: list[ImageUrl | str] = []
    for i, raw in enumerate(content):
        part = Fields(raw, f"{name}[{i}]")
        kind = part.take("type")
        if kind == "image_url" and role == "user":
            parts.append(_image(part))
        elif kind in ("text", "input_text"):
            parts.append(_said(part.need("text"), part.name("text")))
        else:
            raise Problem(
                400,
                "unsupported_parameter",
                f"{part.name('type')}: expected text, or image_url in what a user says",
                part.name("type"),
            )
        part.end()
    return parts


def _image(part: Fields) -> ImageUrl:
    raw = part.need("image_url")
    if not isinstance(raw, dict):
        return image_url(raw, part.name("image_url"))
    inner = Fields(raw, part.name("image_url"))
    inner.ignore("detail")
    url = image_url(inner.need("url"), inner.name("url"))
    inner.end()
    return url


def _said(value: Any, param: str) -> str:
    """Read a text that may be empty, as an assistant's was."""
    if isinstance(value, str) and not value.strip() and len(value) <= MAX_TEXT:
        problem = text_problem(value)
        if problem is None:
            return value
    return require_text(value, param)


def _add(
    read: Conversation, role: str, parts: Sequence[ImageUrl | str], at: str, has_places: bool
) -> None:
    """Add a message to a conversation."""
    texts = [part for part in parts if isinstance(part, str)]
    if role in ("system", "developer"):
        if read.turns or read.system is not None:
            text = f"{at}: expected one system message, and first"
            raise bad_request("invalid_value", text, at)
        read.system = "\n".join(texts)
    elif role == "assistant":
        if not read.turns or read.turns[-1].answer is not None:
            text = f"{at}: expected a user's message before an assistant's"
            raise bad_request("invalid_value", text, at)
        read.turns[-1] = Turn(question=read.turns[-1].question, answer="\n".join(texts))
    elif role == "user":
        if has_places and any(place in text for text in texts for place in (IMAGE, VIDEO)):
            text = f"{at}.content: {IMAGE} and {VIDEO} stand for pictures; give these as parts"
            raise bad_request("invalid_value", text, f"{at}.content")
        read.urls += [part for part in parts if isinstance(part, ImageUrl)]
        asked = _question(parts, has_places)
        if read.turns and read.turns[-1].answer is None:  # it goes on
            asked = f"{read.turns.pop().question}\n{asked}"
        read.turns.append(Turn(question=asked))
    else:
        text = f"{at}.role: expected one of {', '.join(ROLES)}"
        raise bad_request("invalid_value", text, f"{at}.role")


def _question(parts: Sequence[ImageUrl | str], has_places: bool) -> str:
    """Write a question, each picture where its part stands, on a line of its own."""
    pieces = [part if isinstance(part, str) else IMAGE if has_places else None for part in parts]
    return "\n".join(piece for piece in pieces if piece)
