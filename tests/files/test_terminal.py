"""Texts of others on a terminal and in JSON."""

from __future__ import annotations

import json
import os
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.files.terminal import json_bytes, printable

every_text = st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Cf", "Zl", "Zp"]))


def test_what_steers_a_terminal_is_spelled_out() -> None:
    assert printable("\x1b]0;title\x07 \x9b2J") == r"\x1b]0;title\x07 \x9b2J"
    assert printable("a\rb\nc") == r"a\x0db\nc"
    assert printable("a\r\nb\tc", lines=True) == "a\nb\tc"
    assert printable("gnp.\u202egpj") == r"gnp.\u202egpj"
    assert printable(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"
    assert printable("\ud800") == r"\ud800"


def test_what_people_write_stays() -> None:
    for text in ("ein Bär", "一只 红色　的", "می‌خواهم", "👩‍👩‍👧", r"a\b", "שלום"):
        assert printable(text) == text


@given(every_text)
def test_nothing_but_text_and_line_ends_reaches_the_terminal(text: str) -> None:
    shown = printable(text, lines=True)
    shown.encode()
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in shown if c not in "\n\t")
    assert "\n" not in printable(text)


@given(every_text)
def test_json_is_utf8_on_one_line_and_loses_only_halves_of_characters(text: str) -> None:
    line = json_bytes({text: [text]})
    assert b"\n" not in line and b"\x1b" not in line
    ((name, (value,)),) = json.loads(line.decode()).items()
    assert name == value
    value.encode()
    if not any(unicodedata.category(c) == "Cs" for c in text):
        assert value == text


def test_json_spells_halves_of_characters() -> None:
    assert json_bytes([os.fsdecode(b"a\xff"), "\ud800"]) == rb'["a\\xff", "\\ud800"]'
    assert json_bytes("\x9b\u202e") == rb'"\u009b\u202e"'
