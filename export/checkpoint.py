"""Checkpoints on disk: a Hugging Face directory, read tensor by tensor and never as a whole.

The safetensors headers of all shards are parsed and validated when a checkpoint is opened; the
tensors stay on disk as (file, offset, length) until something asks for one, which is then read
with pread. Mapping the files instead would turn a shard that is truncated while we read into a
bus error that kills the process.

Names are canonical: those of InternVL-14B, with ``vision_model.`` in front of a bare InternViT's.
``lm_head`` and ``embed_tokens`` are two tensors and are never tied (internvl-spec section 2.6).
Pickle files are refused here; ``internvl-edge convert`` turns them into safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from internvl_edge.errors import CheckpointError
from internvl_edge.export.config import CheckpointConfig, load_config
from internvl_edge.export.models import InternViT, InternVL

MAX_HEADER_NBYTES = 100_000_000  # the format's own limit
MAX_LISTED = 20  # problems named one by one before the rest is counted
PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = tuple(DTYPES[code] for code in ("F64", "F32", "F16", "BF16"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies on disk."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    offset: int  # from the start of the file
    nbytes: int

    def read(self) -> np.ndarray[Any, Any]:
        """The values, copied into memory of their own.

        Raises:
            CheckpointError: the file ended early: it was changed while we read it.
        """
        buffer = bytearray(self.nbytes)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            done, view = 0, memoryview(buffer)
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(
                        f"{self.file}: ends inside tensor {self.name!r} "
                        f"({done} of {self.nbytes} bytes); was it changed while being read?"
                    )
                done += count
        return np.frombuffer(buffer, dtype=self.dtype).reshape(self.shape)

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        values = self.read()
        if self.dtype == DTYPES["BF16"]:  # all exponent bits set; ml_dtypes' isfinite is slow
            return not bool(((values.view(np.uint16) & 0x7F80) == 0x7F80).any())
        return bool(np.isfinite(values).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A directory's configuration and where each of its tensors lies."""

    path: Path
    config: CheckpointConfig
    tensors: Mapping[str, TensorEntry]  # canonical name → place
    shards: tuple[Path, ...]

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """One tensor by canonical name, in its stored dtype."""
        return self.tensors[name].read()

    def read_torch(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One tensor by canonical name, as a torch tensor of ``dtype``."""
        return torch_from_numpy(self.read(name)).to(dtype)

    def check_finite(self, names: Iterable[str]) -> None:
        """Refuse NaN and infinities; reads every tensor once, one at a time.

        Raises:
            CheckpointError: names every tensor that is not finite.
        """
        bad = [
            f"{name}: holds NaN or infinity" for name in names if not self.tensors[name].is_finite()
        ]
        _raise_problems(self.path, bad)


def torch_from_numpy(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """As ``torch.from_numpy``, which does not know bfloat16."""
    if values.dtype == DTYPES["BF16"]:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def open_checkpoint(directory: Path | str) -> Checkpoint:
    """Open a checkpoint directory and prove that its tensors are those its config asks for.

    Raises:
        CheckpointError: not a checkpoint, pickle only, a malformed or missing shard, or tensors
            missing, unexpected, of a wrong shape or type: all of them named in one message.
    """
    path = Path(directory)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; expected a Hugging Face checkpoint directory")
    config = load_config(path)
    shards = _shards(path)
    found = _canonical(config, _all_entries(shards))
    tensors, problems = _match(config, found)
    _raise_problems(path, problems)
    return Checkpoint(path=path, config=config, tensors=tensors, shards=tuple(shards))


def build_model(config: CheckpointConfig) -> InternVL | InternViT:
    """The PyTorch model of a configuration, on the current default device."""
    if config.kind == "internvl":
        assert config.internvl is not None
        return InternVL(config.internvl)
    return InternViT(config.vision)


def expected_shapes(config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape of every tensor that a configuration calls for."""
    with torch.device("meta"):
        model = build_model(config)
    prefix = "" if config.kind == "internvl" else "vision_model."
    return {prefix + name: tuple(t.shape) for name, t in model.state_dict().items()}


def load_reference(
    checkpoint: Path | str, dtype: torch.dtype = torch.float32
) -> InternVL | InternViT:
    """Our PyTorch model of a checkpoint, weights loaded, in evaluation mode.

    Args:
        checkpoint: the directory.
        dtype: every parameter's dtype.
    """
    opened = open_checkpoint(checkpoint)
    with torch.device("meta"):
        model = build_model(opened.config)
    prefix = "" if opened.config.kind == "internvl" else "vision_model."
    load_into(model, opened, prefix, dtype)
    return model.eval()


def load_into(module: nn.Module, source: Checkpoint, prefix: str, dtype: torch.dtype) -> None:
    """Give a module built on the meta device its weights, read one tensor at a time."""
    state = {name: source.read_torch(prefix + name, dtype) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    for owner in module.modules():  # tables that are computed, not stored
        restore = getattr(owner, "reset_tables", None)
        if restore is not None:
            restore()


# --- shards --------------------------------------------------------------------------------------


def _shards(path: Path) -> list[Path]:
    """The safetensors files of a directory, by its index where it has one."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        return [path / name for name in _indexed(index)]
    single = sorted(path.glob("*.safetensors"))
    if single:
        return single
    pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise CheckpointError(
            f"{path}: holds pickle files only ({', '.join(pickles[:3])}), which can run code when "
            f"loaded; convert them first: internvl-edge convert {path} NEW_DIRECTORY"
        )
    raise CheckpointError(f"{path}: no *.safetensors file found")


def _indexed(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a shard index: {error!r}") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard must be a plain *.safetensors name: {name!r}")
        if not (index.parent / name).exists():
            raise CheckpointError(f"{index}: names shard {name}, which is missing")
    absent = _index_disagreements(index, weight_map)
    _raise_problems(index, absent)
    return names


def _index_disagreements(index: Path, weight_map: dict[str, str]) -> list[str]:
    held = {name: read_header(index.parent / name) for name in set(weight_map.values())}
    return [
        f"{tensor}: the index places it in {shard}, which does not hold it"
        for tensor, shard in weight_map.items()
        if tensor not in held[shard]
    ]


def _all_entries(shards: list[Path]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in entries:
                raise CheckpointError(
                    f"tensor {name!r} is in two shards: {entries[name].file.name}, {shard.name}"
                )
            entries[name] = entry
    return entries


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Parse and validate one safetensors file's header.

    Raises:
        CheckpointError: not a regular file, not safetensors, or offsets that are not exactly one
            contiguous run from the header to the end of the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        prefix = os.pread(descriptor, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER_NBYTES, status.st_size - 8):
            raise CheckpointError(
                f"{path}: not a safetensors file, or truncated: header of {length} bytes in a file "
                f"of {status.st_size}"
            )
        raw = os.pread(descriptor, length, 8)
        file.close()
    return _parse_header(path, raw, 8 + length, status.st_size)


def header_fingerprint(path: Path) -> dict[str, Any]:
    """Size of a shard and sha256 of its header, which lists every tensor and its place."""
    with open(path, "rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        digest = hashlib.sha256(file.read(min(length, MAX_HEADER_NBYTES))).hexdigest()
    return {"nbytes": path.stat().st_size, "header_sha256": digest}


def _parse_header(path: Path, raw: bytes, start: int, size: int) -> dict[str, TensorEntry]:
    try:
        header = json.loads(_begins_with_brace(raw).decode(), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        entries = [_entry(path, name, item, start) for name, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: malformed safetensors header: {error}") from error
    end = start
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != end:
            raise CheckpointError(f"{path}: tensor {entry.name!r} overlaps or leaves a hole")
        end += entry.nbytes
    if end != size:
        raise CheckpointError(
            f"{path}: truncated or padded: tensors end at byte {end}, the file at {size}"
        )
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, item: dict[str, Any], start: int) -> TensorEntry:
    begin, end = item["data_offsets"]
    shape = tuple(item["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name!r}: shape and offsets must be non-negative integers")
    if item["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r}: dtype {item['dtype']!r} is not supported")
    dtype = DTYPES[item["dtype"]]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r}: {end - begin} bytes do not hold {shape} of {dtype}")
    return TensorEntry(
        name=name, dtype=dtype, shape=shape, file=path, offset=start + begin, nbytes=end - begin
    )


def _begins_with_brace(raw: bytes) -> bytes:
    """The format forbids white space in front; JSON would allow it."""
    if not raw.startswith(b"{"):
        raise ValueError("does not begin with {")
    return raw


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


# --- names ---------------------------------------------------------------------------------------


def _canonical(config: CheckpointConfig, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Entries under canonical names, without what is computed rather than stored."""
    kept = {n: e for n, e in entries.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.kind == "vit" and not any(n.startswith("vision_model.") for n in kept):
        return {"vision_model." + n: e for n, e in kept.items()}
    if config.kind == "internvl":
        return kept
    # Of a composite checkpoint with another language model, the tower is what we compile.
    return {n: e for n, e in kept.items() if n.startswith("vision_model.")}


def _match(
    config: CheckpointConfig, found: dict[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], list[str]]:
    expected = expected_shapes(config)
    problems = [f"{name}: missing" for name in expected if name not in found]
    for name, entry in found.items():
        if name not in expected:
            problems.append(f"{name}: unexpected")
        elif entry.shape != expected[name]:
            problems.append(f"{name}: expected shape {expected[name]}, found {entry.shape}")
        elif entry.dtype not in FLOATS:
            problems.append(f"{name}: expected a float type, found {entry.dtype}")
    return {name: found[name] for name in expected if name in found}, problems


def _raise_problems(path: Path, problems: list[str]) -> None:
    if not problems:
        return
    listed = "; ".join(problems[:MAX_LISTED])
    more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    raise CheckpointError(f"{path}: {len(problems)} problem(s): {listed}{more}")
