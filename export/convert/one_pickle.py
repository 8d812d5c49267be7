"""One pickle file to safetensors: run in a process of its own, by ``pickles``.

    python -P -m internvl_edge.export.convert.one_pickle PICKLE TARGET

A pickle can run code when it is loaded. ``torch.load(weights_only=True)`` admits tensors and plain
containers only; besides these, two kinds of plain data that trainers store are admitted, and there
is no fallback to full unpickling. What it was refused for is said in words: a whole pickled module,
an optimizer's state, a TorchScript archive.

The model lies in the file itself, or under a key of it (``oddities.CONTAINERS``). Names come out
without what frameworks put around them, and of InternViT's original files as they are published.
The answer is one line of JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import pickletools
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.oddities.table import CONTAINERS
from internvl_edge.export.checkpoint.oddities.wrappers import published_name, unwrapped
from internvl_edge.files.content import content_of
from internvl_edge.files.reading import open_file

DISK_FULL = 28  # exit code
REFUSED = 3
MAX_REASON = 200  # characters
FORBIDDEN = re.compile(r"(?:GLOBAL|class|function) ['\"]?([\w.]+)")
PICKLE_CONTENTS = ("a zip archive, as torch.save writes", "a Python pickle")
DICTIONARIES = ("collections OrderedDict", "builtins dict")
OF_OPTIMIZERS = {"state", "param_groups"}
OF_TRAINERS = ("optim", "sched", "scaler", "rng", "callbacks", "loops", "loss", "hyper")
# Plain data that trainers store next to tensors: options of a command line, NumPy's numbers.
PLAIN_DATA: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.bool_)),
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
]


def convert_file(pickle: Path, target: Path) -> dict[str, Any]:
    """Load one pickle with the restricted loader and write its tensors.

    Returns:
        How many tensors there were, and notes on what was left out.

    Raises:
        CheckpointError: it holds something else than a dictionary of tensors.
    """
    _require_pickle(pickle)
    state, notes = _model_in(pickle, _loaded(pickle))
    short, more = unwrapped(state)
    named = {name: published_name(one) for name, one in short.items()}
    if len(set(named.values())) < len(named):
        raise CheckpointError(f"{pickle}: holds parameters twice, under two kinds of names")
    tensors = {named[name]: _plain(pickle, name, tensor) for name, tensor in state.items()}
    try:
        save_file(tensors, target, metadata={"format": "pt"})
    except SafetensorError as error:
        sys.exit(DISK_FULL if "space" in str(error) else str(error))
    return {"tensors": len(tensors), "notes": [*notes, *more]}


def _plain(pickle: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor into memory of its own."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(
            f"{pickle}: {name}: expected a dense tensor, found {tensor.dtype} {tensor.layout}; "
            "take the checkpoint before it was quantized or made sparse"
        )
    return tensor.detach().contiguous().clone()


# --- before it is loaded -------------------------------------------------------------------------


def _require_pickle(pickle: Path) -> None:
    """Refuse what is no pickle of a dictionary, by its first bytes."""
    content = content_of(pickle)
    if content is not None and content.what not in PICKLE_CONTENTS:
        raise CheckpointError(
            f"{pickle}: expected a pickle of tensors, found {content.what}; {content.remedy}"
        )
    if not zipfile.is_zipfile(pickle):
        return
    with zipfile.ZipFile(pickle) as archive:
        names = archive.namelist()
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise CheckpointError(
                f"{pickle}: is a TorchScript archive, a program; save the model's state_dict()"
            )
        data = next((name for name in names if name.rpartition("/")[2] == "data.pkl"), None)
        kind = None if data is None else _first_class(archive.read(data))
    if kind is not None:
        raise CheckpointError(
            f"{pickle}: is a whole pickled object of class {kind}, which only its own code can "
            "load; with that code, save model.state_dict() instead"
        )


def _first_class(data: bytes) -> str | None:
    """Name the class of a pickle's outermost object; None where it is a dictionary or plain."""
    texts: list[str] = []
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("GLOBAL", "STACK_GLOBAL"):
            name = str(argument) if code.name == "GLOBAL" else " ".join(texts[-2:])
            return None if name in DICTIONARIES else name.replace(" ", ".")
        if isinstance(argument, str):
            texts.append(argument)
        elif code.name not in ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "PUT", "LONG_BINPUT"):
            return None  # a dictionary, a list, a number
    return None


def _loaded(pickle: Path) -> Any:
    try:
        with (
            open_file(pickle, CheckpointError) as file,
            open(file.fileno(), "rb", closefd=False) as opened,
            torch.serialization.safe_globals(PLAIN_DATA),
        ):
            return torch.load(opened, map_location="cpu", weights_only=True, mmap=False)
    except CheckpointError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        text = str(error)
        if forbidden := FORBIDDEN.search(text):
            raise CheckpointError(
                f"{pickle}: not a plain pickle of tensors: it holds a {forbidden[1]}, which could "
                "run code; where it comes from, save the state_dict alone"
            ) from error
        reason = " ".join(text.split())[:MAX_REASON]
        raise CheckpointError(
            f"{pickle}: not a plain pickle of tensors, or truncated: {reason}"
        ) from error


# --- in what was loaded --------------------------------------------------------------------------


def _model_in(pickle: Path, loaded: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Find the dictionary of tensors, and say what was left out."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"{pickle}: expected a dictionary of tensors, found a {type(loaded).__name__}; it "
            "holds no model"
        )
    notes: list[str] = []
    while not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        if set(loaded) >= OF_OPTIMIZERS:
            raise CheckpointError(
                f"{pickle}: expected a dictionary of tensors, found an optimizer's state; convert "
                "the model's own file"
            )
        keys = [key for key in CONTAINERS if _has_tensors(loaded.get(key))]
        if not keys:
            break
        left = [str(key) for key in loaded if key != keys[0]]
        notes += [f"the model is under {keys[0]!r}; left out: {', '.join(left)}"] if left else []
        loaded = loaded[keys[0]]
    state = dict(_flat(loaded))
    if not state:
        shown = ", ".join(map(str, list(loaded)[:5])) or "nothing"
        raise CheckpointError(f"{pickle}: expected a dictionary of tensors, found {shown}")
    others = [str(key) for key, value in loaded.items() if not _has_tensors(value)]
    notes += [f"left out, as no tensors: {', '.join(others[:5])}"] if others else []
    return state, notes


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensors(inner) for inner in value.values())
    return isinstance(value, torch.Tensor)


def _flat(loaded: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """List the tensors of nested dictionaries, without a trainer's."""
    for key, value in loaded.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and not str(key).startswith(OF_TRAINERS):
            yield from _flat(value, f"{prefix}{key}.")


def main() -> None:
    """Convert ``argv[1]`` to ``argv[2]``, and print the answer or the error as JSON."""
    try:
        answer, code = convert_file(Path(sys.argv[1]), Path(sys.argv[2])), 0
    except CheckpointError as problem:
        answer, code = {"error": str(problem)}, REFUSED
    sys.stdout.write(f"{json.dumps(answer)}\n")
    sys.exit(code)
