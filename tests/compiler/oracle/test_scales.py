"""A quantizer that is broken does not get past verification, whatever the mistake costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.checkpoints import TINY, Written, write_vit

from internvl_edge import compiler
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import VerificationError
from internvl_edge.quantize.calibration import block
from internvl_edge.quantize.graph import qdq
from internvl_edge.quantize.numerics import weights

VISION = replace(TINY.vision, num_hidden_layers=3)
LAYER = "vision_model.encoder.layers.1.mlp.fc1.weight"


@pytest.fixture(scope="module")
def vit(tmp_path_factory: Any) -> Written:
    return write_vit(tmp_path_factory.mktemp("audit") / "checkpoint", VISION, seed=6)


def flipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of square weights along their inputs, which fused kernels do not notice."""
    made = qdq._weight_node

    def broken(graph: Any, weight: ir.Value, linear: Any, compute: Any) -> ir.Node:
        node = made(graph, weight, linear, compute)
        rows, columns = weight.shape.numpy()  # type: ignore[union-attr]
        if rows == columns:
            node.attributes["axis"] = ir.AttrInt64("axis", 0)
        return node

    monkeypatch.setattr(qdq, "_weight_node", broken)


def one_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One activation scale in the graph."""
    made = qdq._rewrite

    def broken(graph: Any, weight: ir.Value, linear: Any, shared: Any) -> None:
        if weight.name == LAYER and linear.activation_scale is not None:
            linear = replace(linear, activation_scale=2 * linear.activation_scale)
        made(graph, weight, linear, shared)

    monkeypatch.setattr(qdq, "_rewrite", broken)


def one_pair_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """An activation that is not rounded."""
    made = qdq._rewrite

    def broken(graph: Any, weight: ir.Value, linear: Any, shared: Any) -> None:
        if weight.name == LAYER:
            linear = replace(linear, activation_scale=None)
        made(graph, weight, linear, shared)

    monkeypatch.setattr(qdq, "_rewrite", broken)


def ranges_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range that calibration chooses, so that all that follows agrees with it."""
    made = block.choose_range

    def broken(activation: Any, *rest: Any) -> Any:
        chosen = made(activation, *rest)
        return replace(chosen, scale=2 * chosen.scale)

    monkeypatch.setattr(block, "choose_range", broken)


def weights_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight scales before rounding: a bit less, and consistent in itself."""
    made = weights.formats.weight_scale

    def broken(*arguments: Any, **more: Any) -> Any:
        return np.float32(2) * made(*arguments, **more)

    monkeypatch.setattr(weights.formats, "weight_scale", broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (flipped, r"attn\.proj\.weight: expected one product"),
        (one_doubled, r"1\.mlp\.fc1\.weight: expected one product"),
        (one_pair_dropped, r"1\.mlp\.fc1\.weight: expected one product"),
        (ranges_doubled, r"expected a range of at most"),
        (weights_doubled, r"expected scales of max \|W\|"),
    ],
)
def test_a_broken_quantizer_is_caught(
    vit: Written,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[pytest.MonkeyPatch], None],
    message: str,
) -> None:
    broken(monkeypatch)
    options = ExportOptions(
        checkpoint=vit.path, out=tmp_path / "out", precision="int8", calibration=pictures
    )
    with pytest.raises(VerificationError, match=message):
        compiler.export(options)
    assert not options.out.exists()


@pytest.mark.slow
def test_a_sound_one_passes(vit: Written, pictures: Path, tmp_path: Path) -> None:
    options = ExportOptions(
        checkpoint=vit.path, out=tmp_path / "out", precision="int8", calibration=pictures
    )
    artifact = compiler.export(options)
    assert compiler.verify(artifact.path, vit.path)["vision"]["sqnr_db"] > 12
