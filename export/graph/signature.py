"""The inputs and outputs of a graph, as a manifest records them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from internvl_edge.artifact import TensorSpec
from internvl_edge.runtime.generation.fixed_cache import capacity_of

__all__ = ["graph_capacity", "tensor_specs"]


def tensor_specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Describe a graph's inputs or outputs, without inputs that may be left out."""
    return tuple(
        TensorSpec(
            name=str(value.name),
            dtype=np.dtype(value.dtype.numpy()).name,  # type: ignore[union-attr]
            shape=tuple(d if isinstance(d, int) else str(d.value) for d in value.shape or ()),
        )
        for value in values
        if not value.is_initializer()
    )


def graph_capacity(model: ir.Model) -> int | None:
    """Count the positions of a decoder's cache that is written in place; None: it grows."""
    return capacity_of({spec.name: spec for spec in tensor_specs(model.graph.inputs)})
