"""The folder that a run works in, next to its result, and the recipe by which it is known again.

    .DEST.parquet.partial/       locked while a run is at work; this user's own, mode 0700, no links
        recipe.json              what the rows are made of, and how; which DEST ``force`` replaces

A result that is there has the recipe in the metadata of its Parquet. DEST is absent, the old one or
the complete new one at any moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from internvl_edge.errors import InputError, UsageError
from internvl_edge.files.disk import (
    PRIVATE,
    empty,
    is_abandoned,
    lock,
    make_private,
    os_errors,
    strange_entry,
    sync,
    write_atomically,
)
from internvl_edge.files.reading import parse_json, read_json, require_unicode

__all__ = [
    "SUFFIX",
    "Recipe",
    "check_dest",
    "is_done",
    "is_replacing",
    "remove_staging",
    "staging",
    "staging_of",
    "with_recipe",
]

Recipe: TypeAlias = Mapping[str, Any]  # as JSON writes it

RECIPE_FILE = "recipe.json"
RECIPE_KEY = b"internvl_edge.recipe"  # of a schema's metadata
REPLACES = "replaces"  # of a recipe in a staging folder
SUFFIX = ".parquet"
MAX_RECIPE_NBYTES = 1 << 20


def staging_of(dest: Path) -> Path:
    """Return the folder that a run of ``dest`` works in."""
    return dest.with_name(f".{dest.name}.partial")


def check_dest(dest: Path, *, resume: bool, force: bool, folder: bool = False) -> None:
    """Refuse, before any work, a name that cannot be written to.

    Args:
        dest: of the result.
        resume: take up what an interrupted run left.
        force: replace what is there.
        folder: the result is a folder of Parquet files, not one of them.

    Raises:
        UsageError: it says why.
    """
    require_unicode(dest)
    if dest.suffix != SUFFIX:
        raise UsageError(f"{dest}: expected a name that ends in {SUFFIX}")
    if resume and force:
        raise UsageError("--resume goes on and --force begins anew; leave one of them out")
    parent = dest.absolute().parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{dest}: {parent} cannot be written or is missing")
    if not os.path.lexists(dest):
        return
    if dest.is_symlink() or not (_is_ours(dest) if folder else dest.is_file()):
        kind = "folder of Parquet files" if folder else "file"
        raise UsageError(f"{dest}: expected a new {kind}, found something else; choose another")
    if not (force or resume):
        raise UsageError(f"{dest} exists; pass --force to replace it, or choose another name")


def is_done(dest: Path, recipe: Recipe) -> bool:
    """Tell whether a result that is there already has the rows of a recipe.

    Raises:
        UsageError: it has others.
    """
    if not dest.exists():
        return False
    files = sorted(dest.glob(f"*{SUFFIX}")) if dest.is_dir() else [dest]
    try:
        found = parse_json((pq.read_schema(files[0]).metadata or {})[RECIPE_KEY])
    except (pa.ArrowException, OSError, IndexError, KeyError, ValueError) as error:
        raise UsageError(f"{dest} exists, and is none of ours; choose another name") from error
    _require_same(dest, found, recipe)
    return True


def is_replacing(dest: Path) -> bool:
    """Tell whether the result that is there is what an interrupted run with ``force`` replaces."""
    written = staging_of(dest) / RECIPE_FILE
    if not (written.exists() and dest.exists()):
        return False
    found = _written(written)
    return isinstance(found, dict) and found.get(REPLACES) == _identity(dest)


def with_recipe(schema: pa.Schema, recipe: Recipe) -> pa.Schema:
    """Write a recipe into a schema's metadata."""
    return schema.with_metadata({RECIPE_KEY: json.dumps(recipe, sort_keys=True)})


@contextmanager
def staging(
    dest: Path, recipe: Recipe, *, resume: bool, force: bool, holds: str = f"*{SUFFIX}"
) -> Iterator[Path]:
    """Hold the folder that a run of ``dest`` works in, with what an interrupted one left there.

    It stays if the block fails, unless nothing of ``holds`` is in it.

    Args:
        dest: of the result.
        recipe: of its rows.
        resume: take up what an interrupted run left.
        force: remove that.
        holds: a pattern of what makes the folder worth keeping.

    Raises:
        UsageError: another run holds it, it is of another recipe, or something is in it and neither
            ``resume`` nor ``force`` says what to do about that.
        InputError: what is in it is damaged.
        ResourceError: the disk is full or fails.
    """
    folder = staging_of(dest)
    with contextlib.ExitStack() as held, os_errors(dest):
        with contextlib.suppress(FileExistsError):  # another run is as fast; the lock decides
            folder.mkdir(mode=PRIVATE)
        descriptor = lock(folder)
        held.callback(os.close, descriptor)
        make_private(folder, descriptor)
        written = folder / RECIPE_FILE
        if force:
            empty(folder)
        elif written.exists():
            if not resume:
                raise UsageError(
                    f"{dest}: an interrupted run left a part of it; --resume goes on from there, "
                    "--force begins anew"
                )
            if problem := strange_entry(folder):
                raise InputError(f"{folder}: {problem}; --force begins anew")
            found = _written(written)
            if isinstance(found, dict):
                found.pop(REPLACES, None)
            _require_same(dest, found, recipe)
        if not written.exists():
            empty(folder)
            marked = {**recipe, REPLACES: _identity(dest)} if force and dest.exists() else recipe
            write_atomically(written, json.dumps(marked, sort_keys=True).encode())
            sync(folder.parent)
        try:
            yield folder
        except BaseException:
            if not any(folder.glob(holds)):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def remove_staging(dest: Path) -> None:
    """Remove what a run left that died after ``dest`` was there."""
    folder = staging_of(dest)
    if is_abandoned(folder):  # a run that replaces DEST may be at work in it
        shutil.rmtree(folder, ignore_errors=True)


def _identity(dest: Path) -> list[int]:
    """Return what a new result of the same name has another of."""
    status = dest.stat()
    return [status.st_ino, status.st_mtime_ns]


def _is_ours(dest: Path) -> bool:
    """Tell a folder of nothing but Parquet files."""
    return dest.is_dir() and all(path.suffix == SUFFIX for path in dest.iterdir())


def _written(path: Path) -> Any:
    """Read the recipe in a staging folder.

    Raises:
        InputError: it is damaged.
    """
    try:
        return read_json(path, MAX_RECIPE_NBYTES)
    except InputError as error:
        raise InputError(f"{error}; --force begins anew") from error


def _require_same(dest: Path, found: Any, recipe: Recipe) -> None:
    """Refuse rows of another recipe.

    Raises:
        UsageError: it says in what they differ.
    """
    keys = sorted({*found, *recipe}) if isinstance(found, dict) else []
    differ = [key for key in keys if found.get(key) != recipe.get(key)]
    if differ or not keys:
        raise UsageError(
            f"{dest}: what is there was made of another {', '.join(differ) or 'recipe'}; --force "
            "begins anew, or choose another name"
        )
