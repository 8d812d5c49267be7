"""A chat checkpoint in the other layout: the same model, and what transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import as_snapshot
from support.checkpoints.family import IMAGE_TOKEN_ID, KINDS, write_family

from internvl_edge import cli
from internvl_edge.errors import CheckpointError, UsageError
from internvl_edge.export import load_reference
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.config.chat import Layout
from internvl_edge.export.convert import layout
from internvl_edge.export.convert.layout import convert_layout, write_layout


@pytest.mark.parametrize(("name", "target"), [("chat", "internvl_hf"), ("hf", "internvl_chat")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_same(kind: str, name: str, target: Layout, tmp_path: Path) -> None:
    source = open_checkpoint(write_family(tmp_path / "a", kind, name).path)
    (tmp_path / "b").mkdir()
    count = write_layout(source, tmp_path / "b", target)
    there = open_checkpoint(tmp_path / "b")
    assert there.config.chat is not None and source.config.chat is not None
    assert there.config.vision == source.config.vision
    assert there.config.chat.llama == source.config.chat.llama
    assert there.content_sha256() == source.content_sha256()
    assert count == len(json.loads(_header(tmp_path / "b" / "model.safetensors"))) - 1
    (tmp_path / "c").mkdir()
    write_layout(there, tmp_path / "c", "internvl_chat")
    assert open_checkpoint(tmp_path / "c").content_sha256() == source.content_sha256()


def test_the_command_writes_all_or_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_family(tmp_path / "a", "qwen2").path
    out = tmp_path / "b"
    command = ["convert", str(path), str(out), "--layout", "internvl_hf", "--json"]
    assert cli.run(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tensors"] > 20
    assert open_checkpoint(out).content_sha256() == open_checkpoint(path).content_sha256()
    assert cli.run(command) == 2
    raw = json.loads((path / "config.json").read_text()) | {"ps_version": "v1"}
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="no place for"):
        convert_layout(path, tmp_path / "c", "internvl_hf")
    assert not (tmp_path / "c").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_copied(name: str, tmp_path: Path) -> None:
    path = write_family(tmp_path / "a", "qwen2").path
    file = path / name
    (tmp_path / "another").write_text(file.read_text() if file.exists() else "{}")
    file.unlink(missing_ok=True)
    file.symlink_to(tmp_path / "another")
    with pytest.raises(CheckpointError, match="link out of the folder"):
        convert_layout(path, tmp_path / "b", "internvl_hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "another"]


def test_a_cache_s_links_are_files_of_the_checkpoint(tmp_path: Path) -> None:
    path = write_family(tmp_path / "a", "qwen2").path
    (path / "tokenizer_config.json").write_text('{"model_max_length": 99}')
    snapshot = as_snapshot(path, tmp_path / "cache")
    convert_layout(snapshot, tmp_path / "b", "internvl_hf")
    copied = tmp_path / "b" / "tokenizer_config.json"
    assert json.loads(copied.read_text()) == {"model_max_length": 99} and not copied.is_symlink()


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def test_large_models_have_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_SHARD_NBYTES", 100_000)
    source = open_checkpoint(write_family(tmp_path / "a", "qwen2", dtype=torch.bfloat16).path)
    (tmp_path / "b").mkdir()
    write_layout(source, tmp_path / "b", "internvl_hf")
    there = open_checkpoint(tmp_path / "b")
    assert len(there.shards) > 2
    assert there.content_sha256() == source.content_sha256()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ps_version": "v1"}, "no place for: ps_version v1"),
        ({"pad2square": True}, "no place for: pad2square"),
        ({"force_image_size": 28}, "images of 28 pixels on positions of 56"),
    ],
)
def test_what_transformers_layout_cannot_say(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write_family(tmp_path / "a", "qwen2").path
    raw = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=message):
        write_layout(open_checkpoint(path), tmp_path, "internvl_hf")


@pytest.mark.slow  # it imports transformers
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_it(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = write_family(tmp_path / "a", kind, seed=2).path
    (tmp_path / "b").mkdir()
    write_layout(open_checkpoint(path), tmp_path / "b", "internvl_hf")
    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path / "b").eval()
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 3:7] = IMAGE_TOKEN_ID
    with torch.inference_mode():
        expected = load_reference(path)(pixels, ids)
        found = theirs(pixel_values=pixels, input_ids=ids).logits
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
