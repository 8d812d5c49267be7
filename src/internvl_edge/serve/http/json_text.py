"""JSON of requests and answers: read within bounds, written without blanks."""

from __future__ import annotations

import json
from typing import Any

from internvl_edge.serve.http.problems import bad_request

__all__ = ["as_json", "parsed"]

MAX_VALUES = 250_000  # strings, objects and lists of a request
MAX_NUMBERS = 2_000_000


def _no_constant(name: str) -> float:
    raise ValueError(name)


# Once: ``json.loads`` and ``json.dumps`` make new ones each time where they are told how
DECODER = json.JSONDecoder(parse_constant=_no_constant)
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def parsed(body: bytes) -> Any:
    """Read JSON.

    Raises:
        Problem: it is none, nested without end, or of so many values that it would take many times
            its own size in memory.
    """
    _require_few(body)
    try:
        return DECODER.decode(body.decode("utf-8"))
    except RecursionError:
        raise bad_request("invalid_json", "the JSON is nested too deep") from None
    except UnicodeDecodeError as error:
        text = f"expected UTF-8, found a byte that is not at {error.start}"
        raise bad_request("invalid_json", text) from None
    except json.JSONDecodeError as error:
        text = f"expected JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise bad_request("invalid_json", text) from None
    except ValueError:  # an integer of thousands of digits, NaN
        text = "expected JSON with numbers of the usual size, found NaN, infinity or more digits"
        raise bad_request("invalid_json", text) from None


def as_json(content: Any) -> str:
    """Write JSON, without blanks and without line breaks of its own."""
    return ENCODER.encode(content)


def _require_few(body: bytes) -> None:
    """Count what JSON is made of, without reading it: at most as many values as this."""
    quotes = body.count(b'"') - body.count(b'\\"')  # a string has two, one at least is not escaped
    if quotes + body.count(b"{") + body.count(b"[") > MAX_VALUES or body.count(b",") > MAX_NUMBERS:
        text = f"expected at most {MAX_VALUES} strings, lists and objects, found more"
        raise bad_request("invalid_json", text)
