"""A model's folder in the repository: what is written in it, and what every model's has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from internvl_edge.integrations.triton.config import Word
from internvl_edge.integrations.triton.options import RepositoryOptions

__all__ = ["CONFIG", "VERSION", "WARMUP", "ModelFolder", "batching", "instance_group"]

CONFIG, VERSION, WARMUP = "config.pbtxt", "1", "warmup"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model of Triton, before its folder is written; paths are those in the folder."""

    name: str
    config: Mapping[str, Any]  # of config.pbtxt
    written: Mapping[str, bytes] = field(default_factory=dict)  # path → contents
    linked: Mapping[str, str] = field(default_factory=dict)  # path → file of OUT
    components: tuple[str, ...] = ()  # that lie in a directory of their own, 1/out
    built_by: str | None = None  # the release of TensorRT whose engines are linked

    @property
    def max_batch(self) -> int:
        """The rows of a batch; 0: requests have none."""
        return int(self.config["max_batch_size"])


def instance_group(options: RepositoryOptions, *, gpu: int | None) -> dict[str, Any]:
    """Write how many instances there are, and where."""
    if gpu is None:
        return {"count": options.instances, "kind": Word("KIND_CPU")}
    return {"count": options.instances, "kind": Word("KIND_GPU"), "gpus": [gpu]}


def batching(options: RepositoryOptions) -> dict[str, Any]:
    """Write how requests share batches; without options, nothing that would make one wait."""
    fields: dict[str, Any] = {}
    if options.max_delay_us is not None:
        fields["max_queue_delay_microseconds"] = options.max_delay_us
    if options.max_queued is not None:
        fields["default_queue_policy"] = {"max_queue_size": options.max_queued}
    return fields
