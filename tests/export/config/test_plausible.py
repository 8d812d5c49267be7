"""Configurations that ask for what no model is: refused before anything is built or listed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_internvl

from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.config.checkpoint import load_config


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_internvl(tmp_path_factory.mktemp("plain") / "checkpoint").path


def with_config(plain: Path, folder: Path, change: Any) -> Path:
    raw = json.loads((plain / "config.json").read_text())
    change(raw)
    folder.mkdir()
    (folder / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return folder


@pytest.mark.parametrize("section", ["vision_config", "qllama_config"])
@pytest.mark.parametrize("layers", [1025, 10**5, 10**7, 10**60])
def test_more_layers_than_any_model_are_refused_at_once(
    plain: Path, tmp_path: Path, section: str, layers: int
) -> None:
    folder = with_config(
        plain, tmp_path / "c", lambda raw: raw[section].update(num_hidden_layers=layers)
    )
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"config\.json: .*num_hidden_layers is implausible"):
        load_config(folder)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize("value", [10**90, -(10**90), 1e308 * 10, "1e-6", None.__class__, [1e-6]])
def test_a_float_of_another_kind_is_no_crash(plain: Path, tmp_path: Path, value: Any) -> None:
    value = "NoneType" if isinstance(value, type) else value
    folder = with_config(
        plain, tmp_path / "c", lambda raw: raw["vision_config"].update(layer_norm_eps=value)
    )
    if value == 10**90:  # finite, and positive
        assert load_config(folder).vision.layer_norm_eps == 1e90
        return
    with pytest.raises(CheckpointError, match="layer_norm_eps"):
        load_config(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"hidden_size": ' + "1" * 400 + "}", "a number of 400 digits"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, "nested deeper"),
        ('{"model_type": "\\udc00"}', "half a character"),
        ("[]", "expected one JSON object"),
        ('"text"', "expected one JSON object"),
    ],
)
def test_json_that_is_no_configuration_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=says):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000 + ".safetensors", "a\0b.safetensors"])
def test_a_shard_of_a_name_that_no_file_has_is_missing(
    plain: Path, tmp_path: Path, name: str
) -> None:
    folder = with_config(plain, tmp_path / "c", lambda raw: None)
    index = {"weight_map": {"text_projection": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"which is missing|must be a plain"):
        open_checkpoint(folder)
