"""How a TensorRT session runs its engine; can be written down where TensorRT is not installed."""

from __future__ import annotations

from dataclasses import dataclass

from internvl_edge.errors import UsageError

__all__ = ["TrtOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtOptions:
    """How a session runs its engine."""

    slots: int = 1  # calls that run at once, each with memory for the largest call
    graphs: bool = True  # replay calls of shapes seen before as CUDA graphs
    batch_buckets: tuple[int, ...] = ()  # fill batches up to these sizes: few shapes, few graphs

    def __post_init__(self) -> None:
        if self.slots < 1 or min(self.batch_buckets, default=1) < 1:
            raise UsageError(
                f"expected at least 1 slot and batch buckets from 1 on, found {self.slots} slots "
                f"and buckets {self.batch_buckets}"
            )
