"""The memory that one component takes, measured in a process that does nothing else."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from internvl_edge.artifact import open_artifact
from internvl_edge.benchmark.inputs import as_taken, seeded_feeds
from internvl_edge.errors import InternVLError
from internvl_edge.files.helper import run_helper
from internvl_edge.files.memory import peak_rss_nbytes, rss_nbytes
from internvl_edge.runtime.gpu.device import Device
from internvl_edge.runtime.gpu.probe import gpu_count
from internvl_edge.runtime.session import open_component, options_for, runs_engines

__all__ = ["Footprint", "measure_footprint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The memory of a process that opened one component and ran it once; None: not known.

    The CUDA context is not counted on the GPU, and what others took there meanwhile is.
    """

    peak_rss_bytes: int | None = None  # the most that was resident, mapped files included
    before_rss_bytes: int | None = None  # before the component was opened: Python and this package
    gpu_bytes: int | None = None  # how much less the GPU had free after the call than before
    failed: str | None = None  # why there are no figures

    def to_json(self) -> dict[str, Any]:
        """Return the figures, or why there are none."""
        fields = asdict(self)
        failed = fields.pop("failed")
        return fields if failed is None else {"failed": failed}


def measure_footprint(
    out: str,
    component: str,
    backend: str,
    batch: int,
    *,
    device: str = "auto",
    threads: int | None = None,
) -> Footprint:
    """Measure the memory of opening a component and running it once, in a new process.

    Args:
        out: the directory.
        component: a name in its manifest.
        backend: what runs it.
        batch: of the call.
        device: where it runs.
        threads: of ONNX Runtime; None: its default.
    """
    arguments = [out, component, backend, str(batch), device, str(threads or 0)]
    done = run_helper("internvl_edge.benchmark.footprint", arguments)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Footprint(failed=told[-1])
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure in the new process: its arguments are a command's, its figures go to stdout."""
    out, component, backend, batch, device, threads = sys.argv[1:]
    options = None
    if not runs_engines(backend):  # as slow as it was allowed
        options = options_for(backend, int(threads) or None, allow_slow=True)
    artifact = open_artifact(out)
    feeds = seeded_feeds(artifact, component, int(batch))
    gpu = _gpu()
    before_rss, before_gpu = rss_nbytes(), _free_nbytes(gpu)
    with open_component(artifact, component, backend, device, options=options) as session:
        session.run(as_taken(feeds, session.inputs))
        after_gpu = _free_nbytes(gpu)
    gpu_bytes = None if before_gpu is None or after_gpu is None else before_gpu - after_gpu
    footprint = Footprint(
        peak_rss_bytes=peak_rss_nbytes(),
        before_rss_bytes=before_rss,
        gpu_bytes=gpu_bytes,
    )
    sys.stdout.write(json.dumps(footprint.to_json()) + "\n")


def _gpu() -> Device | None:
    """Open the first GPU, where there is one and its memory can be counted."""
    if gpu_count() == 0:
        return None
    try:
        return Device(0)
    except InternVLError:
        return None


def _free_nbytes(gpu: Device | None) -> int | None:
    return None if gpu is None else gpu.free_nbytes()
