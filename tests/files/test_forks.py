"""What a forked child must leave alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.tiny_onnx import publish_linear

import internvl_edge
from internvl_edge.errors import UsageError
from internvl_edge.files import forks
from internvl_edge.runtime.model import Model

X = np.eye(4, dtype=np.float32)


def status_of_child(work: Callable[[], object]) -> int:
    """Run a function in a forked child that leaves as Python programs do; 14: it hung."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def model(tmp_path: Path) -> Model:
    out = publish_linear(tmp_path / "out", components=("vision", "matcher"))
    model = internvl_edge.load(out, options=internvl_edge.OrtOptions(num_threads=2))
    model.session("vision").run({"x": X})
    return model


def test_an_object_that_lives_at_a_fork_is_never_destroyed_in_the_child() -> None:
    class Native:
        destroyed = False

        def __del__(self) -> None:
            Native.destroyed = True

    native = Native()
    forks.never_destroyed_in_children(native)

    def child() -> None:
        nonlocal native
        del native
        assert not Native.destroyed

    assert status_of_child(child) == 0
    del native
    assert Native.destroyed


@pytest.mark.parametrize("fate", ["close", "del", "leave"])
def test_a_child_closes_deletes_and_leaves_at_once(model: Model, fate: str) -> None:
    def child() -> None:
        nonlocal model
        if fate == "close":
            model.close()
        if fate == "del":
            del model

    assert status_of_child(child) == 0
    np.testing.assert_allclose(model.session("vision").run({"x": X})["total"], X.sum(1))
    model.close()


def test_in_a_child_a_session_says_what_to_do(model: Model) -> None:
    def child() -> None:
        with pytest.raises(UsageError, match="load the model in each worker"):
            model.session("vision").run({"x": X})

    assert status_of_child(child) == 0
    model.close()


def test_what_was_not_open_opens_in_a_child(model: Model) -> None:
    def child() -> None:
        session = model.session("matcher")
        np.testing.assert_allclose(session.run({"x": X})["total"], X.sum(1))
        session.close()

    assert status_of_child(child) == 0
    model.close()


def test_a_lock_that_another_thread_held_stops_no_child(model: Model) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with model.components._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    status = status_of_child(lambda: model.close())
    done.set()
    thread.join()
    assert status == 0
    model.close()


INTERPRETER = """
import os, signal, sys, numpy as np, internvl_edge
model = internvl_edge.load(sys.argv[1], options=internvl_edge.OrtOptions(num_threads=2))
x = np.zeros((64, 4), np.float32)
model.session("vision").run({"x": x}); model.session("matcher").run({"x": x})
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    sys.exit(0)
status = os.waitpid(pid, 0)[1]
sys.exit(status)
"""


def test_an_interpreter_that_was_forked_ends(tmp_path: Path) -> None:
    out = publish_linear(tmp_path / "out", components=("vision", "matcher"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETER, str(out)], env=environment, check=False, timeout=60
    )
    assert done.returncode == 0


def threads_after_each(tmp_path: Path, *, shared: bool) -> list[int]:
    """The threads of a process after each of its sessions, in a process of its own."""
    names = ("vision", "matcher", "image_pool", "text_embed")
    out = publish_linear(tmp_path / "out", components=names)
    count = """
import os, sys, internvl_edge
from internvl_edge.runtime.session import open_component
from internvl_edge.artifact.open import open_artifact
artifact = open_artifact(sys.argv[1])
if sys.argv[2] == "shared":
    internvl_edge.share_threads()
opened = []
for name in sys.argv[3:]:
    opened.append(open_component(artifact, name))
    print(len(os.listdir("/proc/self/task")))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "5"}
    how = "shared" if shared else "own"
    done = subprocess.run(
        [sys.executable, "-c", count, str(out), how, *names],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return [int(line) for line in done.stdout.split()]


def test_sessions_share_the_threads_of_a_process_that_says_so(tmp_path: Path) -> None:
    counts = threads_after_each(tmp_path, shared=True)
    assert len(set(counts)) == 1
    assert counts[0] >= 5


@pytest.mark.slow
def test_sessions_have_threads_of_their_own_elsewhere(tmp_path: Path) -> None:
    counts = threads_after_each(tmp_path, shared=False)
    assert [b - a for a, b in pairwise(counts)] == [4, 4, 4]  # the caller's thread computes too
