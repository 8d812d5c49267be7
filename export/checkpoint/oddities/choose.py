"""Which files of a directory hold the model, and what the others are.

Of several, transformers takes the first of these, and so does this module:

    model.safetensors                  whole, whatever an index next to it says
    model.safetensors.index.json       the shards that it names, held against what they hold
    other *.safetensors                all of them: numbered shards only if none is missing

Of pickles, which ``convert`` turns into safetensors, the same with ``pytorch_model.bin``. A folder
of that name is what newer versions of DeepSpeed's zero_to_fp32.py write; its files are taken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.oddities.table import ELSEWHERE, LEFT_OUT, odd_file
from internvl_edge.export.checkpoint.shards import (
    MAX_LISTED,
    PICKLE_SUFFIXES,
    REMEDY,
    TensorEntry,
    raise_problems,
    read_header,
)
from internvl_edge.files.content import content_of
from internvl_edge.files.reading import is_there, read_json
from internvl_edge.files.terminal import printable

__all__ = ["Chosen", "choose_pickles", "choose_safetensors"]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NUMBERED = re.compile(r"(?P<stem>.*?)[-_.]?(?P<number>\d{1,5})-of-(?P<total>\d{1,5})(?P<rest>.*)")
MAX_NAME_NBYTES = 255  # of a file, on every file system
MAX_INDEX_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files that hold a model, and what is said about those that do not."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def choose_safetensors(path: Path) -> Chosen:
    """Choose the safetensors files of a directory.

    Raises:
        CheckpointError: there are none, one is missing, or an index does not agree with them.
    """
    names = _listed(path, (".safetensors",))
    others = [name for name in names if name != WHOLE]
    if WHOLE in names:
        notes = [*_left_out(others), *_unread(path, others)]
        return Chosen((path / WHOLE,), tuple(notes))
    if is_there(path / INDEX):  # one that leads nowhere is a broken download
        shards = _indexed(path / INDEX, ".safetensors", read_header)
        left = [name for name in others if name not in shards]
        return Chosen(tuple(path / name for name in shards), tuple(_left_out(left)))
    kept = [name for name in others if odd_file(name, LEFT_OUT) is None]
    if kept:
        _require_all_numbers(path, kept)
        left = [name for name in others if name not in kept]
        return Chosen(tuple(path / name for name in kept), tuple(_left_out(left)))
    raise CheckpointError(_without_weights(path, others))


def choose_pickles(path: Path) -> Chosen:
    """Choose the pickle files of a directory, which may lie in a folder called like one.

    Raises:
        CheckpointError: there are none, one is missing, or one is not what its name says.
    """
    names = _listed(path, PICKLE_SUFFIXES)
    if PICKLE in names and (path / PICKLE).is_dir():
        inner = choose_pickles(path / PICKLE)
        note = f"{PICKLE} is a folder, as zero_to_fp32.py writes; its files are taken"
        left = [name for name in names if name != PICKLE]
        return Chosen(inner.files, (note, *inner.notes, *_left_out(left)))
    if PICKLE in names:
        return Chosen((path / PICKLE,), tuple(_left_out(n for n in names if n != PICKLE)))
    index, shards = path / PICKLE_INDEX, list[str]()
    if is_there(index) and _says_shards(index):
        shards = _indexed(index, PICKLE_SUFFIXES, None)
    kept = shards or [name for name in names if odd_file(name, LEFT_OUT) is None]
    kept = [name for name in kept if not (path / name).is_dir()]
    if not kept:
        raise CheckpointError(_without_pickles(path, names))
    _require_all_numbers(path, kept)
    left = [name for name in names if name not in kept]
    return Chosen(tuple(path / name for name in kept), tuple(_left_out(left)))


def _listed(path: Path, suffixes: Sequence[str]) -> list[str]:
    """List the files with a suffix, by name; names that no text can carry are refused."""
    names = sorted(
        name
        for name in os.listdir(path)
        if name.lower().endswith(tuple(suffixes)) and not name.startswith(".")
    )
    for name in names:
        if not _is_text(name):
            raise CheckpointError(
                f"{path}: expected file names in UTF-8, found {os.fsencode(name)!r}; rename it"
            )
    return names


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in name


def _left_out(names: Iterable[str]) -> list[str]:
    """Say what files are that lie next to the weights and are known not to be them."""
    return [
        f"{name} is left out: {oddity.what}; {oddity.remedy}"
        for name in names
        if (oddity := odd_file(name, LEFT_OUT)) is not None
    ]


def _unread(path: Path, others: Iterable[str]) -> list[str]:
    """Say that a whole file is taken where shards or an index lie next to it."""
    shards = [name for name in others if odd_file(name, LEFT_OUT) is None]
    has_index = (path / INDEX).exists() and not _names_only(path / INDEX, WHOLE)
    if not shards and not has_index:
        return []
    ignored = [f"{len(shards)} other file(s) such as {shards[0]}"] if shards else []
    ignored += [INDEX] if has_index else []
    return [f"{WHOLE} is taken, as transformers does, and not {' and '.join(ignored)}"]


def _require_all_numbers(path: Path, names: Sequence[str]) -> None:
    """Refuse shards numbered ``i-of-n`` of which some are missing."""
    sets: dict[tuple[str, str, int], set[int]] = {}
    for name in names:
        if match := NUMBERED.fullmatch(name):
            key = match["stem"], match["rest"], int(match["total"])
            sets.setdefault(key, set()).add(int(match["number"]))
    for (stem, rest, total), numbers in sets.items():
        first = 0 if 0 in numbers else 1
        if len(numbers) < total:
            missing = [n for n in range(first, first + total) if n not in numbers]
            raise CheckpointError(
                f"{path}: {stem}*{rest}: expected {total} shards, found {len(numbers)}; missing: "
                f"{', '.join(map(str, missing[:MAX_LISTED]))}; {REMEDY}"
            )


# --- an index ------------------------------------------------------------------------------------


def _read_index(index: Path) -> Any:
    return read_json(index, MAX_INDEX_NBYTES, CheckpointError, unique=True)


def _names_only(index: Path, name: str) -> bool:
    """Tell whether an index speaks of this one file."""
    try:
        return set(_read_index(index)["weight_map"].values()) == {name}
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return False


def _says_shards(index: Path) -> bool:
    """Tell whether an index names shards; one without a map says nothing of them."""
    try:
        return bool(_read_index(index).get("weight_map"))
    except (CheckpointError, AttributeError):
        return True  # and is refused when it is read


def _indexed(
    index: Path,
    suffixes: str | tuple[str, ...],
    read: Callable[[Path], dict[str, TensorEntry]] | None,
) -> list[str]:
    try:
        weight_map = _read_index(index)["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {REMEDY}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a shard index: {_reason(error)}; {REMEDY}") from error
    for name in names:
        is_plain = _is_text(name) and Path(name).name == name and name.endswith(suffixes)
        if not is_plain or len(name.encode()) > MAX_NAME_NBYTES:
            shown = f"{name!r:.80}"
            raise CheckpointError(
                f"{index}: shard must be a plain *{suffixes if read else '.bin'} name: {shown}"
            )
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        many = f" ({len(missing)} of {len(names)} are)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{index}: names shard {missing[0]}, which is missing{many}; {REMEDY}"
        )
    if read is not None:
        raise_problems(index, _index_disagreements(index, weight_map, read))
    return names


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    return str(error)


def _index_disagreements(
    index: Path, weight_map: dict[str, str], read: Callable[[Path], dict[str, TensorEntry]]
) -> list[str]:
    held = {name: read(index.parent / name) for name in sorted(set(weight_map.values()))}
    absent = [
        f"{tensor}: the index places it in {shard}, which does not hold it"
        for tensor, shard in weight_map.items()
        if tensor not in held[shard]
    ]
    left_out = [
        f"{tensor}: {shard} holds it, the index does not name it"
        for shard, tensors in held.items()
        for tensor in tensors
        if tensor not in weight_map
    ]
    return absent + left_out


# --- none of them --------------------------------------------------------------------------------


def _without_weights(path: Path, others: Sequence[str]) -> str:
    """Say what a directory holds instead of safetensors."""
    pickles = [name for name in _listed(path, PICKLE_SUFFIXES) if odd_file(name, LEFT_OUT) is None]
    if pickles:
        return (
            f"{path}: holds pickle files only ({', '.join(pickles[:3])}), which can run code when "
            f"loaded; convert them first: internvl-edge convert {path} NEW_DIRECTORY"
        )
    return f"{path}: no *.safetensors file found{_instead(path, others)}"


def _without_pickles(path: Path, names: Sequence[str]) -> str:
    """Say what a directory holds instead of pickles."""
    for name in _listed(path, (".safetensors",)):
        if content := content_of(path / name):
            return f"{path / name}: is {content.what}; {content.remedy}"
        return f"{path}: holds safetensors already, nothing to convert; export takes it as it is"
    return f"{path}: no {', '.join(PICKLE_SUFFIXES)} file to convert{_instead(path, names)}"


def _instead(path: Path, others: Sequence[str]) -> str:
    for name in others:
        if oddity := odd_file(name, LEFT_OUT):
            return f"; {name} is {oddity.what}; {oddity.remedy}"
    for name in sorted(os.listdir(path)):
        if oddity := odd_file(name, ELSEWHERE):
            return f"; {printable(name)} belongs to {oddity.what}; {oddity.remedy}"
    return f"; {REMEDY}"
