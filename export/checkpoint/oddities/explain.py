"""Why a checkpoint's tensors are not those that its configuration calls for, in words.

The first cause that the tensors' names and types speak of is named, with what to do: another tool
quantized them, an adapter is not merged, an optimizer's state lies there. Otherwise what is
missing and what was found are shown side by side. Components that would compile all the same are
named too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from internvl_edge.artifact.components import find_component
from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.oddities.table import (
    QUANTIZATIONS,
    UNUSABLE,
    is_method,
    method_name,
    oddity_of,
    quantization_of,
)
from internvl_edge.export.checkpoint.parameters import expected_shapes
from internvl_edge.export.checkpoint.scope import is_in_scope
from internvl_edge.export.checkpoint.shards import DTYPES, MAX_LISTED, TensorEntry
from internvl_edge.export.config.checkpoint import CheckpointConfig, available_components
from internvl_edge.export.config.fields import read_json

__all__ = ["quantized_by", "refuse_mismatch"]

Kind = TypeVar("Kind")
MAX_METHOD = 40  # characters of a method's name

MLX_DTYPE = DTYPES["U32"]
FLOAT8 = {dtype for code, dtype in DTYPES.items() if code.startswith("F8")}
PACKED = {DTYPES[code] for code in ("U8", "I8", "I32", "U32", "F4", "F6_E2M3", "F6_E3M2")}
SECTIONS = ("", "llm_config", "text_config", "language_config", "vision_config")
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def refuse_mismatch(
    path: Path,
    config: CheckpointConfig,
    problems: Sequence[str],
    entries: Mapping[str, TensorEntry],
    num_matching: int,
) -> NoReturn:
    """Raise the error that says best why tensors are not those that are called for.

    Args:
        path: the checkpoint.
        config: what calls for them.
        problems: one text for each tensor that is missing, unexpected or of another kind.
        entries: the tensors that were looked at, by canonical name.
        num_matching: how many of them are called for.
    """
    expected = expected_shapes(config)
    odd = {n: e for n, e in entries.items() if n not in expected or _is_packed(n, e, expected)}
    hint = _what_compiles(config, {problem.partition(":")[0] for problem in problems})
    adapters = _named_by(odd, oddity_of, UNUSABLE)
    if adapters:
        oddity, names = adapters
        raise CheckpointError(
            f"{path}: expected the weights of {_parts(names)}, found {oddity.what} ({len(names)} "
            f"tensor(s) such as {names[0]}); {oddity.remedy}{hint}"
        )
    quantization = quantized_by(path, odd)
    if quantization is not None:
        listed, parts = ", ".join(list(odd)[:2]), _parts(odd)
        verb = "are" if " and " in parts else "is"
        raise CheckpointError(
            f"{path}: {parts} {verb} quantized by {quantization} ({len(odd)} tensor(s) such as "
            f"{listed}); expected weights in bf16, fp16 or fp32, which are quantized here: take "
            f"the checkpoint that this one was made from{hint}"
        )
    raise CheckpointError(
        f"{path}: {len(problems)} problem(s): {_listed(problems, num_matching)}{hint}"
    )


def quantized_by(path: Path, odd: Mapping[str, TensorEntry]) -> str | None:
    """Name the tool that quantized tensors; None where nothing speaks of one.

    Args:
        path: the checkpoint, whose configuration may name it.
        odd: tensors that no unquantized model has, or that are no floats.
    """
    marked = _named_by(odd, quantization_of, QUANTIZATIONS)
    dtypes = {entry.dtype for entry in odd.values()}
    if marked is None and not dtypes & (PACKED | FLOAT8):
        return None
    told, found = _told(path), marked and marked[0].name
    if told is not None and (found is None or is_method(told)):
        return method_name(told)
    if found is not None:
        return f"{found} (its configuration says {told!r})" if told else found
    if MLX_DTYPE in dtypes:
        return "MLX, whose weights are packed in U32"
    return "FP8" if dtypes & FLOAT8 else "a tool that is not named, in packed integers"


def _is_packed(name: str, entry: TensorEntry, expected: Mapping[str, Any]) -> bool:
    """Tell whether a tensor that is called for is there in a type that no model computes in."""
    is_float = entry.dtype in (np.float64, np.float32, np.float16, DTYPES["BF16"])
    return name in expected and not is_float


def _told(path: Path) -> str | None:
    """Read the method of a quantization from the configuration, or from a tool's own file."""
    raw = read_json(path / "config.json")
    for key in SECTIONS:
        section = raw.get(key) if key else raw
        if not isinstance(section, dict):
            continue
        for name in ("quantization_config", "compression_config", "quantization"):
            given = section.get(name)
            if isinstance(given, dict):
                return _method(given, "mlx" if name == "quantization" else name)
    for name in FILES:
        if (path / name).is_file():
            try:
                given = read_json(path / name)
            except CheckpointError:
                return name
            inner = given.get("quantization")
            return _method(inner if isinstance(inner, dict) else given, name)
    return None


def _method(given: Mapping[str, Any], otherwise: str) -> str:
    """Read the method of one section; its tensors' number of bits tells bitsandbytes' two apart."""
    method = given.get("quant_method", given.get("quant_algo"))
    if not isinstance(method, str) or not method.isprintable() or not method:
        return otherwise
    if method.lower() == "bitsandbytes":
        method += "_4bit" if given.get("load_in_4bit") else "_8bit"
    return method[:MAX_METHOD]


def _named_by(
    names: Iterable[str], find: Callable[[str], Kind | None], table: Sequence[Kind]
) -> tuple[Kind, list[str]] | None:
    """Find the first row of a table that names speak of, and these names.

    Kinds share some names: of GPTQ and AWQ the first has one more.
    """
    groups: dict[str, tuple[Kind, list[str]]] = {}
    for name in names:
        if (kind := find(name)) is not None:
            groups.setdefault(str(kind), (kind, []))[1].append(name)
    return min(groups.values(), key=lambda group: table.index(group[0]), default=None)


def _parts(names: Iterable[str]) -> str:
    """Name the parts of the model that tensors belong to."""
    return " and ".join(dict.fromkeys(name.partition(".")[0] for name in names))


def _what_compiles(config: CheckpointConfig, bad: set[str]) -> str:
    """Name the components that read none of the bad tensors."""
    whole = [
        name
        for name in available_components(config)
        if not any(is_in_scope(tensor, find_component(name).parts or None) for tensor in bad)
    ]
    return f"; --components {','.join(whole)} reads none of them" if whole else ""


def _listed(problems: Sequence[str], num_matching: int) -> str:
    """Show what is missing and what was found instead, some of each."""
    missing = [problem for problem in problems if problem.endswith(": missing")]
    others = [problem for problem in problems if not problem.endswith(": missing")]
    half = MAX_LISTED // 2
    most = max(half, MAX_LISTED - len(others))
    shown = missing[:most] + others[: MAX_LISTED - len(missing[:most])]
    text = "; ".join(shown)
    if len(shown) < len(problems):
        text += f"; and {len(problems) - len(shown)} more"
    return text if num_matching else f"{text}; no tensor has a name that was expected"
