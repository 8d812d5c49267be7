"""What the command line refuses, by the name that was typed and before any work."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import write_internvl, write_tokenizer, write_vit

from internvl_edge.cli import app, run
from internvl_edge.cli.inputs import read_labels, read_texts
from internvl_edge.errors import MediaError, UsageError
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession


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


@pytest.mark.parametrize(
    "option", ["--calib=.", "--min-sqnr=9", "--max-drop=0", "--device=cpu", "--threads=1"]
)
def test_options_of_a_comparison_without_one(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is read."""
    message = refused(capsys, 2, "verify", tmp_path / "nowhere", option)
    assert option.split("=")[0] in message
    assert message.endswith("are of a comparison; add --checkpoint")


# --- options of text and of speed ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "3"], "--seed 3: nothing is drawn; add --temperature, --top-k or --top-p"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
        (["--max-new-tokens", "999"], "shorten the prompt or lower --max-new-tokens"),
        (["--top-p", "2"], "--top-p 2.0: expected more than 0, up to 1"),
        (["--num-beams", "2", "--top-k", "3"], "--num-beams 2: beams are not drawn; leave --temp"),
        (["--seed", "3", "--temperature", "0"], "--seed 3: nothing is drawn"),
        (["--temperature", "inf"], "expected a finite number"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0.0: expected a finite number above"),
        (["--device", "gpu"], "device 'gpu': expected 'auto', 'cpu', 'cuda' or 'cuda:1'; a GPU is"),
        (["--threads", "0"], "0 is not in the range"),
        (
            ["--threads", "2", "--backend", "tensorrt"],
            "tensorrt computes on a GPU; leave --threads",
        ),
        (["--background", "red-ish"], "background 'red-ish': expected white, black, #rrggbb"),
        (["--max-megapixels", "nan"], "expected a finite number"),
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


# --- folders -------------------------------------------------------------------------------------


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Two pictures in three places, one that is broken, and what else stands in folders."""
    folder = tmp_path / "album"
    (folder / "sub" / ".hidden").mkdir(parents=True)
    for name in ("a.png", "c.jfif", "sub/b.PNG", "sub/.hidden/x.png"):
        kind = "JPEG" if name.endswith("jfif") else "PNG"
        Image.new("RGB", (40, 30), "red").save(folder / name, kind)
    (folder / "z.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "._a.png").write_bytes(b"\0\5\26\7")
    for name in ("one.heic", "two.HEIC", "notes"):
        (folder / name).write_bytes(b"x")
    return folder


FOLDER_COMMANDS = {
    "embed": lambda found: [*zip(found["image_files"], found["images"], strict=True)],
    "classify": lambda found: [(one["file"], one["labels"]) for one in found["results"]],
    "retrieve": lambda found: [(one["file"], one["texts"]) for one in found["by_image"]],
    "caption": lambda found: [(one["file"], one["caption"]) for one in found["results"]],
}
MORE = {"classify": ["--labels", "a,b"], "retrieve": ["--text", "a"]}


@pytest.mark.parametrize("command", FOLDER_COMMANDS)
@pytest.mark.parametrize("skip", [[], ["--skip-errors"]])
def test_one_bad_file_ends_no_folder(
    place: Path, album: Path, capsys: pytest.CaptureFixture[str], command: str, skip: list[str]
) -> None:
    words = [command, str(place / "out"), str(album), *MORE.get(command, []), *skip, "--json"]
    assert run([*words, "--recursive"]) == (0 if skip else 3)
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    answers = FOLDER_COMMANDS[command](found)
    assert [file for file, _ in answers] == [
        str(album / n) for n in ("a.png", "c.jfif", "sub/b.PNG")
    ]
    (error,) = found["errors"]
    assert error["file"] == str(album / "z.png")
    assert error["exit_code"] == 3 and error["type"] == "MediaError"
    assert f"image 4 of 4 ({album / 'z.png'}): the image is truncated" in error["message"]
    assert found["left_out"] == {".heic": 2, "without a suffix": 1}
    assert "left out: .heic 2, without a suffix 1\n" in captured.err
    assert captured.err.count("error: ") == 1
    assert run([command, str(place / "out"), answers[0][0], *MORE.get(command, []), "--json"]) == 0
    alone = FOLDER_COMMANDS[command](json.loads(capsys.readouterr().out))
    if command == "embed":
        np.testing.assert_allclose(alone[0][1], answers[0][1], atol=1e-5)
    elif command == "caption":
        assert alone[0][1] == answers[0][1]


def test_subfolders_are_counted(
    place: Path, album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["embed", str(place / "out"), str(album), "--json", "--skip-errors"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["left_out"]["subfolders"] == 1
    assert "subfolders 1, without a suffix 1; --recursive looks into subfolders" in captured.err
    message = refused(capsys, 3, "embed", place / "out", album.parent)
    assert (
        "expected images (.jpg, .jpeg, .jpe, .jfif, .png, .webp) in it, found subfolders 1; add"
        in (message)
    )


def test_where_nothing_can_be_read_that_is_the_error(
    place: Path, album: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [str(album / "z.png")] * 2
    assert run(["caption", str(place / "out"), *broken, "--json", "--skip-errors"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "MediaError"


# --- texts and labels ----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_texts_are_read_as_they_were_saved(tmp_path: Path, encoding: str, end: str) -> None:
    lines = ["a yellow one", "größer, 一 🙂", "two\u2028parts\x85of one"]
    (tmp_path / "texts").write_bytes(end.join(["", *lines, " "]).encode(encoding))
    assert read_texts(("first",), tmp_path / "texts") == ["first", *lines]
    assert read_labels("x, y", tmp_path / "texts") == ["x", "y", *lines]
    for order in ("utf-16-be", "utf-32-be"):
        mark = "\ufeff".encode(order)
        (tmp_path / "texts").write_bytes(mark + end.join(lines).encode(order))
        assert read_texts((), tmp_path / "texts") == lines


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected texts, one a line, found none"),
        (b" \r\n\n", "expected texts, one a line, found none"),
        ("größer".encode("cp1252"), "expected text in UTF-8, or UTF-16 with its mark.*0xf6 at 2"),
        ("a cat".encode("utf-16-le"), "expected text, found a NUL at 1: UTF-16 without"),
        (b"\xff\xfea", "expected text in UTF-16, found byte"),
    ],
)
def test_texts_that_cannot_be_read(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "texts").write_bytes(data)
    with pytest.raises(MediaError, match=f"--texts .*texts: {message}"):
        read_texts((), tmp_path / "texts")


def test_labels_that_are_a_file(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a\nb\n")
    for given in (str(tmp_path / "labels"), f"@{tmp_path / 'labels'}"):
        with pytest.raises(UsageError, match="it is a file; pass it as --labels-file"):
            read_labels(given, None)
    with pytest.raises(UsageError, match="expected --labels, or a file of them as --labels-file"):
        read_labels(None, None)


def test_stdin_is_a_picture_or_texts(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def typed(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    picture, out = (place / "photos" / "0.png").read_bytes(), str(place / "out")
    typed(picture)
    assert run(["embed", out, "-", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert run(["embed", out, str(place / "photos" / "0.png"), "--json"]) == 0
    assert found["images"] == json.loads(capsys.readouterr().out)["images"]
    assert found["image_files"] == ["-"]
    typed(b"\xef\xbb\xbfa\r\nb\r\n")
    command = ["classify", out, str(place / "photos"), "--labels-file", "-", "--json"]
    assert run(command) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert {item["label"] for item in result["labels"]} == {"a", "b"}
    typed(b"")
    assert "expected an image on stdin, found nothing" in refused(capsys, 3, "embed", out, "-")
    assert "stdin is read for questions" in refused(capsys, 2, "chat", out, "-")
    told = refused(capsys, 3, "chat", out, str(place / "photos" / "0.png"), "how many digits?")
    assert "how many digits?: expected an image, found no such file" in told
    assert "a question is asked by --question" in told
    assert "found no such file" in refused(capsys, 3, "chat", out, "many digits? " * 40)
    monkeypatch.setattr("sys.stdin", None)
    assert "found nothing" in refused(capsys, 3, "embed", out, "-")
    assert run(["chat", out, str(place / "photos" / "0.png"), "--json"]) == 0


@pytest.mark.parametrize("seconds", ["inf", "nan", "-1", "1e9"])
def test_seconds_of_a_benchmark_are_a_time(
    vit: Path, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    assert "--seconds" in refused(capsys, 2, "benchmark", vit / "out", "--seconds", seconds)


# --- what runs it -------------------------------------------------------------------------------

COMPUTES = {"verify", "bisect", "embed", "classify", "retrieve", "match", "caption", "answer"}
COMPUTES |= {"chat", "serve", "triton", "benchmark"}


@pytest.mark.parametrize("name", sorted(app.commands))
def test_commands_that_run_a_model_take_a_device_and_threads(name: str) -> None:
    options = {option for given in app.commands[name].params for option in given.opts}
    assert ({"--device", "--threads"} <= options) == (name in COMPUTES)


@pytest.mark.parametrize("command", ["verify", "bisect"])
def test_comparisons_compute_with_the_threads_that_are_asked_for(
    vit: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    used: set[tuple[int | None, int]] = set()

    def noticed(*given: Any, options: OrtOptions, **more: Any) -> OrtSession:
        used.add((options.num_threads, torch.get_num_threads()))
        return OrtSession(*given, options=options, **more)

    monkeypatch.setattr("internvl_edge.compiler.oracle.run_graph.OrtSession", noticed)
    before = torch.get_num_threads()
    arguments = [command, str(vit / "out"), "--checkpoint", str(vit / "checkpoint"), "--threads"]
    assert run([*arguments, "3"]) == 0
    assert used == {(3, 3)}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("command", ["verify", "bisect"])
@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--threads", "0"], 2, "0 is not in the range"),
        (["--device", "gpu"], 2, "device 'gpu': expected 'auto', 'cpu'"),
        (["--device", "cuda"], 4, "found no CUDA device; use device 'cpu'"),
    ],
)
def test_a_device_or_threads_that_are_not_there(
    vit: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    arguments: list[str],
    code: int,
    told: str,
) -> None:
    monkeypatch.setattr("internvl_edge.runtime.ort.options.gpu_count", lambda: 0)
    given = [command, vit / "out", "--checkpoint", vit / "checkpoint", *arguments]
    assert told in refused(capsys, code, *given)


# --- streams -------------------------------------------------------------------------------------


def in_a_shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run ``$IE`` in bash, the exit code of every part of a pipe on the last line."""
    program = f"{shlex.quote(sys.executable)} -m internvl_edge"
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        ["bash", "-c", command.replace("$IE", program) + "; echo codes ${PIPESTATUS[@]} >&2"],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
        check=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("$IE doctor >&-", 5, b"error: stdout is closed"),
        ("$IE doctor --json >&-", 5, b"error: stdout is closed"),
        ("$IE doctor >/dev/full", 5, b"error: stdout: the answer cannot be written: No space"),
        ("$IE doctor --json >/dev/full", 5, b"error: stdout: the answer cannot be written"),
        ("$IE inspect nowhere --json >/dev/full", 3, b"error: nowhere: expected a folder"),
        ("$IE doctor --json 2>&- >/dev/null", 0, b""),
        ("$IE inspect nowhere 2>/dev/full", 3, b""),
        ("$IE doctor --json <&- >/dev/null", 0, b""),
        ("$IE doctor | true", 141, b""),
        ("$IE doctor --json | true", 141, b""),
        ("$IE --version >&-", 5, b"error: stdout is closed"),
        ("$IE --help >&- 2>&-", 5, b""),
        ("$IE caption --help >&-", 5, b"error: stdout is closed"),
        ("$IE >&-", 5, b"error: stdout is closed"),
        ("$IE --help >/dev/full", 5, b"error: stdout: the answer cannot be written: No space"),
        ("$IE >/dev/full", 5, b"error: stdout: the answer cannot be written: No space"),
        ("$IE --version >/dev/full", 5, b"error: stdout: the answer cannot be written: No space"),
        ("$IE --help | true", 141, b""),
        ("$IE --version | true", 141, b""),
        ("$IE --help | head -1 >/dev/null", 0, b""),  # which was all there when it left
        ("$IE --version | head -1 >/dev/null", 0, b""),
    ],
)
def test_streams_that_cannot_be_used(command: str, code: int, told: bytes) -> None:
    done = in_a_shell(command)
    *said, codes = done.stderr.strip().splitlines()
    assert codes.split()[1] == str(code).encode()
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    assert said[0].startswith(told) if told else not said, done.stderr
    if b"stdout" in told:
        assert b"redirect it to a file" in said[0]  # what to do


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_answer_that_is_cut_short_is_no_success(tmp_path: Path, unbuffered: str) -> None:
    answer = tmp_path / "answer"
    code = (
        "from internvl_edge.cli.console import Output, prepare_streams; prepare_streams(); "
        "Output(as_json=True).result({'caption': 'x' * 5000})"
    )
    command = f"ulimit -f 1; {shlex.quote(sys.executable)} -c {shlex.quote(code)} > {answer}"
    done = in_a_shell(command, PYTHONUNBUFFERED=unbuffered)
    assert answer.stat().st_size == 1024  # of the beginning, which was written
    assert b"stdout: the answer cannot be written: File too large" in done.stderr
    assert done.stderr.endswith(b"codes 1\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "utf-8:strict"},
    ],
    ids=str,
)
def test_names_of_every_kind_are_printed(tmp_path: Path, environment: dict[str, str]) -> None:
    name = os.fsencode(tmp_path) + "/一 🙂 caf".encode() + b"\xe9"
    os.mkdir(name)
    for flags in ("", " --json"):
        done = in_a_shell(f"$IE inspect {shlex.quote(os.fsdecode(name))}{flags}", **environment)
        assert b"Traceback" not in done.stderr and done.stderr.endswith(b"codes 3\n")
        assert b"expected a folder, a checkpoint" in done.stderr
        if flags:
            shown = json.loads(done.stdout)["error"]["message"]
            assert ("caf\\xe9" if "LC_ALL" in environment else "一 🙂 caf\\xe9") in shown


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


def test_a_benchmark_during_other_work(
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
