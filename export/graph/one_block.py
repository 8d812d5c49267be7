"""One block cut out of a graph: the residual stream is its input, its inner tensors are outputs.

``repeat.keep_block`` keeps the nodes before and after a block, for a comparison of whole
components. Here a block's input is given, so that its error is its own and not that of the
blocks before it, and its inner tensors are outputs of the graph, so that the first wrong one can
be named.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnx_ir.passes import common as passes

from internvl_edge.export.graph.bf16_twin import infer_dtypes
from internvl_edge.export.graph.repeat import blocks_of, residual_stream

BLOCK_INPUT = "block.input"
BLOCK_OUTPUT = "block.output"
PAIR = ("QuantizeLinear", "DequantizeLinear")


def isolate_block(
    model: ir.Model, stack: str, index: int, modules: Iterable[str], *, with_tail: bool = False
) -> list[str]:
    """Cut a block out of a component's graph, in place.

    Args:
        model: the graph, with or without data, quantized or not.
        stack: the tower's blocks, such as ``vision_model.encoder.layers``.
        index: the block to keep, from 0.
        modules: paths in the block, such as ``attn.qkv``, whose outputs become outputs.
        with_tail: also keep the nodes after the tower; only for the last block.

    Returns:
        The modules that the block has, in the order of the graph; each is an output of that name,
        and ``BLOCK_OUTPUT`` one more. ``BLOCK_INPUT`` is float32, (B, T, C).

    Raises:
        InternVLError: there is no such block, or the blocks are not joined by one value.
    """
    infer_dtypes(model.graph)
    graph, nodes = model.graph, blocks_of(model, stack)[index]
    entering, leaving = residual_stream(model, stack, index)
    outputs = _outputs_of(nodes, f"{stack}.{index}", set(modules))
    _feed(graph, nodes, entering)
    kept = list(graph.outputs) if with_tail else []
    graph.outputs.clear()
    graph.outputs.extend(kept)
    for name, value in [*outputs.items(), (BLOCK_OUTPUT, leaving)]:
        graph.outputs.append(_alias(graph, value, name))
    _remove_unused(model)
    return list(outputs)


def num_blocks(model: ir.Model, stack: str) -> int:
    """Count the blocks of a tower in a component's graph."""
    return len(blocks_of(model, stack))


def isolate_front(model: ir.Model, stack: str) -> None:
    """Keep the nodes before a tower, in place; their output is ``BLOCK_INPUT``."""
    infer_dtypes(model.graph)
    entering, _ = residual_stream(model, stack, 0)
    model.graph.outputs.clear()
    model.graph.outputs.append(_alias(model.graph, entering, BLOCK_INPUT))
    _remove_unused(model)


def _outputs_of(nodes: list[ir.Node], block: str, modules: set[str]) -> dict[str, ir.Value]:
    """Map each module to its last value: nodes are named after the module they came from."""
    last: dict[str, ir.Value] = {}
    for node in nodes:
        path = str(node.name).removeprefix(f"{block}.").partition("/")[0]
        if path in modules and node.op_type not in PAIR:
            last.pop(path, None)  # ordered by the module's last node
            last[path] = node.outputs[0]
    return last


def _feed(graph: ir.Graph, nodes: list[ir.Node], entering: ir.Value) -> None:
    """Let a block read a new input of the graph instead of the residual stream."""
    shape = ir.Shape([f"{BLOCK_INPUT}.{dimension}" for dimension in ("batch", "length", "width")])
    source = ir.Value(name=BLOCK_INPUT, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    graph.inputs.append(source)
    if entering.dtype not in (None, ir.DataType.FLOAT):
        source = _cast(graph, source, entering.dtype, nodes[0], f"{BLOCK_INPUT}.cast")
    own = set(nodes)
    for node, i in list(entering.uses()):
        if node in own:
            node.replace_input_with(i, source)


def _alias(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Give a value's numbers another name, in float32; its other readers are unaffected."""
    node = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{name}/Cast")
    graph.append(node)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
    return node.outputs[0]


def _cast(
    graph: ir.Graph, value: ir.Value, dtype: ir.DataType, before: ir.Node, name: str
) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
    graph.insert_before(before, node)
    return node.outputs[0]


def _remove_unused(model: ir.Model) -> None:
    passes.RemoveUnusedNodesPass()(model)
    unused = [value for value in model.graph.inputs if not value.uses()]
    for value in unused:
        model.graph.inputs.remove(value)
