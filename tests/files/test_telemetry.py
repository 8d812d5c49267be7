"""Nothing reaches for the network, and nothing is kept about the machine."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.paths import ROOT

from internvl_edge.files import telemetry

MAIN_COMMANDS = """
import sys
from pathlib import Path
from internvl_edge.cli import run
work, picture = Path(sys.argv[1]), sys.argv[2]
out = str(work / "out")
for command in (
    ["export", "-o", out, "--precision", "fp32", "--components", "image_embed,text_embed"],
    ["verify", out],
    ["inspect", out],
    ["doctor"],
    ["embed", out, picture, "--text", "a red seven"],
    ["classify", out, picture, "--labels", "seven,eight"],
    ["classify", out, picture, "--labels", "seven,eight", "--backend", "openvino"],
    ["benchmark", out, "--components", "image_embed", "--seconds", "0.1", "--no-roofline"],
):
    assert run(command) == 0, command
"""


@pytest.mark.slow
def test_main_commands_open_no_socket_and_leave_nothing_at_home(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    from PIL import Image

    Image.new("RGB", (48, 48), "red").save(tmp_path / "red.png")
    (home := tmp_path / "home").mkdir()
    (work := tmp_path / "work").mkdir()
    (script := tmp_path / "commands.py").write_text(MAIN_COMMANDS)
    kept = {k: v for k, v in os.environ.items() if k not in (*telemetry.SWITCHES, "XDG_CACHE_HOME")}
    done = subprocess.run(
        [
            *(strace, "-f", "-qq", "-e", "trace=socket", "-o", str(tmp_path / "calls")),
            *(sys.executable, "-B", str(script), str(work), str(tmp_path / "red.png")),
        ],
        env={**kept, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip("processes cannot be traced here")
    assert done.returncode == 0, done.stderr
    families = set(re.findall(r"socket\((AF_\w+)", (tmp_path / "calls").read_text()))
    assert families <= {"AF_UNIX"}
    assert [path for path in home.rglob("*") if path.is_file()] == []


def environment_after(script: str, **given: str) -> dict[str, str]:
    kept = {name: v for name, v in os.environ.items() if name not in telemetry.SWITCHES}
    done = subprocess.run(
        [sys.executable, "-c", f"{script}\nimport json, os; print(json.dumps(dict(os.environ)))"],
        env={**kept, **given, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def test_any_import_of_ours_turns_telemetry_off_unless_the_user_decided() -> None:
    for script in ("import internvl_edge", "import internvl_edge.files.cores"):
        after = environment_after(script)
        assert [after[name] for name in telemetry.SWITCHES] == ["1"] * len(telemetry.SWITCHES)
    assert (
        environment_after("import internvl_edge", ORT_DISABLE_TELEMETRY="0")[
            "ORT_DISABLE_TELEMETRY"
        ]
        == "0"
    )


@pytest.mark.parametrize(("decided", "calls"), [(None, 1), ("0", 0)])
def test_an_onnxruntime_that_was_imported_before_sends_nothing_from_then_on(
    monkeypatch: pytest.MonkeyPatch, decided: str | None, calls: int
) -> None:
    called: list[int] = []
    module = SimpleNamespace(disable_telemetry_events=lambda: called.append(1))
    monkeypatch.setitem(sys.modules, "onnxruntime", module)  # type: ignore[arg-type]
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    if decided is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", decided)
    telemetry.turn_off()
    assert len(called) == calls


def test_openvino_is_imported_without_what_reports_that_it_was() -> None:
    script = """
import sys
import internvl_edge.runtime.openvino.session
import openvino
assert callable(openvino.convert_model), "something is missing"
assert "openvino_telemetry" not in sys.modules, "it is there"
import openvino_telemetry  # by who means it
"""
    environment_after(script)


def test_a_reporter_that_the_program_imported_is_left_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "some_reporter", module)  # type: ignore[arg-type]
    with telemetry.without_reports("some_reporter"):
        import some_reporter  # type: ignore[import-not-found]
    assert some_reporter is sys.modules["some_reporter"] is module


def test_scripts_import_ours_before_onnxruntime() -> None:
    """At the top of a module, where the order is the order of the lines."""
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    assert len(scripts) > 8
    for script in scripts:
        names = [
            name
            for node in ast.parse(script.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
        ]
        tops = [name.split(".")[0] for name in names]
        if "onnxruntime" in tops:
            assert "internvl_edge" in tops[: tops.index("onnxruntime")], script
