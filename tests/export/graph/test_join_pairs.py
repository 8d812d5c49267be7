"""Pairs of linear layers joined for a builder, against the graph that they come from."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.chat.generation import noise
from support.checkpoints import write_internvl

from internvl_edge import compiler, open_session
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.oracle.run_graph import runnable
from internvl_edge.errors import ArtifactError, ResourceError
from internvl_edge.export.graph import join_pairs
from internvl_edge.export.graph.bf16_twin import compute_in_float32
from internvl_edge.export.graph.join_pairs import joined_graph
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession

COMPONENTS = ("vision", "image_queries", "text_embed")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    checkpoint = write_internvl(folder / "checkpoint", seed=3).path
    options = ExportOptions(
        checkpoint=checkpoint, out=folder / "out", components=COMPONENTS, verify="none"
    )
    compiler.export(options)
    return folder / "out"


def opened(path: Path, options: OrtOptions) -> OrtSession:
    """Open a graph in float32, for this CPU, which has no bfloat16."""
    model = ir.load(path)
    compute_in_float32(model)
    return OrtSession(path, graph=runnable(model), options=options)


def names(out: Path) -> set[str]:
    return {path.name for path in out.rglob("*")}


@pytest.mark.slow
def test_weights_of_another_type_are_joined_before_their_cast(out: Path, tmp_path: Path) -> None:
    """float32 shards that were linked, read by a float16 graph."""
    options = ExportOptions(
        checkpoint=out.parent / "checkpoint",
        out=tmp_path / "half",
        precision="fp16",
        components=("text_embed",),
        weights="copy",
        verify="none",
    )
    compiler.export(options)
    ids = np.random.default_rng(0).integers(3, 300, (2, 6))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with open_session(tmp_path / "half", "text_embed") as session:
        expected = session.run(feeds)
    with (
        joined_graph(tmp_path / "half" / "text_embed.onnx") as path,
        OrtSession(path) as session,
    ):
        assert "joined" in path.name
        found = session.run(feeds)
    np.testing.assert_allclose(found["text_embeds"], expected["text_embeds"], atol=1e-3)


@pytest.mark.parametrize("component", ["text_embed", "image_queries"])
def test_a_joined_graph_gives_the_same(out: Path, component: str) -> None:
    """Gate and up in every layer; keys and values of the vision states too. To the bit."""
    before = names(out)
    ids = np.random.default_rng(0).integers(3, 300, (2, 6))
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if component == "image_queries":
        with open_session(out, "vision") as vision:
            feeds = vision.run({"pixel_values": noise()})
    with open_session(out, component) as session:
        expected = session.run(feeds)
    with joined_graph(out / f"{component}.onnx") as path:
        kinds = [n.op_type for n in onnx.load(path, load_external_data=False).graph.node]
        with OrtSession(path) as session:
            found = session.run(feeds)
    assert kinds.count("Split") >= 2
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    assert names(out) == before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8", "int8-wo"])
def test_pairs_in_8_bits_are_joined_by_column(
    out: Path,
    tmp_path: Path,
    precision: str,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Graphs around the 16 bits of engines, and around float32. To the bit."""
    options = ExportOptions(
        checkpoint=out.parent / "checkpoint",
        out=tmp_path / "out",
        precision=precision,
        components=("text_embed",),
        calibration=pictures,
        verify="none",
    )
    compiler.export(options)
    ids = np.random.default_rng(0).integers(3, 300, (2, 6))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    exact = OrtOptions(exact=True)
    kinds = ["fp16.onnx", *(["onnx"] if precision != "int8" else [])]  # whose readers share a pair
    graphs = [tmp_path / "out" / f"text_embed.{kind}" for kind in kinds]
    monkeypatch.setattr(join_pairs, "_CHUNK", 1000)  # a few rows at a time, and fewer in the end
    os.link(tmp_path / "out" / "weights.safetensors", tmp_path / "second name")
    before, layers = names(tmp_path / "out"), 0
    for graph in graphs:
        with opened(graph, exact) as session:
            expected = session.run(feeds)
        with joined_graph(graph) as path, opened(path, exact) as session:
            nodes = onnx.load(path, load_external_data=False).graph.node
            found = session.run(feeds)
        layers += sum(node.op_type == "Split" and "gate_proj" in node.name for node in nodes)
        np.testing.assert_array_equal(found["text_embeds"], expected["text_embeds"])
    assert layers >= 2 * len(graphs)
    assert names(tmp_path / "out") == before


def test_a_tower_without_pairs_stays(out: Path) -> None:
    with joined_graph(out / "vision.onnx") as path:
        assert path == out / "vision.onnx"


def test_weights_that_something_else_reads_stay(out: Path) -> None:
    model = onnx.load(out / "text_embed.onnx", load_external_data=False)
    for node in list(model.graph.node):
        if node.op_type == "Transpose" and "up_proj" in node.name:
            model.graph.node.append(
                onnx.helper.make_node("Identity", [node.input[0]], [f"{node.name}.copy"])
            )
    path = out / "read_twice.onnx"
    onnx.save(model, path)
    try:
        with joined_graph(path) as found:
            assert found == path
    finally:
        path.unlink()


def test_a_full_disk_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the tensorrt-rtx package is not installed")
    before = names(out)

    def full(stored: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(join_pairs, "_copy", full)
    with pytest.raises(ResourceError, match="No space left"):
        compiler.build(out, ["tensorrt-rtx"], components=["text_embed"])
    assert names(out) - {"engines"} == before


def test_weights_that_became_shorter(out: Path, tmp_path: Path) -> None:
    for file in out.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / file.name)
    data = tmp_path / "model.safetensors"
    os.truncate(data, data.stat().st_size // 8)
    before = names(tmp_path)
    with (
        pytest.raises(ArtifactError, match="became shorter"),
        joined_graph(tmp_path / "text_embed.onnx"),
    ):
        pass
    assert names(tmp_path) == before
