"""Every kind of chat model, in both layouts: against transformers, and against the original."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints.family import IMAGE_TOKEN_ID, KINDS, write_family
from support.golden import FAMILY, assert_golden, read_golden

from internvl_edge.export import load_reference
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.models import Chat
from internvl_edge.export.models.llama import Llama

ALLOWED = {"vit": 3e-5, "features": 2e-5, "logits": 1e-4, "kv": 3e-5, "phi3": 3e-4}


def language_of(model: Chat) -> Llama:
    assert model.language_model is not None
    return model.language_model


def prompt_of(images: int, seed: int = 0) -> torch.Tensor:
    """Ids with the places of 4 tokens for each image."""
    ids = torch.randint(3, 100, (1, 20), generator=torch.Generator().manual_seed(seed))
    ids[0, 2 : 2 + 4 * images] = IMAGE_TOKEN_ID
    return ids


@pytest.mark.slow  # it imports transformers
@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, is_new: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    written = write_family(tmp_path / "hf", kind, "hf", is_new=is_new, shards=2, seed=3)
    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(
        written.path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = load_reference(written.path)
    assert isinstance(ours, Chat)
    pixels, ids = torch.randn(2, 3, 56, 56), prompt_of(2)
    # longer than the positions of short texts, where a kind has such
    text = torch.randint(3, 100, (1, 80), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(pixel_values=pixels, input_ids=ids).logits
        assert (ours(pixels, ids) - expected).abs().max() < 1e-4 * expected.abs().max()
        expected = theirs(input_ids=text).logits
        assert (ours(pixels[:0], text) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_are_one_checkpoint(kind: str, is_new: bool, tmp_path: Path) -> None:
    chat = open_checkpoint(write_family(tmp_path / "chat", kind).path)
    native = open_checkpoint(write_family(tmp_path / "hf", kind, "hf", is_new=is_new).path)
    assert list(chat.tensors) == list(native.tensors)
    for name in chat.tensors:
        np.testing.assert_array_equal(chat.read(name), native.read(name), err_msg=name)
    assert chat.content_sha256() == native.content_sha256()


def test_a_long_text_keeps_its_positions_to_the_end(tmp_path: Path) -> None:
    model = load_reference(write_family(tmp_path, "phi3").path)
    assert isinstance(model, Chat)
    llama = language_of(model)
    short = torch.ones(1, 60, dtype=torch.long)
    assert llama.positions_of(short).max() == 59
    assert llama.positions_of(short, 4).max() == 59  # 64 in all
    assert llama.positions_of(short, 5).min() == 64
    assert torch.equal(llama.positions_of(short, 5), llama.positions_of(short) + 64)


@pytest.mark.parametrize("layout", ["chat", "hf"])
@pytest.mark.parametrize("kind", FAMILY)
def test_golden(family: Path, kind: str, layout: str) -> None:
    wanted = read_golden(family / kind / "reference.npz")
    arrays = {n: torch.from_numpy(array) for n, array in wanted.items() if "eos" not in n}
    model = load_reference(family / kind / layout)
    assert isinstance(model, Chat)
    llama, logits_bound = language_of(model), ALLOWED["phi3" if kind == "phi3" else "logits"]
    pixels, ids = arrays["pixel_values"], arrays["input_ids"]
    mask = torch.ones_like(ids)

    def close(actual: torch.Tensor, name: str, bound: float) -> None:
        assert_golden(actual, arrays[name], bound, name)

    with torch.inference_mode():
        close(model.vision_model(pixels), "vit.last_hidden_state", ALLOWED["vit"])
        features = model.encode_image(pixels)
        close(features, "image_features", ALLOWED["features"])
        assert model.config.image_token_id is not None
        embeds = model.embed(ids, features, model.config.image_token_id)
        close(embeds, "inputs_embeds", ALLOWED["features"])
        empty = llama.empty_cache(1)
        logits, cache = llama(embeds, mask, llama.positions_of(mask), empty)
        close(logits, "logits", logits_bound)
        for i in (0, len(cache) - 1):
            for which, tensor in zip("kv", cache[i], strict=True):
                close(tensor, f"kv.{i}.{which}", ALLOWED["kv"])
        rows = arrays["batch.pixel_values"], arrays["batch.input_ids"]
        padded = arrays["batch.attention_mask"]
        close(model(*rows, padded) * padded[..., None], "batch.logits", logits_bound)
        close(model(pixels[:0], arrays["text.input_ids"]), "text.logits", logits_bound)
    object.__setattr__(llama.config, "eos_token_id", -1)  # the reference has no end
    assert torch.equal(model.generate(pixels, ids, max_new_tokens=24), arrays["greedy_ids"])
    new = model.generate(*rows, padded, max_new_tokens=24)
    assert torch.equal(new, arrays["batch.greedy_ids"])
    if kind == "phi3":
        long = arrays["long.input_ids"]
        with torch.inference_mode():
            close(model(pixels[:0], long), "long.logits", logits_bound)
        new = model.generate(pixels[:0], long, max_new_tokens=8)
        assert torch.equal(new, arrays["long.greedy_ids"])


@pytest.mark.parametrize("kind", FAMILY)
def test_golden_configs_of_transformers_5(family: Path, kind: str, tmp_path: Path) -> None:
    """Its tie flag at the top is wrong; nothing else may change the model."""
    native = family / kind / "hf"
    for file in native.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_bytes((native / "config_v5.json").read_bytes())
    (tmp_path / "config_v5.json").unlink()
    assert open_checkpoint(tmp_path).config == open_checkpoint(native).config
