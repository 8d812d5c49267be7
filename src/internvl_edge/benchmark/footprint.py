"""The memory that one component takes: of a process of its own, so that it is nobody else's.

    peak_rss_bytes     the most that the process had resident, files it maps included
    before_rss_bytes   what it had before it opened the component: Python and this package
    gpu_bytes          how much less the GPU had free after opening and one call than before

The CUDA context is not in the last, and what others took on the same GPU meanwhile is. It is None
where there is no GPU or the CUDA bindings are not installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from internvl_edge.artifact.open import open_artifact
from internvl_edge.benchmark.inputs import as_taken, seeded_feeds
from internvl_edge.errors import InternVLError
from internvl_edge.files.memory import peak_rss_nbytes, rss_nbytes
from internvl_edge.runtime.gpu.device import Device
from internvl_edge.runtime.gpu.probe import gpu_count
from internvl_edge.runtime.session import open_component

__all__ = ["measure_footprint"]

START = "from internvl_edge.benchmark.footprint import main; main()"


def measure_footprint(out: str, component: str, backend: str, batch: int) -> dict[str, Any]:
    """The memory of opening a component and running it once, in a new process.

    Args:
        out: the directory.
        component: a name in its manifest.
        backend: what runs it.
        batch: of the call.

    Returns:
        The figures above, or why there are none: ``{"failed": …}``.
    """
    command = [sys.executable, "-c", START, out, component, backend, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": told[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """The new process: its arguments as a command's, its figures on stdout."""
    out, component, backend, batch = sys.argv[1:]
    artifact = open_artifact(out)
    feeds = seeded_feeds(artifact, component, int(batch))
    gpu = _gpu()
    before_rss, before_gpu = rss_nbytes(), _free_nbytes(gpu)
    with open_component(artifact, component, backend) as session:
        session.run(as_taken(feeds, session.inputs))
        after_gpu = _free_nbytes(gpu)
    found = {
        "peak_rss_bytes": peak_rss_nbytes(),
        "before_rss_bytes": before_rss,
        "gpu_bytes": None if before_gpu is None or after_gpu is None else before_gpu - after_gpu,
    }
    sys.stdout.write(json.dumps(found) + "\n")


def _gpu() -> Device | None:
    """The first GPU, where there is one and what counts its memory."""
    if gpu_count() == 0:
        return None
    try:
        return Device(0)
    except InternVLError:
        return None


def _free_nbytes(gpu: Device | None) -> int | None:
    return None if gpu is None else gpu.free_nbytes()
