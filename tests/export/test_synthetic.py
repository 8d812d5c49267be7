"""Made-up checkpoints: the real layout, the same bytes again, and outliers that change nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import TINY

from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.checkpoint.load import load_reference
from internvl_edge.export.checkpoint.parameters import expected_shapes
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.models import InternViT, InternVL
from internvl_edge.export.synthetic import (
    OUTLIER_CHANNELS,
    PRESETS,
    Synthesis,
    main,
    shrink,
    write_checkpoint,
)

SMALL = CheckpointConfig(kind="internvl", vision=TINY.vision, internvl=TINY)


def count(config: CheckpointConfig) -> int:
    return sum(int(np.prod(shape)) for shape in expected_shapes(config).values())


def test_parameter_counts_are_the_published_ones() -> None:
    assert count(PRESETS["internvit-6b-224"]) == 5_902_793_600
    assert count(PRESETS["internvit-6b-448-v1-5"]) == 5_536_496_000
    assert count(PRESETS["internvl-14b-224"]) == 13_834_975_747
    shapes = expected_shapes(PRESETS["internvl-chat-v1-2"])  # its language model is Yi-34B
    language = {n: shape for n, shape in shapes.items() if n.startswith("language_model.")}
    assert sum(math.prod(shape) for shape in language.values()) == 34_388_917_248


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("internvl3-1b", 938_193_024),
        ("internvl2_5-2b", 2_205_754_368),
        ("internvl3-8b", 7_944_373_760),
        ("internvl2_5-26b", 25_514_186_112),
    ],
)
def test_parameter_counts_of_the_family(preset: str, parameters: int) -> None:
    assert count(PRESETS[preset]) == parameters


@pytest.mark.parametrize("preset", ["internvl3-1b", "internvl2_5-2b"])
def test_a_chat_model_is_packed_as_published(preset: str, tmp_path: Path) -> None:
    config = shrink(PRESETS[preset], 1)
    assert config.chat is not None and config.chat.llama is not None
    thin = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50, "head_dim": 4}
    llama = replace(config.chat.llama, max_position_embeddings=64, **thin)
    vision = replace(TINY.vision, qkv_bias=True, norm_type="layer_norm", qk_normalization=False)
    chat = replace(config.chat, llama=llama, language_width=32, image_size=28)
    config = replace(config, vision=vision, chat=chat)
    write_checkpoint(Synthesis(config=config), tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.config == config
    assert expected_shapes(config).keys() == checkpoint.tensors.keys()


def test_it_is_a_checkpoint(tmp_path: Path) -> None:
    total = write_checkpoint(Synthesis(config=SMALL), tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    assert checkpoint.config.internvl == TINY
    assert sum(entry.nbytes for entry in checkpoint.tensors.values()) == total
    checkpoint.content_sha256()


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(Synthesis(config=SMALL, seed=seed), tmp_path / name)
    first, second, third = (
        next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in "abc"
    )
    assert first == second
    assert first != third


@pytest.mark.parametrize("kind", ["internvl", "vit"])
def test_outliers_change_the_weights_and_not_the_function(tmp_path: Path, kind: str) -> None:
    config = SMALL if kind == "internvl" else replace(SMALL, kind="vit", internvl=None)
    write_checkpoint(Synthesis(config=config), tmp_path / "plain")
    write_checkpoint(Synthesis(config=config, outliers=True), tmp_path / "outliers")
    plain, outliers = (load_reference(tmp_path / name) for name in ("plain", "outliers"))
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        if isinstance(plain, InternVL):
            ids = torch.tensor([[1, 5, 7, 2]])
            torch.testing.assert_close(plain.encode_text(ids), outliers.encode_text(ids))
            expected, actual = plain.encode_image(pixels, "g"), outliers.encode_image(pixels, "g")
        else:
            expected, actual = plain(pixels), outliers(pixels)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    prefix = "vision_model." if kind == "internvl" else ""
    gain = outliers.state_dict()[f"{prefix}encoder.layers.0.norm1.weight"]
    assert int((gain > 30).sum()) == 6


def test_massive_activations(tmp_path: Path) -> None:
    config = replace(SMALL, kind="vit", internvl=None)
    write_checkpoint(Synthesis(config=config), tmp_path / "plain")
    write_checkpoint(Synthesis(config=config, massive=True), tmp_path / "massive")
    plain, massive = (load_reference(tmp_path / name) for name in ("plain", "massive"))
    assert isinstance(massive, InternViT)
    pixels = torch.zeros(1, 3, 28, 28)
    with torch.inference_mode():
        hidden = massive(pixels)[0]
        attention = massive.encoder.layers[0].attn
        x = torch.randn(1, 5, TINY.vision.hidden_size)
        torch.testing.assert_close(
            attention(x), plain.encoder.layers[0].attn(x), rtol=1e-4, atol=1e-4
        )
    peaks = hidden.abs().amax(dim=1)
    assert int((peaks > 1000).sum()) == 3


def test_shrinking_keeps_the_widths() -> None:
    small = shrink(PRESETS["internvl-14b-224"], 4)
    assert small.internvl is not None
    assert small.vision.num_hidden_layers == small.internvl.qllama.num_hidden_layers == 4
    assert small.internvl.vision == small.vision
    assert small.internvl.qllama.hidden_size == 4096
    assert shrink(small, None) == small


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["there"], "exists; choose a new directory"),
        (["file/new"], "cannot be written: Not a directory"),
        (["new", "--layers", "0"], "expected a number of at least 1, found '0'"),
        (["new", "--layers", "-3"], "expected a number of at least 1, found '-3'"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["synthetic", "internvit-6b-224", *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err


def test_outliers_after_gelu(tmp_path: Path) -> None:
    config = CheckpointConfig(kind="vit", vision=TINY.vision)
    write_checkpoint(Synthesis(config=config, gelu=True), tmp_path / "gelu")
    model = load_reference(tmp_path / "gelu")
    assert isinstance(model, InternViT)
    for block in model.encoder.layers:
        rows, columns = block.mlp.fc1.weight.abs().amax(1), block.mlp.fc2.weight.abs().amax(0)
        large = set(rows.topk(OUTLIER_CHANNELS).indices.tolist())
        assert large == set((-columns).topk(OUTLIER_CHANNELS).indices.tolist())
        assert rows[list(large)].min() > 20 * rows.median()
