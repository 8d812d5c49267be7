"""The needs of steps: memory, disk and time; and whether this machine has them.

Each step states its own cost next to the code that spends it. Here costs are only added up, and
compared with what there is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_edge.errors import ResourceError
from internvl_edge.files.disk import require_free_disk
from internvl_edge.files.memory import available_memory, peak_rss_nbytes

IMPORTS_NBYTES = 450_000_000  # of memory: PyTorch, ONNX and the exporter, loaded
FLOAT32_NBYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The needs of one step."""

    name: str
    memory_nbytes: int  # resident, mapped files included: they give way where memory is short
    disk_nbytes: int
    seconds: float
    mapped_nbytes: int = 0  # of the memory
    scratch_nbytes: int = 0  # of disk in addition, until the step ends
    remedy: str = "--dry-run lists every step"  # for who has less

    @property
    def needed_nbytes(self) -> int:
        """Memory that has to be free, in bytes."""
        return self.memory_nbytes - self.mapped_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The costs of all steps of an export or a build."""

    steps: tuple[Cost, ...]

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
            written_nbytes: the part of the disk's share that an earlier run has written.

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
        """Write step, memory, disk and time as texts, for a table; the last row is of all steps."""
        total = Cost(
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


def require_within_budget(
    budget: int | None,
    done: int,
    total: int,
    what: str = "blocks",
    remedy: str = "the same command with a larger budget goes on from there",
) -> None:
    """Stop a run that takes more memory than it was given.

    Raises:
        ResourceError: with what it took.
    """
    peak = peak_rss_nbytes()
    if budget is not None and peak is not None and peak > budget:
        raise ResourceError(
            f"--memory-budget {budget / 1e9:.2f} GB: {peak / 1e9:.2f} GB were needed after "
            f"{done} of {total} {what}; {remedy}"
        )
