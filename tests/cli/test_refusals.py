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
from PIL import Image
from support.checkpoints import write_internvl, write_tokenizer, write_vit

from internvl_edge.cli import run


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint``, a bare tower, and ``out``, compiled from it."""
    folder = tmp_path_factory.mktemp("vit")
    checkpoint = write_vit(folder / "checkpoint").path
    command = ["export", str(checkpoint), "-o", str(folder / "out"), "--verify", "none", "-q"]
    assert run(command) == 0
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``checkpoint``, a whole model; ``out``, compiled from it; ``photos`` of one picture."""
    folder = tmp_path_factory.mktemp("place")
    checkpoint = write_internvl(folder / "checkpoint").path
    write_tokenizer(checkpoint)
    command = ["export", str(checkpoint), "-o", str(folder / "out"), "--verify", "none", "-q"]
    assert run(command) == 0
    (folder / "photos").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "photos" / "0.png")
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["match", "OUT", "PHOTOS", "--text", "a"], "expected one image, found a folder"),
        (["answer", "OUT", "PHOTOS", "--prompt", "a"], "expected one image, found a folder"),
        (["retrieve", "OUT", "PHOTOS", "--texts", "PHOTOS"], "one text a line; it is a folder"),
    ],
)
def test_a_folder_in_place_of_a_file(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    names = {"OUT": str(place / "out"), "PHOTOS": str(place / "photos")}
    assert message in refused(capsys, 3, *(names.get(word, word) for word in arguments))


# --- options of text and of speed ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "--seed 3: nothing is drawn; add --temperature, --top-k or --top-p"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
        (["--max-new-tokens", "999"], "shorten the prompt or lower --max-new-tokens"),
        (["--top-p", "2"], "--top-p 2.0: expected more than 0, up to 1"),
        (["--num-beams", "2", "--top-k", "3"], "--num-beams 2: beams are not drawn; leave --temp"),
        (["--num-beams", "2", "--stream"], "--num-beams 2: only one beam can be streamed"),
    ],
)
def test_options_are_called_as_they_are_typed(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = ["answer", place / "out", place / "photos" / "0.png", "--prompt", "a"]
    assert message in refused(capsys, 2, *command, *arguments)


@pytest.mark.parametrize(
    ("command", "default"), [("caption", "30"), ("chat", "1024, or as many as there is room for,")]
)
def test_the_help_has_the_commands_own_default(
    capsys: pytest.CaptureFixture[str], command: str, default: str
) -> None:
    assert run([command, "--help"]) == 0
    assert f"of a text; {default} by default" in " ".join(capsys.readouterr().out.split())


def test_streams_need_a_scenario(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, 2, "benchmark", place / "out", "--streams", "4")
    assert "--streams 4" in message
    assert "choose multi-stream, offline, server" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["answer", "OUT", "IMAGE", "--prompt", ""],
        ["caption", "OUT", "IMAGE", "--prompt", " "],
        ["chat", "OUT", "IMAGE", "--question", ""],
        ["classify", "OUT", "IMAGE", "--labels", ""],
        ["match", "OUT", "IMAGE", "--text", ""],
        ["retrieve", "OUT", "IMAGE", "--text", "a", "--text", " "],
        ["embed", "OUT", "--text", ""],
    ],
)
def test_an_empty_text_is_a_broken_input(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    names = {"OUT": str(place / "out"), "IMAGE": str(place / "photos" / "0.png")}
    refused(capsys, 3, *(names.get(word, word) for word in arguments))


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

    monkeypatch.setattr("internvl_edge.cli.inspect.open_artifact", fail)
    message = refused(capsys, 7, "verify", "a folder")
    assert message.endswith("to see where: internvl-edge --debug verify 'a folder' --json")


# --- figures that cannot be trusted --------------------------------------------------------------


def test_a_benchmark_beside_other_work(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (999.0, 1.0, 1.0))
    command = ["benchmark", str(place / "out"), "--components", "image_pool", "--seconds", "0"]
    assert run([*command, "--no-roofline", "--no-memory"]) == 0
    assert "warning: other work is under way, a load of 999.0 on" in capsys.readouterr().err


def test_the_bundled_model_has_a_name_which_a_folder_of_that_name_takes(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["inspect", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "internvl"
    (tmp_path / "demo").symlink_to(vit / "checkpoint")
    assert run(["inspect", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "vit"
