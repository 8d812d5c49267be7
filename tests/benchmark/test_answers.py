"""The benchmark of answers: what a contender is asked, and what is made of its seconds."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
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
    row: dict[str, Any] = {}
    rounds = [(0.5, 2.0, 0.05, 7), (0.3, 1.0, 0.04, 9), (9.0, 3.0, 0.06, 8)]
    for vision, prompt, token, memory in rounds:
        done = {"vision": vision, "1 tile": prompt, "token": token, "peak_rss_bytes": memory}
        row = answers.add(row, done)
    assert row["first_token_ms"] == pytest.approx(2500)
    assert row["tokens_per_second"] == pytest.approx(20)
    assert row["samples_ms"]["vision"] == pytest.approx([500, 300, 9000])
    assert row["peak_rss_bytes"] == 9
    without = answers.add({}, {"vision": None, "1 tile": 1.0, "peak_rss_bytes": 1})
    assert "first_token_ms" not in without and "vision ms" not in without


def test_the_table_names_what_was_skipped() -> None:
    row = answers.add({}, {"1 tile": 1.25, "token": 0.05, "peak_rss_bytes": 1_500_000_000})
    told = answers.table({"results": {"int8": row}, "skipped": {"theirs": "x not installed"}})
    assert "| int8 | – | – | 1.25 s | – | 20.0 | 1.50 GB |" in told
    assert told.endswith("theirs was skipped: x not installed")


def test_what_is_not_installed_is_named() -> None:
    entry = replace(answers.CONTENDERS["int8"], packages=("json", "no_such_package"))
    assert answers.missing(entry) == "no_such_package not installed"
    assert answers.missing(replace(entry, packages=("json",))) is None


def test_a_run_goes_on_where_the_last_one_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "work" / "internvl2_5-2b" / "checkpoint").mkdir(parents=True)
    made = replace(answers.CONTENDERS["int8"], packages=(), make=lambda work: None)
    monkeypatch.setattr(answers, "CONTENDERS", dict.fromkeys(("a", "b", "broken"), made))
    asked: list[tuple[str, bool]] = []

    def measure(name: str, work: Path, threads: int, *, is_long: bool) -> dict[str, Any]:
        asked.append((name, is_long))
        if name == "broken":
            raise RuntimeError("broken: no memory")
        if len(asked) == 4:
            raise KeyboardInterrupt
        return {"1 tile": 1.0, "token": 0.1, "peak_rss_bytes": 1}

    monkeypatch.setattr(answers, "measure", measure)
    results = tmp_path / "answers.json"
    results.write_text('{"internvl3-1b": {}}')
    line = ["answers.py", "--work", str(tmp_path / "work"), "--preset", "internvl2_5-2b"]
    monkeypatch.setattr(sys, "argv", [*line, "--rounds", "2", "--json", str(results)])
    with pytest.raises(KeyboardInterrupt):
        answers.main()
    answers.main()
    first = [("a", True), ("b", True), ("broken", True), ("b", False)]
    assert asked == [*first, ("b", False), ("a", False)]
    stored = answers.stored(results)
    assert stored["internvl3-1b"] == {}
    told = stored["internvl2_5-2b"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--layers", "2"])
    with pytest.raises(SystemExit, match="measured on another machine, with other versions or oth"):
        answers.main()
    assert answers.stored(results) == stored
    assert told["skipped"] == {"broken": "broken: no memory"}
    assert [len(told["results"][name]["samples_ms"]["token"]) for name in "ab"] == [2, 2]
