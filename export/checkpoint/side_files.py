"""What a checkpoint has besides its weights: tokenizer and settings, which a runtime reads too.

They are passed on as they are, so a stranger's checkpoint must not name a file of the reader by a
link. A link that stays in the checkpoint's folder, or in the blobs of the Hugging Face cache that
it lies in, is as good as the file (``files.reading``). One that leads elsewhere is followed where
the file is what its name says, and said aloud; ``convert``, which is for strangers' files, refuses
it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.errors import CheckpointError, InputError
from internvl_edge.export.checkpoint.tokenizer import (
    check_tokenizer,
    has_vocabulary,
    unread_vocabularies,
)
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.config.native import PROCESSOR_FILES, processor_settings
from internvl_edge.files.reading import foreign_target, is_there, not_json, parse_json, read_file
from internvl_edge.runtime.images.transform import Preprocessing

__all__ = [
    "SIDE_FILES",
    "check_side_files",
    "passed_on",
    "read_preprocessing",
    "read_side_file",
    "refuse_foreign",
    "sha256_of",
]

logger = logging.getLogger(__name__)

# Files of a checkpoint that a runtime may read; copied as they are. Of several vocabularies one is
# (``passed_on``).
SIDE_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
)
MAX_NBYTES = 64 << 20


def read_side_file(folder: Path, name: str) -> bytes | None:
    """Read a file that is passed on as it is; None where the checkpoint has none.

    Raises:
        CheckpointError: it is not a regular file of a plausible size, or ``*.json`` and no object.
    """
    path = folder / name
    if not is_there(path):
        return None
    data = read_file(path, MAX_NBYTES, CheckpointError)
    if path.suffix == ".json":
        _parsed(path, data)
    return data


def passed_on(folder: Path, config: CheckpointConfig) -> tuple[str, ...]:
    """Name the files that a runtime of this model reads: of several vocabularies, one."""
    unread = unread_vocabularies(folder, config)
    return tuple(name for name in SIDE_FILES if name not in unread)


def check_side_files(folder: Path, config: CheckpointConfig, readers: Sequence[str]) -> None:
    """Refuse, before any work, what cannot be passed on; say what is missing or comes from afar.

    Args:
        folder: of the checkpoint.
        config: of the checkpoint.
        readers: components that read texts.

    Raises:
        CheckpointError: a file that is not what its name says, or is of another model.
    """
    for name in passed_on(folder, config):
        read_side_file(folder, name)
    say_foreign(folder)
    if readers:
        check_tokenizer(folder, config)
    if readers and config.chat is not None and not config.chat.template:
        logger.warning(
            "%s: its chat template is not the published one, and is never run: a conversation will "
            "ask for a template of ours by name",
            folder,
        )
    if readers and not has_vocabulary(folder, config):
        wanted = "tokenizer.model" if config.chat is None else "tokenizer files"
        logger.warning(
            "%s has no %s: %s will take token ids only, and no strings; put the model's "
            "%s there and export again to embed, match or write texts",
            folder,
            wanted,
            " and ".join(readers),
            wanted,
        )


def side_file_problem(
    folder: Path, config: CheckpointConfig, components: Sequence[str]
) -> str | None:
    """Say why an export of these components would refuse what is there; None where it takes it."""
    readers = [name for name in components if COMPONENTS[name].reads_text]
    try:
        check_side_files(folder, config, readers)
        read_preprocessing(folder, config.vision.image_size)
    except CheckpointError as error:
        return str(error)
    return None


def say_foreign(folder: Path) -> None:
    """Warn of side files that are links out of the checkpoint: their contents are published."""
    for name in SIDE_FILES:
        if (target := foreign_target(folder / name)) is not None:
            logger.warning(
                "%s is a link out of the checkpoint, to %s, whose content is copied",
                folder / name,
                target,
            )


def refuse_foreign(path: Path) -> None:
    """Refuse a file that is a link out of its folder and out of a cache's blobs around it.

    Raises:
        CheckpointError: it says where the link leads.
    """
    if (target := foreign_target(path)) is not None:
        raise CheckpointError(
            f"{path}: is a link out of the folder, to {target}, which would be copied; put a copy "
            f"of the file in its place if that is meant: cp --remove-destination {target} {path}"
        )


def sha256_of(folder: Path, name: str) -> str | None:
    """Hash a file that is passed on; None where the checkpoint has none."""
    data = read_side_file(folder, name)
    return None if data is None else hashlib.sha256(data).hexdigest()


def read_preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """Read mean and standard deviation of the processor's file, for a resolution.

    The file is optional: the published models all use ImageNet's figures.
    """
    default, raw = Preprocessing(size=image_size), processor_settings(folder)
    try:
        red, green, blue = (float(v) for v in raw.get("image_mean", default.mean))
        mean = red, green, blue
        red, green, blue = (float(v) for v in raw.get("image_std", default.std))
        return replace(default, mean=mean, std=(red, green, blue))
    except (ValueError, TypeError, InputError) as error:
        raise CheckpointError(
            f"{folder / PROCESSOR_FILES[0]}: not a preprocessor configuration: {error}"
        ) from error


def _parsed(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: {not_json(path, data, error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected one JSON object, found {type(value).__name__}")
    return value
