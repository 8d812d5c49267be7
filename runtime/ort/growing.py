"""A cache that grows, handed from one call on the host to the next.

A token of 24 layers takes 48 values and gives 48. Bound by name, each an object of Python, they
cost half a millisecond of 16; they stay in ONNX Runtime's own vector instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as native

from internvl_edge.runtime.ort.rows import HOST
from internvl_edge.runtime.ort.values import value_of
from internvl_edge.types import Array

__all__ = ["Grown", "grow"]

DEVICE = native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)


class Grown(Sequence[Any]):
    """The values of a cache as a call gave them; its logits, which may be large, are not kept."""

    def __init__(self, outputs: Any) -> None:
        self.values = native.OrtValueVector()
        self.values.reserve(len(outputs) - 1)
        for at in range(1, len(outputs)):
            self.values.push_back(outputs[at])

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, at: Any) -> Any:
        return onnxruntime.OrtValue(self.values[range(len(self.values))[at]])


def grow(
    session: Any,
    feeds: Mapping[str, Array],
    names: Sequence[str],
    cache: Sequence[Any],
    outputs: Sequence[str],
) -> tuple[Array, Grown]:
    """Run a call of a decoder; its logits, and the next cache.

    Args:
        session: ONNX Runtime's.
        feeds: what is not in the cache.
        names: of the cache's inputs.
        cache: their ``OrtValue``s, or what the call before gave.
        outputs: the logits' name, and those of the next cache in the same order.
    """
    given, taken = native.OrtValueVector(), native.OrtValueVector()
    given.reserve(len(feeds) + len(names))
    values = [value_of(array, HOST) for array in feeds.values()]  # which hold the arrays
    held = cache.values if isinstance(cache, Grown) else [value._ortvalue for value in cache]
    for value in (*(value._ortvalue for value in values), *held):
        given.push_back(value)
    session.run_with_ortvaluevector(
        onnxruntime.RunOptions(), [*feeds, *names], given, outputs, taken, [DEVICE] * len(outputs)
    )
    return taken[0].numpy(), Grown(taken)
