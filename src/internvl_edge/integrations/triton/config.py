"""``config.pbtxt``: a model's configuration, in the text format of Protocol Buffers.

A message is a mapping, a repeated field a list, a ``Word`` the name of an enum's value. Maps are
written as the format has them, a list of messages of ``key`` and ``value``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Word", "entries", "text_of"]

MAX_COLUMNS = 96
ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


class Word(str):
    """A bare word: the name of an enum's value."""

    __slots__ = ()


def entries(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make the messages that a map is written as."""
    return [{"key": key, "value": value} for key, value in values.items()]


def text_of(message: Mapping[str, Any], indent: str = "") -> str:
    """Write a message: a field after the other, what fits on a line on one."""
    return "".join(f"{indent}{_field(*field, indent)}\n" for field in message.items())


def _field(name: str, value: Any, indent: str) -> str:
    if isinstance(value, Mapping):
        return f"{name} {_block(value, indent)}"
    if not isinstance(value, Sequence) or isinstance(value, str):
        return f"{name}: {_scalar(value)}"
    if not any(isinstance(item, Mapping) for item in value):
        return f"{name}: [ {', '.join(map(_scalar, value))} ]"
    inner = f"{indent}  "
    items = ",\n".join(f"{inner}{_block(item, inner)}" for item in value)
    return f"{name} [\n{items}\n{indent}]"


def _block(message: Mapping[str, Any], indent: str) -> str:
    line = f"{{ {' '.join(_field(*field, '') for field in message.items())} }}"
    if not message:
        return "{ }"
    if "\n" not in line and len(indent) + len(line) <= MAX_COLUMNS:
        return line
    return f"{{\n{text_of(message, f'{indent}  ')}{indent}}}"


def _scalar(value: str | int) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word | int):
        return str(value)
    return f'"{"".join(map(_escaped, value))}"'


def _escaped(character: str) -> str:
    if character in ESCAPED:
        return ESCAPED[character]
    # Three octal digits: a fourth one that follows is no part of them.
    return f"\\{ord(character):03o}" if ord(character) < 32 or ord(character) == 127 else character
