"""Reading a published ``config.json`` without trusting it: the type of each key is checked.

Nothing that a config names is ever imported or executed: ``auto_map`` may point to the modules
that internvl-edge re-implements, and to no others.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from internvl_edge.errors import CheckpointError
from internvl_edge.files import reading
from internvl_edge.files.reading import cache_hint, is_there

# More is no model, and would be named tensor by tensor, or tried tile by tile.
MAX_SIZE = 1 << 24
LIMITS = {"num_hidden_layers": 1024, "min_dynamic_patch": 1024, "max_dynamic_patch": 1024}
MAX_CONFIG_NBYTES = 4 << 20
# The modules that internvl-edge re-implements; a config that points to others is refused.
KNOWN_REMOTE_MODULES = frozenset(
    {
        "configuration_intern_vit",
        "configuration_internvl",
        "configuration_internvl_chat",
        "modeling_intern_vit",
        "modeling_internvl",
        "modeling_internvl_chat",
        "modeling_qllama",
    }
)


def known_fields(
    cls: type, raw: dict[str, Any], path: Path, prefix: str, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the keys of ``raw`` that are fields of ``cls``, with types checked; null: default."""
    types = {"int": int, "float": float, "bool": bool, "str": str}
    return {
        f.name: typed(raw[f.name], types[str(f.type)], path, prefix + f.name)
        for f in dataclasses.fields(cls)
        if f.name not in skip and raw.get(f.name) is not None
    }


def typed(value: object, kind: type, path: Path, key: str) -> Any:
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{path}: {key} must be {kind.__name__}, found {value!r}")
    if kind is float and not math.isfinite(value):  # type: ignore[arg-type]
        raise CheckpointError(f"{path}: {key} must be finite, found {value!r}")
    return kind(value)


def section(raw: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = raw.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key} must be an object, found {value!r}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a checkpoint's JSON file.

    Raises:
        CheckpointError: it is not there, not a regular file of this size, or not a JSON object.
    """
    if not is_there(path):
        raise CheckpointError(
            f"{path}: not found; expected a Hugging Face directory{cache_hint(path.parent)}"
        )
    raw = reading.read_json(path, MAX_CONFIG_NBYTES, CheckpointError)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected one JSON object, found {type(raw).__name__}")
    return raw


def refuse_remote_code(raw: dict[str, Any], path: Path) -> None:
    if raw.get("trust_remote_code"):
        raise CheckpointError(f"{path}: requires trust_remote_code, but remote code is never run")
    auto_map = raw.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise CheckpointError(f"{path}: auto_map must be an object, found {auto_map!r}")
    for target in auto_map.values():
        # "repo--module.Class" or "module.Class"; for tokenizers a pair of these.
        for name in target if isinstance(target, list) else [target]:
            module = str(name).rsplit("--", 1)[-1].split(".", 1)[0]
            if name is not None and module not in KNOWN_REMOTE_MODULES:
                raise CheckpointError(
                    f"{path}: auto_map points to {name!r}, which internvl-edge does not "
                    "re-implement; remote code is never run"
                )


def require_positive(config: Any, where: str, but: tuple[str, ...] = ()) -> None:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value <= 0 and f.name not in but:
            raise CheckpointError(f"{where}.{f.name} must be positive, found {value}")
        if isinstance(value, int) and value > LIMITS.get(f.name, MAX_SIZE):
            raise CheckpointError(f"{where}.{f.name} is implausible: {value}")


def require_divisible(width: int, heads: int, where: str) -> None:
    if width % heads:
        raise CheckpointError(f"{where}: width {width} is not a multiple of {heads} heads")


def require_choice(where: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise CheckpointError(f"{where} must be one of {', '.join(choices)}, found {value!r}")
