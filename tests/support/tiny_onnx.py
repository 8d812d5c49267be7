"""Tiny ONNX files, and open directories around them, made by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.artifact.manifest import (
    ComponentRecord,
    FileRecord,
    Manifest,
    TensorSpec,
)
from internvl_edge.artifact.open import Artifact
from internvl_edge.types import Array

FLOAT, INT64, BFLOAT16 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BFLOAT16
Value = tuple[str, int, Sequence[int | str | None]]


def write_onnx(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: Mapping[str, Array] | None = None,
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "tiny",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    opset = helper.make_opsetid("", 23)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def linear(path: Path, seed: int = 0) -> Path:
    """``y = x W``, float32 [batch, 4] to [batch, 3]; and ``total``, the sum of each row of x."""
    weight = np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32)
    return write_onnx(
        path,
        [
            helper.make_node("MatMul", ["x", "weight"], ["y"]),
            helper.make_node("ReduceSum", ["x", "axes"], ["total"], keepdims=0),
        ],
        [("x", FLOAT, ["batch", 4])],
        [("y", FLOAT, ["batch", 3]), ("total", FLOAT, ["batch"])],
        {"weight": weight, "axes": np.array([1], np.int64)},
    )


def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _record(path: Path) -> FileRecord:
    """The record of a file; of one that is not there, something."""
    data = path.read_bytes() if path.is_file() else b""
    return FileRecord(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def publish_linear(path: Path, seed: int = 0, components: Sequence[str] = ("vision",)) -> Path:
    """A directory that opens whole: ``linear`` graphs with their weights in files next to them."""
    path.mkdir()
    for number, name in enumerate(components):
        model = onnx.load(linear(path / f"{name}.onnx", seed + 100 * number))
        onnx.save(
            model,
            path / f"{name}.onnx",
            save_as_external_data=True,
            location=f"{name}.bin",
            size_threshold=64,
        )
    names = [f"{name}{end}" for name in components for end in (".onnx", ".bin")]
    outputs = (spec("y", "float32", "batch", 3), spec("total", "float32", "batch"))
    manifest = Manifest(
        tool_version="0",
        precision="fp32",
        model={"kind": "vit", "vision": {"num_hidden_layers": 1}},
        image_size=4,
        preprocessing={"size": 4},
        recipe=None,
        source={"checkpoint": "tiny", "files": {}},
        components={
            name: ComponentRecord(
                file=f"{name}.onnx",
                inputs=(spec("x", "float32", "batch", 4),),
                outputs=outputs,
                nbytes=48,
                verification=None,
            )
            for name in components
        },
        files={name: _record(path / name) for name in names},
    )
    (path / "manifest.json").write_bytes(manifest.to_bytes())
    return path


def open_directory(
    path: Path,
    components: Sequence[str],
    *,
    image_size: int = 4,
    preprocessing: dict[str, Any] | None = None,
    **fields: Any,
) -> Artifact:
    """A directory of ``<component>.onnx`` files, without going through its validation."""
    records = {
        name: ComponentRecord(
            file=f"{name}.onnx", inputs=(), outputs=(), nbytes=0, verification=None
        )
        for name in components
    }
    names = [record.file for record in records.values()] + ["tokenizer.model"]
    manifest = Manifest(
        tool_version="0",
        precision="fp32",
        model={"internvl": {}},
        image_size=image_size,
        preprocessing=preprocessing or {"size": 4},
        recipe=None,
        source={},
        components=records,
        files={name: _record(path / name) for name in names},
        **fields,
    )
    return Artifact(path=path, manifest=manifest)
