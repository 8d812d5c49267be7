"""Spools, workspaces, and compilations that were killed and go on."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import write_internvl

from internvl_edge import compiler
from internvl_edge.artifact import workspace as workspace_module
from internvl_edge.artifact.workspace import JOURNAL, KEY, Workspace, kept_nbytes, workspace
from internvl_edge.compiler import ExportOptions, cost
from internvl_edge.compiler.steps import weights as weights_step
from internvl_edge.compiler.steps.calibration import blocks as calibration_step
from internvl_edge.errors import (
    CheckpointError,
    InternVLError,
    ResourceError,
    UsageError,
    VerificationError,
)
from internvl_edge.files.spool import Budget, Spool

pytestmark = pytest.mark.slow

KEY_A = {"checkpoint": "a"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "out"


@pytest.fixture
def spools(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as cleanup:

        def make(budget: Budget, *, write_through: bool = False, name: str = "spool") -> Spool:
            file = open(tmp_path / name, "w+b", buffering=0)  # noqa: SIM115
            spool = Spool(file, budget, write_through=write_through)
            cleanup.callback(spool.close)
            return spool

        yield make


# --- spools --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=8),
    st.integers(0, 300),
    st.booleans(),
)
def test_what_comes_out_went_in(
    shapes: list[tuple[int, int]], budget_nbytes: int, write_through: bool
) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    budget = Budget(budget_nbytes)
    with open(os.memfd_create("spool"), "w+b", buffering=0) as file:
        spool = Spool(file, budget, write_through=write_through)
        for values in arrays:
            spool.append(values)
        assert budget.free_nbytes >= 0
        for _ in range(2):
            for values, found in zip(arrays, spool, strict=True):
                np.testing.assert_array_equal(values, found)
        assert [values.shape for values in spool[1:]] == [a.shape for a in arrays[1:]]
        spool.close()
        assert budget.free_nbytes == budget_nbytes


def test_only_what_the_budget_does_not_hold_is_written(spools: Any, tmp_path: Path) -> None:
    spool = spools(Budget(100))
    for _ in range(3):
        spool.append(np.ones(20, np.float32))
    assert (tmp_path / "spool").stat().st_size == 160


def test_reopened(spools: Any, tmp_path: Path) -> None:
    spool = spools(Budget(1000), write_through=True)
    spool.append(np.arange(6).reshape(2, 3))
    shapes = json.loads(json.dumps(spool.shapes))
    spool.close()
    with open(tmp_path / "spool", "r+b", buffering=0) as file:
        found = Spool.reopen(file, shapes, Budget(0))
        np.testing.assert_array_equal(found[0], np.arange(6).reshape(2, 3))
    with (
        open(tmp_path / "spool", "r+b", buffering=0) as file,
        pytest.raises(InternVLError, match="expected 48 bytes, found 24"),
    ):
        Spool.reopen(file, [*shapes, [6]], Budget(0))


def test_a_file_that_was_cut_off(spools: Any, tmp_path: Path) -> None:
    spool = spools(Budget(0))
    spool.append(np.ones(4, np.float32))
    os.truncate(tmp_path / "spool", 8)
    with pytest.raises(ResourceError, match="cut off"):
        spool[0]


# --- workspaces ----------------------------------------------------------------------------------


def work_on(out: Path, key: dict[str, Any], blocks: int, *, fail: bool) -> list[str]:
    """Finish some blocks more; the names of all that are finished."""
    with workspace(out, lambda: key, Budget(0)) as work:
        for _ in range(blocks):
            hidden = work.hidden("image")
            hidden.append(np.full((2, 2), work.num_done, np.float32))
            work.finish(f"block {work.num_done}", {}, {"image": hidden})
        names = [entry["block"] for entry in work.entries]
        if fail:
            raise ResourceError("the disk is full")
    return names


def test_goes_on_where_the_other_failed(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ResourceError), caplog.at_level(logging.WARNING):
        work_on(out, KEY_A, 2, fail=True)
    assert "2 finished step(s) are kept" in caplog.text
    with workspace(out, lambda: KEY_A, Budget(0)) as work:
        assert work.num_done == 2
        np.testing.assert_array_equal(work.restore("image")[0], np.ones((2, 2)))
        assert len(list((work.path / "states").iterdir())) == 1, "only the newest states stay"
    assert not list(out.parent.iterdir())


def test_work_of_another_key_is_never_taken_up(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ResourceError):
        work_on(out, KEY_A, 2, fail=True)
    assert "is dropped" not in caplog.text
    assert work_on(out, {"checkpoint": "b"}, 1, fail=False) == ["block 0"]
    assert "what another run with other options or inputs finished is dropped" in caplog.text


def test_nothing_stays_of_a_run_that_finished_nothing(out: Path) -> None:
    with pytest.raises(ResourceError):
        work_on(out, KEY_A, 0, fail=True)
    assert not list(out.parent.iterdir())


def test_a_line_that_was_cut_short_is_dropped(out: Path) -> None:
    with pytest.raises(ResourceError):
        work_on(out, KEY_A, 2, fail=True)
    path = out.with_name(f".{out.name}.work") / JOURNAL
    path.write_bytes(path.read_bytes() + b'{"block": "half')
    assert work_on(out, KEY_A, 1, fail=False) == ["block 0", "block 1", "block 2"]


def test_second_run_is_told(out: Path) -> None:
    with (
        workspace(out, lambda: KEY_A, Budget(0)),
        pytest.raises(UsageError, match=f"another run is writing .*{out.name}"),
        workspace(out, lambda: KEY_A, Budget(0)),
    ):
        pass
    assert not list(out.parent.iterdir())


def test_second_run_is_told_before_it_asks_for_its_key(out: Path) -> None:
    asked: list[str] = []
    with (
        workspace(out, lambda: KEY_A, Budget(0)),
        pytest.raises(UsageError, match="another run"),
        workspace(out, lambda: {"checkpoint": asked.append("b")}, Budget(0)),
    ):
        pass
    assert not asked


def test_nothing_stays_where_there_is_no_key(out: Path) -> None:
    def fail() -> dict[str, Any]:
        raise ResourceError("reading failed")

    with pytest.raises(ResourceError, match="reading failed"), workspace(out, fail, Budget(0)):
        pass
    assert not list(out.parent.iterdir())


def test_scratch_leaves_nothing(out: Path) -> None:
    with workspace(out, lambda: KEY_A, Budget(0)) as work:
        work.scratch().append(np.ones(3, np.float32))
        assert not list((work.path / "states").iterdir())


# --- compilations --------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_internvl(tmp_path / "checkpoint").path


def options(checkpoint: Path, out: Path, **more: Any) -> ExportOptions:
    components = ("vision", "image_queries")
    return ExportOptions(
        checkpoint=checkpoint,
        out=out,
        precision="int8",
        components=components,
        verify="none",
        **more,
    )


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


class Killed(BaseException):
    """As if the process had died: nothing of ours catches it."""


@contextmanager
def dying_after(steps: int) -> Iterator[list[tuple[Any, ...]]]:
    """A run dies after its so-many-th finished step; what it noted of each."""
    finish, noted = Workspace.finish, list[tuple[Any, ...]]()

    def finish_some(self: Workspace, *args: Any) -> None:
        finish(self, *args)
        noted.append(args)
        if len(noted) == steps:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Workspace, "finish", finish_some)
        yield noted


@pytest.mark.parametrize("after", [1, 3])  # inside the vision tower, and inside QLLaMA
def test_interrupted_runs_end_byte_identical(
    checkpoint: Path,
    tmp_path: Path,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiler.export(options(checkpoint, tmp_path / "whole"))
    with dying_after(after) as noted:
        compiler.export(options(checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out").exists()

    run = calibration_step.calibrate_block
    done: list[str] = []

    def calibrate(block: Any, *args: Any) -> Any:
        done.append(block.name)
        return run(block, *args)

    monkeypatch.setattr(calibration_step, "calibrate_block", calibrate)
    with caplog.at_level(logging.WARNING):
        compiler.export(options(checkpoint, tmp_path / "out"))
    total = len(done) + after
    assert f"{after} of {total} block(s) that an earlier run finished are taken up" in caplog.text
    assert done
    assert not set(done) & {args[0] for args in noted}, "finished blocks are not calibrated again"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_conversion_goes_on_after_its_last_piece(
    checkpoint: Path,
    tmp_path: Path,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To float16, where nothing is calibrated."""
    how = {"precision": "fp16", "components": ("vision", "text_embed")}
    compiler.export(replace(options(checkpoint, tmp_path / "whole"), **how))
    whole = contents(tmp_path / "whole")
    monkeypatch.setattr(weights_step, "PIECE_NBYTES", len(whole["weights.safetensors"]) // 4)
    with dying_after(after) as pieces:
        compiler.export(replace(options(checkpoint, tmp_path / "out"), **how))
    noted = [name for _, entry, _ in pieces for name in entry["weights"]]
    assert not (tmp_path / "out").exists()
    read, run = list[str](), weights_step.read_tensor
    monkeypatch.setattr(
        weights_step, "read_tensor", lambda plan, name: read.append(name) or run(plan, name)
    )
    with caplog.at_level(logging.WARNING):
        compiler.export(replace(options(checkpoint, tmp_path / "out"), **how))
    total = len(noted) + len(read)
    assert f"{len(noted)} of {total} tensors that an earlier run wrote are taken up" in caplog.text
    assert noted and read
    assert not set(noted) & set(read), "what is durable is not converted again"
    assert contents(tmp_path / "out") == whole
    assert not list(tmp_path.glob(".*"))


def test_a_piece_of_a_changed_checkpoint_is_not_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_step, "PIECE_NBYTES", 1)
    run = weights_step.read_tensor

    def touch(plan: Any, name: str) -> Any:
        os.utime(plan.checkpoint.shards[0], (0, 0))
        return run(plan, name)

    monkeypatch.setattr(weights_step, "read_tensor", touch)
    with pytest.raises(CheckpointError, match="changed"):
        compiler.export(replace(options(checkpoint, tmp_path / "out"), precision="fp16"))
    assert not list(tmp_path.glob(".out*"))


def test_the_journal_is_the_first_to_go(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work whose removal is cut short must not speak of what is not there any more."""
    with pytest.raises(Killed), workspace(out, lambda: KEY_A, Budget(0)) as work:
        work.finish("a", {"weights": {}}, {})
        raise Killed

    def cut_short(path: Path, **_: Any) -> None:
        assert not (path / JOURNAL).exists()
        raise OSError("cut short")

    monkeypatch.setattr(workspace_module.shutil, "rmtree", cut_short)
    with workspace(out, lambda: KEY_A, Budget(0)) as work:
        assert work.num_done == 1
    with workspace(out, lambda: KEY_A, Budget(0)) as work:
        assert work.num_done == 0


@pytest.mark.parametrize(("entry", "is_kept"), [({}, False), ({"activations": {}}, True)])
def test_a_conversion_that_failed_to_verify_is_not_kept(
    out: Path, entry: dict[str, Any], is_kept: bool
) -> None:
    """It would fail again; blocks that took minutes to calibrate may be looked at without."""
    with (
        pytest.raises(VerificationError),
        workspace(out, lambda: KEY_A, Budget(0)) as work,
    ):
        work.finish("a", {"weights": {}, **entry}, {})
        raise VerificationError("wrong")
    assert out.with_name(".out.work").exists() == is_kept


def test_where_a_file_has_one_name_only_it_is_moved(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    out.mkdir()
    monkeypatch.setattr(os, "link", no_links)
    with workspace(out.with_name("new"), lambda: KEY_A, Budget(0)) as work:
        (work.path / "w").write_bytes(b"weights")
        work.finish("a", {"weights": {}}, {})
        work.hand_over("w", out)
        assert work.num_done == 0
        assert not (work.path / "w").exists()
    assert (out / "w").read_bytes() == b"weights"


KILLED_BY_ITSELF = """
import os, signal, sys
from internvl_edge.artifact.workspace import Workspace
finish = Workspace.finish
def finish_and_die(self, *args):
    finish(self, *args)
    if self.num_done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Workspace.finish = finish_and_die
from internvl_edge.cli import main
main()
"""


def test_kill_9(checkpoint: Path, tmp_path: Path) -> None:
    def command(out: str) -> list[str]:
        return ["export", str(checkpoint), "-o", str(tmp_path / out), "-p", "int8",
                "--components", "image_queries", "--verify", "none"]  # fmt: skip

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    dead = subprocess.run(
        [sys.executable, "-c", KILLED_BY_ITSELF, *command("out")], env=environment, check=False
    )
    assert dead.returncode == -9
    assert (tmp_path / ".out.work" / JOURNAL).read_text().count("\n") == 2
    for out in ("out", "whole"):
        subprocess.run(
            [sys.executable, "-m", "internvl_edge", *command(out)], env=environment, check=True
        )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_stale_work_of_an_edited_checkpoint(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same names, shapes and sizes, and one value that differs."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="memory-budget"):
        patch.setattr(cost, "peak_rss_nbytes", lambda: 10**12)
        compiler.export(options(checkpoint, out, memory_budget=10**11))
    before = json.loads((tmp_path / ".out.work" / KEY).read_text())

    shard = next(
        path
        for path in checkpoint.glob("*.safetensors")
        if "query_tokens" in safetensors.numpy.load_file(path)
    )
    tensors = safetensors.numpy.load_file(shard)
    tensors["query_tokens"].reshape(-1)[0] += 1
    safetensors.numpy.save_file(tensors, shard)
    finished: list[int] = []
    opened = Workspace.__init__

    def watch(self: Workspace, *args: Any) -> None:
        opened(self, *args)
        finished.append(self.num_done)
        assert json.loads((self.path / KEY).read_text()) != before

    monkeypatch.setattr(Workspace, "__init__", watch)
    compiler.export(options(checkpoint, out))
    assert finished == [0]


def change_while_calibrating(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, block: str
) -> dict[Path, bytes]:
    """Rewrite the shards when a block was calibrated on them; what they were."""
    original = {path: path.read_bytes() for path in checkpoint.glob("*.safetensors")}
    run = calibration_step.calibrate_block

    def calibrate(current: Any, *args: Any) -> Any:
        if current.name.endswith(block):
            for path, data in original.items():
                path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        return run(current, *args)

    monkeypatch.setattr(calibration_step, "calibrate_block", calibrate)
    return original


def test_blocks_of_a_changed_checkpoint_are_not_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        original = change_while_calibrating(patch, checkpoint, ".1")
        with pytest.raises(CheckpointError, match="changed while it was read"):
            compiler.export(options(checkpoint, tmp_path / "out"))
    journal = tmp_path / ".out.work" / JOURNAL
    assert journal.read_text().count("\n") == 1, "the block before it is as it was"
    for path, data in original.items():
        path.write_bytes(data)
    compiler.export(options(checkpoint, tmp_path / "out"))
    compiler.export(options(checkpoint, tmp_path / "clean"))
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")


def test_killed_between_publishing_and_cleaning_up(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.work"
    with monkeypatch.context() as patch:
        patch.setattr(workspace_module.shutil, "rmtree", lambda *_, **__: None)
        compiler.export(options(checkpoint, out))
    assert (work / "weights.safetensors").exists()
    with pytest.raises(UsageError, match="exists"):
        compiler.export(options(checkpoint, out))
    assert not work.exists()


def test_budget_does_not_count_who_started_us() -> None:
    """``ru_maxrss`` begins at the size of the process that forked us."""
    child = """
from internvl_edge.compiler.cost import require_within_budget
import resource
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 900_000
require_within_budget(900_000_000, 1, 1)
"""
    ballast = np.ones(1_000_000_000, np.uint8)
    subprocess.run([sys.executable, "-c", child], check=True, close_fds=False)
    assert ballast[-1]


def test_budget_binds_verification(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "peak_rss_nbytes", lambda: 10**12)
    chosen = ExportOptions(
        checkpoint=checkpoint, out=tmp_path / "out", components=("vision",), memory_budget=10**11
    )
    with pytest.raises(ResourceError, match="after 1 of 1 graphs verified; raise the budget"):
        compiler.export(chosen)
    assert not (tmp_path / "out").exists()


def test_disk_full_in_the_middle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write = calibration_step.write_block

    def full(writer: Any, block: Any) -> list[str]:
        if any(".1." in name for name in block.weights):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(writer, block)

    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="No space left"):
        patch.setattr(calibration_step, "write_block", full)
        compiler.export(options(checkpoint, out))
    assert (tmp_path / ".out.work" / JOURNAL).read_text().count("\n") == 1
    compiler.export(options(checkpoint, out))


def test_budget_too_small_is_said_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"step .* needs .* GB .* allowed by --memory-budget"):
        compiler.export(options(checkpoint, tmp_path / "out", memory_budget=1000))
    assert not (tmp_path / "out").exists()


def test_what_was_kept_is_what_lies_on_the_disk(tmp_path: Path) -> None:
    """The weights file has its full size before anything is written into it."""
    assert kept_nbytes(tmp_path / "out") == 0
    work = tmp_path / ".out.work"
    work.mkdir()
    with open(work / "weights.safetensors", "wb") as file:
        file.truncate(1 << 30)
    assert kept_nbytes(tmp_path / "out") < 1 << 20
    (work / "states").write_bytes(bytes(3_000_000))
    assert kept_nbytes(tmp_path / "out") >= 3_000_000


# --- what is not taken up ------------------------------------------------------------------------


def finished(out: Path, blocks: int = 2) -> Path:
    """Work of a run that failed, with a weights file; its directory."""
    values = np.arange(6, dtype=np.float32)
    with (
        pytest.raises(ResourceError),
        workspace(out, lambda: KEY_A, Budget(0)) as work,
    ):
        safetensors.numpy.save_file({"w": values}, work.path / "weights.safetensors")
        for i in range(blocks):
            hidden = work.hidden("image")
            hidden.append(np.full((2, 2), i, np.float32))
            entry = {"weights": {"w": hashlib.sha256(values.tobytes()).hexdigest()}}
            work.finish(f"block {i}", entry, {"image": hidden})
        raise ResourceError("the disk is full")
    return out.with_name(f".{out.name}.work")


def num_taken_up(out: Path) -> int:
    with pytest.raises(ResourceError), workspace(out, lambda: KEY_A, Budget(0)) as work:
        count = work.num_done
        raise ResourceError("again")
    return count


def test_sound_work_is_taken_up(out: Path) -> None:
    finished(out)
    assert num_taken_up(out) == 2


def lose_pages(work: Path) -> None:
    with (work / "weights.safetensors").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))


def cut_weights_off(work: Path) -> None:
    os.truncate(work / "weights.safetensors", 20)


def remove_weights(work: Path) -> None:
    (work / "weights.safetensors").unlink()


def lose_states(work: Path) -> None:
    path = sorted((work / "states").iterdir())[-1]
    path.write_bytes(bytes(path.stat().st_size))


def no_hash(work: Path) -> None:
    lines = [json.loads(line) for line in (work / JOURNAL).read_text().splitlines()]
    for line in lines:
        line["weights"] = list(line["weights"])
    (work / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))


def no_journal(work: Path) -> None:
    (work / JOURNAL).write_bytes(b"[]\n")


def a_link(work: Path) -> None:
    (work / "weights.safetensors").rename(work.with_name("elsewhere"))
    (work / "weights.safetensors").symlink_to("../elsewhere")


def a_linked_state(work: Path) -> None:
    path = sorted((work / "states").iterdir())[-1]
    path.rename(work.with_name("elsewhere"))
    path.symlink_to("../../elsewhere")


def a_pipe(work: Path) -> None:
    os.mkfifo(work / "engines" / "x.plan")


@pytest.mark.parametrize(
    "damage",
    [
        lose_pages,
        cut_weights_off,
        remove_weights,
        lose_states,
        no_hash,
        no_journal,
        a_link,
        a_linked_state,
        a_pipe,
    ],
    ids=lambda damage: damage.__name__,
)
def test_damaged_work_is_dropped_and_said(
    out: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    damage(finished(out))
    with caplog.at_level(logging.WARNING):
        assert num_taken_up(out) == 0
    assert "is damaged, and dropped" in caplog.text


def test_work_that_others_could_write_to_is_dropped(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = finished(out)
    assert work.stat().st_mode & 0o777 == 0o700
    work.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert num_taken_up(out) == 0
    assert "was open to others" in caplog.text


def test_work_of_another_user_is_refused(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(out)
    monkeypatch.setattr(workspace_module.os, "geteuid", lambda: os.getuid() + 1)
    with (
        pytest.raises(UsageError, match="belongs to another user"),
        workspace(out, lambda: KEY_A, Budget(0)),
    ):
        pass


def test_a_link_in_place_of_the_directory_is_refused(out: Path) -> None:
    finished(out).rename(out.with_name("elsewhere"))
    out.with_name(".out.work").symlink_to("elsewhere")
    with pytest.raises(UsageError), workspace(out, lambda: KEY_A, Budget(0)):
        pass
    assert (out.with_name("elsewhere") / JOURNAL).exists()
