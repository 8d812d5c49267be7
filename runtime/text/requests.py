"""Requests as lists and arrays: texts, ids, labels, templates.

Everything here refuses before any work, and says which item is wrong.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from internvl_edge.errors import MediaError, UsageError, shortened
from internvl_edge.runtime.images.arrays import as_array, is_array_like
from internvl_edge.runtime.images.sources import is_readable, kind_problem
from internvl_edge.types import Array

__all__ = [
    "Template",
    "batches_of",
    "distinct_labels",
    "fill_template",
    "id_rows",
    "masked",
    "one_place_templates",
    "require_choice",
    "require_flag",
    "require_vocabulary",
    "require_whole",
    "slices",
    "text_list",
    "text_problem",
]

MAX_CHARACTERS = 1_000_000  # of a text
Template: TypeAlias = str | Callable[[str], str]  # with a place for a label, or a function of it


def text_list(texts: Any, what: str = "text") -> list[str] | Array:
    """Return strings as a list; ids, an array or rows of equal length, as int64 [B,T].

    Args:
        texts: one or several.
        what: they are called in errors.

    Raises:
        MediaError: none, an empty one, neither strings nor ids, or a negative id.
    """
    if is_array_like(texts):
        texts = as_array(texts)
        if not texts.ndim:
            texts = texts.reshape(1)
    if isinstance(texts, np.ndarray) and texts.dtype.kind in "iu":
        if texts.ndim != 2 or not texts.size or texts.min() < 0:
            raise MediaError(
                "text ids: expected int [B,T] of at least one id, all at least 0, found "
                f"{list(texts.shape)}" + (f" from {texts.min()}" if texts.size else "")
            )
        return texts.astype(np.int64)
    _require_collection(texts, f"a {what} or several")
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


def _require_collection(items: Any, expected: str) -> None:
    """Refuse by name what is not several things in an order, though Python could iterate over it.

    Raises:
        MediaError: a mapping, whose keys would be taken, a set, an open file, bytes, or no
            collection at all.
    """
    if isinstance(items, os.PathLike):
        problem = f"a path ({type(items).__name__}); pass the text itself, such as its read_text()"
    elif is_readable(items):
        problem = f"an open file ({type(items).__name__}); pass file.read().splitlines()"
    elif isinstance(items, Mapping) and "input_ids" in items:
        problem = f"a mapping ({type(items).__name__}), as a tokenizer gives; pass its 'input_ids'"
    elif isinstance(items, bytes | bytearray | memoryview):
        problem = f"{type(items).__name__}; pass .decode()"
    elif isinstance(items, np.ndarray) and not items.ndim:
        problem = f"an array of one value ({items.dtype}); pass a list"
    elif not isinstance(items, Iterable) or isinstance(items, Mapping | set | frozenset):
        problem = kind_problem(items)
    else:
        return
    raise MediaError(f"expected {expected}, found {problem}")


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
    require_whole("batch_size", size, 1)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def batches_of(items: Any, size: int) -> Iterator[Any]:
    """Yield ``items`` in slices of ``size``."""
    for rows in slices(len(items), size):
        yield items[rows]


def require_whole(name: str, value: Any, low: int, *, none: bool = False) -> None:
    """Refuse what is not a whole number of at least ``low``.

    Raises:
        UsageError: which argument, and what was found.
    """
    if none and value is None:
        return
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise UsageError(
            f"{name} {shortened(value)}: expected a whole number, found {type(value).__name__}"
        )
    if value < low:
        raise UsageError(f"{name} {value}: expected at least {low}")


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is not one of a few words.

    Raises:
        UsageError: which argument, and what was found.
    """
    if not isinstance(value, str) or value not in choices:
        raise UsageError(
            f"{name} must be {' or '.join(map(repr, choices))}, found {shortened(value)}"
        )


def require_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False, such as the word "no", which counts as true.

    Raises:
        UsageError: which argument, and what was found.
    """
    if not isinstance(value, bool | np.bool_):
        raise UsageError(f"{name} must be True or False, found {shortened(value)}")


def distinct_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Check that labels are distinct strings.

    Raises:
        UsageError: one string in place of several, or one twice.
        MediaError: none, an empty one, or not a string.
    """
    if isinstance(labels, str):
        parts = [part.strip() for part in labels.split(",")]
        raise UsageError(
            f"labels: expected a list of strings such as {shortened(parts)}, found "
            f"{shortened(labels)}"
        )
    _require_collection(labels, "labels as a list of strings")
    given = tuple(labels)
    if not given:
        raise MediaError("labels: expected one or more non-empty strings, found none")
    for i, label in enumerate(given):
        if not isinstance(label, str) or not label.strip():
            raise MediaError(
                f"labels: expected one or more non-empty strings, found {shortened(label)} as "
                f"{i + 1} of {len(given)}"
            )
    twice, count = Counter(given).most_common(1)[0]
    if count > 1:
        raise UsageError(f"labels: {shortened(twice)} is there more than once")
    return given


def one_place_templates(templates: Any) -> tuple[Template, ...]:
    """Check that every template has one place for a label, or is a function of it.

    Raises:
        UsageError: none, or one without exactly one ``{}`` or ``{c}``.
    """
    if isinstance(templates, str) or callable(templates):
        given: tuple[Any, ...] = (templates,)
    elif isinstance(templates, list | tuple | Iterator) or getattr(templates, "ndim", 0) == 1:
        given = tuple(templates)
    else:
        raise UsageError(
            f"templates {shortened(templates)}: expected strings with one {{}} or {{c}} where the "
            "label goes, or functions of a label"
        )
    for template in given:
        if callable(template):
            continue
        rest = fill_template(template, "") if isinstance(template, str) else "{"
        if "{" in rest or "}" in rest or template.count("{}") + template.count("{c}") != 1:
            raise UsageError(
                f"template {shortened(template)}: expected one {{}} or {{c}} where the label goes"
            )
    if not given:
        raise UsageError("templates: expected one or more, found none")
    return given


def fill_template(template: Template, label: str) -> str:
    """Put a label in a template's place; the label's own braces mean nothing.

    Raises:
        UsageError: a function that fails, or gives no text.
    """
    if isinstance(template, str):
        return template.replace("{}" if "{}" in template else "{c}", label)
    try:
        text: object = template(label)
    except Exception as error:  # of the caller's own code
        raise UsageError(
            f"template {shortened(template)}: it failed for the label {shortened(label)}: "
            f"{shortened(str(error), quoted=False)}"
        ) from error
    if not isinstance(text, str):
        raise UsageError(
            f"template {shortened(template)}: expected a string for the label {shortened(label)}, "
            f"found {type(text).__name__}"
        )
    return text
