"""Caches that are written apart: the same values, and a graph that is gone afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from internvl_edge.export.engine.unaliased import unaliased_graph

BATCH, HEADS, ROOM, SIZE = 2, 3, 7, 4


def cache_graph(path: Path) -> Path:
    """Two caches, written from the same positions on."""
    float32, int64 = TensorProto.FLOAT, TensorProto.INT64
    names = ("key", "value")
    room = ["batch", HEADS, ROOM, SIZE]
    graph = helper.make_graph(
        [
            helper.make_node(
                "TensorScatter",
                [f"past.{name}", f"new.{name}", "write_indices"],
                [f"present.{name}"],
                axis=2,
                name=f"{name}/TensorScatter",
            )
            for name in names
        ],
        "caches",
        [
            *(helper.make_tensor_value_info(f"past.{n}", float32, room) for n in names),
            *(
                helper.make_tensor_value_info(f"new.{n}", float32, ["batch", HEADS, "length", SIZE])
                for n in names
            ),
            helper.make_tensor_value_info("write_indices", int64, ["batch"]),
        ],
        [helper.make_tensor_value_info(f"present.{n}", float32, room) for n in names],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)]), path)
    return path


@pytest.mark.parametrize(("length", "first"), [(1, [0, 0]), (1, [6, 2]), (3, [4, 1]), (7, [0, 0])])
def test_the_values_are_the_same(tmp_path: Path, length: int, first: list[int]) -> None:
    path = cache_graph(tmp_path / "decoder.onnx")
    rng = np.random.default_rng(length)
    feeds: dict[str, Any] = {"write_indices": np.array(first, np.int64)}
    for name in ("key", "value"):
        feeds[f"past.{name}"] = rng.random((BATCH, HEADS, ROOM, SIZE), np.float32)
        feeds[f"new.{name}"] = rng.random((BATCH, HEADS, length, SIZE), np.float32)
    expected = ort.InferenceSession(path).run(None, feeds)
    with unaliased_graph(path) as apart:
        model = onnx.load(apart)
        assert "TensorScatter" not in {node.op_type for node in model.graph.node}
        assert model.graph.output == onnx.load(path).graph.output
        found = ort.InferenceSession(apart).run(None, feeds)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [file.name for file in tmp_path.iterdir()] == ["decoder.onnx"]
