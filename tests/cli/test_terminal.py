"""What reaches a terminal and a program of names that others chose; files that are written."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from internvl_edge.cli import run
from internvl_edge.cli.console import Output, PrintableFormatter

TITLE = "\x1b]0;mine\x07\x9b2J\u202e"
RAW = ("\x1b", "\x07", "\x9b", "\u202e")


def test_an_error_that_quotes_a_name_steers_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (odd := tmp_path / f"a{TITLE}\nerror: forged").mkdir()
    assert run(["inspect", str(odd)]) == 3
    told = capsys.readouterr().err
    assert r"\x1b]0;mine\x07\x9b2J\u202e" in told
    assert not any(mark in told for mark in RAW)
    assert told.count("\n") == 1


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", "né".encode()])
def test_json_is_valid_utf8_whatever_a_folder_is_called(
    tmp_path: Path, name: bytes, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    odd = tmp_path / os.fsdecode(name)
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this file system takes no such name")
    assert run(["inspect", str(odd), "--json"]) == 3
    lines = capfdbinary.readouterr().out.splitlines()
    error = json.loads(lines[-1].decode())["error"]
    assert error["exit_code"] == 3
    error["message"].encode()


def test_answers_tables_and_warnings_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.lines([f"label {TITLE}"])
    output.table(("file", "score"), [(f"b{TITLE}.png", 1.0)])
    output.text(f"two\nlines {TITLE}")
    output.piece(f"piece {TITLE}\n")
    output.say(f"said {TITLE}")
    told = "".join(capsys.readouterr())
    assert told.count(r"\x1b]0;mine") == 5
    assert "two\nlines" in told
    assert not any(mark in told for mark in RAW)
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "name %s", (TITLE,), None)
    assert "\x1b" not in PrintableFormatter("%(message)s").format(record)


def test_a_report_is_written_through_no_link_and_onto_no_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (target := tmp_path / "precious").write_text("mine")
    (tmp_path / "link.html").symlink_to(target)
    os.mkfifo(tmp_path / "pipe.html")
    for option in ("--report", "--markdown"):
        for name, what in (("link.html", "symbolic link"), ("pipe.html", "pipe or a device")):
            assert run(["benchmark", str(tmp_path), option, str(tmp_path / name)]) == 2
            assert what in capsys.readouterr().err
    assert target.read_text() == "mine"
