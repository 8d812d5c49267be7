"""Binding a graph to its weights: every initializer refers to its stored tensor.

Where a graph computes in another dtype than the stored one, a Cast follows the initializer, which
every builder folds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.errors import InternVLError
from internvl_edge.export.weights.writer import StoredTensor


def weights_without_data(models: Iterable[ir.Model]) -> dict[str, np.dtype[Any]]:
    """Collect name → dtype of every initializer that still needs data, over several graphs.

    Where graphs disagree (they never do at one precision), the first one decides and ``bind``
    casts.
    """
    needed: dict[str, np.dtype[Any]] = {}
    for model in models:
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                assert value.dtype is not None
                needed.setdefault(name, np.dtype(value.dtype.numpy()))
    return needed


def bind(model: ir.Model, stored: Mapping[str, StoredTensor], directory: Path) -> int:
    """Point every initializer without data at its stored tensor, in place.

    A Cast follows where the graph computes in another dtype than the stored one.

    Returns:
        The number of bytes of weights that the graph reads.
    """
    total = 0
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is not None:
            continue
        place = stored[name]
        wanted, held = value.dtype, ir.DataType.from_numpy(place.dtype)
        shape = tuple(value.shape or ())
        if wanted == ir.DataType.INT4 and place.shape == (-(-math.prod(shape) // 2),):
            held = wanted  # packed, two to a byte: safetensors has no such type
        elif shape != place.shape:
            raise InternVLError(
                f"{name}: expected the graph's shape {value.shape}, found {place.shape} stored"
            )
        value.const_value = ir.ExternalTensor(
            location=place.location,
            offset=place.offset,
            length=place.nbytes,
            dtype=held,
            shape=ir.Shape(shape),
            name=name,
            base_dir=directory,
        )
        total += place.nbytes
        if wanted != held and value.uses():
            _cast_after(model.graph, value, held, wanted)
    return total


def _cast_after(
    graph: ir.Graph, value: ir.Value, held: ir.DataType, wanted: ir.DataType | None
) -> None:
    assert wanted is not None
    uses = list(value.uses())
    value.type = ir.TensorType(held)
    cast = ir.node("Cast", [value], {"to": int(wanted)}, name=f"{value.name}/Cast")
    cast.outputs[0].name = f"{value.name}.as_{wanted.name.lower()}"
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(wanted), value.shape
    first = next(node for node in graph if any(use.node is node for use in uses))
    graph.insert_before(first, cast)
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])


def save(model: ir.Model, path: Path) -> None:
    """Write the graph; its external tensors are referred to, not copied."""
    ir.save(model, path)
