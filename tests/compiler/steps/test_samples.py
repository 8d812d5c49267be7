"""Conversations to calibrate on, as ids of the checkpoint's own tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from support.chat.tokenizers import open_tokenizer, write_qwen

from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.steps.calibration import samples
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import CheckpointConfig, VisionConfig
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.export.towers.streams import NO_TOKEN
from internvl_edge.quantize.calibration.images import CalibrationSet
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.runtime.text.templates import Turn, conversation, find_template

CAPTIONS = ["a red panda!", "two cats on a sofa, and the dog"]


def plan_of(path: Path) -> Plan:
    chat = ChatConfig(llama=LanguageConfig(vocab_size=500), template="internvl2_5")
    config = CheckpointConfig(kind="chat", vision=VisionConfig(), chat=chat)
    checkpoint: Any = SimpleNamespace(path=path, config=config)
    return cast(Plan, SimpleNamespace(checkpoint=checkpoint, recipe=None))


def pictures(**more: Any) -> CalibrationSet:
    return CalibrationSet.from_arrays(
        [np.zeros((4, 4, 3), np.uint8)] * 2, CAPTIONS, name="test", **more
    )


def test_captions_of_a_byte_level_vocabulary(tmp_path: Path) -> None:
    """Also those that end with "!", whose id is 0 there."""
    tokenizer = open_tokenizer(write_qwen(tmp_path))
    ids = samples.chat_ids(plan_of(tmp_path), pictures())
    assert (ids[:, -1] == NO_TOKEN).sum() == 1, "the longer row has none"
    template = find_template("internvl2_5")
    for row, caption in zip(ids.tolist(), CAPTIONS, strict=True):
        turn = Turn(question=f"<image>\n{samples.DESCRIBE}", answer=caption)
        expected = tokenizer.encode(conversation(template, [turn]), [1], template)
        assert row[: len(expected)] == expected
        assert set(row[len(expected) :]) <= {NO_TOKEN}
    assert 0 in ids


def test_a_set_has_conversations_of_its_own(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_qwen(tmp_path))
    turns = (("Image-1: <image>\nImage-2: <image>\nwhich is red?", "both"), ("why?", "so"))
    one = pictures(conversations=[turns])
    (row,) = samples.chat_ids(plan_of(tmp_path), one)
    assert (row == PLACE).sum() == 2
    text = tokenizer.decode(row[row >= 0])
    assert "which is red?" in text and text.endswith("assistant\nso")
    assert one.digest != pictures().digest


def test_without_a_tokenizer_there_are_random_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bare = samples.chat_ids(plan_of(tmp_path), pictures())
    assert (bare[:, 0] == PLACE).all() and (bare[:, 1:] >= 0).all()
    write_qwen(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert (samples.chat_ids(plan_of(tmp_path), pictures()) == bare).all()
    assert "calibration sees random ids and no texts" in caplog.text
