"""A call that is about to be queued, and what of its memory it may write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl_edge.errors import FeedError
from internvl_edge.runtime.gpu.device_array import DeviceArray
from internvl_edge.runtime.gpu.memory import ALIGNMENT, find_overlap
from internvl_edge.runtime.trt.contexts import Bound
from internvl_edge.runtime.trt.profiles import EngineSpec

__all__ = ["Call", "Shapes", "is_bound_in_place", "require_apart"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Call:
    """Everything that is decided of it."""

    feeds: Mapping[str, Any]
    bound: Bound
    shapes: Shapes  # of the inputs as they run, filled up
    outputs: Shapes  # without the rows that fill up
    targets: Mapping[str, DeviceArray]  # outputs that are not written to the slot's own memory
    addresses: Mapping[str, int]  # of all


def is_bound_in_place(array: Any) -> bool:
    """Whether an engine can read an input where it is."""
    return isinstance(array, DeviceArray) and array.pointer % ALIGNMENT == 0


def require_apart(call: Call, spec: EngineSpec) -> None:
    """Refuse targets of other shapes, or in memory that something else of the call is in.

    An engine may write its outputs in any order, and before it has read all inputs; what it writes
    in place is its business.

    Raises:
        FeedError: which ones.
    """
    for name, array in call.targets.items():
        if array.shape != call.outputs[name]:
            raise FeedError(
                f"output {name!r}: expected {list(call.outputs[name])}, found {list(array.shape)}"
            )
    written = []
    for name, shape in call.outputs.items():
        start, nbytes = call.addresses[name], math.prod(shape) * spec.dtypes[name].itemsize
        written.append((start, start + nbytes, f"output {name!r}"))
    in_place = spec.aliases.values()
    read = [
        (array.pointer, array.pointer + array.nbytes, f"input {name!r}")
        for name, array in call.feeds.items()
        # what is copied before the run is safe, but for a copy to where something is written
        if is_bound_in_place(array) or (in_place and isinstance(array, DeviceArray))
        if not (name in in_place and array.pointer == call.addresses[name])
    ]
    found = find_overlap(written, read)
    if found is not None:
        raise FeedError(
            f"{found[1]} is where this run writes {found[0]}; give that other memory with out=, "
            "such as session.empty(...)"
        )
