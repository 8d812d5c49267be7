"""A step of an export, and what flows from one to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from internvl_edge.artifact import Manifest, TensorSpec
from internvl_edge.compiler.cost import Cost
from internvl_edge.compiler.progress import Report
from internvl_edge.errors import InternVLError

if TYPE_CHECKING:
    import onnx_ir as ir

    from internvl_edge.artifact.workspace import Workspace
    from internvl_edge.compiler.plan import Plan
    from internvl_edge.export.towers.streams import Samples
    from internvl_edge.export.weights.link import Brought
    from internvl_edge.export.weights.writer import StoredTensor
    from internvl_edge.quantize.calibration.images import CalibrationSet


class Step(Protocol):
    """One step: a frozen object that says what it will cost, and does it."""

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        """State what the step needs: the forecast's rows, none where it is too little for one."""
        ...

    def run(self, plan: Plan, build: Build) -> None:
        """Take what earlier steps left in ``build``, and leave there what later ones need."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """A component's graph on disk."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nbytes: int  # of weights that it reads


@dataclass(slots=True, kw_only=True)
class Build:
    """An export under way: where it is written, and what its steps have left so far."""

    directory: Path  # what will be published
    work: Workspace
    report: Report
    calibration: CalibrationSet | None  # None: nothing is quantized
    samples: Samples | None  # the same, as the towers take it
    models: dict[str, ir.Model] = field(default_factory=dict)  # component → graph without weights
    stored: dict[str, StoredTensor] = field(default_factory=dict)  # where every parameter lies
    brought: dict[str, Brought] = field(default_factory=dict)  # the checkpoint's own shards
    scales: dict[str, dict[str, float | None]] = field(default_factory=dict)  # by stream, weight
    graphs: dict[str, Emitted] = field(default_factory=dict)  # component → graph on disk
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)  # of verification
    manifest: Manifest | None = None
    failure: InternVLError | None = None  # of an engine: what is compiled is published all the same
