"""Files that others wrote, read whole: regular ones alone, of a bounded size, through known links.

A name may lead anywhere: to a pipe that blocks for ever, to a device without an end, to a file of
somebody else. So nothing but a regular file is opened, without waiting; no more is read than a
limit; and ``foreign_target`` says of a link whether what it leads to belongs to its folder.

    the folder itself                       a link from one name in it to another
    blobs, next to it or to one above it    Hugging Face's cache: snapshots/REV/FILE is a link to
                                            ../../blobs/HASH, relative or absolute, of any length

Whoever only parses a file follows any link to it; whoever passes its bytes on asks first.
A compiled directory has no links at all: ``artifact.open``. What the system itself writes, in /proc
and /sys, has none of these dangers: ``system_text``.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from internvl_edge.errors import InputError, InternVLError, UsageError
from internvl_edge.files.content import HEAD_NBYTES, content_of_bytes
from internvl_edge.files.disk import EXHAUSTED, translated

__all__ = [
    "cache_hint",
    "foreign_target",
    "is_there",
    "not_json",
    "open_file",
    "parse_json",
    "read_file",
    "read_json",
    "require_unicode",
    "system_text",
    "unique_names",
]

FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # a pipe must not block
BLOBS, SNAPSHOTS = "blobs", "snapshots"
MAX_CLIMB = 3  # folders above a file's own that are searched for blobs
MAX_DEPTH = 64  # of JSON: no format that is read here nests a tenth as deep
MAX_DIGITS = 100  # of a whole number; tokenizers say 10³⁰ for "no limit"
MAX_LISTED = 20  # names that stand twice
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_file(path: Path, limit: int, error: type[InternVLError] = InputError) -> bytes:
    """Read a regular file of at most ``limit`` bytes, through links.

    Raises:
        error: it is not there, not a regular file, too large, or cannot be read.
        ResourceError: descriptors or memory ran out, or the disk fails.
    """
    with open_file(path, error) as file, _reading(path, error):
        pieces, left = [], limit + 1
        while left and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
    if not left:
        size = os.stat(path).st_size if os.path.exists(path) else 0
        raise error(
            f"{path}: expected at most {limit:,} bytes, found {max(size, limit + 1):,}; "
            "it is not what its name says"
        )
    return b"".join(pieces)


def read_json(
    path: Path, limit: int, error: type[InternVLError] = InputError, *, unique: bool = False
) -> Any:
    """Read a file of at most ``limit`` bytes as JSON.

    Args:
        path: the file.
        limit: of its size, in bytes.
        error: what is raised.
        unique: refuse an object that has a name twice.

    Raises:
        error: the file cannot be read, or is not JSON that ``parse_json`` takes.
        ResourceError: descriptors or memory ran out, or the disk fails.
    """
    data = read_file(path, limit, error)
    try:
        return parse_json(data, unique=unique)
    except ValueError as problem:
        raise error(f"{path}: {not_json(path, data, problem)}") from problem


def not_json(path: Path, data: bytes, problem: ValueError) -> str:
    """Say why a file is not JSON, and what it is instead where its first bytes tell."""
    content = content_of_bytes(data[:HEAD_NBYTES], quotes=not os.path.islink(path))
    instead = f"; it is {content.what}; {content.remedy}" if content is not None else ""
    return f"not readable as JSON: {problem}{instead}"


def open_file(path: Path, error: type[InternVLError] = InputError) -> FileIO:
    """Open a regular file to read, unbuffered, through links; nothing else is waited for.

    Raises:
        error: it is not there, not a regular file, or cannot be opened.
        ResourceError: descriptors or memory ran out, or the disk fails.
    """
    with _reading(path, error):
        _require_regular(path, os.stat(path).st_mode, error)  # opening a device may do something
        descriptor = os.open(path, FLAGS)
        try:
            _require_regular(path, os.fstat(descriptor).st_mode, error)
        except BaseException:
            os.close(descriptor)
            raise
    return FileIO(descriptor, "rb")


def _require_regular(path: Path, mode: int, error: type[InternVLError]) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in KINDS if is_kind(mode)), "something else")
        raise error(f"{path}: expected a regular file, found {kind}{_leading(path)}")


@contextmanager
def _reading(path: Path, error: type[InternVLError]) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        if problem.errno in EXHAUSTED:
            raise translated(problem, path) from problem
        if problem.errno == errno.ENOENT and os.path.islink(path):
            raise error(f"{path}: the link leads nowhere{_leading(path)}") from problem
        if problem.errno == errno.ENOENT:
            raise error(f"{path}: not found") from problem
        raise error(f"{path}: cannot be read: {problem.strerror or problem}") from problem
    except ValueError as problem:  # a NUL in the name
        raise error(f"{str(path)!r}: cannot be read: {problem}") from problem


def _leading(path: Path) -> str:
    return f" (it is a link to {os.readlink(path)})" if os.path.islink(path) else ""


def system_text(path: Path) -> str:
    """Read a file of /proc or /sys; "" where there is none."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read().decode("utf-8", "surrogateescape").strip()
    except OSError:
        return ""


def is_there(path: Path) -> bool:
    """Tell whether there is something of this name, a link that leads nowhere too."""
    return os.path.lexists(path)


def require_unicode(path: Path | None) -> None:
    """Refuse a name that is not UTF-8: no manifest, report or answer in JSON could hold it.

    Raises:
        UsageError: it says which bytes the name has.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{os.fsencode(str(path))!r}: expected a path in UTF-8; rename it, or make a link to "
            "it under another name"
        ) from None


def cache_hint(path: Path) -> str:
    """Return a hint to append where a repository of a Hugging Face cache was named; else ""."""
    folder = path if path.name == SNAPSHOTS else path / SNAPSHOTS
    try:
        revisions = sorted(
            (one for one in folder.iterdir() if one.is_dir()), key=lambda one: one.stat().st_mtime
        )
    except OSError:
        return ""
    if not revisions:
        return f"; {folder} holds no downloaded revision, download the model again"
    more = f", the newest of {len(revisions)}" if len(revisions) > 1 else ""
    return f"; it is a repository of a Hugging Face cache, name its snapshot {revisions[-1]}{more}"


def foreign_target(path: Path) -> Path | None:
    """Tell where a link leads that leaves its folder and the cache around it; None: it does not.

    Args:
        path: a file of a checkpoint; None too where it is no link.

    Returns:
        The file at the end of all links.
    """
    if not os.path.islink(path):
        return None
    folder, target = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    homes = [folder, *(above / BLOBS for above in list(folder.parents)[:MAX_CLIMB])]
    if any(target.is_relative_to(os.path.realpath(home)) for home in homes):
        return None
    return target


def parse_json(data: bytes, *, unique: bool = False, constants: bool = True) -> Any:
    """Parse JSON that others wrote: bounded in depth and digits, every text Unicode.

    Args:
        data: the text, in UTF-8.
        unique: refuse an object that has a name twice.
        constants: take NaN and Infinity, which are not JSON and which Python writes.

    Raises:
        ValueError: it is not JSON in UTF-8, or not within these bounds, or, with ``unique``, an
            object has a name twice.
    """
    hook = unique_names if unique else None
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=hook,
            parse_int=_whole_number,
            parse_constant=None if constants else _no_constant,
        )
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from error
    if b"\\u" in data or data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_plain(value)
    return value


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, {digits[:20]}…")
    return int(digits)


def _check_plain(value: Any) -> None:
    """Refuse what is nested too deep, and halves of characters (surrogates)."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}")
        for item in level:
            for text in item if isinstance(item, dict) else (item,):
                if isinstance(text, str) and (half := re.search("[\ud800-\udfff]", text)):
                    raise ValueError(f"a text with half a character, \\u{ord(half[0]):04x}")
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        depth += 1


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs (``json``'s ``object_pairs_hook``).

    Raises:
        ValueError: a name stands twice.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = [name for name, count in counts.items() if count > 1]
        shown = ", ".join(repr(name[:80]) for name in twice[:MAX_LISTED])
        raise ValueError(f"{len(twice)} name(s) stand twice: {shown}")
    return result
