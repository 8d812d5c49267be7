"""Caches that an engine does not write where they lie, for builders that fail at those that are.

A cache in place is a ``TensorScatter``, which builders make a layer that writes into its input:
input and output are one memory, and a step moves what is new. On some GPUs that layer together
with a fused attention does not compile (reported for TensorRT on SM120 and SM121). The same values
by ``ScatterElements`` are a copy of the cache in every step, and compile everywhere:

    present[b, h, first[b] + t, :] = new[b, h, t, :]        the rest is the cache's

The graph of that exists only for the builder and is deleted afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["unaliased_graph"]

POSITIONS = 2  # the axis of a cache (B, heads, S, d)


@contextlib.contextmanager
def unaliased_graph(path: Path) -> Iterator[Path]:
    """Write a graph whose caches are outputs of their own, and remove it afterwards.

    It is next to ``path``, where its weights are found.
    """
    model = ir.load(path)
    for node in list(model.graph):
        if node.op_type == "TensorScatter":
            _write_apart(model.graph, node)
    partial = path.with_name(f".{path.stem}.unaliased.partial")
    try:
        ir.save(model, partial)
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def _write_apart(graph: ir.Graph, scatter: ir.Node) -> None:
    """Replace a TensorScatter of (cache, new, first position) by ScatterElements."""
    cache, new, first = scatter.inputs

    def add(op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"{scatter.name}/{op}.{len(made)}")
        node.outputs[0].name = node.name
        made.append(node)
        return node.outputs[0]

    def constant(name: str, values: Any) -> ir.Value:
        return _constant(graph, f"unaliased.{name}", np.asarray(values, np.int64))

    made: list[ir.Node] = []
    shape = add("Shape", new)
    length = add("Gather", shape, constant("axis", POSITIONS))
    steps = add("Range", constant("zero", 0), length, constant("one", 1))
    steps = add("Unsqueeze", steps, constant("around", [0, 1, 3]))  # (1, 1, T, 1)
    start = add("Unsqueeze", first, constant("after", [1, 2, 3]))  # (B, 1, 1, 1)
    places = add("Expand", add("Add", start, steps), shape)  # (B, heads, T, d)
    present = add("ScatterElements", cache, places, new, axis=POSITIONS)
    old = scatter.outputs[0]
    present.type, present.shape, name = old.type, old.shape, old.name
    old.replace_all_uses_with(present, replace_graph_outputs=True)
    graph.insert_before(scatter, made)
    graph.remove(scatter, safe=True)
    present.name = name


def _constant(graph: ir.Graph, name: str, values: np.ndarray[Any, Any]) -> ir.Value:
    """Return the constant of this name, which all layers read; add it if it is not there."""
    if name not in graph.initializers:
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape))
        value.const_value = tensor
        graph.initializers[name] = value
    return graph.initializers[name]
