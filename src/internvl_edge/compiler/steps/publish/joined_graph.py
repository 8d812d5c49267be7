"""Both towers as one graph with CLIP's inputs and outputs, on the weights that they have.

    input_ids, attention_mask ─ text_embed  ─ unit length ─┬─ text_embeds
                                                           ├─ logits_per_text, logits_per_image
    pixel_values              ─ image_embed ─ unit length ─┴─ image_embeds

The nodes are those of the two components; new are the unit length, the product and its factor of
100, which zero-shot classification has (``runtime.tasks.compare``). The mask is that of the caller
where the id is above 0: an unknown piece is masked as padding is (``runtime.text.tokenizer``).

Where INT8 products have a graph for CPUs without VNNI, that one is joined: this file is opened by
programs that do not ask which CPU they run on, and its products are exact on all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from internvl_edge.artifact.components import IMAGE_EMBED, TEXT_EMBED, unsigned_graph
from internvl_edge.errors import InternVLError
from internvl_edge.runtime.tasks.compare import LOGIT_SCALE

__all__ = ["join_towers"]

IMAGE, TEXT = "image", "text"
SMALLEST = 1e-30  # a row of zeros stays one


def join_towers(directory: Path) -> ir.Model:
    """Join the graphs of ``image_embed`` and ``text_embed`` that lie in a directory.

    Returns:
        A graph with the inputs ``input_ids`` and ``attention_mask`` int64 [text_batch, length],
        ``pixel_values`` float32 [image_batch, 3, S, S]; and the outputs, float32,
        ``logits_per_image`` [image_batch, text_batch], ``logits_per_text`` its transpose,
        ``text_embeds`` [text_batch, E], ``image_embeds`` [image_batch, E], of unit length.

    Raises:
        InternVLError: a mistake of ours: they cannot be joined.
    """
    image, text = _load(directory, IMAGE_EMBED), _load(directory, TEXT_EMBED)
    if image.opset_imports != text.opset_imports or image.functions or text.functions:
        raise InternVLError(
            f"{directory}: expected graphs of one opset and no functions, found "
            f"{dict(image.opset_imports)} and {dict(text.opset_imports)}"
        )
    for model, name in ((image, IMAGE), (text, TEXT)):
        _rename(model.graph, name)
    pixels, (ids, mask) = image.graph.inputs[0], text.graph.inputs
    (u,), (t,) = image.graph.outputs, text.graph.outputs
    graph = image.graph
    _move(text.graph, graph)
    graph.inputs[:] = [ids, mask, pixels]
    _mask_unknown(graph, ids, mask)
    graph.outputs[:] = _compare(graph, u, t)
    for value, name in zip((ids, mask, pixels), _INPUTS, strict=True):
        value.name = name
    return image


_INPUTS = ("input_ids", "attention_mask", "pixel_values")


def _load(directory: Path, component: str) -> ir.Model:
    unsigned = directory / unsigned_graph(component)
    return ir.load(unsigned if unsigned.exists() else directory / f"{component}.onnx")


def _rename(graph: ir.Graph, prefix: str) -> None:
    """Put a prefix before every name of a graph, also of sizes that a call decides.

    Sizes of one name are taken for equal, and memory is shared where they are.
    """
    values = [*graph.inputs, *graph.initializers.values()]
    values += [output for node in graph for output in node.outputs]
    for value in dict.fromkeys(values):
        if value.name:
            value.name = f"{prefix}.{value.name}"
        if value.shape is not None:
            sizes = [d if isinstance(d, int) else d.value for d in value.shape]
            names = [f"{prefix}_{d}" if isinstance(d, str) else d for d in sizes]
            value.shape = ir.Shape(names)
    for node in graph:
        node.name = f"{prefix}.{node.name}"


def _move(source: ir.Graph, target: ir.Graph) -> None:
    nodes, initializers = list(source), list(source.initializers.values())
    source.outputs.clear()
    source.inputs.clear()
    source.remove(nodes)
    source.initializers.clear()
    for value in initializers:
        target.register_initializer(value)
    target.extend(nodes)


def _mask_unknown(graph: ir.Graph, ids: ir.Value, mask: ir.Value) -> None:
    """Let the text tower read the mask as 0 where the id is."""
    readers = [(use.node, use.idx) for use in mask.uses()]
    zero = _constant(graph, "zero", np.array(0, np.int64))
    is_known = _node("Greater", [ids, zero], "is_known", ir.DataType.BOOL, ids.shape)
    known = _node("Cast", [is_known.outputs[0]], "known", ir.DataType.INT64, ids.shape)
    known.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.INT64))
    both = _node("Mul", [mask, known.outputs[0]], "mask", ir.DataType.INT64, ids.shape)
    graph.insert_before(graph[0], [is_known, known, both])
    for node, index in readers:
        node.replace_input_with(index, both.outputs[0])


def _compare(graph: ir.Graph, image: ir.Value, text: ir.Value) -> list[ir.Value]:
    """Add what a CLIP does with two embeddings; return the graph's outputs."""
    assert image.shape is not None and text.shape is not None
    images, texts = image.shape[0], text.shape[0]
    u, t = _unit(graph, image, "image_embeds"), _unit(graph, text, "text_embeds")
    scale = _constant(graph, "scale", np.array(LOGIT_SCALE, np.float32))
    scaled = _node("Mul", [u, scale], "scaled", ir.DataType.FLOAT, image.shape)
    across = _node("Transpose", [t], "across", ir.DataType.FLOAT, [text.shape[1], texts])
    product = _node(
        "MatMul",
        [scaled.outputs[0], across.outputs[0]],
        "logits_per_image",
        ir.DataType.FLOAT,
        [images, texts],
    )
    turned = _node(
        "Transpose", product.outputs, "logits_per_text", ir.DataType.FLOAT, [texts, images]
    )
    graph.extend([scaled, across, product, turned])
    return [product.outputs[0], turned.outputs[0], t, u]


def _unit(graph: ir.Graph, rows: ir.Value, name: str) -> ir.Value:
    """Add the division of rows by their lengths."""
    assert rows.shape is not None
    axis = _constant(graph, f"{name}.axis", np.array([-1], np.int64))
    least = _constant(graph, f"{name}.least", np.array(SMALLEST, np.float32))
    column = [rows.shape[0], 1]
    length = _node("ReduceL2", [rows, axis], f"{name}.length", ir.DataType.FLOAT, column)
    divisor = _node("Max", [length.outputs[0], least], f"{name}.divisor", ir.DataType.FLOAT, column)
    unit = _node("Div", [rows, divisor.outputs[0]], name, ir.DataType.FLOAT, rows.shape)
    graph.extend([length, divisor, unit])
    return unit.outputs[0]


def _node(op: str, inputs: object, name: str, dtype: ir.DataType, shape: object) -> ir.Node:
    node = ir.node(op, list(inputs), name=name)  # type: ignore[call-overload]
    (output,) = node.outputs
    output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape(shape)  # type: ignore[arg-type]
    return node


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    values = ir.tensor(array, name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(values.dtype), const_value=values
    )
    graph.register_initializer(value)
    return value
