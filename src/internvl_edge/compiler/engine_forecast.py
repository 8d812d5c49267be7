"""What steps need: memory, disk and time, and whether this machine has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_edge.errors import ResourceError
from internvl_edge.export.engine.memory import builder_nbytes, joined_nbytes
from internvl_edge.files.disk import require_free_disk
from internvl_edge.files.memory import available_memory

BUILDER_MAPPED_NBYTES = 110_000_000  # its library
BUILD_NBYTES_PER_SECOND = 290e6
JOINED_NBYTES_PER_SECOND = 800e6
BUILD_SECONDS_PER_BLOCK = 0.7
BUILD_SECONDS = 1.0
ENGINE_NBYTES = 7_000_000  # of an engine beside its weights: those of the demo have 5 to 9 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one step will need."""

    name: str
    memory_nbytes: int  # resident, mapped files included: they give way where memory is short
    disk_nbytes: int
    seconds: float
    mapped_nbytes: int = 0  # of the memory
    scratch_nbytes: int = 0  # of disk beside that, until the step ends
    remedy: str = "--dry-run lists every step"  # for who has less

    @property
    def needed_nbytes(self) -> int:
        """Memory that has to be free."""
        return self.memory_nbytes - self.mapped_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """All steps of an export or a build."""

    steps: tuple[Step, ...]

    @property
    def peak_nbytes(self) -> int:
        return max(step.memory_nbytes for step in self.steps)

    @property
    def disk_nbytes(self) -> int:
        written = sum(step.disk_nbytes for step in self.steps)
        return written + max((step.scratch_nbytes for step in self.steps), default=0)

    def require_fit(self, folder: Path, budget: int | None = None, written_nbytes: int = 0) -> None:
        """Refuse, before any work, what this machine or a memory budget cannot hold.

        Args:
            folder: on whose disk all is written; it need not exist yet.
            budget: of memory; None: what is free.
            written_nbytes: of the disk's share, what an earlier run has written.

        Raises:
            ResourceError: the step, what it needs and what there is.
        """
        require_free_disk(folder, max(self.disk_nbytes - written_nbytes, 0))
        worst = max(self.steps, key=lambda step: step.needed_nbytes)
        limit = available_memory() if budget is None else budget
        if worst.needed_nbytes > limit:
            source = "are free" if budget is None else "are allowed by --memory-budget"
            raise ResourceError(
                f"step {worst.name!r} needs {worst.needed_nbytes / 1e9:.2f} GB of memory, "
                f"{limit / 1e9:.2f} GB {source}; {worst.remedy}"
            )

    def rows(self) -> list[tuple[str, str, str, str]]:
        """For a table: step, memory, disk, time."""
        total = Step(
            name="all",
            memory_nbytes=self.peak_nbytes,
            disk_nbytes=self.disk_nbytes,
            seconds=sum(step.seconds for step in self.steps),
        )
        return [
            (
                step.name,
                f"{step.memory_nbytes / 1e9:.2f} GB",
                f"{step.disk_nbytes / 1e9:.3f} GB",
                f"{step.seconds:.0f} s",
            )
            for step in (*self.steps, total)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": [asdict(step) for step in self.steps],
            "peak_memory_nbytes": self.peak_nbytes,
            "disk_nbytes": self.disk_nbytes,
        }


def build_steps(
    weights: Mapping[str, int],
    depths: Mapping[str, int],
    targets: Sequence[str],
    precision: str,
) -> list[Step]:
    """Building the engine of each component, one after the other, for each target.

    Args:
        weights: component → bytes of its weights as the engine holds them.
        depths: component → blocks of its tower.
        targets: what is built for.
        precision: what was asked for: one for all, or one per tower.
    """
    steps = []
    for component, depth in depths.items():
        nbytes = weights[component]
        mapped = nbytes + BUILDER_MAPPED_NBYTES  # the graph's weights
        joined = joined_nbytes(component, nbytes, precision)
        taken = builder_nbytes(component, nbytes, depth, precision)
        seconds = BUILD_SECONDS + BUILD_SECONDS_PER_BLOCK * depth
        seconds += nbytes / BUILD_NBYTES_PER_SECOND + joined / JOINED_NBYTES_PER_SECOND
        steps.append(
            Step(
                name=f"build {component}",
                memory_nbytes=mapped + taken,
                mapped_nbytes=mapped,
                disk_nbytes=(nbytes + ENGINE_NBYTES) * len(targets),
                scratch_nbytes=joined,
                seconds=len(targets) * seconds,
            )
        )
    return steps
