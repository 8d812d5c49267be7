"""Rotations are orthogonal, symmetric and keep the mean; folded checkpoints compute the same."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import TINY, write_internvl

from internvl_edge.errors import UsageError
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.checkpoint.load import load_model
from internvl_edge.export.checkpoint.parameters import expected_shapes
from internvl_edge.export.models import InternViT, InternVL
from internvl_edge.export.synthetic import PRESETS, Synthesis, shrink, write_checkpoint
from internvl_edge.quantize.fold import folded
from internvl_edge.quantize.numerics.rotation import rotate_heads, rotation

SEEDED = partial(rotation, seed=3)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 160), seed=st.integers(0, 100))
def test_orthogonal_symmetric_and_the_mean_stays(width: int, seed: int) -> None:
    q = rotation(width, seed).matrix().astype(np.float64)
    np.testing.assert_allclose(q @ q.T, np.eye(width), atol=1e-6)
    np.testing.assert_allclose(q, q.T, atol=1e-7)
    np.testing.assert_allclose(q.sum(axis=0), 1.0, atol=1e-5)


@pytest.mark.parametrize("width", [64, 400, 1024])
def test_an_outlier_is_spread_over_all_channels(width: int) -> None:
    spike = np.zeros((1, width))
    spike[0, width // 3] = 100.0
    turned = rotation(width, 1).apply(spike)
    assert np.abs(turned).max() < 500.0 / np.sqrt(width)
    np.testing.assert_allclose(np.linalg.norm(turned), 100.0, rtol=1e-6)


def test_small_products_equal_the_matrix_along_either_axis() -> None:
    turn = rotation(48, 2)
    values = np.random.default_rng(0).standard_normal((5, 48, 3)).astype(np.float32)
    expected = np.einsum("abc,bd->adc", values, turn.matrix())
    found = turn.apply(values.transpose(0, 2, 1)).transpose(0, 2, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    columns = values[0]
    np.testing.assert_allclose(turn.apply(columns, axis=0), turn.matrix() @ columns, atol=1e-6)


def test_heads_turn_by_themselves() -> None:
    head = rotation(8, 0)
    values = np.random.default_rng(1).standard_normal((5, 24)).astype(np.float32)
    blocks = np.kron(np.eye(3, dtype=np.float32), head.matrix())
    np.testing.assert_allclose(rotate_heads(values, head), values @ blocks, atol=1e-6)
    found = rotate_heads(np.ascontiguousarray(values.T), head, axis=0)
    np.testing.assert_allclose(found, blocks.T @ values.T, atol=1e-6)


def test_seeds_decide_the_rotation() -> None:
    assert (rotation(64, 1).matrix() == rotation(64, 1).matrix()).all()
    assert (rotation(64, 1).matrix() != rotation(64, 2).matrix()).any()


def test_another_width_is_refused() -> None:
    with pytest.raises(UsageError, match="expected 8 channels along axis -1"):
        rotation(8, 0).apply(np.zeros((2, 9)))


@pytest.mark.parametrize("is_rotated", [False, True])
@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_a_folded_checkpoint_computes_the_same(
    tmp_path: Path, norm_type: str, is_rotated: bool
) -> None:
    config = replace(TINY, vision=replace(TINY.vision, norm_type=norm_type))
    checkpoint = open_checkpoint(write_internvl(tmp_path / "checkpoint", config).path)
    source = folded(checkpoint, SEEDED if is_rotated else None, has_shift=True)
    assert {n: entry.shape for n, entry in source.tensors.items()} == expected_shapes(source.config)
    assert not any(".ls1" in name for name in source.tensors)
    before, after = load_model(checkpoint), load_model(source)
    assert isinstance(before, InternVL)
    assert isinstance(after, InternVL)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 28, 28, generator=generator)
    larger = torch.randn(1, 3, 42, 42, generator=generator)  # positions are resampled
    ids = torch.randint(3, 300, (3, 9), generator=generator)
    with torch.inference_mode():
        pairs = [
            (model.vision_model(pixels), model.vision_model(larger))
            + (model.encode_image(pixels, "g"), model.encode_text(ids))
            + (model.match(pixels, ids, ids > 0),)
            for model in (before, after)
        ]
    for expected, found in zip(*pairs, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_gains_are_one_and_the_stream_is_turned(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_internvl(tmp_path / "checkpoint").path)
    source = folded(checkpoint, SEEDED, has_shift=False)
    assert (source.read("vision_model.encoder.layers.0.norm1.weight") == 1).all()
    assert (source.read("qllama.model.layers.0.cross_attn.norm2.weight") == 1).all()
    name = "vision_model.embeddings.class_embedding"
    expected = checkpoint.read(name) @ rotation(64, 3).matrix()
    np.testing.assert_allclose(source.read(name), expected, atol=1e-5)
    same = "vision_model.encoder.layers.0.attn.q_norm.weight"
    np.testing.assert_array_equal(source.read(same), checkpoint.read(same))


@pytest.mark.slow
def test_full_width_blocks_with_outliers_compute_the_same(tmp_path: Path) -> None:
    """Two blocks at InternViT-6B's width 3200 = 2⁷ · 25, gains of outlier channels 64 times."""
    config = shrink(PRESETS["internvit-6b-224"], 2)
    path = tmp_path / "checkpoint"
    write_checkpoint(Synthesis(config=config, outliers=True, massive=True), path)
    checkpoint = open_checkpoint(path)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 224, 224, generator=generator)
    outputs = []
    for source in (checkpoint, folded(checkpoint, SEEDED, has_shift=True)):
        model = load_model(source)
        assert isinstance(model, InternViT)
        with torch.inference_mode():
            outputs.append(model(pixels))
        del model
    expected, found = outputs
    assert float((found - expected).norm() / expected.norm()) < 1e-4
