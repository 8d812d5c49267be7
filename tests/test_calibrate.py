"""Calibration block by block against the whole model run at once."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import TINY, write_internvl, write_vit

from internvl_edge.errors import CalibrationError
from internvl_edge.export.blocks import (
    LLAMA_NORMS,
    VISION_NORMS,
    Samples,
    calibration_blocks,
)
from internvl_edge.export.checkpoint import Checkpoint, load_reference, open_checkpoint
from internvl_edge.export.models import InternViT, InternVL
from internvl_edge.quantize import formats
from internvl_edge.quantize.calibrate import CalibratedBlock, calibrate_block
from internvl_edge.quantize.recipe import Recipe, recipe_for
from internvl_edge.resume import Workspace
from internvl_edge.spool import Budget

STREAMS = {"image", "queries", "text", "match"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_internvl(tmp_path / "checkpoint").path)


@pytest.fixture(scope="module")
def samples() -> Samples:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(6, 3, 28, 28, generator=generator)
    ids = torch.randint(3, 300, (6, 9), generator=generator)
    ids[2:, 6:] = 0
    return Samples(
        pixel_values=[pixels[:4], pixels[4:]], input_ids=[ids[:4], ids[4:]], match_ids=[ids[:4]]
    )


def calibrate(
    checkpoint: Checkpoint,
    samples: Samples,
    recipe: Recipe,
    streams: set[str],
    budget_nbytes: int = 1 << 30,
) -> tuple[list[CalibratedBlock], dict[str, list[torch.Tensor]]]:
    """Every block's result, and the hidden states that each stream ends with."""
    results: list[CalibratedBlock] = []
    states: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(TemporaryDirectory())
        work = Workspace(Path(folder), Budget(budget_nbytes))
        cleanup.callback(work.close)
        for block, current in calibration_blocks(checkpoint, samples, streams, work):
            results.append(calibrate_block(block, current, recipe, work.hidden, work.scratch))
            work.finish(block.name, {}, {name: s.hidden for name, s in current.items()})
            states |= {n: [torch.from_numpy(x) for x in s.hidden] for n, s in current.items()}
    return results, states


def test_results_do_not_depend_on_the_memory_budget(
    checkpoint: Checkpoint, samples: Samples
) -> None:
    recipe = recipe_for("int8")
    held, held_states = calibrate(checkpoint, samples, recipe, STREAMS)
    spooled, spooled_states = calibrate(checkpoint, samples, recipe, STREAMS, budget_nbytes=0)
    torch.testing.assert_close(held_states, spooled_states, rtol=0, atol=0)
    for one, other in zip(held, spooled, strict=True):
        assert one.activations == other.activations
        for name, weight in one.weights.items():
            assert np.array_equal(weight.values, other.weights[name].values)


def test_streams_flow_as_the_whole_model_does(checkpoint: Checkpoint, samples: Samples) -> None:
    model = load_reference(checkpoint.path)
    assert isinstance(model, InternVL)
    _, states = calibrate(checkpoint, samples, recipe_for("int8"), STREAMS)
    norm = model.qllama.model.norm
    with torch.inference_mode():
        for i, pixels in enumerate(samples.pixel_values):
            vision = model.vision_model(pixels)
            torch.testing.assert_close(states["image"][i], vision)
            torch.testing.assert_close(norm(states["queries"][i]), model.encode_queries(vision)[0])
        for i, ids in enumerate(samples.input_ids):
            text = model.text_states(ids, (ids > 0).long())
            torch.testing.assert_close(norm(states["text"][i]), text)
        ids = samples.match_ids[0]
        vision = model.vision_model(samples.pixel_values[0])
        matched = model.match_states(vision, ids, (ids > 0).long())
        torch.testing.assert_close(norm(states["match"][0])[:, : TINY.num_query_token], matched)


@pytest.mark.parametrize(("precision", "least_db"), [("int8", 36.0), ("fp8", 28.0)])
def test_stored_weights_are_the_checkpoints(
    checkpoint: Checkpoint, samples: Samples, precision: str, least_db: float
) -> None:
    """Dequantized, and with the folded factors taken out again."""
    results, _ = calibrate(checkpoint, samples, recipe_for(precision), STREAMS)
    readers = {**VISION_NORMS, **LLAMA_NORMS}
    for result in results:
        moved: dict[str, Any] = {}
        for name, gain in result.folded.items():
            path = name.removesuffix(".weight")
            norm = max((n for n in readers if path.endswith(f".{n}")), key=len)
            block = path.removesuffix(f".{norm}")
            factor = gain / checkpoint.read(name)
            moved |= {f"{block}.{reader}.weight": factor for reader in readers[norm]}
        assert bool(moved) == (precision == "int8")
        for name, weight in result.weights.items():
            stored = formats.dequantize(weight.values, weight.scales, axis=1).T
            assert formats.sqnr_db(checkpoint.read(name), stored * moved.get(name, 1)) > least_db


@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_smoothing_folds_away(tmp_path: Path, samples: Samples, norm_type: str) -> None:
    """Without rounding, smoothed weights behind divided gains compute the same function."""
    config = replace(TINY.vision, norm_type=norm_type)
    checkpoint = open_checkpoint(write_vit(tmp_path / "vit", config).path)
    fine = replace(recipe_for("int8"), smooth=0.5)
    rough = replace(fine, smooth=None)
    smoothed, _ = calibrate(checkpoint, samples, fine, {"image"})
    plain, _ = calibrate(checkpoint, samples, rough, {"image"})
    assert any(result.folded for result in smoothed)
    assert not any(result.folded for result in plain)
    for changed, same in zip(smoothed, plain, strict=True):
        for name in ("norm1.weight", "norm1.bias"):
            full = next((n for n in changed.folded if n.endswith(name)), None)
            if full is None:
                assert norm_type == "rms_norm"
                continue
            original = checkpoint.read(full)
            reader = full.replace(name, "attn.qkv.weight")
            before = formats.dequantize(same.weights[reader].values, same.weights[reader].scales, 1)
            after = formats.dequantize(
                changed.weights[reader].values, changed.weights[reader].scales, 1
            )
            gain = (changed.folded[full] / original)[:, None]
            assert formats.sqnr_db(before, after * gain) > 30


def test_every_stream_has_a_range_for_every_layer_it_runs(
    checkpoint: Checkpoint, samples: Samples
) -> None:
    results, _ = calibrate(checkpoint, samples, recipe_for("int8"), STREAMS)
    scales: dict[str, dict[str, float]] = {}
    for result in results:
        for stream, found in result.activations.items():
            scales.setdefault(stream, {}).update(found)
    names = {name for result in results for name in result.weights}
    llama = {name for name in names if name.startswith("qllama.")}
    assert set(scales["image"]) == names - llama
    assert set(scales["queries"]) == set(scales["match"]) == llama
    assert set(scales["text"]) == {name for name in llama if "cross_attn" not in name}
    assert all(scale > 0 for found in scales.values() for scale in found.values())
    different = [name for name in scales["text"] if scales["text"][name] != scales["queries"][name]]
    assert different, "streams must not share ranges"


def test_excluded_and_narrow_layers_are_left_alone(
    checkpoint: Checkpoint, samples: Samples
) -> None:
    recipe = replace(recipe_for("int8"), exclude=(r"mlp\.fc2$", r"self_attn\.k_proj$"))
    results, _ = calibrate(checkpoint, samples, recipe, STREAMS)
    for result in results:
        assert not any("fc2" in name or "self_attn.k_proj" in name for name in result.weights)
        # q and v still are quantized, but their norm also feeds a layer that is not
        assert not any("input_layernorm" in name for name in result.folded)
    wide = replace(recipe_for("int8"), min_features=1000)
    results, _ = calibrate(checkpoint, samples, wide, {"image"})
    assert not any(result.weights for result in results)


def test_non_finite_activations_are_named(checkpoint: Checkpoint, samples: Samples) -> None:
    pixels = samples.pixel_values[0].clone()
    pixels[0, 0, 0, 0] = torch.nan
    broken = replace(samples, pixel_values=[pixels])
    with pytest.raises(CalibrationError, match=r"layers\.0\.attn\.qkv"):
        calibrate(checkpoint, broken, recipe_for("int8"), {"image"})


def test_the_same_samples_give_the_same_bytes(checkpoint: Checkpoint, samples: Samples) -> None:
    first, _ = calibrate(checkpoint, samples, recipe_for("int8"), STREAMS)
    second, _ = calibrate(checkpoint, samples, recipe_for("int8"), STREAMS)
    for a, b in zip(first, second, strict=True):
        assert a.activations == b.activations
        for name, weight in a.weights.items():
            np.testing.assert_array_equal(weight.values, b.weights[name].values)
            np.testing.assert_array_equal(weight.scales, b.weights[name].scales)


def test_a_bare_tower_needs_no_text(tmp_path: Path, samples: Samples) -> None:
    checkpoint = open_checkpoint(write_vit(tmp_path / "vit").path)
    model = load_reference(checkpoint.path)
    assert isinstance(model, InternViT)
    images = Samples(pixel_values=samples.pixel_values)
    results, states = calibrate(checkpoint, images, recipe_for("int8"), {"image"})
    assert len(results) == TINY.vision.num_hidden_layers
    with torch.inference_mode():
        torch.testing.assert_close(states["image"][0], model(samples.pixel_values[0]))
