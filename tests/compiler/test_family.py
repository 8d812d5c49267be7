"""Every kind of chat model compiled: at every precision, from files that stay where they are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import write_chat_tokenizer
from support.checkpoints.family import IMAGE_TOKEN_ID, KINDS, write_family

import internvl_edge
from internvl_edge import compiler
from internvl_edge.artifact.components import WEIGHTS_FILE
from internvl_edge.artifact.open import Artifact
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.steps.calibration.samples import DESCRIBE, chat_ids
from internvl_edge.export import load_reference
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.checkpoint.shards import read_header
from internvl_edge.export.checkpoint.tokenizer import token_files
from internvl_edge.export.models import Chat
from internvl_edge.quantize.calibration.images import CalibrationSet
from internvl_edge.runtime.text.chat_tokenizer import PLACE, load_chat_tokenizer

pytestmark = pytest.mark.slow

MIXED = "chat_vision=int8,chat_decoder=int4-wo"
DEEP = {"num_hidden_layers": 4}  # enough for a tower to be traced in part
BOTH = ("chat_vision", "chat_decoder")


def exported(
    path: Path, out: Path, precision: str, pictures: Path | None = None, **more: Any
) -> Artifact:
    is_quantized = precision not in ("fp32", "fp16", "bf16")
    calibration = pictures if is_quantized else None
    options = ExportOptions(
        checkpoint=path, out=out, precision=precision, calibration=calibration, **more
    )
    return compiler.export(options)


@pytest.mark.parametrize(
    ("kind", "precision", "components"),
    [
        # the others compute what a LLaMA does; one tower is theirs all
        *((kind, "int8", BOTH[1:]) for kind in ("internlm2", "qwen2", "phi3")),
        *((kind, "int4-wo", BOTH[1:]) for kind in ("internlm2", "qwen2", "phi3")),
        *(("qwen3", precision, BOTH) for precision in ("int8", "int4-wo", "bf16", "fp8", MIXED)),
        *(("qwen2", precision, BOTH) for precision in ("fp16", "int8-wo")),
    ],
)
def test_every_kind_compiles_and_agrees(
    kind: str, precision: str, components: tuple[str, ...], pictures: Path, tmp_path: Path
) -> None:
    """An export holds every graph against PyTorch, and quantized ones against their simulation."""
    path = write_family(tmp_path / "c", kind, vision=DEEP, language=DEEP).path
    artifact = exported(path, tmp_path / "out", precision, pictures, components=components)
    figures = {name: c.verification for name, c in artifact.manifest.components.items()}
    least = {"int8": 20.0, "fp16": 50.0}.get(precision, 8.0)
    assert set(figures) == set(components)
    assert min(figure["sqnr_db"] for figure in figures.values()) > least, figures


@pytest.mark.parametrize("layout", ["chat", "hf"])
@pytest.mark.parametrize("kind", ["internlm2", "phi3", "qwen3"])
def test_weights_stay_in_the_checkpoints_files(kind: str, layout: str, tmp_path: Path) -> None:
    """Only what lies in several places, or LayerScale is part of, is written, and it all works."""
    written = write_family(tmp_path / "c", kind, layout, is_new=True, seed=5)
    artifact = exported(written.path, tmp_path / "out", "fp32")
    files = artifact.manifest.files
    assert "model.safetensors" in files
    new = set(read_header(tmp_path / "out" / WEIGHTS_FILE)) if WEIGHTS_FILE in files else set()
    parts = {name.rpartition(".")[0].rpartition(".")[2] for name in new}
    qkv = {"q_proj", "k_proj", "v_proj"} if (kind, layout) == ("internlm2", "chat") else set()
    assert parts == {"proj", "fc2"} | (qkv if layout == "chat" else {"qkv"})
    reference = load_reference(written.path)
    assert isinstance(reference, Chat)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 56, 56, generator=generator)
    ids = torch.randint(3, 100, (1, 14), generator=generator)
    ids[0, 3:7] = IMAGE_TOKEN_ID
    object.__setattr__(reference.language_model.config, "eos_token_id", -1)  # type: ignore[union-attr]
    expected = reference.generate(pixels, ids, max_new_tokens=12)
    with internvl_edge.load(tmp_path / "out") as model:
        how: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": ()}
        found = model.generate(pixels.numpy(), ids.numpy(), **how)
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("kind", "precision", "components"),
    [
        # Decoders of other operators than a LLaMA's: biases, norms of heads, two rotary tables;
        # and one of each kind. There are two vision towers, LLaMA's and everybody else's.
        *(("llama", precision, BOTH) for precision in ("fp16", "int8", "int4-wo")),
        *(("qwen2", precision, BOTH) for precision in ("fp16", "int8", "int4-wo")),
        *(("qwen3", precision, BOTH[1:]) for precision in ("fp16", "int8", "int4-wo")),
        *(("phi3", precision, BOTH[1:]) for precision in ("fp16", "int8", "int4-wo")),
        *((kind, "int4-wo", BOTH[1:]) for kind in ("internlm2", "internlm3")),
    ],
)
def test_engines_are_built(
    kind: str, precision: str, components: tuple[str, ...], pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = ExportOptions(
        checkpoint=write_family(tmp_path / "c", kind).path,
        out=tmp_path / "out",
        precision=precision,
        components=components,
        calibration=None if precision == "fp16" else pictures,
        targets=("onnx", "tensorrt-rtx"),
        verify="none",
    )
    engines = compiler.export(options).manifest.engines
    assert {engine.component for engine in engines} == set(components)


def test_every_kind_has_its_engines() -> None:
    (cases,) = (m.args[1] for m in test_engines_are_built.pytestmark if m.name == "parametrize")
    assert {kind for kind, _, _ in cases} == set(KINDS)
    towers = {json.dumps(KINDS[kind].tower) for kind, _, parts in cases if parts == BOTH}
    assert towers == {json.dumps(kind.tower) for kind in KINDS.values()}


def test_texts_to_calibrate_on_are_the_models_own_ids(tmp_path: Path) -> None:
    path = write_family(tmp_path, "llama", language={"vocab_size": 400}).path
    write_chat_tokenizer(path)
    plan: Any = SimpleNamespace(checkpoint=open_checkpoint(path), recipe=None)
    ids = chat_ids(plan, photographs("a red seven", "blue"))
    files = token_files(path, plan.checkpoint.config)
    assert files is not None
    tokenizer = load_chat_tokenizer(files)
    for row, caption in zip(ids, ["a red seven", "blue"], strict=True):
        assert (row == PLACE).sum() == 1
        text = tokenizer.decode(row[row >= 0])
        assert text.index(DESCRIBE) < text.index("assistant") < len(text) - len(caption)
        assert text.endswith(caption)


def test_without_a_tokenizer_random_ids_follow_an_image(tmp_path: Path) -> None:
    plan: Any = SimpleNamespace(
        checkpoint=open_checkpoint(write_family(tmp_path, "qwen2").path), recipe=None
    )
    ids = chat_ids(plan, photographs("blue", "red", "green"))
    assert ids.shape[0] == 3 and (ids[:, 0] == PLACE).all() and (ids[:, 1:] >= 0).all()


def photographs(*captions: str) -> CalibrationSet:
    images = [np.zeros((8, 8, 3), np.uint8)] * len(captions)
    return CalibrationSet.from_arrays(images, captions, name="test")


def test_a_mixture_of_experts_is_refused_before_any_work(tmp_path: Path) -> None:
    path = write_family(tmp_path / "c", "qwen3").path
    raw = json.loads((path / "config.json").read_text())
    raw["llm_config"] |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(internvl_edge.InternVLError, match=r"Qwen3MoeForCausalLM, a mixture"):
        compiler.export(ExportOptions(checkpoint=path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
