"""``embed SOURCE OUT -o DEST.parquet`` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs.bulk import write_folder, write_table

from internvl_edge.cli import run
from internvl_edge.integrations import ray
from internvl_edge.integrations.bulk.job import Done
from internvl_edge.integrations.bulk.staging import staging_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Path:
    """Ten pictures, one of them broken, and a link to a compiled directory."""
    folder = tmp_path_factory.mktemp("bulk-cli")
    (folder / "tiny").symlink_to(compiled)
    write_folder(folder / "pictures", 10, broken=(5,))
    return folder


def embed(*arguments: str | Path) -> int:
    return run(["embed", *map(str, arguments)])


def test_one_broken_picture_of_ten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dest = place / "a.parquet"
    assert embed(place / "pictures", place / "tiny", "-o", dest, "-q") == 3
    told = capsys.readouterr()
    assert told.out == f"{dest}: 10 rows, 1 without an embedding\n"
    assert "00005.png" in told.err
    assert pq.read_table(dest).column("embedding").null_count == 1
    assert embed(place / "pictures", place / "tiny", "-o", dest) == 2
    assert "exists; pass --force" in capsys.readouterr().err
    code = embed(
        place / "pictures", place / "tiny", "-o", dest, "--force", "--skip-errors", "--json"
    )
    assert code == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["errors"], result["file"]) == (10, 1, str(dest))
    assert result["first_errors"][0]["path"].endswith("00005.png")


def test_the_order_of_the_other_form_is_understood(place: Path) -> None:
    dest = place / "b.parquet"
    assert embed(place / "tiny", place / "pictures", "-o", dest, "--skip-errors", "-q") == 0


def test_several_tables_and_columns(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("x.parquet", "y.parquet"):
        write_table(place / name, 5)
    dest = place / "c.parquet"
    tables = [place / "x.parquet", place / "y.parquet"]
    assert embed(*tables, place / "tiny", "-o", dest, "--keep", "id", "-q") == 0
    assert pq.read_table(dest).column_names == ["path", "id", "embedding", "error"]
    texts = ["--column", "caption", "--force", "--normalize", "-q"]
    assert embed(*tables, place / "tiny", "-o", dest, *texts) == 0
    assert len(pq.read_table(dest)) == 10


def test_texts_that_are_too_long(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"caption": ["a zero", "word " * 100]}), place / "long.parquet")
    texts = [place / "long.parquet", place / "tiny", "--column", "caption", "--on-long", "error"]
    assert embed(*texts, "-o", place / "d.parquet", "-q") == 3
    told = capsys.readouterr()
    assert "2 rows, 1 without an embedding" in told.out
    assert "tokens, at most" in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pictures", "tiny", "--resume"], "--resume goes with -o"),
        (["pictures", "tiny", "--ray"], "--ray goes with -o"),
        (["pictures", "tiny", "-o", "z.parquet", "--text", "a"], "--text does not go with -o"),
        (["pictures", "tiny", "-o", "z.parquet", "--save", "a.npz"], "--save does not go"),
        (["pictures", "tiny", "-o", "z.parquet", "--actors", "2"], "--actors goes with --ray"),
        (
            ["pictures", "tiny", "-o", "z.parquet", "--ray", "--backend", "tensorrt"],
            "--backend tensorrt: the actors of --ray run ONNX Runtime",
        ),
        (["pictures", "-o", "z.parquet"], "expected SOURCE and OUT"),
        (["pictures", "tiny", "-o", "z.npz"], "ends in .parquet"),
        (["pictures", "tiny", "-o", "z.parquet", "--column", "a"], "pictures have no columns"),
        (["x.tar", "tiny", "-o", "z.parquet"], "cannot be read"),
    ],
)
def test_refusals(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(place)
    assert embed(*arguments) in (2, 3)
    assert message in capsys.readouterr().err
    assert not (place / "z.parquet").exists()
    assert not staging_of(place / "z.parquet").exists()


def test_actors_are_told_to_allow_what_is_slow(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def embedded(*_: Any, **how: Any) -> Done:
        seen.update(how)
        return Done(rows=1, errors=0)

    monkeypatch.setattr("internvl_edge.cli.bulk.require", lambda *_: None)
    monkeypatch.setattr(ray, "connected", lambda *_, **__: nullcontext())
    monkeypatch.setattr(ray, "embed", embedded)
    arguments = (place / "pictures", place / "tiny", "-o", place / "z.parquet", "-q", "--ray")
    assert embed("--allow-slow", *arguments) == 0
    assert seen["allow_slow"]
    assert embed(*arguments) == 0
    assert not seen["allow_slow"]


def test_a_package_that_is_missing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("internvl_edge.files.packages.is_installed", lambda module: False)
    assert embed(place / "pictures", place / "tiny", "-o", place / "z.parquet") == 4
    assert "internvl-edge[parquet]" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_is_finished(
    place: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    source, dest = write_folder(tmp_path / "pictures", 3000), tmp_path / "a.parquet"
    arguments: list[Any] = ["embed", source, place / "tiny", "-o", dest, "--batch-size", "1"]
    command = [sys.executable, "-m", "internvl_edge", *arguments, "--threads", "1"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored in the background
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    assert first.startswith("embed 1/3000")
    time.sleep(0.2)
    process.send_signal(number)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "--resume goes on" in rest
    assert not dest.exists()
    assert len(list(staging_of(dest).glob("0*.parquet"))) == 1
    done = subprocess.run(
        [*command, "--resume", "--json", "-q"], stdout=subprocess.PIPE, check=True
    )
    result = json.loads(done.stdout)
    assert result["rows"] == 3000
    assert 0 < result["kept_rows"] < 3000
    assert os.listdir(tmp_path) and not staging_of(dest).exists()
