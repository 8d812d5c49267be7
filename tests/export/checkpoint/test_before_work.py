"""What is refused before any work: tokenizers of others, values without a place, names."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import (
    TINY,
    Written,
    write_chat,
    write_internvl,
    write_tokenizer,
    write_vit,
)

from internvl_edge import compiler
from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.compiler.plan import ExportOptions, make_plan
from internvl_edge.errors import CheckpointError, InternVLError, UsageError
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.checkpoint.side_files import check_side_files
from internvl_edge.export.precision import ALIASES, precision_hint, precisions_of_towers
from internvl_edge.runtime.text.templates import TEMPLATES, Turn, conversation


@pytest.fixture
def tiny(tmp_path: Path) -> Written:
    return write_internvl(tmp_path / "checkpoint")


def check(path: Path, *components: str) -> None:
    readers = [name for name in components if COMPONENTS[name].reads_text]
    check_side_files(path, open_checkpoint(path).config, readers)


# --- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\nsize 500\n", "a Git LFS pointer to a file"),
        (b"<html>Log in</html>", "a web page"),
        (b"", "an empty file"),
        (b"IQ== 0\nIg== 1\n", "a text that begins with 'IQ== 0'"),
        (b"\x0a\x05abc", "not a SentencePiece model"),
    ],
)
def test_a_tokenizer_that_is_none(tiny: Written, data: bytes, says: str) -> None:
    (tiny.path / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointError, match=says):
        check(tiny.path, "vision", "text_embed")
    check(tiny.path, "vision", "image_embed")  # which read no texts


def test_a_tokenizer_that_is_a_folder(tiny: Written) -> None:
    (tiny.path / "tokenizer.model").mkdir()
    with pytest.raises(CheckpointError, match="a folder"):
        check(tiny.path, "decoder")


def test_a_tokenizer_of_a_larger_vocabulary(tiny: Written) -> None:
    write_tokenizer(tiny.path, TINY.qllama.vocab_size)
    check(tiny.path, "text_embed", "matcher")
    raw = json.loads((tiny.path / "config.json").read_text())
    raw["qllama_config"]["vocab_size"] = 280
    (tiny.path / "config.json").write_text(json.dumps(raw))
    tensors = load_file(tiny.path / "model.safetensors")
    for name in ("qllama.lm_head.weight", "qllama.model.embed_tokens.weight"):
        tensors[name] = tensors[name][:280].copy()
    save_file(tensors, tiny.path / "model.safetensors")
    with pytest.raises(CheckpointError, match="pieces, 280 rows of token embeddings: expected no"):
        check(tiny.path, "text_embed", "matcher")


def test_a_tokenizer_of_a_much_smaller_vocabulary_is_said(
    tiny: Written, caplog: pytest.LogCaptureFixture
) -> None:
    write_tokenizer(tiny.path)
    config = open_checkpoint(tiny.path).config
    check_side_files(tiny.path, config, ["text_embed"])
    assert not caplog.text
    from dataclasses import replace

    assert config.internvl is not None
    llama = replace(config.internvl.qllama, vocab_size=1000)
    larger = replace(config, internvl=replace(config.internvl, qllama=llama))
    check_side_files(tiny.path, larger, ["text_embed"])
    assert "most rows are never read" in caplog.text


# --- values --------------------------------------------------------------------------------------


def with_value(path: Path, name: str, dtype: Any, value: float) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[name] = tensors[name].astype(dtype)
    tensors[name].reshape(-1)[1] = value
    save_file(tensors, path / "model.safetensors")


LINEAR = "encoder.layers.1.mlp.fc1.weight"
NORM = "encoder.layers.1.norm1.weight"


@pytest.mark.parametrize(
    ("precision", "dtype", "value", "is_refused"),
    [
        ("fp16", ml_dtypes.bfloat16, 7e4, True),
        ("fp16", ml_dtypes.bfloat16, -7e4, True),
        ("fp16", np.float32, 65520.0, True),
        ("fp16", np.float32, 65519.0, False),  # rounds to the largest that there is
        ("fp16", np.float64, 1e300, True),
        ("fp32", np.float64, 1e300, True),
        ("fp32", np.float64, 1e30, False),
        ("bf16", ml_dtypes.bfloat16, 1e38, False),
        ("bf16", np.float32, 3.4e38, True),
        ("bf16", np.float32, 7e4, False),
    ],
)
@pytest.mark.parametrize("weights", ["auto", "link"])
def test_a_value_beyond_its_type_is_named(
    tmp_path: Path, precision: str, dtype: Any, value: float, is_refused: bool, weights: Any
) -> None:
    written = write_vit(tmp_path / "vit")
    with_value(written.path, LINEAR, dtype, value)
    options = ExportOptions(
        out=tmp_path / "out",
        checkpoint=written.path,
        precision=precision,
        verify="none",
        weights=weights,
    )
    plan = make_plan(options)
    from internvl_edge.compiler.weights.tensors import read_content

    if not is_refused:
        read_content(plan)
        return
    with pytest.raises(CheckpointError, match=f"vision_model.{LINEAR}: holds .* beyond the range"):
        read_content(plan)


def test_what_stays_in_float32_may_be_large(tmp_path: Path) -> None:
    from internvl_edge.compiler.weights.tensors import read_content

    written = write_vit(tmp_path / "vit")
    with_value(written.path, NORM, ml_dtypes.bfloat16, 7e4)
    options = ExportOptions(out=tmp_path / "out", checkpoint=written.path, precision="fp16")
    read_content(make_plan(options))


def outcome(run: Any) -> str | None:
    try:
        run()
    except InternVLError as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("case", ["value", "NaN", "tokenizer", "pictures", "name", "components"])
def test_dry_run_and_export_refuse_the_same(tmp_path: Path, case: str) -> None:
    written = write_internvl(tmp_path / "checkpoint")
    options: dict[str, Any] = {"components": ("vision", "text_embed"), "precision": "fp16"}
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    if case == "value":
        with_value(written.path, name, np.float32, 1e6)
    if case == "NaN":
        with_value(written.path, name, np.float32, np.nan)
    if case == "tokenizer":
        (written.path / "tokenizer.model").write_text("no model")
    if case == "pictures":
        (tmp_path / "pictures").mkdir()
        (tmp_path / "pictures/1.jpg").write_text("no picture")
        options |= {"precision": "int8", "calibration": tmp_path / "pictures"}
    if case == "name":
        options |= {"out": tmp_path / "o\udcff"}
    if case == "components":
        options |= {"components": ("chat_vision",)}
    chosen = ExportOptions(**({"out": tmp_path / "out", "checkpoint": written.path} | options))
    dry = outcome(lambda: compiler.rehearse(chosen, lambda forecast: None))
    assert dry is not None
    assert dry == outcome(lambda: compiler.export(chosen))
    assert not list(tmp_path.glob("*out*"))


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["out", "checkpoint", "calibration"])
def test_paths_that_are_no_text(tmp_path: Path, what: str) -> None:
    written = write_vit(tmp_path / "vit")
    paths = {"out": tmp_path / "out", "checkpoint": written.path, "calibration": tmp_path}
    paths[what] = tmp_path / "caf\udce9"
    if what == "checkpoint":
        written.path.rename(paths[what])
    elif what == "calibration":
        paths[what].mkdir()
    options = ExportOptions(precision="int8", **paths)
    with pytest.raises(UsageError, match=r"caf\\xe9.*expected a path in UTF-8") as caught:
        compiler.rehearse(options, lambda forecast: None)
    str(caught.value).encode()


# --- precisions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "meant"), ALIASES.items())
def test_other_names_of_precisions(given: str, meant: str) -> None:
    assert precision_hint(given.upper(), [meant]) == f"; {given.upper()} is called {meant} here"
    with pytest.raises(UsageError, match="expected one of"):
        precisions_of_towers(given)


def test_int4_of_a_tower() -> None:
    with pytest.raises(UsageError, match="int4 is called int4-wo here"):
        precisions_of_towers("vision=int8,decoder=int4")


# --- the system sentence -------------------------------------------------------------------------


@pytest.mark.parametrize("message", ["Answer the questions.", "", None])
def test_the_system_message_is_kept(tmp_path: Path, message: str | None) -> None:
    written = write_chat(tmp_path / "chat", system_message=message)
    config = open_checkpoint(written.path).config
    assert config.chat is not None
    assert config.chat.system == message
    assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config
    template = TEMPLATES["Hermes-2"]
    turns = [Turn(question="What?")]
    spelled = "".join(p.text for p in conversation(template, turns, config.chat.system))
    sentence = template.system if message is None else message
    assert spelled.startswith(f"<|im_start|>system\n{sentence}<|im_end|>")


@pytest.mark.parametrize("message", [5, ["a"], "half \ud800"])
def test_a_system_message_that_is_no_text(tmp_path: Path, message: Any) -> None:
    with pytest.raises(CheckpointError):
        write_chat(tmp_path / "chat", system_message=message)


def test_nothing_is_said_of_a_plain_checkpoint(
    tiny: Written, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        open_checkpoint(tiny.path)
    assert not caplog.text
