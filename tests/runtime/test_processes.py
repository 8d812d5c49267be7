"""Models in processes and threads: sent to another process, and idle between two runs."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_onnx import open_directory, publish_linear

import internvl_edge
from internvl_edge.errors import ArtifactError, UsageError
from internvl_edge.runtime.model import Model
from internvl_edge.types import Array

X = np.eye(4, dtype=np.float32)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return publish_linear(tmp_path / "out")


def run(model: Model) -> Array:
    return model.session("vision").run({"x": X})["y"]


def test_a_pickled_model_is_its_path_and_options(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(out.parent)
    options = internvl_edge.OrtOptions(num_threads=1)
    with internvl_edge.load("out", device="cpu", options=options) as model:
        expected = run(model)
        data = pickle.dumps(model)
    assert len(data) < 1000
    monkeypatch.chdir("/")
    with pickle.loads(data) as again:
        assert again.artifact.path == out
        np.testing.assert_array_equal(run(again), expected)


def test_a_spawned_worker_computes_the_same(out: Path) -> None:
    with (
        internvl_edge.load(out) as model,
        multiprocessing.get_context("spawn").Pool(1) as pool,
    ):
        np.testing.assert_array_equal(pool.apply(run, (model,)), run(model))


def test_a_model_of_another_directory_is_not_opened_there(out: Path, tmp_path: Path) -> None:
    data = pickle.dumps(internvl_edge.load(out))
    shutil.rmtree(out)
    publish_linear(out, seed=1)
    with pytest.raises(ArtifactError, match="changed since it was opened: its manifest"):
        pickle.loads(data)


def test_a_model_that_load_did_not_open_says_so(tmp_path: Path) -> None:
    def open_one(component: str) -> Any:
        raise AssertionError

    model = Model(open_directory(tmp_path, ["vision"]), open_one)
    with pytest.raises(UsageError, match="was not opened by load"):
        pickle.dumps(model)


def test_threads_sleep_between_two_runs(out: Path) -> None:
    """Else the pools of all components take the cores from the one that computes: 10-30 ms each."""
    options = internvl_edge.OrtOptions(num_threads=3)
    idle_s = 0.0
    with internvl_edge.load(out, device="cpu", options=options) as model:
        for _ in range(5):
            run(model)
            began = time.process_time()
            time.sleep(0.05)
            idle_s += time.process_time() - began
    assert idle_s < 0.01


@pytest.mark.parametrize("count", [0, -1, 1.0, "2", True, 10**6])
def test_a_number_of_threads_that_is_none(count: Any) -> None:
    with pytest.raises(UsageError, match=r"num_threads .*: expected a whole number from 1 to 1024"):
        internvl_edge.OrtOptions(num_threads=count)


@pytest.mark.parametrize("options", [{"num_threads": 1}, 4, internvl_edge.TrtOptions()])
def test_options_of_another_kind_are_refused_when_the_model_is_loaded(
    out: Path, options: Any
) -> None:
    with pytest.raises(UsageError, match=r"onnxruntime: options: expected OrtOptions"):
        internvl_edge.load(out, options=options)
