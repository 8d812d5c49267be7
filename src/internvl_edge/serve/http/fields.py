"""The fields of a JSON object, read one by one: each is what it should be, and no other is left.

A field that is ``null`` is one that was left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internvl_edge.errors import did_you_mean
from internvl_edge.runtime.text.requests import text_problem
from internvl_edge.serve.http.problems import Problem, bad_request, shown

__all__ = ["MAX_TEXT", "Fields", "require_text"]

MAX_TEXT = 8192  # characters
MAX_INTEGER = (1 << 63) - 1
LONGEST_NAME = 64  # of a field that may have been meant


class Fields:
    """An object of a request, whose fields are taken out one after the other.

    Args:
        raw: what stands there.
        at: where, for messages; "" is the whole request.

    Raises:
        Problem: it is no object.
    """

    def __init__(self, raw: Any, at: str = "") -> None:
        if not isinstance(raw, dict):
            what = at or "the request"
            text = f"{what}: expected an object, found {kind(raw)}"
            raise bad_request("invalid_value", text, at or None)
        self._left: dict[str, Any] = {key: value for key, value in raw.items() if value is not None}
        self._at = at
        self._known: list[str] = []

    def name(self, key: str) -> str:
        """Return the whole name of a field, as in ``messages[0].content``."""
        return f"{self._at}.{key}" if self._at else key

    def has(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str) -> Any:
        """Take a field as it is; None where it was left out."""
        self._known.append(key)
        return self._left.pop(key, None)

    def need(self, key: str) -> Any:
        """Take a field that has to be there."""
        value = self.take(key)
        if value is None:
            raise self.wrong(key, "expected a value, found none")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        """Take a text of at most ``MAX_TEXT`` characters."""
        value = self.take(key)
        return default if value is None else require_text(value, self.name(key))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, f"expected true or false, found {kind(value)}")
        return value

    def integer(self, key: str, low: int = 0, high: int = MAX_INTEGER) -> int | None:
        value = self.take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"expected an integer from {low} to {high}, found {shown(value)}")
        return value

    def number(self, key: str, low: float, high: float) -> float | None:
        value = self.take(key)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise self.wrong(
                key, f"expected a number from {low:g} to {high:g}, found {shown(value)}"
            )
        return float(value)

    def choice(self, key: str, options: Sequence[str], default: str) -> str:
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, str) or value not in options:
            raise self.wrong(key, f"expected {' or '.join(options)}, found {shown(value)}")
        return value

    def items(self, key: str, most: int, what: str) -> list[Any]:
        """Take a list of 1 to ``most`` items."""
        value = self.need(key)
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            found = len(value) if isinstance(value, list) else kind(value)
            raise self.wrong(key, f"expected a list of 1 to {most} {what}, found {found}")
        return value

    def neutral(self, key: str, *values: Any) -> None:
        """Take a field that the model has no use for, where it asks for nothing.

        Raises:
            Problem: it asks for something.
        """
        value = self.take(key)
        if value is not None and not any(value == v and type(value) is type(v) for v in values):
            raise Problem(
                400,
                "unsupported_parameter",
                f"{self.name(key)}: {shown(value)} is not supported",
                self.name(key),
            )

    def ignore(self, *keys: str) -> None:
        """Take fields that change no answer."""
        for key in keys:
            self.take(key)

    def end(self) -> None:
        """Refuse whatever was not taken."""
        for key in self._left:
            name = self.name(key)
            meant = did_you_mean(key, self._known) if len(key) <= LONGEST_NAME else ""
            text = f"{shown(name)} is not supported{meant}"
            raise bad_request("unsupported_parameter", text, shown(name).strip("'\""))

    def wrong(self, key: str, message: str) -> Problem:
        """Make the error of a field that is not what it should be."""
        return bad_request("invalid_value", f"{self.name(key)}: {message}", self.name(key))


def require_text(value: Any, param: str) -> str:
    """Return a text that can be encoded.

    Raises:
        Problem: it is none, empty or too long.
    """
    if not isinstance(value, str):
        raise bad_request("invalid_value", f"{param}: expected a text, found {kind(value)}", param)
    if len(value) > MAX_TEXT:
        text = f"{param}: expected at most {MAX_TEXT} characters, found {len(value)}"
        raise bad_request("invalid_value", text, param)
    problem = text_problem(value) or (None if value.strip() else "expected text, found none")
    if problem is not None:
        raise bad_request("invalid_value", f"{param}: {problem}", param)
    return value


def kind(value: Any) -> str:
    """Name what a JSON value is."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    if isinstance(value, bool):
        return names[bool]
    return names.get(type(value), "a number" if isinstance(value, int | float) else "nothing")
