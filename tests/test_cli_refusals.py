"""What the command line refuses, by the name that was typed and before any work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_vit

from internvl_edge.cli import run


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint``, a bare tower, and ``out``, compiled from it."""
    folder = tmp_path_factory.mktemp("vit")
    checkpoint = write_vit(folder / "checkpoint").path
    command = ["export", str(checkpoint), "-o", str(folder / "out"), "--verify", "none", "-q"]
    assert run(command) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path) -> str:
    """The one line of a command that is refused."""
    assert run([*map(str, arguments), "--json"]) == code
    captured = capsys.readouterr()
    error = json.loads(captured.out.strip().splitlines()[-1])["error"]
    assert error["exit_code"] == code
    assert len(captured.err.strip().splitlines()) == 1
    return str(error["message"])


# --- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_root_is_no_place_to_write(
    vit: Path, capsys: pytest.CaptureFixture[str], force: list[str]
) -> None:
    message = refused(capsys, 2, "export", vit / "checkpoint", "-o", "/", *force)
    assert message == "/ is the root of the file system; choose a folder in it"


def test_an_empty_path_is_none(vit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, 2, "export", vit / "checkpoint", "-o", "")
    assert "'--out'" in message
    assert "found an empty text" in message


@pytest.mark.parametrize("option", ["--report", "--markdown"])
@pytest.mark.parametrize(
    ("place", "reason"), [("nodir/x", "cannot be written or is missing"), (".", "found a folder")]
)
def test_what_a_benchmark_cannot_write(
    vit: Path, capsys: pytest.CaptureFixture[str], option: str, place: str, reason: str
) -> None:
    message = refused(capsys, 2, "benchmark", vit / "out", option, place)
    assert option in message
    assert reason in message


# --- signals and faults --------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_ctrl_c_while_it_is_imported(tmp_path: Path, flags: list[str]) -> None:
    importing = tmp_path / "importing"
    (tmp_path / "click.py").write_text(
        f"import pathlib, time\npathlib.Path({str(importing)!r}).touch()\ntime.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "internvl_edge", "doctor", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        # as in a terminal, even if these tests run in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not importing.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "error: interrupted\n"
    assert [json.loads(line)["error"]["exit_code"] for line in out.splitlines()] == [130] * bool(
        flags
    )


def test_a_fault_of_ours_says_how_to_see_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("internvl_edge.artifact.open_artifact", fail)
    message = refused(capsys, 7, "verify", "a folder")
    assert message.endswith("to see where: internvl-edge --debug verify 'a folder' --json")
