r"""Texts of others on a terminal: what would steer it is spelled out instead.

File names, names of tensors, manifests, labels, captions and the errors that quote them may hold
escape sequences, which rewrite the screen or the window's title, and marks that turn the order of
what is read. Nothing of a text is dropped: a byte of a file name that is no UTF-8 is shown as
\xff, ESC as \x1b, a half of a character as \ud800.
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["json_bytes", "printable"]

# C0 but for tab and line feed, DEL and C1, line separators, marks that turn the reading order, and
# surrogates. What joins letters or emoji, and spaces of every width, is left alone.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SURROGATES = range(0xD800, 0xE000)
ESCAPED_BYTES = range(0xDC80, 0xDD00)  # of file names: os.fsdecode's surrogates of a byte


def printable(text: str, *, lines: bool = False) -> str:
    r"""Spell out what would steer a terminal.

    Args:
        text: to be shown.
        lines: leave line feeds as they are: of texts that may have several lines.
    """
    if lines:
        return STEERING.sub(_spelled, text.replace("\r\n", "\n"))
    return STEERING.sub(_spelled, text).replace("\n", r"\n")


def json_bytes(value: Any) -> bytes:
    """Write JSON in UTF-8 on one line, which every reader takes and which steers no terminal.

    Control characters stand as JSON's escapes, so nothing is lost. Half a character is none in
    UTF-8, and many readers refuse its escape: it is spelled out, as ``printable`` does.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return STEERING.sub(_json_escape, text).encode()


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code in ESCAPED_BYTES:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _json_escape(match: re.Match[str]) -> str:
    return f"\\{_spelled(match)}" if ord(match[0]) in SURROGATES else f"\\u{ord(match[0]):04x}"
