"""What a builder calls back: nothing raises, nothing is lost, files appear whole or not at all."""

from __future__ import annotations

import hashlib
from enum import Enum
from pathlib import Path

import pytest
from support.disk import fill_disk

from internvl_edge.errors import ResourceError
from internvl_edge.export.engine import monitor as callbacks
from internvl_edge.export.engine.monitor import Monitor
from internvl_edge.files.disk import StreamedFile
from internvl_edge.runtime.trt.vendor import NativeLog, callback, decisive_lines

Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO")


class NativeBase:
    """As pybind11's: an object without the base's own __init__ is not usable."""

    ready = False

    def __init__(self) -> None:
        self.ready = True


def test_a_callback_object_is_initialised_and_calls_our_function() -> None:
    taken: list[bytes] = []
    made = callback(NativeBase, write=taken.append)
    made.write(b"piece")
    assert (made.ready, isinstance(made, NativeBase), taken) == (True, True, [b"piece"])


def test_only_errors_are_kept_of_the_log() -> None:
    log = NativeLog()
    for severity in Severity:
        log.log(severity, f"{severity.name} line")
    assert list(log.errors) == ["INTERNAL_ERROR line", "ERROR line"]
    assert log.mentions("ERROR line")
    assert not log.mentions("WARNING")


def test_a_file_that_lost_a_piece_takes_no_more_and_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, room=4)
    with StreamedFile(tmp_path / "plan") as file:
        assert [file.write(piece) for piece in (b"abc", b"de", b"f")] == [3, 0, 0]
        with pytest.raises(ResourceError, match="after 3 bytes"):
            file.publish()
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_of_all_pieces(tmp_path: Path) -> None:
    with StreamedFile(tmp_path / "plan") as file:
        for piece in (b"abc", b"", b"def"):
            file.write(piece)
        file.publish()
    assert (file.nbytes, file.sha256) == (6, hashlib.sha256(b"abcdef").hexdigest())


def test_what_a_report_raises_stops_the_build_once() -> None:
    calls: list[int] = []

    def report(phase: str, done: int, steps: int) -> None:
        calls.append(done)
        raise KeyboardInterrupt

    monitor = Monitor(report)
    monitor.phase_start("Building", None, 2)
    assert not monitor.step_complete("Building", 0)
    assert isinstance(monitor.stopped_by, KeyboardInterrupt)
    assert calls == [0]


def test_a_streamed_file_replaces_another_only_when_published(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    path.write_bytes(b"old")
    with StreamedFile(path) as file:
        file.write(b"new")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
    with StreamedFile(path) as file:
        file.write(b"new")
        file.publish()
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"new", [path])


def test_progress_is_told_in_steps() -> None:
    told: list[tuple[str, int, int]] = []
    monitor = Monitor(lambda *progress: told.append(progress))
    monitor.phase_start("Building", None, 2)
    assert monitor.step_complete("Building", 0)
    monitor.phase_finish("Building")
    assert told == [("Building", 0, 2), ("Building", 1, 2), ("Building", 2, 2)]


def test_decisive_lines_are_few_and_never_empty_of_reason() -> None:
    noise = "Error Code 1: CUDA driver version is insufficient"
    assert decisive_lines([noise]) == noise  # where it is all there is
    assert decisive_lines(["a\nb", "b", noise]) == "a\n  b"
    assert decisive_lines([str(i) for i in range(99)]).count("\n") < 9
    assert decisive_lines([]) == ""


def test_memory_is_given_back_where_a_phase_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the builder freed would stay beside the engine's bytes: a tenth of an INT8 one's."""
    calls: list[str] = []
    monkeypatch.setattr(callbacks, "trim", lambda: calls.append("trim"))
    monitor = Monitor(lambda phase, done, steps: calls.append(f"{phase} {done}/{steps}"))
    monitor.phase_start("lower", None, 2)
    monitor.step_complete("lower", 0)
    monitor.phase_finish("lower")
    assert calls == ["lower 0/2", "lower 1/2", "trim", "lower 2/2"]
