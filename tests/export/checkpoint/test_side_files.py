"""Tokenizer and settings besides the weights: read as a stranger's, and no link out unsaid."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import Written, as_snapshot, write_internvl

from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint import side_files
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.checkpoint.side_files import (
    SIDE_FILES,
    read_preprocessing,
    read_side_file,
    refuse_foreign,
    say_foreign,
)


@pytest.fixture
def tiny(tmp_path: Path) -> Written:
    return write_internvl(tmp_path / "tiny")


def test_a_file_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert read_side_file(tmp_path, "tokenizer.model") is None
    assert read_preprocessing(tmp_path, 224).size == 224


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "expected a regular file, found a pipe"),
    "folder": (Path.mkdir, "expected a regular file, found a folder"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "found a device"),
    "dead link": (lambda path: path.symlink_to("gone"), "the link leads nowhere"),
    "a pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\nsize 7\n"),
        "not readable as JSON: .*; it is a Git LFS pointer to a file of 7 bytes",
    ),
    "a page": (lambda path: path.write_text("<html></html>"), "it is a web page"),
    "no JSON": (lambda path: path.write_text("root:x:0:0"), "not readable as JSON"),
    "a list": (lambda path: path.write_text("[]"), "expected one JSON object, found list"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_what_its_name_says_is_refused(tmp_path: Path, case: str) -> None:
    make, says = BAD[case]
    make(tmp_path / "special_tokens_map.json")
    with pytest.raises(CheckpointError, match=says):
        read_side_file(tmp_path, "special_tokens_map.json")


def test_a_size_beyond_all_tokenizers_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(side_files.MAX_NBYTES + 1)
    with pytest.raises(CheckpointError, match="at most 67,108,864 bytes"):
        read_side_file(tmp_path, "tokenizer.model")


def test_a_preprocessor_of_a_wrong_type_is_refused(tmp_path: Path) -> None:
    for mean in ([0.5], "abcd", 3, [1, 2, None]):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean}))
        with pytest.raises(CheckpointError, match="not a preprocessor configuration"):
            read_preprocessing(tmp_path, 224)


def test_a_link_elsewhere_is_said_when_it_is_followed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    (folder := tmp_path / "checkpoint").mkdir()
    (folder / "added_tokens.json").symlink_to("../elsewhere")
    (folder / "generation_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        say_foreign(folder)
    (record,) = caplog.records
    assert "added_tokens.json is a link out of the checkpoint" in record.getMessage()
    assert str(tmp_path / "elsewhere") in record.getMessage()
    with pytest.raises(CheckpointError, match=r"to .*elsewhere, which would be copied"):
        refuse_foreign(folder / "added_tokens.json")
    refuse_foreign(folder / "generation_config.json")


def test_a_snapshot_of_the_cache_has_nothing_foreign(
    tiny: Written, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in SIDE_FILES:
        (tiny.path / name).write_text("{}")
    snapshot = as_snapshot(tiny.path, tmp_path / "hub")
    with caplog.at_level(logging.WARNING):
        say_foreign(snapshot)
    assert not caplog.records
    assert all(read_side_file(snapshot, name) == b"{}" for name in SIDE_FILES)
    opened = open_checkpoint(snapshot)
    assert opened.tensors.keys() == tiny.state.keys()
    with pytest.raises(CheckpointError, match=f"name its snapshot {snapshot}"):
        open_checkpoint(snapshot.parent.parent)
    with pytest.raises(CheckpointError, match=f"name its snapshot {snapshot}"):
        open_checkpoint(snapshot.parent)


@pytest.mark.parametrize("name", ["config.json", "added_tokens.json"])
def test_a_pipe_among_a_checkpoints_files_is_not_waited_for(tiny: Written, name: str) -> None:
    (tiny.path / name).unlink(missing_ok=True)
    os.mkfifo(tiny.path / name)
    with pytest.raises(CheckpointError, match="found a pipe"):
        read_side_file(tiny.path, name)
