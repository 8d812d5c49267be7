"""The command line as a user types it: answers, JSON on the last line, exit codes."""

from __future__ import annotations

import errno
import json
import shutil
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

from internvl_edge import cli
from internvl_edge.artifact.manifest import EngineRecord
from internvl_edge.artifact.open import open_artifact
from internvl_edge.artifact.sidecar import ShapeRanges
from internvl_edge.benchmark.footprint import measure_footprint
from internvl_edge.benchmark.limits import peaks
from internvl_edge.cli import run
from internvl_edge.cli.console import Output
from internvl_edge.errors import CheckpointError, ResourceError, UsageError
from internvl_edge.runtime.gpu.probe import Gpu

COMMANDS = [
    "export",
    "build",
    "verify",
    "inspect",
    "convert",
    "lint",
    "bisect",
    "embed",
    "classify",
    "retrieve",
    "match",
    "caption",
    "answer",
    "chat",
    "serve",
    "triton",
    "benchmark",
    "doctor",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """A checkpoint, three pictures and a compiled directory."""
    folder = tmp_path_factory.mktemp("cli")
    written = write_internvl(folder / "checkpoint")
    write_tokenizer(written.path)
    (folder / "pictures").mkdir()
    for i in range(3):
        picture = np.random.default_rng(i).integers(0, 256, (32, 40, 3), np.uint8)
        Image.fromarray(picture).save(folder / "pictures" / f"{i}.png")
    assert run(["export", str(written.path), "-o", str(folder / "out"), "-q"]) == 0
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """The JSON object of a command that succeeds."""
    assert run([*map(str, arguments), "--json"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.strip().splitlines()[-1])
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert "--backend" in text


def test_every_command_is_tested() -> None:
    assert sorted(cli.app.commands) == sorted(COMMANDS)


def test_inspect(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "inspect", place / "checkpoint")
    assert found["kind"] == "internvl"
    assert "matcher" in found["components"]
    compiled = answer(capsys, "inspect", place / "out")
    assert compiled["precision"] == "fp32"
    assert compiled["components"].keys() == set(found["components"])


@pytest.mark.parametrize("name", ["tokenizer.model", "preprocessor_config.json"])
def test_inspect_names_what_an_export_refuses(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert answer(capsys, "inspect", place / "checkpoint")["problem"] is None
    copy = shutil.copytree(place / "checkpoint", tmp_path / "copy")
    (copy / name).write_text("<html>not found</html>", encoding="utf-8")
    assert name in answer(capsys, "inspect", copy)["problem"]
    assert run(["inspect", str(copy)]) == 0
    assert "export refuses it: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["checkpoint", "out"])
def test_inspecting_needs_no_framework(place: Path, name: str) -> None:
    code = (
        "import json, sys; from internvl_edge.cli import run; "
        "code = run(['inspect', sys.argv[1], '--json']); "
        "print(json.dumps([code, *sys.modules]))"
    )
    command = [sys.executable, "-c", code, str(place / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer, loaded = (json.loads(line) for line in done.stdout.splitlines())
    assert answer.keys() & {"components"}
    assert loaded[0] == 0
    assert not {"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime"} & set(loaded)


@pytest.mark.slow
def test_verify(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "verify", place / "out")["ok"] is True
    found = answer(capsys, "verify", place / "out", "--checkpoint", place / "checkpoint")
    assert found["components"]["vision"]["sqnr_db"] > 90


def test_dry_run_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(
        capsys, "export", place / "checkpoint", "-o", place / "new", "-p", "fp16", "--dry-run"
    )
    assert found["disk_nbytes"] > 0
    assert not (place / "new").exists()


def test_what_a_build_takes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the tensorrt-rtx package is not installed")
    before = sorted((place / "out").rglob("*"))
    every = answer(capsys, "build", place / "out", "--dry-run")
    names = [step["name"] for step in every["steps"]]
    assert "build vision" in names and "build decoder" in names
    one = answer(capsys, "build", place / "out", "--dry-run", "--components", "vision")
    assert 0 < one["disk_nbytes"] < every["disk_nbytes"]
    command = ["build", str(place / "out"), "--dry-run", "--length", "1,32,9999"]
    assert run(command) == UsageError.exit_code
    assert "positions" in capsys.readouterr().err
    assert sorted((place / "out").rglob("*")) == before
    command = ["build", str(place / "out"), "--dry-run", "--components", "visoin"]
    assert run(command) == UsageError.exit_code
    assert "did you mean 'vision'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build", "export"])
def test_a_full_disk_is_seen_first(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    if command == "build":
        pytest.importorskip("tensorrt_rtx", reason="the tensorrt-rtx package is not installed")
    before = sorted((place / "out").rglob("*"))
    full = shutil.disk_usage(place)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    words = ["build", str(place / "out")]
    if command == "export":
        words = ["export", str(place / "checkpoint"), "-o", str(place / "new"), "-p", "fp16"]
    assert run(words) == ResourceError.exit_code
    assert "B of disk" in capsys.readouterr().err
    assert sorted((place / "out").rglob("*")) == before
    assert not (place / "new").exists()


def test_embed(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, save = place / "pictures", tmp_path / "e.npz"
    found = answer(capsys, "embed", place / "out", pictures, "--text", "a seven", "--normalize")
    images = np.array(found["images"])
    assert images.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)
    assert np.array(found["texts"]).shape == (1, 16)
    command = ["embed", place / "out", pictures / "0.png", "--mode", "G", "--save", save]
    answer(capsys, *command)
    assert np.load(save)["images"].shape == (1, 16)
    assert run([*map(str, command)]) == 2
    assert "--force" in capsys.readouterr().err
    answer(capsys, *command, "--force", "--text", "a")
    saved = np.load(save)
    assert saved["texts"].shape == (1, 16)
    assert saved["image_names"].tolist() == [str(pictures / "0.png")]
    assert saved["texts_given"].tolist() == ["a"]


def test_embeddings_are_labelled(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = place / "pictures" / "0.png"
    assert run(["embed", str(place / "out"), str(picture), "--text", "a seven"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{picture}: ")
    assert second.startswith("a seven: ")
    assert len(second.removeprefix("a seven: ").split()) == 16


def test_classify(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(
        capsys,
        "classify",
        place / "out",
        place / "pictures",
        "--labels",
        "one, two,three",
        "--template",
        "a {}",
        "--template",
        "the digit {}",
        "--top",
        "2",
    )
    for result in found["results"]:
        assert len(result["labels"]) == 2
        assert result["labels"][0]["score"] >= result["labels"][1]["score"]


def test_videos(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "pictures"
    found = answer(
        capsys, "classify", place / "out", folder, "--labels", "a,b", "--video", "--frames", "2"
    )
    assert [result["file"] for result in found["results"]] == [str(folder)]
    options = ["--text", "a", "--text", "b", "--video"]
    found = answer(capsys, "retrieve", place / "out", folder, folder, *options)
    assert len(found["by_image"]) == 2
    assert run(["classify", str(place / "out"), str(place), "--labels", "a,b", "--video"]) == 3
    assert "expected image files" in capsys.readouterr().err


def test_retrieve(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a red seven\n\na blue three\n")
    found = answer(capsys, "retrieve", place / "out", place / "pictures", "--texts", texts)
    assert [item["text"] for item in found["by_text"]] == ["a red seven", "a blue three"]
    scores = [hit["score"] for hit in found["by_text"][0]["images"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert run(["retrieve", str(place / "out"), str(place / "pictures"), "--text", "a seven"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "images of each text:"
    assert lines[1].startswith("  a seven: ")
    assert lines[2] == "texts of each image:"
    assert lines[3].startswith(f"  {place / 'pictures' / '0.png'}: a seven ")
    assert len(lines) == 6


def test_match(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = place / "pictures" / "0.png"
    found = answer(capsys, "match", place / "out", picture, "--text", "a", "--text", "b")
    assert {item["text"] for item in found["results"]} == {"a", "b"}
    assert all(0 <= item["probability"] <= 1 for item in found["results"])
    command = ["match", str(place / "out"), str(picture), "--text", "b", "--text", "a", "--stream"]
    assert run([*command, "--json"]) == 0
    *pieces, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    given = sorted(last["results"], key=lambda item: str(item["text"]), reverse=True)
    assert [piece["piece"] for piece in pieces] == given
    probabilities = [item["probability"] for item in found["results"]]
    assert [item["probability"] for item in last["results"]] == pytest.approx(probabilities)
    assert run(command) == 0
    lines = [f"{item['probability']:.4f}  {item['text']}\n" for item in given]
    assert capsys.readouterr().out == "".join(lines)


def test_answers_without_json_are_on_stdout(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = place / "pictures" / "0.png"
    assert run(["classify", str(place / "out"), str(picture), "--labels", "one,two"]) == 0
    assert "0.png: " in capsys.readouterr().out


@pytest.fixture
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks of small products and arrays: wrong, and soon measured; nothing else is running."""
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(peaks, "SIDE", 64)
    monkeypatch.setattr(peaks, "ARRAY_NBYTES", 1 << 20)


@pytest.mark.slow
@pytest.mark.usefixtures("small_peaks")
def test_benchmark(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (place / "out").iterdir()}
    found = answer(
        capsys,
        "benchmark",
        place / "out",
        "--components",
        "image_pool",
        "--batch",
        "1,2",
        "--seconds",
        "0.05",
        "--against",
        "pytorch",
        "--checkpoint",
        place / "checkpoint",
        "--markdown",
        tmp_path / "speed.md",
        "--report",
        tmp_path / "report.html",
    )
    assert len(found["results"]) == 4
    latency = found["results"][0]["latency"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
    memory = found["results"][0]["memory"]
    assert 0 < memory["before_rss_bytes"] < memory["peak_rss_bytes"]
    assert memory["gpu_bytes"] is None
    assert "memory" not in found["results"][1]
    assert [ratio["rounds"] >= 20 for ratio in found["ratios"]] == [True, True]
    assert found["peaks"]["operations"].keys() == {"float32"}
    for result in found["results"]:
        assert ("roofline" in result) == (result["out"] != "pytorch")
    small, large = (r["roofline"] for r in found["results"] if "roofline" in r)
    assert large["operations"] == 2 * small["operations"]
    assert small["mfu"] > 0
    table = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert table.count("| image_pool |") == 4
    assert "MFU" in table
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Speed</h2>" in page
    assert "<h3>Roofline</h3>" in page
    assert before == {path.name: path.stat().st_mtime_ns for path in (place / "out").iterdir()}


@pytest.mark.slow
def test_a_benchmark_of_the_whole_way(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a picture and from arrays, compared with another directory of the same checkpoint."""
    shutil.copytree(place / "out", tmp_path / "other")
    found = answer(
        capsys,
        *("benchmark", place / "out", "--against", tmp_path / "other"),
        *("--components", "image_pool,image_embed", "--image", place / "pictures" / "0.png"),
        *("--seconds", "0", "--no-roofline", "--no-memory"),
    )
    labels = ["image_pool", "image_embed", "image_embed from a picture"]
    outs = [str(place / "out"), str(tmp_path / "other")]
    assert [(r["component"], r["out"]) for r in found["results"]] == [
        (label, out) for label in labels for out in outs
    ]
    assert [(r["component"], r["out"]) for r in found["ratios"]] == [(n, outs[1]) for n in labels]
    assert all(r["low"] <= r["median"] <= r["high"] for r in found["ratios"])
    arrays, whole = (r["latency"]["p50"] for r in found["results"][2::2])
    assert whole > arrays


def test_memory_that_cannot_be_measured_says_why(place: Path) -> None:
    found = measure_footprint(str(place / "out"), "image_pool", "tensorrt", 1)
    assert found.to_json().keys() == {"failed"}
    assert "tensorrt" in str(found.failed)


@pytest.mark.slow
def test_a_benchmark_of_a_server(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["benchmark", str(place / "out"), "--components", "image_pool", "--seconds", "0.1"]
    command += ["--scenario", "server", "--p99", "5000"]
    assert run([*command, "--no-roofline", "--no-memory", "--json"]) == 0
    captured = capsys.readouterr()
    (result,) = json.loads(captured.out.strip().splitlines()[-1])["results"]
    assert result["latency"]["p99"] <= result["p99_bound"]["max"] == 5000
    assert result["latency"]["count"] == round(0.1 * result["request_rate"]["avg"])


def test_a_benchmark_without_peaks(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(
        capsys,
        "benchmark",
        place / "out",
        "--components",
        "image_pool",
        "--seconds",
        "0.05",
        "--scenario",
        "multi-stream",
        "--no-roofline",
    )
    assert found["peaks"] is None
    assert "roofline" not in found["results"][0]


@pytest.mark.slow
@pytest.mark.usefixtures("small_peaks")
@pytest.mark.parametrize("quiet", [[], ["-q"]])
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["inspect", "CHECKPOINT"], "internvl checkpoint"),
        (["inspect", "COMPILED"], "image_queries"),
        (["verify", "COMPILED"], "every graph is sound"),
        (["export", "CHECKPOINT", "-o", "NEW", "-p", "FP16", "--dry-run"], "weights"),
        (
            ["benchmark", "COMPILED", "--components", "image_pool", "--seconds", "0"],
            "peaks measured here: float32",
        ),
        (["doctor"], 'pip install "internvl-edge[trt]"'),
    ],
)
def test_answers_are_on_stdout_and_all_else_is_not(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    shown: str,
    quiet: list[str],
) -> None:
    names = {"CHECKPOINT": "checkpoint", "COMPILED": "out", "NEW": "new"}
    arguments = [str(place / names[word]) if word in names else word for word in arguments]
    assert run([*arguments, *quiet]) == 0
    captured = capsys.readouterr()
    assert shown in captured.out
    assert captured.err == ""


def test_tables_show_what_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a/[bold]folder[/]/" + "x" * 300
    Output().table(("file", "extra"), [(path, "[trt]")])
    shown = capsys.readouterr().out
    assert path in shown
    assert "[trt]" in shown
    Output(quiet=True).say("nothing")
    Output().say("[note]")
    assert capsys.readouterr().err == "[note]\n"


def test_build_says_what_is_new(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (
        EngineRecord(component=c, target="tensorrt-rtx", file=f"engines/{c}", sidecar=c)
        for c in ("vision", "matcher")
    )
    asked: list[tuple[str, ...]] = []

    def build(out: Path, targets: tuple[str, ...], **_: Any) -> list[EngineRecord]:
        asked.append(targets)
        return [old, new]

    class Info:
        nbytes, profile = 1_500_000, ShapeRanges(batch=(1, 8, 32))
        inputs = open_artifact(place / "out").manifest.components["vision"].inputs
        census = None

    monkeypatch.setattr("internvl_edge.compiler.steps.engines.build", build)
    monkeypatch.setattr("internvl_edge.cli.export.engine_files", lambda out: {old.file})
    monkeypatch.setattr("internvl_edge.artifact.sidecar.read_engine_info", lambda path: Info)
    target = ["--target", "TensorRT-RTX, tensorrt", "--target", "tensorrt"]
    found = answer(capsys, "build", place / "out", *target)
    assert asked == [("tensorrt-rtx", "tensorrt")]
    assert [engine["is_new"] for engine in found["engines"]] == [False, True]
    assert found["engines"][1]["nbytes"] == 1_500_000
    assert found["engines"][1]["profile"] == {"batch": [1, 8, 32]}
    assert run(["build", str(place / "out")]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert "batch 1/8/32" in first
    assert " new " not in first
    assert " new " in second


def test_dry_run_refuses_what_does_not_fit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(place / "checkpoint"), "-o", str(place / "new"), "--dry-run"]
    command += ["--memory-budget", "1MB"]
    assert run(command) == ResourceError.exit_code
    captured = capsys.readouterr()
    assert "trace" in captured.out
    assert "--memory-budget" in captured.err
    assert run([*command, "--json"]) == ResourceError.exit_code
    forecast, error = map(json.loads, capsys.readouterr().out.splitlines())
    assert forecast["peak_memory_nbytes"] > 1e6
    assert error["error"]["exit_code"] == 5


def test_a_checkpoint_without_a_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    written = write_internvl(tmp_path / "checkpoint")
    out = tmp_path / "out"
    command = [
        "export",
        str(written.path),
        "-o",
        str(out),
        "--components",
        "image_embed,text_embed",
    ]
    assert run([*command, "--verify", "none"]) == 0
    (record,) = [r for r in caplog.records if "tokenizer" in r.getMessage()]
    assert "no tokenizer.model: text_embed will take token ids only" in record.getMessage()
    capsys.readouterr()
    assert run(["embed", str(out), "--text", "a"]) == 2
    assert "its checkpoint had none" in capsys.readouterr().err


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) > 10
    assert captured.err == ""


@pytest.mark.parametrize(
    ("stop", "code", "word"),
    [(KeyboardInterrupt(), 130, "interrupted"), (cli.Terminated(), 143, "terminated")],
)
def test_a_signal_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop: BaseException,
    code: int,
    word: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise stop

    monkeypatch.setattr("internvl_edge.cli.inspect.open_artifact", fail)
    assert run(["verify", "x", "--json"]) == code
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["exit_code"] == code
    assert captured.err.strip() == f"error: {word}"


def test_sigterm_cleans_up(tmp_path: Path) -> None:
    waiting, cleaned = tmp_path / "waiting", tmp_path / "cleaned"
    code = f"""
import contextlib, pathlib, time
from internvl_edge import cli

@contextlib.contextmanager
def block():
    try:
        yield
    finally:
        pathlib.Path({str(cleaned)!r}).touch()

def wait(*_, **__):
    with block():
        pathlib.Path({str(waiting)!r}).touch()
        while True:
            time.sleep(0.01)  # one call that blocks could begin just after the signal

cli.inspect.open_artifact = wait
cli.main(["verify", "x"])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not waiting.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "error: terminated" in said
    assert cleaned.exists()


@pytest.mark.slow
def test_build_needs_no_pytorch() -> None:
    """Engines are built from graphs: neither its memory nor its absence matters."""
    code = (
        "import sys; import internvl_edge.cli.export, internvl_edge.compiler as c; c.build; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'onnx', 'onnx_ir')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "doctor")
    release, _, _ = torch.__version__.partition("+")  # a build's label is not in every wheel's name
    assert found["packages"]["torch"].partition("+")[0] == release
    assert found["machine"]["cores"] >= 1


def test_doctor_says_which_gpus_have_no_rtx(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        Gpu(index=i, name=name, sm=sm, memory_nbytes=1)
        for i, (name, sm) in enumerate([("RTX 4090", 89), ("H100", 90), ("T4", 75)])
    ]
    monkeypatch.setattr("internvl_edge.runtime.gpu.probe.gpus", lambda: found)
    said = answer(capsys, "doctor")
    assert said["machine"]["cuda_devices"] == 3
    assert [gpu["runs_tensorrt_rtx"] for gpu in said["gpus"]] == [True, False, True]
    assert [gpu["precisions"]["engines"] for gpu in said["gpus"]] == [
        ["bf16", "fp8", "int8"],
        ["bf16", "fp8", "int8"],
        ["fp16", "int8"],
    ]
    assert run(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "cuda:0: RTX 4090, SM89\n" in told
    assert "cuda:1: H100, SM90: not for TensorRT-RTX" in told
    assert "onnxruntime: bf16 or int4-wo for decoders\n" in told


@pytest.mark.slow
def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write_vit(tmp_path / "vit")
    (written.path / "model.safetensors").unlink()
    torch.save(written.state, written.path / "pytorch_model.bin")
    found = answer(capsys, "convert", written.path, tmp_path / "new")
    assert found["tensors"] == len(written.state)
    assert answer(capsys, "inspect", tmp_path / "new")["kind"] == "vit"


def test_convert_runs_no_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    source = tmp_path / "evil"
    source.mkdir()

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (canary,)

    torch.save({"weight": Payload()}, source / "pytorch_model.bin")
    assert run(["convert", str(source), str(tmp_path / "new")]) == 3
    assert not canary.exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_convert_imports_nothing_from_where_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write_vit(tmp_path / "vit")
    (written.path / "model.safetensors").unlink()
    torch.save(written.state, written.path / "pytorch_model.bin")
    canary = tmp_path / "canary"
    (written.path / "safetensors.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.chdir(written.path)
    assert run(["convert", ".", str(tmp_path / "new")]) == 0
    assert not canary.exists()


def caused_by(cause: OSError) -> CheckpointError:
    """As ``raise CheckpointError from cause`` makes it."""
    error = CheckpointError(f"config.json: not readable: {cause}")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (MemoryError(), 5),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 5),
        (ImportError("libx.so: failed to map segment from shared object"), 5),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 5),
        (caused_by(OSError(errno.EMFILE, "Too many open files")), 5),
        (caused_by(OSError(errno.EACCES, "Permission denied")), 3),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2),
        (ZeroDivisionError("oops"), 7),
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_every_failure_has_a_code_and_a_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: Exception,
    code: int,
    debug: list[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("internvl_edge.cli.inspect.open_artifact", fail)
    assert run([*debug, "verify", "x", "--json"]) == code
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["exit_code"] == code
    assert ("Traceback" in captured.err) == bool(debug)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "nowhere", "-o", "OUT"], 3, "does not exist"),
        (["export", "CHECKPOINT", "-o", "OUT", "-p", "int7"], 2, "int8"),
        (["export", "CHECKPOINT", "-o", "OUT", "-p", "atuo"], 2, "did you mean 'auto'"),
        (["export", "CHECKPOINT", "-o", "OUT", "-p", "auto"], 2, "requires --max-drop"),
        (
            ["export", "CHECKPOINT", "-o", "OUT", "--max-drop", "0.5", "--verify", "none"],
            2,
            "leave --verify none out",
        ),
        (
            ["export", "CHECKPOINT", "-o", "OUT", "--metric", "cosine"],
            2,
            "--metric only applies to",
        ),
        (["convert", "nowhere", "OUT"], 3, "nowhere: expected a folder with config.json and"),
        (["lint", "COMPILED"], 3, "expected FILE.onnx, found a folder; it contains 12, such as"),
        (["embed", "CHECKPOINT", "PICTURE"], 3, "is a checkpoint: it has config.json"),
        (["embed", "PICTURES", "PICTURE"], 3, "internvl-edge export CHECKPOINT -o OUT"),
        (["export", "CHECKPOINT", "-o", "OUT", "--components", "x"], 2, "vision"),
        (["export", "CHECKPOINT", "-o", "OUT", "--components", "visoin"], 2, "mean 'vision'"),
        (["export", "CHECKPOINT", "-o", "OUT", "--image-size", "100000"], 2, "--image-size"),
        (["export", "CHECKPOINT", "-o", "PICTURE/out"], 2, "is not a folder"),
        (["export", "CHECKPOINT", "-o", "OUT", "--target", ","], 2, "at least one name"),
        (["export", "PICTURES", "-o", "OUT"], 3, "pictures to calibrate on go to --calib"),
        (["export", "COMPILED", "-o", "OUT"], 3, "is a compiled directory"),
        (["export", "CHECKPOINT", "-o", "OUT", "--image-size", "29"], 2, "28 and 42"),
        (["export", "CHECKPOINT", "-o", "COMPILED"], 2, "--force"),
        (["export", "CHECKPOINT"], 2, "out"),
        (["exprt"], 2, "No such command"),
        (["classify", "COMPILED", "CHECKPOINT/config.json", "--labels", "a,b"], 3, "config.json"),
        (["classify", "COMPILED", "missing.png", "--labels", "a,b"], 3, "missing.png"),
        (["classify", "CHECKPOINT", "PICTURE", "--labels", "a,b"], 3, "manifest"),
        (["embed", "COMPILED"], 2, "expected an image"),
        (["retrieve", "COMPILED", "PICTURE"], 2, "--text"),
        (["benchmark", "COMPILED", "--batch", "0"], 2, "positive"),
        (["benchmark", "COMPILED", "--components", "visoin"], 2, "did you mean 'vision'"),
        (["benchmark", "COMPILED", "--checkpoint", "CHECKPOINT"], 2, "--against pytorch"),
        (["benchmark", "COMPILED", "--p99", "5"], 2, "--scenario server"),
        (["benchmark", "COMPILED", "--against", "pytroch"], 2, "did you mean 'pytorch'"),
        (["benchmark", "COMPILED", "--against", "COMPILED"], 2, "different directories"),
        (["benchmark", "COMPILED", "--image", "nowhere.png"], 3, "--image nowhere.png"),
        (
            ["benchmark", "COMPILED", "--components", "text_embed", "--image", "PICTURE"],
            2,
            "none of text_embed embeds a picture",
        ),
        (["benchmark", "COMPILED", "--seconds", "-1"], 2, "0<=x<="),
        (["build", "COMPILED", "--batch", "4,1"], 2, "three sizes"),
        (["build", "COMPILED", "--target", "x"], 2, "x"),
        (["build", "COMPILED", "--target", "onnx"], 2, "onnx"),
        (["build", "COMPILED", "--length", "1,8,999"], 2, "positions for"),
        (["export", "CHECKPOINT", "-o", "OUT", "--calib", "x", "-p", "int8", "--dry-run"], 3, "x"),
        (["export", "CHECKPOINT", "-o", "OUT", "--calib", "CHECKPOINT"], 2, "calibrate"),
        (["embed", "COMPILED", "PICTURE", "--save", "/nonexistent/x.npz"], 2, "/nonexistent"),
        (["embed", "COMPILED", "PICTURE", "--save", "keep.png"], 2, ".npz"),
        (["embed", "COMPILED", "EMPTY"], 3, ".jpg"),
        (["classify", "COMPILED", "PICTURE", "--labels", "a", "--top", "0"], 2, "x>=1"),
        (["retrieve", "COMPILED", "PICTURE", "--texts", "nowhere"], 3, "expected a text file"),
        (["retrieve", "COMPILED", "PICTURE", "--texts", "PICTURE"], 3, "UTF-8"),
        (["inspect", "nowhere"], 3, "does not exist"),
        (["inspect", "PICTURES"], 3, "config.json or a compiled directory with manifest.json"),
        (["verify", "nowhere"], 3, "nowhere"),
        (["match", "COMPILED", "PICTURE", "--text", "a", "--backend", "tensorrt"], 4, "tensorrt"),
    ],
)
def test_errors_are_one_line_with_a_code(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    names = {
        "OUT": tmp_path / "out",
        "COMPILED": place / "out",
        "CHECKPOINT": place / "checkpoint",
        "PICTURES": place / "pictures",
        "PICTURE": place / "pictures" / "0.png",
        "EMPTY": place / "empty",
    }
    names["EMPTY"].mkdir(exist_ok=True)
    for name, path in names.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    assert run([*arguments, "--json"]) == code
    captured = capsys.readouterr()
    error = json.loads(captured.out.strip().splitlines()[-1])["error"]
    assert error["exit_code"] == code
    assert message in error["message"]
    assert len(captured.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_said_where_nothing_more_can_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("internvl_edge.cli.console.human.print", fail)
    assert run(["inspect", "nothing-is-here"]) == 3
    assert capsys.readouterr().err.startswith("error: nothing-is-here")
