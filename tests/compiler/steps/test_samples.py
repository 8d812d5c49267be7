"""Captions to calibrate on, as ids of the checkpoint's own tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.chat.tokenizers import open_tokenizer, write_qwen

from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.steps.calibration import samples
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import CheckpointConfig, VisionConfig
from internvl_edge.export.config.language import LanguageConfig

CAPTIONS = ["a red panda!", "two cats on a sofa, and the dog"]


def plan_of(path: Path) -> Plan:
    chat = ChatConfig(llama=LanguageConfig(vocab_size=500))
    config = CheckpointConfig(kind="chat", vision=VisionConfig(), chat=chat)
    checkpoint: Any = SimpleNamespace(path=path, config=config)
    return cast(Plan, SimpleNamespace(checkpoint=checkpoint))


def test_captions_of_a_byte_level_vocabulary(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_qwen(tmp_path))
    ids = samples.tokenize(plan_of(tmp_path), CAPTIONS)
    assert ids is not None
    text, match, caption = ids
    assert (text == match).all()
    assert (text == caption).all()
    for row, words in zip(text.tolist(), CAPTIONS, strict=True):
        end = len(row) - next(i for i, token in enumerate(reversed(row)) if token)
        decoded = tokenizer.decode(row[:end])
        assert decoded == words.removesuffix("!")  # id 0, which the mask takes for padding


def test_without_a_tokenizer_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert samples.tokenize(plan_of(tmp_path), CAPTIONS) is None
    write_qwen(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert samples.tokenize(plan_of(tmp_path), CAPTIONS) is None
    assert "calibration sees random ids and no texts" in caplog.text
