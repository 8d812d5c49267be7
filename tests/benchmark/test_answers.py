"""The benchmark of answers: what a contender is asked, and what is made of its seconds."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import answer_peers
import answers


class Fake:
    """A contender without a tower."""

    vision = None

    def __init__(self) -> None:
        self.done: list[Any] = []

    def prompt(self, count: int) -> None:
        self.done.append(count)

    def token(self) -> None:
        self.done.append("token")


def test_a_contender_does_what_each_line_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake()
    monkeypatch.setattr(sys, "stdin", io.StringIO("vision\nprompt 320\ntokens 2\nmemory\n"))
    answer_peers.serve(fake)
    ready, vision, prompt, tokens, memory = map(json.loads, capsys.readouterr().out.splitlines())
    assert fake.done == [320, "token", "token"]
    assert (ready, vision) == ({}, None)
    assert 0 <= prompt < 1 and len(tokens) == 2 and memory > 1e6


def test_figures_are_medians_over_rounds() -> None:
    samples = {"vision": [0.5, 0.3, 9.0], "1 tile": [2.0, 1.0, 3.0], "token": [0.05, 0.04, 0.06]}
    found = answers.figures(samples)
    assert found["first_token_ms"] == pytest.approx(2500)
    assert found["tokens_per_second"] == pytest.approx(20)
    assert found["vision samples_ms"] == pytest.approx([500, 300, 9000])
    without = answers.figures({**samples, "vision": [None] * 3})
    assert "first_token_ms" not in without and "vision ms" not in without


def test_the_table_names_what_was_skipped() -> None:
    row = answers.figures({"1 tile": [1.25], "token": [0.05]}) | {"peak_rss_bytes": 1_500_000_000}
    told = answers.table({"results": {"ours": row}, "skipped": {"theirs": "x not installed"}})
    assert "| ours | – | – | 1.25 s | – | 20.0 | 1.50 GB |" in told
    assert told.endswith("theirs was skipped: x not installed")


def test_what_is_not_installed_is_named() -> None:
    entry = replace(answers.CONTENDERS["fp32"], packages=("json", "no_such_package"))
    assert answers.missing(entry) == "no_such_package not installed"
    assert answers.missing(replace(entry, packages=("json",))) is None
