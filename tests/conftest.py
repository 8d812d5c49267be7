"""What every test may use: the golden data, and an environment left as it was found."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and hasattr(os, "sched_setaffinity"):  # before the libraries count the cores
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
from PIL import Image
from support.golden import FAMILY_SETS, SETS, WHOLE, WHOLE_FAMILY, unpack, unpack_family

import internvl_edge  # noqa: F401, before anything imports onnxruntime: telemetry is off


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="session", params=SETS)
def golden(request: pytest.FixtureRequest, unpacked: Path) -> Path:
    """The reference outputs of the original implementation."""
    return unpacked if request.param == "small" else WHOLE


@pytest.fixture(scope="session")
def unpacked_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session", params=FAMILY_SETS)
def family(request: pytest.FixtureRequest, unpacked_family: Path) -> Path:
    """Tiny models of every kind of the chat family, with what transformers computed."""
    return unpacked_family if request.param == "small" else WHOLE_FAMILY


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures to calibrate on."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled directory of an InternVL with every component and a tokenizer."""
    from support.checkpoints import write_internvl, write_tokenizer

    from internvl_edge.compiler import ExportOptions, export

    root = tmp_path_factory.mktemp("compiled")
    written = write_internvl(root / "checkpoint", seed=3)
    write_tokenizer(written.path)
    export(ExportOptions(checkpoint=written.path, out=root / "tiny", verify="none"))
    return root / "tiny"


@pytest.fixture(scope="session")
def compiled_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled directory of an InternVL-Chat."""
    from support.checkpoints import write_chat, write_chat_tokenizer

    from internvl_edge.compiler import ExportOptions, export

    root = tmp_path_factory.mktemp("compiled-chat")
    write_chat(root / "checkpoint", seed=3)
    write_chat_tokenizer(root / "checkpoint")
    export(ExportOptions(checkpoint=root / "checkpoint", out=root / "talk", verify="none"))
    return root / "talk"


@pytest.fixture(scope="session", autouse=True)
def _traces_are_shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Trace each graph once in a run, whichever worker needs it; where tests import the tracer."""
    if "internvl_edge.compiler.steps.trace" in sys.modules:
        from support.runs.traces import SharedTraces

        from internvl_edge.compiler.steps import trace

        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if worker else base) / "traces"
        folder.mkdir(exist_ok=True)
        trace._kept = SharedTraces(folder)


@pytest.fixture(autouse=True)
def _restore_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
