"""What ``benchmark --against`` times beside a compiled directory: other ways to the same job."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.cli.compile import require_export
from internvl_edge.errors import MissingDependency, UsageError

__all__ = ["AGAINST", "Contender", "contender_of"]

AGAINST = ("pytorch", "torch-compile", "openvino")

Feeds = Mapping[str, np.ndarray[Any, Any]]
Contender = Callable[[str, Feeds], Callable[[], object]]  # component, feeds → what to time


def contender_of(name: str, checkpoint: Path | None, artifacts: Mapping[str, Any]) -> Contender:
    """A way to run components, on as many threads as this process has cores.

    Args:
        name: one of ``AGAINST``.
        checkpoint: what PyTorch runs; None is the demo.
        artifacts: the directories that it is timed beside; OpenVINO reads the first one's graphs.

    Raises:
        MissingDependency: its package is not installed.
        UsageError: the directories were not made from the checkpoint.
    """
    if name == "openvino":
        return _openvino(next(iter(artifacts.values())))
    return _pytorch(checkpoint, artifacts, compiled=name == "torch-compile")


def _openvino(artifact: Any) -> Contender:
    if importlib.util.find_spec("openvino") is None:
        raise MissingDependency("openvino is not installed; run: pip install openvino")
    import openvino

    core = openvino.Core()
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": _cores()}

    def contender(component: str, feeds: Feeds) -> Callable[[], object]:
        compiled = core.compile_model(str(artifact.onnx_path(component)), "CPU", options)
        local = threading.local()  # a request runs one call at a time

        def run() -> object:
            if not hasattr(local, "request"):
                local.request = compiled.create_infer_request()
            return local.request.infer(dict(feeds))

        return run

    return contender


def _pytorch(checkpoint: Path | None, artifacts: Mapping[str, Any], *, compiled: bool) -> Contender:
    """PyTorch in float32, eager or compiled."""
    require_export()
    import torch

    from internvl_edge.compiler.options import demo_checkpoint
    from internvl_edge.export.checkpoint import (
        header_fingerprint,
        load_reference,
        open_checkpoint,
    )
    from internvl_edge.export.components import COMPONENTS, build_component

    source = checkpoint or demo_checkpoint()
    shards = {path.name: header_fingerprint(path) for path in open_checkpoint(source).shards}
    for label, artifact in artifacts.items():
        if artifact.manifest.source["files"] != shards:
            raise UsageError(
                f"{label} was not made from {source}; name its checkpoint with --checkpoint"
            )
    torch.set_num_threads(_cores())
    model = load_reference(source)

    def contender(component: str, feeds: Feeds) -> Callable[[], object]:
        module: Any = build_component(COMPONENTS[component], model)
        if compiled:
            module = torch.compile(module)
        # the reference takes normalised values
        floats = {n: v.astype(np.float32) if v.dtype == np.uint8 else v for n, v in feeds.items()}
        tensors = [torch.from_numpy(values) for values in floats.values()]

        def run() -> object:
            with torch.inference_mode():
                return module(*tensors)

        return run

    return contender


def _cores() -> int:
    return len(os.sched_getaffinity(0))
