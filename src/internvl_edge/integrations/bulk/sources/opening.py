"""A source by its name: what the command line and ``embed`` are given."""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from internvl_edge.errors import MediaError, UsageError
from internvl_edge.integrations.bulk.sources.folder import files_source
from internvl_edge.integrations.bulk.sources.shards import SHARD_SUFFIXES, shards_source
from internvl_edge.integrations.bulk.sources.source import Source
from internvl_edge.integrations.bulk.sources.tables import tables_source
from internvl_edge.runtime.images.folder import SUBFOLDERS, folder_pictures
from internvl_edge.runtime.images.formats import SUFFIXES

__all__ = ["open_source"]

TABLE_SUFFIXES = (".parquet",)
WILD = "*?["


def open_source(
    names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    column: str | None = None,
    keep: Sequence[str] | None = None,
    *,
    recursive: bool = False,
) -> Source:
    """Open folders and files of pictures, Parquet files, or WebDataset shards; one of the three.

    A file that is named twice, as itself and by its folder, say, is there once.

    Args:
        names: a path or several; what is not there and has a wildcard stands for what it matches.
        column: of Parquet, or field of a sample: what is embedded.
        keep: columns or fields that go along.
        recursive: look into subfolders of a folder.

    Raises:
        UsageError: of more than one kind, or options that its kind does not have.
        MediaError: nothing there, or nothing in it.
    """
    given = [names] if isinstance(names, str | os.PathLike) else names
    paths = [path for name in given for path in _expanded(name)]
    if not paths:
        raise UsageError("expected at least one folder or file, found none")
    for suffixes, opened in ((TABLE_SUFFIXES, tables_source), (SHARD_SUFFIXES, shards_source)):
        named = [path for path in paths if _ends(path, suffixes)]
        if not named:
            continue
        if len(named) < len(paths):
            other = next(path for path in paths if path not in named)
            raise UsageError(f"expected sources of one kind, found {named[0]} and {other}")
        if recursive:
            raise UsageError("--recursive is for folders of pictures; leave it out")
        return opened(_once(named), column, keep)
    if column is not None or keep is not None:
        option = "--column" if column is not None else "--keep"
        raise UsageError(f"{option} is for Parquet and tar files; pictures have no columns")
    pictures = [picture for path in paths for picture in _pictures(path, recursive=recursive)]
    return files_source(_once(pictures))


def _expanded(name: str | os.PathLike[str]) -> list[Path]:
    """Return the paths that a name stands for."""
    path = Path(name)
    text = os.fspath(path)
    if os.path.lexists(path) or not any(mark in text for mark in WILD):
        return [path]
    found = sorted(glob.glob(text))
    if not found:
        raise MediaError(f"{path}: no file matches")
    return [Path(one) for one in found]


def _pictures(path: Path, *, recursive: bool) -> list[Path]:
    """List the pictures that a path names: those of a folder, or itself."""
    if not path.is_dir():
        return [path]
    found, left_out = folder_pictures(path, recursive=recursive)
    if found:
        return found
    told = ", ".join(f"{name} {count}" for name, count in sorted(left_out.items())) or "none"
    hint = "; add --recursive" if SUBFOLDERS in left_out else ""
    for suffix in (*TABLE_SUFFIXES, *SHARD_SUFFIXES):
        if f".{suffix.rpartition('.')[2]}" in left_out:
            hint = f"; name the files in it: {path}/*{suffix}"
            break
    raise MediaError(f"{path}: expected images ({', '.join(SUFFIXES)}) in it, found {told}{hint}")


def _once(paths: Iterable[Path]) -> list[Path]:
    """Leave out what comes again by another way to its folder; a link is a file of its own."""
    resolved = functools.cache(os.path.realpath)
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(os.path.join(resolved(path.parent), path.name), path)
    return list(found.values())


def _ends(path: Path, suffixes: Sequence[str]) -> bool:
    return path.name.lower().endswith(tuple(suffixes)) and not path.is_dir()
