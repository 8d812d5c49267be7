"""Parameters' names as training frameworks and original files have them, and as they are published.

A wrapper adds a part to every name (``module.``, ``_orig_mod.``); another puts the model under an
attribute of its own (``model.``, ``net.``). The first kind is known by its parts; the second by the
result: a beginning is left out where the names after it are those that the configuration calls for.
Original ``.pth`` files of InternViT have timm's names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.oddities.table import WRAPPERS

__all__ = ["best_named", "published_name", "unwrapped"]

T = TypeVar("T")

TIMM = (
    (re.compile(r"^cls_token$"), "embeddings.class_embedding"),
    (re.compile(r"^pos_embed$"), "embeddings.position_embedding"),
    (re.compile(r"^patch_embed\.proj\."), "embeddings.patch_embedding."),
    (re.compile(r"^blocks\."), "encoder.layers."),
    (re.compile(r"\.(ls[12])\.gamma$"), r".\1"),
)
ANCHORS = ("class_embedding", "cls_token")  # one in every model: what stands before it is tried
MAX_SHOWN = 3


def published_name(name: str) -> str:
    """Turn a parameter's original ``.pth`` name into its published Hugging Face name."""
    for pattern, replacement in TIMM:
        name = pattern.sub(replacement, name)
    return name


def unwrapped(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Leave the parts of wrappers out of names.

    Returns:
        Each name without them, and the notes that say which there were.

    Raises:
        CheckpointError: two names are the same without them.
    """
    seen: dict[str, int] = {}
    result: dict[str, str] = {}
    for name in names:
        short = f".{name}"
        for part in WRAPPERS:
            if f".{part}." in f"{short}.":
                short = re.sub(rf"(\.{re.escape(part)})+(?=\.)", "", short)
                seen[part] = seen.get(part, 0) + 1
        result[name] = short[1:]
    _require_distinct(result)
    notes = [
        f"{count} name(s) without their {part!r}, a part of {WRAPPERS[part]}"
        for part, count in seen.items()
    ]
    return result, notes


def _require_distinct(result: Mapping[str, str]) -> None:
    owners: dict[str, str] = {}
    for name, short in result.items():
        other = owners.setdefault(short, name)
        if other != name:
            raise CheckpointError(
                f"tensors {other!r} and {name!r} are the same parameter, {short!r}, without what "
                "a training framework put around it; keep one of the two"
            )


def best_named(
    entries: Mapping[str, T],
    expected: Mapping[str, object],
    canonical: Callable[[dict[str, T]], dict[str, T]],
) -> tuple[dict[str, T], list[str]]:
    """Give entries the names that a configuration calls for, as far as they can be told.

    Args:
        entries: by name on disk.
        expected: canonical names.
        canonical: turns published names into canonical ones.

    Returns:
        Entries by canonical name, and notes on what was left out of names.

    Raises:
        CheckpointError: two names are the same without what frameworks put around them.
    """
    short, notes = unwrapped(entries)
    plain = {short[name]: entry for name, entry in entries.items()}
    best = canonical(dict(plain))
    most = _hits(best, expected)
    if most == len(expected) or not expected:
        return best, notes
    said: list[str] = []
    for beginning in _beginnings(plain):
        cut = {name.removeprefix(beginning): entry for name, entry in plain.items()}
        if len(cut) < len(plain):
            continue
        for rename, more in ((str, []), (published_name, ["named as timm does"])):
            tried = {rename(name): entry for name, entry in cut.items()}
            result = canonical(dict(tried)) if len(tried) == len(cut) else {}
            if (hits := _hits(result, expected)) > most:
                best, most = result, hits
                said = [f"names without {beginning!r} in front"] if beginning else []
                said += more
    return best, notes + said


def _hits(entries: Mapping[str, object], expected: Mapping[str, object]) -> int:
    return sum(name in expected for name in entries)


def _beginnings(names: Iterable[str]) -> list[str]:
    """List what stands before a model's own names, and every shorter beginning of it."""
    found = {"": None}
    for name in names:
        if name.rpartition(".")[2] in ANCHORS:
            parts = name.split(".")[:-1]
            found |= {".".join(parts[: i + 1]) + ".": None for i in range(len(parts))}
    return list(found)
