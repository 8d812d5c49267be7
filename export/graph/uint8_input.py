"""Normalisation inside the graph: the input is uint8 levels, and builders can fuse the float part.

    y = (x / 255 - mean) / std           float32, in the same order as ``runtime.images.transform``

so that both give the same bits. The input has a quarter of the bytes. Resizing, which takes
pictures of any size, stays outside.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from internvl_edge.artifact import Manifest, TensorSpec
from internvl_edge.runtime.images.transform import Preprocessing, nearest_levels, normalised
from internvl_edge.types import Array

__all__ = ["PIXELS", "graph_feeds", "on_levels", "preprocessing_inside", "take_levels"]

PIXELS = "pixel_values"

Arrays = Mapping[str, Array]


def take_levels(model: ir.Model, preprocessing: Preprocessing) -> None:
    """Make ``pixel_values`` uint8 [B, 3, S, S]; a graph without this input is unchanged."""
    pixels = next((value for value in model.graph.inputs if value.name == PIXELS), None)
    if pixels is None:
        return
    readers = [use for use in pixels.uses() if use.node.op_type != "Shape"]
    pixels.dtype = ir.DataType.UINT8
    nodes = [ir.node("Cast", [pixels], attributes={"to": ir.DataType.FLOAT})]
    channels = (1, 3, 1, 1)
    for op_type, name, values in (
        ("Div", "levels", np.full((1, 1, 1, 1), 255)),
        ("Sub", "mean", np.reshape(preprocessing.mean, channels)),
        ("Div", "std", np.reshape(preprocessing.std, channels)),
    ):
        constant = _constant(model, f"preprocessing.{name}", values)
        nodes.append(ir.node(op_type, [nodes[-1].outputs[0], constant]))
    for number, node in enumerate(nodes):
        output = node.outputs[0]
        node.name = output.name = f"preprocessing/{node.op_type}_{number}"
        output.dtype, output.shape = ir.DataType.FLOAT, pixels.shape
    for reader in readers:
        reader.node.replace_input_with(reader.idx, nodes[-1].outputs[0])
    model.graph.insert_before(model.graph[0], nodes)


def _constant(model: ir.Model, name: str, values: Array) -> ir.Value:
    tensor = ir.tensor(values.astype(np.float32), name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    model.graph.register_initializer(value)
    return value


# --- comparison with a reference that takes normalised values ------------------------------------


def preprocessing_inside(manifest: Manifest) -> Preprocessing | None:
    """Return the normalisation inside a directory's graphs; None if they take normalised values."""
    specs = (spec for record in manifest.components.values() for spec in record.inputs)
    if any(spec.name == PIXELS and spec.dtype == "uint8" for spec in specs):
        return Preprocessing.from_json(manifest.preprocessing)
    return None


def on_levels(feeds: Arrays, preprocessing: Preprocessing | None) -> dict[str, Array]:
    """Round ``pixel_values`` to what uint8 levels can express; nothing without preprocessing."""
    if preprocessing is None or PIXELS not in feeds:
        return dict(feeds)
    levels = nearest_levels(feeds[PIXELS], preprocessing)
    return {**feeds, PIXELS: normalised(levels, preprocessing)}


def graph_feeds(
    specs: Mapping[str, TensorSpec], feeds: Arrays, preprocessing: Preprocessing | None
) -> dict[str, Array]:
    """Select a graph's inputs from its reference's feeds, in the graph's dtypes."""
    inputs = {}
    for name, spec in specs.items():
        if spec.dtype == "uint8" and preprocessing is not None:
            inputs[name] = nearest_levels(feeds[name], preprocessing)
        else:
            inputs[name] = feeds[name].astype(spec.dtype, copy=False)
    return inputs
