"""Requests as lists and arrays: texts, ids, labels, templates.

Everything here refuses before any work, and says which item is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from internvl_edge.errors import MediaError, UsageError
from internvl_edge.types import Array

__all__ = [
    "batches_of",
    "distinct_labels",
    "fill_template",
    "id_rows",
    "masked",
    "one_place_templates",
    "require_vocabulary",
    "slices",
    "text_list",
    "text_problem",
]

MAX_CHARACTERS = 1_000_000  # of a text


def text_list(texts: Any, what: str = "text") -> list[str] | Array:
    """Return strings as a list; ids, an array or rows of equal length, as int64 [B,T].

    Args:
        texts: one or several.
        what: they are called in errors.

    Raises:
        MediaError: none, an empty one, neither strings nor ids, or a negative id.
    """
    if isinstance(texts, np.ndarray) and texts.dtype.kind in "iu":
        if texts.ndim != 2 or not texts.size or texts.min() < 0:
            raise MediaError(
                "text ids: expected int [B,T] of at least one id, all at least 0, found "
                f"{list(texts.shape)}" + (f" from {texts.min()}" if texts.size else "")
            )
        return texts.astype(np.int64)
    if not isinstance(texts, Iterable):
        raise MediaError(f"expected a text or several, found {type(texts).__name__}")
    given = [texts] if isinstance(texts, str) else list(texts)
    if not given:
        raise MediaError("expected at least one text, found none")
    if all(isinstance(row, (list, tuple)) for row in given):
        return text_list(_id_array(given))
    for i, text in enumerate(given):
        problem = text_problem(text)
        if problem is None and not text.strip():
            problem = "expected text, found none"
        if problem is not None:
            raise MediaError(f"{what} {i + 1} of {len(given)}: {problem}")
    return given


def _id_array(rows: list[Any]) -> Array:
    try:
        ids = np.array(rows)
    except ValueError:  # rows of different lengths
        ids = np.empty(0)
    if ids.dtype.kind not in "iu":
        raise MediaError(
            f"text ids: expected {len(rows)} rows of as many integers each, padded with 0, found "
            f"rows of {', '.join(str(len(row)) for row in rows[:8])} items"
        )
    return ids


def id_rows(prompts: Any) -> Array:
    """Return ids, an array or rows of equal length, as int64 [B,T]; they may be negative.

    Raises:
        MediaError: something else.
    """
    try:
        ids = np.asarray(prompts)
    except ValueError:  # rows of different lengths
        ids = np.empty(0)
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or not ids.size:
        given = (
            f"{ids.dtype} {list(ids.shape)}" if ids.size else "rows of different lengths, or none"
        )
        raise MediaError(f"prompts: expected ids, int [B,T], padded in front with 0, found {given}")
    return ids.astype(np.int64)


def require_vocabulary(ids: Iterable[int], size: int, what: str) -> None:
    """Refuse ids that a model does not have.

    Raises:
        UsageError: the first of them.
    """
    for token in ids:
        if not 0 <= token < size:
            raise UsageError(f"{what}: token id {token}: expected ids from 0 to {size - 1}")


def text_problem(text: object) -> str | None:
    """Say why a text cannot be encoded; None where it can."""
    if not isinstance(text, str):
        return f"expected a string, or all texts as ids, int [B,T], found {type(text).__name__}"
    if len(text) > MAX_CHARACTERS:
        return f"at most {MAX_CHARACTERS} characters are accepted, found {len(text)}"
    if "\0" in text:
        return f"expected no NUL character, found one at {text.index(chr(0))}"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"expected Unicode text, found a lone surrogate at {error.start}"
    return None


def masked(ids: Array) -> dict[str, Array]:
    """Make the feeds of ids, int64 [B,T]: 0 is padding (docs/model.md, section 8.2)."""
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


def slices(count: int, size: int) -> Iterator[slice]:
    """Yield slices of 0…count in steps of ``size``.

    Raises:
        UsageError: a size below 1.
    """
    if size < 1:
        raise UsageError(f"batch_size {size}: expected at least 1")
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def batches_of(items: Any, size: int) -> Iterator[Any]:
    """Yield ``items`` in slices of ``size``."""
    for rows in slices(len(items), size):
        yield items[rows]


def distinct_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Check that labels are distinct strings.

    Raises:
        UsageError: one string in place of several, or one twice.
        MediaError: none, an empty one, or not a string.
    """
    if isinstance(labels, str):
        parts = [part.strip() for part in labels.split(",")]
        raise UsageError(f"labels: expected a list of strings such as {parts}, found {labels!r}")
    given = tuple(labels)
    if not given or not all(isinstance(label, str) and label.strip() for label in given):
        raise MediaError(f"labels: expected one or more non-empty strings, found {list(given)!r}")
    if len(set(given)) < len(given):
        twice = next(label for label in given if given.count(label) > 1)
        raise UsageError(f"labels: {twice!r} is there more than once")
    return given


def one_place_templates(templates: Iterable[str]) -> tuple[str, ...]:
    """Check that every template has one place for a label.

    Raises:
        UsageError: none, or one without exactly one ``{}`` or ``{c}``.
    """
    given = (templates,) if isinstance(templates, str) else tuple(templates)
    for template in given:
        rest = fill_template(template, "")
        if template.count("{}") + template.count("{c}") != 1 or "{" in rest or "}" in rest:
            raise UsageError(
                f"template {template!r}: expected one {{}} or {{c}} where the label goes"
            )
    if not given:
        raise UsageError("templates: expected one or more, found none")
    return given


def fill_template(template: str, label: str) -> str:
    """Put a label in a template's place; the label's own braces mean nothing."""
    place = "{}" if "{}" in template else "{c}"
    return template.replace(place, label)
