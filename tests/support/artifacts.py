"""A tiny compiled directory of our format, for the tests of whatever reads or writes one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from internvl_edge.artifact.manifest import (
    ComponentRecord,
    EngineRecord,
    FileRecord,
    Manifest,
    TensorSpec,
)
from internvl_edge.artifact.publish import staging, write_manifest

MODEL = bytes.fromhex(  # y = Relu(x @ w); w is 128 bytes of weights.bin from byte 64
    "080b3a6e0a110a01780a017712016822064d61744d756c0a0c0a0168120179220452656c752a4108040808"
    "10014201776a170a086c6f636174696f6e120b776569676874732e62696e6a0c0a066f6666736574120236"
    "346a0d0a066c656e677468120331323870015a030a017862030a017942021017"
)
ENGINE = "engines/vision.tensorrt-rtx-1a2b3c4d.plan"
SIDECAR = "engines/vision.tensorrt-rtx-1a2b3c4d.json"


def contents(weights: bytes = bytes(192), *, engine: bytes | None = None) -> dict[str, bytes]:
    """Every file but the manifest."""
    files = {"vision.onnx": MODEL, "weights.bin": weights, "README.md": b"# tiny\n"}
    if engine is not None:
        files |= {ENGINE: engine, SIDECAR: b"{}"}
    return files


def manifest_of(files: dict[str, bytes], /, **changed: Any) -> Manifest:
    """The manifest of these files."""
    engines = (
        EngineRecord(component="vision", target="tensorrt-rtx", file=ENGINE, sidecar=SIDECAR),
    )
    fields: dict[str, Any] = {
        "tool_version": "0.1.0",
        "precision": "fp32",
        "model": {"kind": "vit", "vision": {"num_hidden_layers": 1}},
        "image_size": 28,
        "preprocessing": {"size": 28, "mean": [0.5, 0.5, 0.5]},
        "recipe": None,
        "source": {"checkpoint": "tiny", "files": {}},
        "components": {
            "vision": ComponentRecord(
                file="vision.onnx",
                inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
                outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 8)),),
                nbytes=128,
                verification={"cosine": 1.0, "sqnr_db": 90.0, "max_abs": 0.0},
            )
        },
        "engines": engines if ENGINE in files else (),
        "files": {name: file_record(data) for name, data in files.items()},
    }
    return Manifest(**fields | changed)


def file_record(data: bytes) -> FileRecord:
    return FileRecord(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)


def write_artifact(directory: Path, files: dict[str, bytes], /, **changed: Any) -> Path:
    """A directory, written without the code under test but for the manifest's text."""
    directory.mkdir(exist_ok=True)
    write_files(directory, files)
    (directory / "manifest.json").write_bytes(manifest_of(files, **changed).to_bytes())
    return directory


def publish(out: Path, files: dict[str, bytes], *, force: bool = False) -> None:
    with staging(out, force=force) as directory:
        write_files(directory, files)
        write_manifest(directory, manifest_of(files))
