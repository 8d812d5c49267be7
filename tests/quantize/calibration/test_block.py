"""Calibration block by block against the whole model run at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.calibration import STREAMS, calibrate
from support.checkpoints import TINY, write_internvl, write_vit
from support.checkpoints.family import IMAGE_TOKEN_ID, write_family

from internvl_edge.errors import CalibrationError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.checkpoint.load import load_model, load_reference
from internvl_edge.export.models import Chat, InternViT, InternVL
from internvl_edge.export.models.chat import require_llama
from internvl_edge.export.towers.streams import NO_TOKEN, Samples
from internvl_edge.quantize.calibration.block import CalibratedBlock
from internvl_edge.quantize.calibration.folding import SMOOTHING_SUFFIX
from internvl_edge.quantize.fold import source_of
from internvl_edge.quantize.numerics import formats
from internvl_edge.quantize.recipe import Recipe, recipe_for
from internvl_edge.runtime.text.chat_tokenizer import PLACE


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


def test_conversations_flow_as_the_whole_model_does(tmp_path: Path) -> None:
    """Also of two images, over the ends of batches, and with id 0, which is "!" in some."""
    path = write_family(tmp_path / "c", "qwen2").path
    model = load_reference(path)
    assert isinstance(model, Chat)
    llama, side = require_llama(model), model.checkpoint_config.vision.image_size
    pixels = torch.randn(5, 3, side, side, generator=torch.Generator().manual_seed(3))
    rows = [[7, PLACE, 8, 0], [7, PLACE, 9, PLACE, 0, 0, 11], [PLACE, 5], [PLACE, 6, 0]]
    ids = torch.full((4, 7), NO_TOKEN)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    chats = Samples(pixel_values=[pixels[:2], pixels[2:]], chat_ids=[ids[:3], ids[3:]])
    checkpoint = open_checkpoint(path)
    _, states = calibrate(checkpoint, chats, recipe_for("int4-wo"), {"image", "chat"})
    images = iter(pixels)
    assert llama.lm_head is not None
    for row, known in zip(rows, [*states["chat"][0], *states["chat"][1]], strict=True):
        shown = torch.stack([next(images) for _ in range(row.count(PLACE))])
        tokens = model.encode_image(shown).shape[1]
        counts = torch.tensor([tokens if i == PLACE else 1 for i in row])
        ids = torch.tensor([IMAGE_TOKEN_ID if i == PLACE else i for i in row])
        prompt = ids.repeat_interleave(counts)[None]
        with torch.inference_mode():
            logits = model(shown, prompt, None, IMAGE_TOKEN_ID)[0]
            found = llama.lm_head(llama.model.norm(known[: prompt.shape[1]]))
        torch.testing.assert_close(found, logits)


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


RECIPES = {
    "smoothed": Recipe(name="smoothed", smooth=0.5),
    "folded": Recipe(name="folded", fold=True),
    "rotated": Recipe(name="rotated", fold=True, rotate=True),
    "int8": recipe_for("int8"),
    "fp8": recipe_for("fp8"),
}


def stored_model(source: Checkpoint, results: list[CalibratedBlock]) -> InternViT | InternVL:
    """The model with what calibration left: dequantized weights, gains, biases and shifts."""
    model = load_model(source)
    prefix = "" if isinstance(model, InternVL) else "vision_model."
    parameters = {prefix + name: p for name, p in model.named_parameters()}
    with torch.no_grad():
        for result in results:
            for name, weight in result.weights.items():
                stored = formats.dequantize(weight.values, weight.scales, axis=1).T
                parameters[name].copy_(torch.from_numpy(np.ascontiguousarray(stored)))
            for name, values in result.folded.items():
                if not name.endswith(SMOOTHING_SUFFIX):
                    parameters[name].copy_(torch.from_numpy(values))
    return model


@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_stored_computes_the_same_function(
    tmp_path: Path, samples: Samples, name: str, norm_type: str
) -> None:
    """But for the rounding of weights: activations are not rounded here."""
    recipe = RECIPES[name]
    config = replace(TINY, vision=replace(TINY.vision, norm_type=norm_type))
    checkpoint = open_checkpoint(write_internvl(tmp_path / "checkpoint", config).path)
    source = source_of(checkpoint, recipe)
    results, _ = calibrate(source, samples, recipe, STREAMS)
    assert any(n.endswith(SMOOTHING_SUFFIX) for r in results for n in r.folded) == (
        recipe.smooth is not None or recipe.rotate
    )
    model, stored = load_model(checkpoint), stored_model(source, results)
    assert isinstance(model, InternVL)
    assert isinstance(stored, InternVL)
    pixels, ids = samples.pixel_values[0], samples.input_ids[0]
    least_db = 28.0 if recipe.weights == "int8" else 18.0
    with torch.inference_mode():
        image = model.vision_model(pixels)
        for run in (
            lambda m: m.vision_model(pixels),
            lambda m: m.encode_queries(image)[0],
            lambda m: m.encode_text(ids),
            lambda m: m.encode_queries(image)[1][0][1],  # cached values are in no other basis
        ):
            expected, found = (np.asarray(run(m)) for m in (model, stored))
            assert formats.sqnr_db(expected, found) > least_db


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


@pytest.mark.parametrize(("method", "headroom"), [("auto", 1.1), ("max", 1.0)])
def test_ranges_hold_what_was_seen_and_a_tenth_more(
    checkpoint: Checkpoint, samples: Samples, method: str, headroom: float
) -> None:
    """There are too few rows here for a clip to be chosen."""
    recipe = replace(recipe_for("int8"), range_method=method, shift=False, spread=False)
    results, _ = calibrate(checkpoint, samples, recipe, STREAMS)
    ratios = [s.clip / s.absmax for result in results for s in result.statistics]
    np.testing.assert_allclose(ratios, headroom, rtol=2**-8)  # a scale is a number of bfloat16
