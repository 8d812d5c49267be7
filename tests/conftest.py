"""What every test may use: the golden data, and an environment left as it was found."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path

worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and hasattr(os, "sched_setaffinity"):  # before the libraries count the cores
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image
from support.golden import SETS, WHOLE, unpack
from torch import nn

from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.steps import graphs
from internvl_edge.export.config.checkpoint import CheckpointConfig


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session", params=SETS)
def golden(request: pytest.FixtureRequest, unpacked: Path) -> Path:
    """The reference outputs of the original implementation."""
    return unpacked if request.param == "small" else WHOLE


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures to calibrate on."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def cloned(model: ir.Model) -> ir.Model:
    """A clone that shares no types and shapes, which passes change in place."""
    clone = model.clone()
    graph = clone.graph
    outputs = [value for node in graph.all_nodes() for value in node.outputs]
    for value in (*graph.inputs, *graph.initializers.values(), *outputs):
        value.type = copy.copy(value.type)
        value.shape = copy.deepcopy(value.shape)
    return clone


@pytest.fixture(scope="session", autouse=True)
def _traced_once() -> Iterator[None]:
    """Trace a component of one configuration and dtype once: most of a tiny export's time.

    What a trace is made of stands in the key, and every export works on a clone of its own.
    """
    kept: dict[str, ir.Model] = {}
    trace = graphs._trace

    def traced_once(plan: Plan, name: str, config: CheckpointConfig, model: nn.Module) -> ir.Model:
        dtypes = [(key, value.dtype) for key, value in model.state_dict().items()]
        key = repr((name, config, plan.image_size, plan.options.cache_capacity, dtypes))
        if key not in kept:
            kept[key] = trace(plan, name, config, model)
        return cloned(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_trace", traced_once)
        yield


@pytest.fixture(autouse=True)
def _restore_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
