"""How much of a machine a component uses: its work, compared with the peaks of its runtime here.

    MFU = Σ operationsₖ / peakₖ / t        k: what products are computed in
    MBU = bytes / bandwidth / t

t is the median latency of a call; the larger of the two says what bounds it, and what is missing
to 1 is lost to everything else. Both numerators are of ``workload``, the peaks of ``peaks``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl_edge.artifact import Artifact
from internvl_edge.benchmark.limits.peaks import Peaks
from internvl_edge.benchmark.limits.workload import Workload, read_workload
from internvl_edge.compiler.steps.graph_files import graph_file
from internvl_edge.runtime.session import runs_engines

__all__ = ["Roofline", "component_workload", "locate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A component, compared with the peaks."""

    operations: int  # of a call
    bytes: int
    intensity: float  # operations per byte
    mfu: float | None  # None: the peak of a type that it computes in is not known
    mbu: float

    @property
    def share(self) -> float:
        """The share that it reaches of what bounds it."""
        return max(self.mfu or 0.0, self.mbu)


def component_workload(
    artifact: Artifact, component: str, feeds: Mapping[str, Any], backend: str
) -> Workload:
    """Read the work of a call from the graph that a backend runs.

    Args:
        artifact: the directory.
        component: a name in its manifest.
        feeds: arrays of the call's shapes.
        backend: that opens the published graph, or runs engines.
    """
    path = artifact.onnx_path(component)
    if runs_engines(backend):
        path = artifact.file(graph_file(artifact.manifest, component))
    return read_workload(path, {name: array.shape for name, array in feeds.items()})


def locate(workload: Workload, peaks: Peaks, latency_ms: float) -> Roofline:
    """Place a component under the roofline.

    Args:
        workload: of a call.
        peaks: of the machine.
        latency_ms: of a call.
    """
    seconds = latency_ms / 1e3
    mfu = None
    if workload.operations.keys() <= peaks.operations.keys():
        ideal_s = sum(n / peaks.operations[kind] for kind, n in workload.operations.items())
        mfu = ideal_s / seconds
    return Roofline(
        operations=sum(workload.operations.values()),
        bytes=workload.nbytes,
        intensity=workload.intensity,
        mfu=mfu,
        mbu=workload.nbytes / peaks.bytes / seconds,
    )
