"""Other ways to the same job, which ``benchmark --against`` times with a compiled directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.errors import HardwareError, UsageError
from internvl_edge.export import require_packages
from internvl_edge.files.cores import default_threads
from internvl_edge.types import Array, Feeds

__all__ = ["AGAINST", "Contender", "contender_of"]

AGAINST = ("pytorch", "torch-compile", "openvino")

Contender = Callable[[str], Callable[[Feeds], object]]  # component → what runs it


def contender_of(
    name: str,
    checkpoint: Path | None,
    artifacts: Mapping[str, Any],
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> Contender:
    """Open a way to run components from host arrays, on as many threads as there are cores.

    Args:
        name: one of ``AGAINST``.
        checkpoint: what PyTorch runs; None is the demo.
        artifacts: the directories that it is timed with; OpenVINO reads the first one's graphs.
        device: ``"cpu"`` or ``"cuda"``, of PyTorch; its outputs come back to the host.
        dtype: of PyTorch's weights and floats.

    Raises:
        MissingDependency: its package is not installed.
        HardwareError: PyTorch sees no GPU.
        UsageError: the directories were not made from the checkpoint.
    """
    if name == "openvino":
        return _openvino(next(iter(artifacts.values())))
    model = _reference(checkpoint, artifacts, device, dtype)
    return _pytorch(model, device, dtype, compiled=name == "torch-compile")


def _openvino(artifact: Any) -> Contender:
    from internvl_edge.runtime.openvino.session import OpenVinoSession, fastest_dtype

    def contender(component: str) -> Callable[[Feeds], object]:
        # with a request for each call, as a session has it: some 50 µs
        path, record = artifact.onnx_path(component), artifact.manifest.components[component]
        session = OpenVinoSession(path, path, record.inputs, record.outputs, dtype=fastest_dtype())
        return partial(session.run, check=False)

    return contender


def _reference(
    checkpoint: Path | None, artifacts: Mapping[str, Any], device: str, dtype: str
) -> Any:
    """Load the checkpoint that the directories were made from, in PyTorch."""
    require_packages()
    import torch

    from internvl_edge.compiler.plan import demo_checkpoint
    from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
    from internvl_edge.export.checkpoint.load import load_reference
    from internvl_edge.export.checkpoint.shards import source_files

    if device == "cuda" and not torch.cuda.is_available():
        raise HardwareError(
            f"PyTorch {torch.__version__} sees no GPU, and the directories run on one; install a "
            "build of it with CUDA, or time on the CPU"
        )
    source = checkpoint or demo_checkpoint()
    shards = source_files(open_checkpoint(source).shards)
    for label, artifact in artifacts.items():
        if artifact.manifest.source["files"] != shards:
            raise UsageError(
                f"{label} was not made from {source}; name its checkpoint with --checkpoint"
            )
    torch.set_num_threads(default_threads())
    return load_reference(source, getattr(torch, dtype)).to(device)


def _pytorch(model: Any, device: str, dtype: str, *, compiled: bool) -> Contender:
    """Run components in PyTorch, eager or compiled."""
    import torch

    from internvl_edge.artifact.components import COMPONENTS
    from internvl_edge.export.checkpoint.load import torch_from_numpy
    from internvl_edge.export.components import build_component

    floats = getattr(torch, dtype)

    def tensor(values: Array) -> Any:
        # the reference takes normalised floats, whatever the graph does
        moved = torch_from_numpy(values).to(device)
        return moved.to(floats) if moved.is_floating_point() or values.dtype == np.uint8 else moved

    def contender(component: str) -> Callable[[Feeds], object]:
        module: Any = build_component(COMPONENTS[component], model)
        if compiled:  # with CUDA graphs on a GPU, where queueing kernels one by one takes longer
            module = torch.compile(module, mode="reduce-overhead" if device == "cuda" else None)

        def run(feeds: Feeds) -> object:
            with torch.inference_mode():
                out = module(*map(tensor, feeds.values()))
                return [each.cpu() for each in out] if isinstance(out, tuple) else out.cpu()

        return run

    return contender
