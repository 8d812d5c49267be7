"""A directory with fewer components: what goes along, and that it opens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from onnx import TensorProto
from support.web.triton.directories import graph_of, write_directory

from internvl_edge.artifact import open_artifact
from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.artifact.subset import graphs_of, subset, write_subset
from internvl_edge.errors import ArtifactError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    fused = graph_of(COMPONENTS["vision"], "Identity", TensorProto.FLOAT)
    more = {"vision.cpu.onnx": fused, "vision.cuda.onnx": fused, "notes.json": b"{}"}
    return write_directory(tmp_path / "out", components=["vision", "text_embed"], more=more)


def test_what_belongs_to_a_component_goes_with_it(out: Path, tmp_path: Path) -> None:
    artifact = open_artifact(out)
    assert graphs_of(artifact, "vision") == ("vision.onnx", "vision.cpu.onnx", "vision.cuda.onnx")
    kept = set(subset(artifact, ["vision"]).files)
    shared = {"weights.bin", "tokenizer.model", "notes.json"}
    assert kept == {"vision.onnx", "vision.cpu.onnx", "vision.cuda.onnx"} | shared
    assert set(subset(artifact, ["text_embed"]).files) == {"text_embed.onnx"} | shared


def test_weights_of_others_stay(tmp_path: Path) -> None:
    """A file that only graphs for engines lie in is not theirs either."""
    out = write_directory(tmp_path / "out", components=["vision"])
    artifact = open_artifact(out)
    artifact.weights["vision.fp16.onnx"] = ("tokenizer.model",)
    assert "tokenizer.model" not in subset(artifact, ["vision"]).files


def test_it_opens_like_any_other(out: Path, tmp_path: Path) -> None:
    artifact, folder = open_artifact(out), tmp_path / "part"
    folder.mkdir()
    write_subset(artifact, ["text_embed"], folder)
    part = open_artifact(folder)
    assert list(part.manifest.components) == ["text_embed"]
    assert part.manifest.hard_links == ("weights.bin",)
    assert (folder / "weights.bin").samefile(out / "weights.bin")
    open_artifact(out)  # one more name of its files is no change
    artifact.watched("weights.bin").close()


def test_a_file_that_was_replaced_is_not_brought(out: Path, tmp_path: Path) -> None:
    artifact = open_artifact(out)
    data = (out / "weights.bin").read_bytes()
    (out / "weights.bin").unlink()
    (out / "weights.bin").write_bytes(bytes(len(data) - 1) + b"\1")
    with pytest.raises(ArtifactError, match=r"weights\.bin is another file"):
        artifact.bring("weights.bin", tmp_path / "weights.bin")
    with pytest.raises(ArtifactError, match="lists no 'other'"):
        artifact.bring("other", tmp_path / "other")


def test_a_copy_is_compared_with_the_manifest(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(source: Path, target: Path) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(os, "link", no_link)
    artifact = open_artifact(out)
    artifact.bring("weights.bin", tmp_path / "weights.bin")
    assert (tmp_path / "weights.bin").read_bytes() == (out / "weights.bin").read_bytes()
    assert not (tmp_path / "weights.bin").samefile(out / "weights.bin")
