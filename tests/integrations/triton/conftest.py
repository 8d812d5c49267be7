"""The models as Triton calls them, with a stand-in for the module that Triton brings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.web.triton import backend_utils
from support.web.triton.configs import as_json, config_of

import internvl_edge
from internvl_edge.integrations.triton.options import RepositoryOptions
from internvl_edge.integrations.triton.repository import write_repository
from internvl_edge.runtime.model import Model

# What imports Triton's module, and would keep the stand-in.
WITHIN = ("models", "requests", "bridge")


@pytest.fixture(scope="session")
def pb_utils() -> Iterator[Any]:
    sys.modules["triton_python_backend_utils"] = backend_utils
    yield backend_utils
    for name in (
        "triton_python_backend_utils",
        *map("internvl_edge.integrations.triton.{}".format, WITHIN),
    ):
        sys.modules.pop(name, None)


Started = Callable[..., Any]


@pytest.fixture
def started(tmp_path: Path, pb_utils: Any) -> Iterator[Started]:
    """Make a model of Triton from its folder in a repository, as Triton does."""
    opened = []

    def start(out: Path, name: str, *, repo: Path | None = None, **how: Any) -> Any:
        place = tmp_path / "repo" if repo is None else repo
        if not place.exists():
            write_repository(RepositoryOptions(out=out, repo=place, **how))
        source = (place / name / "1" / "model.py").read_text()
        namespace: dict[str, Any] = {}
        exec(compile(source, "model.py", "exec"), namespace)
        model = namespace["TritonPythonModel"]()
        model.initialize(
            {
                "model_config": as_json(config_of(place / name)),
                "model_instance_kind": "CPU",
                "model_instance_device_id": "0",
                "model_repository": str(place / name),
                "model_version": "1",
                "model_name": name,
            }
        )
        opened.append(model)
        return model

    yield start
    for model in opened:
        model.finalize()


@pytest.fixture(scope="module")
def direct(compiled: Path) -> Iterator[Model]:
    """The same directory in this process."""
    options = internvl_edge.OrtOptions(num_threads=1, spin=False)
    with internvl_edge.load(compiled, options=options) as model:
        yield model
