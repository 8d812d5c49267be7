from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.serve.http.fields import MAX_TEXT, Fields, require_text
from internvl_edge.serve.http.json_text import parsed
from internvl_edge.serve.http.problems import Problem

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.slow
@given(JSON)
def test_json_is_read(value: Any) -> None:
    assert parsed(json.dumps(value).encode()) == value


@given(st.binary())
def test_anything_else_is_told(body: bytes) -> None:
    try:
        expected = json.loads(body.decode())
    except ValueError:
        with pytest.raises(Problem) as caught:
            parsed(body)
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    else:
        assert parsed(body) == expected or expected != expected


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"NaN",
        b"-Infinity",
        b"1" * 5000,
        b"\xff\xfe",
        b"",
        b"{} x",
        b"[" + b"{}," * 300_000 + b"{}]",
        b"[" + b"[]," * 300_000 + b"[]]",
        b"[" + b'"ab",' * 300_000 + b'""]',
        b"[" + b'"\\\\",' * 300_000 + b'""]',
        b"[" + b"1," * 2_000_001 + b"1]",
    ],
)
def test_json_that_cannot_be(body: bytes) -> None:
    with pytest.raises(Problem) as caught:
        parsed(body)
    assert caught.value.code == "invalid_json"
    assert len(caught.value.message) < 200


def refused(take: Any, raw: dict[str, Any], at: str = "") -> tuple[str, str | None]:
    with pytest.raises(Problem) as caught:
        take(Fields(raw, at))
    assert caught.value.status == 400
    return caught.value.code, caught.value.param


@pytest.mark.parametrize(
    ("take", "raw"),
    [
        (lambda f: f.need("a"), {}),
        (lambda f: f.need("a"), {"a": None}),
        (lambda f: f.text("a"), {"a": 5}),
        (lambda f: f.text("a"), {"a": ""}),
        (lambda f: f.flag("a"), {"a": 1}),
        (lambda f: f.integer("a"), {"a": True}),
        (lambda f: f.integer("a"), {"a": 1.5}),
        (lambda f: f.integer("a"), {"a": -1}),
        (lambda f: f.integer("a"), {"a": 1 << 70}),
        (lambda f: f.number("a", 0, 2), {"a": "1"}),
        (lambda f: f.number("a", 0, 2), {"a": 3}),
        (lambda f: f.number("a", 0, 2), {"a": 1e999}),
        (lambda f: f.number("a", 0, 2), {"a": float("nan")}),
        (lambda f: f.number("a", 0, 2), {"a": 10**400}),
        (lambda f: f.number("a", 0, 2), {"a": -(10**400)}),
        (lambda f: f.choice("a", ("x", "y"), "x"), {"a": "z"}),
        (lambda f: f.choice("a", ("x", "y"), "x"), {"a": ["x"]}),
        (lambda f: f.items("a", 2, "things"), {"a": []}),
        (lambda f: f.items("a", 2, "things"), {"a": [1, 2, 3]}),
        (lambda f: f.items("a", 2, "things"), {"a": "xy"}),
    ],
)
def test_each_rule_refuses(take: Any, raw: dict[str, Any]) -> None:
    assert refused(take, raw) == ("invalid_value", "a")
    assert refused(take, raw, "b[0]") == ("invalid_value", "b[0].a")


def test_texts_may_have_any_number_of_quotes_and_commas_within_reason() -> None:
    text = '<a href="b">, ' * 100_000
    assert parsed(json.dumps([text]).encode()) == [text]


def test_a_name_without_end_is_refused_at_once() -> None:
    with pytest.raises(Problem) as caught:
        Fields({"x" * 20_000_000: 1}).end()
    assert len(caught.value.body) < 400


def test_what_is_left_is_refused_and_null_is_nothing() -> None:
    assert refused(lambda f: f.end(), {"x": 1}) == ("unsupported_parameter", "x")
    Fields({"x": None}).end()
    fields = Fields({"temperatur": 1})
    fields.take("temperature")
    with pytest.raises(Problem, match="did you mean 'temperature'"):
        fields.end()


def test_a_name_that_no_text_can_have_is_quoted() -> None:
    with pytest.raises(Problem) as caught:
        Fields({"\ud800\r\nX-Evil: 1": 1}).end()
    assert caught.value.body.isascii()
    assert b"\r" not in caught.value.body


def test_neutral_values_are_accepted_and_others_are_not() -> None:
    def take(fields: Fields) -> None:
        fields.neutral("n", 1)

    for raw in ({}, {"n": None}, {"n": 1}):
        take(Fields(raw))
    for wrong in (2, True, 1.0, "1"):
        assert refused(take, {"n": wrong}) == ("unsupported_parameter", "n")


@pytest.mark.parametrize("text", ["x" * (MAX_TEXT + 1), "\0", "\ud800", " \n", 5, None, ["a"]])
def test_texts_that_cannot_be(text: Any) -> None:
    with pytest.raises(Problem) as caught:
        require_text(text, "input[3]")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "input[3]")


@pytest.mark.parametrize("raw", [[], "x", 5, None, True])
def test_what_is_no_object(raw: Any) -> None:
    with pytest.raises(Problem, match="expected an object"):
        Fields(raw)
