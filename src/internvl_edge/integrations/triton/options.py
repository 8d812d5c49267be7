"""What ``internvl-edge triton`` can be told, and what it refuses before any work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.errors import UsageError, did_you_mean
from internvl_edge.integrations.triton.tasks import TASKS

__all__ = ["BACKENDS", "RepositoryOptions"]

BACKENDS = ("python", "onnxruntime", "tensorrt")
MOST_ROWS, MOST_INSTANCES, MOST_THREADS = 4096, 64, 1024
MOST_DELAY_US, MOST_QUEUED = 10_000_000, 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryOptions:
    """What is written, and for which machine.

    Raises:
        UsageError: a value that cannot be, or two that do not go together.
    """

    out: Path  # the compiled directory
    repo: Path  # the model repository that is written
    backend: str = "python"  # what runs the image component
    tasks: tuple[str, ...] | None = None  # None: all that the directory has components for
    mode: str = "c"  # of image embeddings: "c" or "g"
    max_batch: int = 32  # rows
    instances: int = 1  # processes of each model
    threads: int = 1  # of each process, on the processor
    device: str = "cpu"  # or "cuda:0"
    self_contained: bool = False  # each model has the files that it needs
    max_delay_us: int | None = None  # how long a request waits for others; None: not at all
    max_queued: int | None = None  # requests that may wait; None: any number
    force: bool = False  # replace an earlier repository of ours

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UsageError(
                f"--backend {self.backend}: expected {', '.join(BACKENDS)}"
                f"{did_you_mean(self.backend, BACKENDS)}"
            )
        for task in self.tasks or ():
            if task not in TASKS:
                hint = did_you_mean(task, TASKS)
                raise UsageError(f"--tasks {task}: expected some of {', '.join(TASKS)}{hint}")
        if self.tasks == ():
            raise UsageError(f"--tasks: expected some of {', '.join(TASKS)}, found none")
        if self.mode not in ("c", "g"):
            raise UsageError(f"--mode {self.mode}: expected c or g")
        if re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device) is None:
            raise UsageError(f"--device {self.device}: expected cpu, cuda or cuda:1")
        for option, value, low, most in (
            ("--max-batch", self.max_batch, 1, MOST_ROWS),
            ("--instances", self.instances, 1, MOST_INSTANCES),
            ("--threads", self.threads, 1, MOST_THREADS),
            ("--max-delay-us", self.max_delay_us, 0, MOST_DELAY_US),
            ("--max-queued", self.max_queued, 1, MOST_QUEUED),
        ):
            if value is not None and not low <= value <= most:
                raise UsageError(f"{option} {value}: expected {low} to {most}")
        if self.backend == "tensorrt" and self.device == "cpu":
            raise UsageError("--backend tensorrt runs on a GPU; add --device cuda:0")
        if self.backend != "python" and self.mode == "g":
            raise UsageError(
                f"--backend {self.backend} runs the component of InternVL-C embeddings; with "
                "--mode g, leave --backend out"
            )

    @property
    def gpu(self) -> int | None:
        """The GPU's number; None: the processor."""
        return None if self.device == "cpu" else int(self.device.partition(":")[2] or 0)

    @property
    def front_gpu(self) -> int | None:
        """The GPU of models in Python; None: the processor."""
        return self.gpu if self.backend == "python" else None

    @property
    def is_bridged(self) -> bool:
        """True where models in Python ask another model of Triton for image embeddings.

        On a GPU one engine serves all tasks; on a processor a call across is slower than a copy.
        """
        return self.backend != "python" and self.gpu is not None
