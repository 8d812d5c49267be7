"""Pickle checkpoints to safetensors, on explicit request.

Each file is read in a process that holds nothing else (``one_pickle``), by PyTorch's restricted
loader; PyTorch older than the last known fix of it is refused. Everything after this step reads
safetensors. Files are named as transformers names them, so it can load the result too:

    model.safetensors                                        of one pickle
    model-00001-of-00002.safetensors, ... and their index    of several

As an export, a conversion is staged, synced and renamed, and one that was interrupted goes on after
the last file that was finished. Nothing is published that no component could be compiled from.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internvl_edge.artifact.publish import FILE_MODE, check_out, check_parent, record, staging
from internvl_edge.artifact.workspace import Workspace, drop_published, workspace
from internvl_edge.errors import CheckpointError, MissingDependency, ResourceError
from internvl_edge.export.checkpoint.checkpoint import num_expected, open_checkpoint
from internvl_edge.export.checkpoint.oddities.choose import INDEX, choose_pickles
from internvl_edge.export.checkpoint.oddities.table import LEFT_OUT, odd_file
from internvl_edge.export.checkpoint.shards import PICKLE_SUFFIXES, file_state, read_header
from internvl_edge.export.checkpoint.side_files import MAX_NBYTES, refuse_foreign
from internvl_edge.export.config.checkpoint import (
    CheckpointConfig,
    available_components,
    load_config,
)
from internvl_edge.files.disk import link_or_copy, os_errors, sync
from internvl_edge.files.helper import run_helper
from internvl_edge.files.reading import is_there, read_file, require_unicode
from internvl_edge.files.spool import Budget

__all__ = ["Conversion", "convert_pickles"]

logger = logging.getLogger(__name__)

OLDEST_TORCH = (2, 10)  # CVE-2026-24747
DISK_FULL = 28  # exit code of the subprocess
CONFIG = "config.json"
SIDE_SUFFIXES = (".json", ".model", ".txt", ".tiktoken", ".jinja")
MODULE = "internvl_edge.export.convert.one_pickle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was converted."""

    num_tensors: int
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()  # on what was left out


def convert_pickles(source: Path, out: Path) -> Conversion:
    """Write every pickle shard of ``source`` as safetensors to the new directory ``out``.

    Args:
        source: a directory with ``config.json`` and ``*.bin`` or ``*.pth`` files.
        out: must not exist.

    Raises:
        CheckpointError: nothing to convert, a file that is not a plain pickle of tensors, or
            tensors that no component could be compiled from.
        UsageError: ``out`` exists or cannot be written.
        ResourceError: the disk is full.
        MissingDependency: PyTorch is older than the last fix of its restricted loader.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise MissingDependency(
            f"torch {torch.__version__} cannot load untrusted pickles safely; at least "
            f'{".".join(map(str, OLDEST_TORCH))}: pip install "internvl-edge[export]"'
        )
    with os_errors(out):
        drop_published(out, CONFIG)
        check_parent(out)
        check_out(out, force=False)
    config = _config_of(source)
    chosen = choose_pickles(source)
    with (
        workspace(out, lambda: _key(chosen.files), Budget(0)) as work,
        staging(out, force=False, check=lambda directory: None) as directory,
    ):
        try:
            parts, notes = _parts(chosen.files, work)
            parts, more = _of_model(config, parts, work)
            count = _place(parts, work, directory)
            _copy_side_files(source, directory)
            notes = [*chosen.notes, *notes, *more, *_checked(source, directory, config)]
        except CheckpointError:
            work.forget()
            raise
        work.publishing(directory, CONFIG)
    return Conversion(
        num_tensors=count, files=tuple(path.name for path in parts), notes=tuple(notes)
    )


def _config_of(source: Path) -> CheckpointConfig:
    require_unicode(source)
    if not source.is_dir():
        reason = "it is a file" if source.exists() else "it does not exist"
        raise CheckpointError(
            f"{source}: expected a folder with config.json and {', '.join(PICKLE_SUFFIXES)} "
            f"files; {reason}"
        )
    if not is_there(source / CONFIG):
        raise CheckpointError(
            f"{source}: expected a folder with config.json and {', '.join(PICKLE_SUFFIXES)} "
            "files; found no config.json, which says what the weights are of: original .pth files "
            "come without, take that of the model's page at Hugging Face"
        )
    return load_config(source)


def _key(files: tuple[Path, ...]) -> dict[str, Any]:
    """List all that decides the result; the work of another conversion is not taken up."""
    return {"torch": torch.__version__, "pickles": [[str(p), str(file_state(p))] for p in files]}


# --- tensors -------------------------------------------------------------------------------------


def _parts(files: tuple[Path, ...], work: Workspace) -> tuple[dict[Path, str], list[str]]:
    """Convert every file that is not converted yet.

    Returns:
        Pickle → its safetensors file in the workspace, and notes on what was left out.
    """
    done = {entry["block"]: entry for entry in work.entries}
    parts: dict[Path, str] = {}
    notes: list[str] = []
    for pickle in files:
        entry = done.get(pickle.name)
        if entry is None or not _is_whole(work.path / entry["file"], entry):
            entry = _converted(pickle, work)
        else:
            logger.warning("%s was converted by an earlier run, and is taken up", pickle.name)
        parts[pickle] = entry["file"]
        notes += [f"{pickle.name}: {note}" for note in entry["notes"]]
    return parts, notes


def _is_whole(path: Path, entry: dict[str, Any]) -> bool:
    """Tell whether a file is what was recorded once it was durable."""
    if path.is_symlink() or not path.is_file():
        return False
    return bool(record(path).sha256 == entry["sha256"])


def _converted(pickle: Path, work: Workspace) -> dict[str, Any]:
    """Convert a file in a process of its own, and note it as done."""
    # a name of its own: a process that outlived its parent may still write the last one
    target = work.path / f"{secrets.token_hex(4)}.safetensors"
    # -P keeps the current directory, which may be the download itself, off the import path.
    done = run_helper(MODULE, [str(pickle), str(target)])
    if done.returncode == DISK_FULL:
        raise ResourceError(f"{target.parent}: the disk is full; free some space")
    if done.returncode < 0:
        raise ResourceError(
            f"{pickle}: the process that read it was ended by signal {-done.returncode}, as the "
            "system does where memory runs out; a machine with more memory can convert it"
        )
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"{pickle}: cannot be converted: {reason}") from error
    if "error" in answer:
        raise CheckpointError(answer["error"])
    sync(target)
    entry = {"file": target.name, "sha256": record(target).sha256, "notes": answer["notes"]}
    work.finish(pickle.name, {"weights": [], **entry}, {})
    return entry


def _of_model(
    config: CheckpointConfig, parts: dict[Path, str], work: Workspace
) -> tuple[dict[Path, str], list[str]]:
    """Leave out files of which the model has nothing, such as a classification head's."""
    strange: dict[Path, list[str]] = {}
    for pickle, part in parts.items():
        entries = read_header(work.path / part)
        if not num_expected(config, entries):
            strange[pickle] = list(entries)
    if len(strange) == len(parts):
        return parts, []  # and what they hold is said when they are opened
    notes = [
        f"{pickle.name} is left out: none of its {len(names)} tensor(s), such as "
        f"{names[0] if names else 'none'}, is of this model"
        for pickle, names in strange.items()
    ]
    return {pickle: part for pickle, part in parts.items() if pickle not in strange}, notes


def _place(parts: dict[Path, str], work: Workspace, directory: Path) -> int:
    """Give every part its published name, and write the index; how many tensors there are."""
    owners: dict[str, Path] = {}
    weight_map: dict[str, str] = {}
    total = 0
    for number, (pickle, part) in enumerate(parts.items(), 1):
        is_one = len(parts) == 1
        name = f"model{f'-{number:05}-of-{len(parts):05}' * (not is_one)}.safetensors"
        link_or_copy(work.path / part, directory / name)
        for tensor, entry in read_header(work.path / part).items():
            other = owners.setdefault(tensor, pickle)
            if other != pickle:
                raise CheckpointError(
                    f"tensor {tensor!r} is in {other.name} and in {pickle.name}; keep the file "
                    "that is meant, and move the other away"
                )
            weight_map[tensor] = name
            total += entry.nbytes
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write(directory / INDEX, json.dumps(index, indent=1).encode())
    return len(weight_map)


def _copy_side_files(source: Path, directory: Path) -> None:
    """Copy tokenizer and settings; a link out of the folder is refused."""
    for name in sorted(os.listdir(source)):
        is_side = name.endswith(SIDE_SUFFIXES) and not name.endswith(".index.json")
        if not is_side or name.startswith(".") or odd_file(name, LEFT_OUT) is not None:
            continue
        refuse_foreign(source / name)
        data = read_file(source / name, MAX_NBYTES, CheckpointError)
        _write(directory / name, data)
    # the library that writes the weights keeps them to their owner
    mode = stat.S_IMODE((directory / CONFIG).stat().st_mode)
    for path in directory.glob("*.safetensors"):
        path.chmod(mode)


def _write(path: Path, data: bytes) -> None:
    """Write a file that others may read if the umask lets them, and never change."""
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, FILE_MODE)) as file:
        file.write(data)


def _checked(source: Path, directory: Path, config: CheckpointConfig) -> list[str]:
    """Make sure that something can be compiled from what was converted; say what cannot.

    Raises:
        CheckpointError: nothing can be.
    """
    try:
        open_checkpoint(directory)
    except CheckpointError as error:
        reason = str(error).replace(str(directory), str(source))
        for component in available_components(config):
            try:
                open_checkpoint(directory, [component])
            except CheckpointError:
                continue
            return [f"converted, but not all of it can be compiled: {reason}"]
        raise CheckpointError(reason) from error
    return []
