"""LayerScale folded into the layers before it, where nothing is quantized."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from support.checkpoints import TINY, write_vit
from support.disk import no_reflinks

from internvl_edge import compiler
from internvl_edge.compiler import ExportOptions
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.quantize.fold import without_layer_scale

BLOCK = "vision_model.encoder.layers.1"
WRITERS = {"attn.proj": "ls1", "mlp.fc2": "ls2"}
FOLDED = {
    f"vision_model.encoder.layers.{i}.{writer}.{part}"
    for i in range(TINY.vision.num_hidden_layers)
    for writer in WRITERS
    for part in ("weight", "bias")
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """In bfloat16, as published: graphs at bf16 can read its own file."""
    written = write_vit(tmp_path / "checkpoint", seed=1)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in written.state.items()}
    save_file(half, written.path / "model.safetensors", metadata={"format": "pt"})
    return written.path


def initializers_of(graph: Path) -> dict[str, ir.ExternalTensor]:
    values = ir.load(graph).graph.initializers.items()
    return {n: v.const_value for n, v in values if isinstance(v.const_value, ir.ExternalTensor)}


@pytest.mark.slow
def test_two_layers_of_a_block_are_written_and_the_others_stay_linked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product of two bfloat16 numbers is exact in float32, so it is rounded once."""
    no_reflinks(monkeypatch)
    out = tmp_path / "out"
    compiler.export(ExportOptions(checkpoint=checkpoint, out=out, precision="bf16", verify="none"))
    written = load_file(out / "weights.safetensors")
    assert written.keys() == FOLDED
    held = open_checkpoint(checkpoint)
    for writer, scale in WRITERS.items():
        gain = held.read(f"{BLOCK}.{scale}").astype(np.float32)
        for part, column in (("weight", gain[:, None]), ("bias", gain)):
            product = held.read(f"{BLOCK}.{writer}.{part}").astype(np.float32) * column
            found = written[f"{BLOCK}.{writer}.{part}"].view(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(found, product.astype(ml_dtypes.bfloat16))
    for graph in ("vision.onnx", "vision.cuda.onnx"):
        places = {name: tensor.location for name, tensor in initializers_of(out / graph).items()}
        assert {n for n, file in places.items() if file == "weights.safetensors"} == FOLDED
        assert set(places.values()) == {"weights.safetensors", "model.safetensors"}
        assert not any(name.endswith((".ls1", ".ls2")) for name in places)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "weights"), [("bf16", "copy"), ("fp16", "auto")], ids=["kept", "float16"]
)
def test_it_stays_where_weights_are_kept_and_at_float16(
    checkpoint: Path, tmp_path: Path, precision: str, weights: str
) -> None:
    out = tmp_path / "out"
    options = ExportOptions(
        checkpoint=checkpoint,
        out=out,
        precision=precision,
        weights=weights,  # type: ignore[arg-type]
        verify="none",
    )
    compiler.export(options)
    assert f"{BLOCK}.ls1" in initializers_of(out / "vision.onnx")


def test_a_tower_without_it_is_left_alone(checkpoint: Path) -> None:
    folded = without_layer_scale(open_checkpoint(checkpoint))
    assert not folded.config.vision.has_layer_scale
    assert without_layer_scale(folded) is folded
