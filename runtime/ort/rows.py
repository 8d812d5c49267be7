"""Rows of one cache that is written in place, each at its own position.

The cache lies in NumPy arrays, whose memory ONNX Runtime's CPU provider reads and writes: a call on
some of the rows is bound to that part of them, and what stands in a row can be put there and taken
from there between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from internvl_edge.artifact import TensorSpec
from internvl_edge.runtime.feeds import LOGITS_FROM, numpy_dtype
from internvl_edge.runtime.generation.fixed_cache import PAST, PRESENT
from internvl_edge.runtime.ort.values import value_of
from internvl_edge.types import Array

__all__ = ["FIRST", "OrtRows"]

HOST = ("cpu", 0)
FIRST = np.zeros(1, np.int64)  # position from which on a call has logits, where it does not say


class OrtRows:
    """See above; used by one thread at a time.

    Args:
        count: rows.
        inputs: of the decoder.
        logits: the name of that output.
        optional: whether it takes ``logits_from``.
        binding: makes a binding.
        run: runs one.
    """

    def __init__(
        self,
        count: int,
        inputs: Mapping[str, TensorSpec],
        logits: str,
        *,
        optional: bool,
        binding: Callable[[], Any],
        run: Callable[[Any], None],
    ) -> None:
        self.count, self.inputs = count, inputs
        self._logits, self._optional = logits, optional
        self._binding, self._run = binding, run
        self.values = {
            name: np.zeros((count, *map(int, spec.shape[1:])), numpy_dtype(spec.dtype))
            for name, spec in inputs.items()
            if name.startswith(PAST)
        }
        self._bindings: dict[tuple[int, int], Any] = {}

    def run(self, rows: slice, feeds: Mapping[str, Array]) -> Array:
        """See ``Rows.run``."""
        key = rows.start, rows.stop
        if key not in self._bindings:
            self._bindings[key] = self._bound(rows)
        binding = self._bindings[key]
        for name, array in feeds.items():
            if name != LOGITS_FROM:
                binding.bind_cpu_input(name, array)
        if self._optional:
            binding.bind_ortvalue_input(LOGITS_FROM, value_of(feeds.get(LOGITS_FROM, FIRST), HOST))
        binding.bind_output(self._logits, *HOST)
        self._run(binding)
        logits: Array = binding.get_outputs()[-1].numpy()
        return logits

    def _bound(self, rows: slice) -> Any:
        binding = self._binding()
        for name, held in self.values.items():
            value = value_of(held[rows], HOST)  # the same memory
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace(PAST, PRESENT, 1), value)
        return binding
