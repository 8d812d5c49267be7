"""Outlier channels after GELU: divided where that pays, and nothing in the graph elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file
from support.checkpoints import TINY, write_vit

from internvl_edge.artifact.components import WEIGHTS_FILE
from internvl_edge.artifact.open import Artifact
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.compiler.steps import quantize
from internvl_edge.compiler.steps.engines import build
from internvl_edge.errors import VerificationError
from internvl_edge.export.checkpoint.shards import read_header
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.synthetic import Synthesis, write_checkpoint
from internvl_edge.quantize import recipe

pytestmark = pytest.mark.slow

LAYERS = TINY.vision.num_hidden_layers
CHANNELS = (5, 77)
FACTOR = 60.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows of every fc1 are larger, and the columns of fc2 that read them smaller."""
    path = write_vit(tmp_path_factory.mktemp("gelu") / "checkpoint").path
    (file,) = path.glob("*.safetensors")
    state = load_file(file)
    for name, values in state.items():
        for channel in CHANNELS:
            if ".mlp.fc1." in name:
                values[channel] *= FACTOR
            elif name.endswith("mlp.fc2.weight"):
                values[:, channel] /= FACTOR
    save_file(state, file)
    return path


def exported(checkpoint: Path, out: Path) -> Artifact:
    # 37 tokens: fewer rows than ``ENOUGH_ROWS`` would choose nothing
    return export(ExportOptions(checkpoint=checkpoint, out=out, precision="int8", image_size=84))


def factors_in(path: Path) -> int:
    graph = onnx.load(path, load_external_data=False).graph
    names = {i.name for i in graph.initializer if i.name.endswith(".mlp.spread")}
    found = [node for node in graph.node if "mlp" in node.name and node.op_type == "Mul"]
    assert len(found) == len(names)
    return len(names)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return exported(checkpoint, tmp_path_factory.mktemp("out") / "out")


def test_every_graph_has_the_factors(artifact: Artifact) -> None:
    for file in ("vision.onnx", "vision.fp16.onnx", "vision.u8.onnx"):
        assert factors_in(artifact.path / file) == LAYERS


def test_they_are_the_outliers(artifact: Artifact) -> None:
    weights = read_header(artifact.path / WEIGHTS_FILE)
    for i in range(LAYERS):
        factors = weights[f"vision_model.encoder.layers.{i}.mlp.spread"].read()
        assert set(np.argsort(factors)[: len(CHANNELS)]) == set(CHANNELS)
        assert factors[list(CHANNELS)].max() < 0.2
        assert (factors <= 1).all()


def test_what_they_are_worth(
    checkpoint: Path, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = {**recipe.PRESETS["int8"], "spread": False}
    monkeypatch.setitem(recipe.PRESETS, "int8", without)
    other = exported(checkpoint, tmp_path / "out")
    assert factors_in(tmp_path / "out" / "vision.onnx") == 0
    found, expected = (a.manifest.components["vision"].verification for a in (artifact, other))
    assert found is not None and expected is not None
    assert found["sqnr_db"] > expected["sqnr_db"] + 6


def test_where_nothing_stands_out_nothing_is_multiplied(tmp_path: Path) -> None:
    config = CheckpointConfig(kind="vit", vision=TINY.vision)
    write_checkpoint(Synthesis(config=config), tmp_path / "checkpoint")
    exported(tmp_path / "checkpoint", tmp_path / "out")
    for file in ("vision.onnx", "vision.fp16.onnx", "vision.u8.onnx"):
        assert factors_in(tmp_path / "out" / file) == 0


def test_factors_that_weights_do_not_have_are_found(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quantize.quantize_weights

    def spoil(*args: Any) -> Any:
        result = run(*args)
        work = args[2].work
        place = read_header(work.path / WEIGHTS_FILE)["vision_model.encoder.layers.1.mlp.spread"]
        values = np.fromfile(work.path / WEIGHTS_FILE, np.uint8)
        part = slice(place.offset, place.offset + place.nbytes)
        values[part] = (values[part].view(np.float32) * 2).view(np.uint8)
        values.tofile(work.path / WEIGHTS_FILE)
        return result

    monkeypatch.setattr(quantize, "quantize_weights", spoil)
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.fc2\.weight: expected scales"):
        exported(checkpoint, tmp_path / "out")


@pytest.mark.rtx
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
def test_an_engine_builds(checkpoint: Path, tmp_path: Path) -> None:
    exported(checkpoint, tmp_path / "out")
    (engine,) = build(tmp_path / "out", ["tensorrt-rtx"])
    assert (tmp_path / "out" / engine.file).stat().st_size > 0
