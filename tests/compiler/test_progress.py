"""Progress where nothing can be drawn: a line for every step."""

from __future__ import annotations

import pytest

from internvl_edge.cli import console
from internvl_edge.cli.console import Output
from internvl_edge.compiler.progress import Progress


def told(capsys: pytest.CaptureFixture[str], output: Output) -> list[str]:
    """What is said of three steps, one of them long."""
    with output.progress() as report:
        report(Progress(step="trace", detail="vision", done=0, total=1))
        for done in range(50):
            report(Progress(step="quantize", detail=f"layers.{done}", done=done, total=50))
        report(Progress(step="publish", detail="out", done=0, total=1))
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_line_for_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, Output()) == ["trace: vision", "quantize 0/50: layers.0", "publish: out"]
    assert told(capsys, Output(quiet=True)) == []


def test_more_of_a_long_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))
    lines = told(capsys, Output())
    between = int(console.SECONDS_BETWEEN_LINES)
    counts = [f"quantize {done}/50: layers.{done}" for done in range(0, 50, between)]
    assert lines == ["trace: vision", *counts, "publish: out"]


def test_a_reader_that_has_gone_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("internvl_edge.cli.console.human.print", gone)
    with Output().progress() as report:
        report(Progress(step="trace", detail="vision", done=0, total=1))
