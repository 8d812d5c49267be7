"""The builders of engines, and the GPUs their engines run on.

TensorRT-RTX builds without a GPU. Its engines run on SM80, SM86, SM89, and SM120 and later when no
compute capability is named; Turing (SM75) has to be asked for, and costs the others speed. TensorRT
builds for the GPU it runs on, and its engines stay there; it is the one for an H100 or a B200.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from internvl_edge.errors import HardwareError, UsageError
from internvl_edge.runtime.gpu.probe import gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A builder: what it is called, whether its engines leave the machine, what it fuses.

    Fused attention is in float16 or bfloat16. TensorRT-RTX's limits were found by trying, those of
    TensorRT are in its documentation (work-with-transformers, multi-head attention fusion).
    """

    name: str
    portable: bool  # builds for any GPU, without one
    head_sizes: range  # of fused attention
    fuses_one_query: bool

    def has_fused_kernel(self, dtype: str, length: int, head_size: int) -> bool:
        """Tell whether there is one for queries of a type, TensorRT's name, and shape."""
        is_narrow, is_fitting = dtype in ("HALF", "BF16"), head_size in self.head_sizes
        return is_narrow and is_fitting and (length != 1 or self.fuses_one_query)


TARGETS = {
    target.name: target
    for target in (
        Target(name="tensorrt-rtx", portable=True, head_sizes=range(9, 257), fuses_one_query=False),
        Target(name="tensorrt", portable=False, head_sizes=range(16, 257, 8), fuses_one_query=True),
    )
}

# The first compute capability with the types of a precision; portable engines start at SM80.
MINIMUM_SM = {"fp32": 80, "fp16": 75, "bf16": 80, "int8": 80, "fp8": 89, "int4": 80}
PORTABLE_SM = 80


def first_sm(precision: str) -> int:
    """Return the first compute capability of a precision, or of several towers' precisions."""
    names = (part.rpartition("=")[2].removesuffix("-wo") for part in precision.split(","))
    return max(MINIMUM_SM.get(name, 0) for name in names)


def find_target(name: str) -> Target:
    if name not in TARGETS:
        raise UsageError(f"target must be one of {', '.join(TARGETS)}, found {name!r}")
    return TARGETS[name]


def choose_capabilities(
    trt: Any, target: Target, precision: str, asked: Sequence[str] | None
) -> tuple[str, ...]:
    """Choose the compute capabilities to build for; empty is the target's portable engine."""
    if not target.portable:
        if asked:
            raise UsageError(
                f"{target.name} builds for the GPU it runs on; leave compute capabilities "
                f"{', '.join(asked)} out, or use tensorrt-rtx"
            )
        return (local_capability(),)
    known = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    unknown = [name for name in asked or () if name not in known]
    if unknown:
        raise UsageError(
            f"compute capability {', '.join(unknown)}: {target.name} {trt.__version__} knows "
            f"{', '.join(known)}"
        )
    needed = first_sm(precision)
    old = [name for name in asked or () if _sm(name) < needed]
    if old:
        raise HardwareError(
            f"{precision} needs SM{needed} or later, asked for {', '.join(old)}; leave it out or "
            "choose fp16"
        )
    return tuple(dict.fromkeys(asked or ()))


def local_capability() -> str:
    """Return the compute capability of this machine's first GPU, as ``SM90``.

    Raises:
        HardwareError: there is no GPU.
    """
    local = gpus()
    if not local:
        raise HardwareError(
            "tensorrt builds for the GPU it runs on, and found no CUDA device; tensorrt-rtx "
            "builds without one"
        )
    return f"SM{local[0].sm}"


def _sm(name: str) -> int:
    return int(name.removeprefix("SM"))


def minimum_sm(precision: str, capabilities: Sequence[str]) -> int:
    if capabilities:
        return min(map(_sm, capabilities))
    return max(PORTABLE_SM, first_sm(precision))
