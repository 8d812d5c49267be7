"""Carry a compiled directory to a machine without its weights, which are made up there.

    python benchmarks/gpu_pack.py pack OUT OUT.tar.xz    # graphs, manifest, headers of weights
    python benchmarks/gpu_pack.py fill OUT.tar.xz COPY   # there: random weights, the same layout

Speed does not depend on the weights, and 12 GB of them are slow to copy. A tensor gets values that
keep activations in range: norms' gains around 1, scales of quantized weights constant, everything
else normal with a deviation of 0.02. The manifest of the copy holds the hashes of what was written,
so that it opens like any other. What it computes means nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.artifact import MANIFEST

WEIGHTS, HEADER = ".safetensors", ".header"
SCALE = 0.005  # of quantized weights
DEVIATION = 0.02
DRAWN = 40_000_000  # values, over and over
WHOLE = ("I8", "U8", "F8_E4M3")


def pack(directory: Path, archive: Path) -> None:
    """Write everything but the weights, and of those the headers."""
    with tarfile.open(archive, "w:xz") as target:
        for path in sorted(directory.iterdir()):
            if path.suffix != WEIGHTS:
                target.add(path, path.name)
                continue
            with path.open("rb") as file:
                length = file.read(8)
                header = length + file.read(int.from_bytes(length, "little"))
            entry = tarfile.TarInfo(path.name + HEADER)
            entry.size = len(header)
            target.addfile(entry, io.BytesIO(header))


def fill(archive: Path, directory: Path, seed: int = 0) -> None:
    """Unpack what ``pack`` wrote, and make up its weights."""
    with tarfile.open(archive) as source:
        source.extractall(directory, filter="data")
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    rng = np.random.default_rng(seed)
    normals = (DEVIATION * rng.standard_normal(DRAWN)).astype(np.float32)
    for packed in sorted(directory.glob(f"*{HEADER}")):
        path = packed.with_suffix("")
        record = manifest["files"][path.name]
        digest, nbytes = _write(path, packed.read_bytes(), rng, normals)
        if nbytes != record["nbytes"]:
            raise SystemExit(f"{path}: expected {record['nbytes']} bytes, made {nbytes}")
        if record["sha256"] is not None:
            record["sha256"] = digest
        packed.unlink()
    (directory / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _write(
    path: Path, header: bytes, rng: np.random.Generator, normals: NDArray[np.float32]
) -> tuple[str, int]:
    """Write a safetensors file of this header; return its SHA-256 and its size."""
    tensors: dict[str, Any] = json.loads(header[8:])
    tensors.pop("__metadata__", None)
    digest, nbytes = hashlib.sha256(header), len(header)
    with path.open("wb") as file:
        file.write(header)
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            data = _values(name, entry["dtype"], end - begin, rng, normals)
            padding = bytes(len(header) + begin - nbytes)
            for part in (padding, data):
                file.write(part)
                digest.update(part)
            nbytes = len(header) + end
    return digest.hexdigest(), nbytes


def _values(
    name: str, dtype: str, nbytes: int, rng: np.random.Generator, normals: NDArray[np.float32]
) -> bytes:
    if dtype in WHOLE:
        codes = rng.integers(0, 256, nbytes, dtype=np.uint8)
        return (codes if dtype == "I8" else codes & 0x77).tobytes()  # 0x77: no NaN in FP8
    count = nbytes // (4 if dtype == "F32" else 2)
    values = np.resize(normals, count)
    if "scale" in name:
        values = np.full(count, SCALE, np.float32)
    elif "norm" in name and name.endswith("weight"):
        values = 1 + values
    if dtype == "BF16":
        return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("pack", "fill"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    (pack if args.command == "pack" else fill)(args.source, args.target)
    sys.stderr.write(f"{args.target}\n")


if __name__ == "__main__":
    main()
