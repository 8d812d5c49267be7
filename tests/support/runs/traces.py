"""Traces that the workers of one test run share: each graph is traced by one of them.

The product keeps traces in memory, which each worker has for itself. Here they also lie in a folder
of the run, under the same keys.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Hashable
from pathlib import Path

import onnx_ir as ir

from internvl_edge.compiler.steps import trace


def stored(graph: ir.Model) -> bytes:
    """Write a graph; an initializer without data refers to a file that is never read."""
    graph = trace._cloned(graph)
    for name, value in graph.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.ExternalTensor(
                "none", 0, 0, value.dtype, shape=value.shape, name=name
            )
    data: bytes = ir.to_proto(graph).SerializeToString()
    return data


def read(data: bytes) -> ir.Model:
    """Read what ``stored`` wrote."""
    import onnx

    graph = ir.from_proto(onnx.load_from_string(data))
    for value in graph.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return graph


class SharedTraces(trace._Kept):
    """Traces in memory, and in a folder; while one process traces a graph, others wait for it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(trace.MAX_KEPT_NBYTES)
        self._folder = folder

    def get(self, key: Hashable, make: Callable[[], ir.Model]) -> ir.Model:
        def made() -> ir.Model:
            path = self._folder / hashlib.sha256(repr(key).encode()).hexdigest()
            with path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    graph = make()
                    path.with_suffix(".part").write_bytes(stored(graph))
                    os.replace(path.with_suffix(".part"), path)
                return read(path.read_bytes())

        return super().get(key, made)
