"""Towers of identical blocks: traced a few blocks deep, the rest stamped.

Tracing takes time in proportion to the number of blocks, and the blocks of a tower differ in
nothing but the names of their weights. So a tower is traced with a few blocks, and the last of
them are copied until it has all.

**Why the copy is what a trace would give.** Blocks repeat with a period p: one in the vision
tower, the cross-attention frequency in QLLaMA. The traced tower has T ≥ 3p blocks, T ≡ depth
(mod p), so that its end has the phase of the real end. For each block b of the last period,
``_sources`` holds it against block b − p, node by node. Both must have the same operators and
attributes, and every input of every node must be one of

    parameter   of this block, at the same place in it
    internal    the output of an earlier node of this block
    carried     an output of the block before, the same one in both cases
    shared      one and the same value in both, made outside of the last two periods

and nobody but the block itself, the block after it and the graph's outputs may read it. That is
the step of an induction: whatever adds blocks T − p … T − 1 to a tower of T − p blocks adds the
next p to one of T. Where it does not hold, nothing is stamped and the tower is traced in full.
The first period is never copied: what all blocks share was computed there.

``keep_block`` is the opposite: it takes all blocks but one out of a graph, for a comparison with
PyTorch that needs no more memory than one block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common as passes

from internvl_edge.errors import InternVLError

STACKS = ("vision_model.encoder.layers", "qllama.model.layers")
Place = tuple[int, int]  # of a value in its block: node, output


def shallow_depth(depth: int, period: int) -> int:
    """How many blocks of a tower to trace so that the rest can be stamped."""
    return min(depth, 3 * period + (depth - 3 * period) % period)


def blocks_of(model: ir.Model, stack: str) -> list[list[ir.Node]]:
    """The nodes of each block of a tower, in order; no block where there is no such tower."""
    blocks: dict[int, list[ir.Node]] = {}
    for node in model.graph:
        index = _index(str(node.name), stack)
        if index is not None:
            blocks.setdefault(index, []).append(node)
    return [blocks[i] for i in range(len(blocks))]


def _index(name: str, stack: str) -> int | None:
    match = re.match(rf"{re.escape(stack)}\.(\d+)[./]", name)
    return None if match is None else int(match[1])


# --- stamping ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where an input of a node of a repeated block comes from."""

    value: ir.Value | None  # shared by all blocks, or absent where None and nothing else is set
    parameter: str | None = None  # its name behind the block's
    internal: Place | None = None
    carried: Place | None = None


def stamp(model: ir.Model, stack: str, period: int, depth: int) -> bool:
    """Add blocks to a traced tower until it is ``depth`` deep, in place.

    Args:
        model: simplified, its initializers without data, ``shallow_depth`` blocks deep.
        stack: the tower's blocks, such as ``vision_model.encoder.layers``.
        period: after how many blocks they repeat.
        depth: how many blocks it should have.

    Returns:
        False, and nothing is changed, where the blocks are not found to repeat.
    """
    blocks = blocks_of(model, stack)
    traced = len(blocks)
    if traced == depth:
        return True
    if traced < 3 * period or (depth - traced) % period:
        return False
    templates = {}
    for index in range(traced - period, traced):
        sources = _sources(blocks, index, period, stack)
        if sources is None:
            return False
        templates[index] = sources
    last = blocks[-1]
    tail = [use for v in _outputs(last) for use in v.uses() if use.node not in set(last)]
    ends = _ends(model, last, blocks[-1 - period])
    tower = list(blocks)
    for index in range(traced, depth):
        template = traced - period + (index - traced) % period
        tower.append(_copy(model, tower, template, index, templates[template], stack))
    _move_tail(model, last, tower[-1], tail, ends)
    return True


def _ends(model: ir.Model, last: Sequence[ir.Node], earlier: Sequence[ir.Node]) -> list[ir.Value]:
    """The graph's outputs that the end of the tower gives, and not every block one of its own."""
    outputs, places = set(model.graph.outputs), _places(earlier)
    own = {place for value, place in places.items() if value in outputs}
    return [v for v, place in _places(last).items() if v in outputs and place not in own]


def _move_tail(
    model: ir.Model,
    old: Sequence[ir.Node],
    new: Sequence[ir.Node],
    tail: Sequence[Any],
    ends: Sequence[ir.Value],
) -> None:
    """Let what comes behind the tower read its new last block."""
    places = _places(old)
    for node, index in tail:
        i, j = places[node.inputs[index]]
        node.replace_input_with(index, new[i].outputs[j])
    for value in ends:
        i, j = places[value]
        moved = new[i].outputs[j]
        moved.name, value.name = value.name, None
        model.graph.outputs[list(model.graph.outputs).index(value)] = moved


def _sources(
    blocks: Sequence[Sequence[ir.Node]], index: int, period: int, stack: str
) -> list[list[_Source]] | None:
    """The source of every input of a block, if it is the same as ``period`` blocks before."""
    block, other = blocks[index], blocks[index - period]
    closed = [index - period, *([] if index == len(blocks) - 1 else [index])]
    if len(block) != len(other) or not all(_is_closed(blocks, i) for i in closed):
        return None
    places = [_places(nodes) for nodes in (block, blocks[index - 1])]
    earlier = [_places(nodes) for nodes in (other, blocks[index - period - 1])]
    found: list[list[_Source]] = []
    for node, twin in zip(block, other, strict=True):
        if not _same_operator(node, twin, f"{stack}.{index}", f"{stack}.{index - period}"):
            return None
        sources = []
        for value, same in zip(node.inputs, twin.inputs, strict=True):
            source = _source(value, places, f"{stack}.{index}.")
            if source != _source(same, earlier, f"{stack}.{index - period}."):
                return None
            sources.append(source)
        found.append(sources)
    return found


def _source(
    value: ir.Value | None, places: Sequence[Mapping[ir.Value, Place]], prefix: str
) -> _Source:
    own, previous = places
    if value is None or (value not in own and value not in previous):
        name = "" if value is None else str(value.name)
        if name.startswith(prefix):
            return _Source(value=None, parameter=name.removeprefix(prefix))
        return _Source(value=value)
    return _Source(value=None, internal=own.get(value), carried=previous.get(value))


def _same_operator(node: ir.Node, twin: ir.Node, name: str, twin_name: str) -> bool:
    return (
        str(node.name).removeprefix(name) == str(twin.name).removeprefix(twin_name)
        and node.op_identifier() == twin.op_identifier()
        and len(node.inputs) == len(twin.inputs)
        and len(node.outputs) == len(twin.outputs)
        and node.attributes.keys() == twin.attributes.keys()
        and all(
            a.type == twin.attributes[key].type and a.value == twin.attributes[key].value
            for key, a in node.attributes.items()
        )
        and all(
            a.type == b.type and a.shape == b.shape
            for a, b in zip(node.outputs, twin.outputs, strict=True)
        )
    )


def _is_closed(blocks: Sequence[Sequence[ir.Node]], index: int) -> bool:
    """Whether no node reads a block's values but its own and those of the next block."""
    readers = {*blocks[index], *blocks[index + 1]}
    return all(use.node in readers for value in _outputs(blocks[index]) for use in value.uses())


def _outputs(nodes: Sequence[ir.Node]) -> Iterator[ir.Value]:
    return (value for node in nodes for value in node.outputs)


def _places(nodes: Sequence[ir.Node]) -> dict[ir.Value, Place]:
    return {value: (i, j) for i, node in enumerate(nodes) for j, value in enumerate(node.outputs)}


def _copy(
    model: ir.Model,
    tower: Sequence[Sequence[ir.Node]],
    template: int,
    index: int,
    sources: Sequence[Sequence[_Source]],
    stack: str,
) -> list[ir.Node]:
    """One more block, behind the tower's last one."""
    old, new = f"{stack}.{template}.", f"{stack}.{index}."
    copies: list[ir.Node] = []
    for node, wanted in zip(tower[template], sources, strict=True):
        inputs: list[ir.Value | None] = []
        for source in wanted:
            if source.parameter is not None:
                inputs.append(_parameter(model, old + source.parameter, new + source.parameter))
            elif source.internal is not None:
                inputs.append(copies[source.internal[0]].outputs[source.internal[1]])
            elif source.carried is not None:
                inputs.append(tower[-1][source.carried[0]].outputs[source.carried[1]])
            else:
                inputs.append(source.value)
        name = f"{stack}.{index}" + str(node.name).removeprefix(f"{stack}.{template}")
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            num_outputs=len(node.outputs),
            name=name,
        )
        for value, like in zip(copy.outputs, node.outputs, strict=True):
            value.type, value.shape = like.type, like.shape
        copies.append(copy)
    model.graph.insert_after(tower[-1][-1], copies)
    for place in _layer_outputs(model, tower[template], template):
        output = copies[place[0]].outputs[place[1]]
        like = tower[template][place[0]].outputs[place[1]]
        output.name = str(like.name).replace(f".{template}.", f".{index}.", 1)
        model.graph.outputs.append(output)
    return copies


def _layer_outputs(model: ir.Model, block: Sequence[ir.Node], index: int) -> list[Place]:
    """Graph outputs that every block has for itself, such as ``present.3.key``, in order."""
    places = _places(block)
    return [
        places[value]
        for value in model.graph.outputs
        if value in places and f".{index}." in str(value.name)
    ]


def _parameter(model: ir.Model, name: str, new: str) -> ir.Value:
    initializers = model.graph.initializers
    if new not in initializers:
        like = initializers[name]
        initializers[new] = ir.Value(name=new, type=like.type, shape=like.shape)
    return initializers[new]


# --- one block -----------------------------------------------------------------------------------


def keep_block(model: ir.Model, stack: str, index: int) -> None:
    """Take every block of a tower but one out of a graph, in place.

    What comes before the tower feeds the block, and the block feeds what comes behind it; outputs
    that belong to other blocks go.

    Args:
        model: a component's graph, with or without data, quantized or not.
        stack: the tower's blocks.
        index: the block to keep, from 0.

    Raises:
        InternVLError: the blocks are not joined by one value.
    """
    blocks = blocks_of(model, stack)
    if len(blocks) > 1:
        enter, leave = _stream_into(blocks, 0), _stream_out(blocks, len(blocks) - 1)
        before, behind = _stream_into(blocks, index), _stream_out(blocks, index)
        for node, i in [use for use in before.uses() if use.node in set(blocks[index])]:
            node.replace_input_with(i, enter)
        inside = set(blocks[-1])
        for node, i in [use for use in leave.uses() if use.node not in inside]:
            node.replace_input_with(i, behind)
        _keep_outputs(model, blocks, index, leave, behind)
    passes.RemoveUnusedNodesPass()(model)


def _keep_outputs(
    model: ir.Model,
    blocks: Sequence[Sequence[ir.Node]],
    index: int,
    leave: ir.Value,
    behind: ir.Value,
) -> None:
    removed = {v for i, block in enumerate(blocks) if i != index for v in _outputs(block)}
    outputs = [behind if value is leave else value for value in model.graph.outputs]
    if leave in set(model.graph.outputs) and behind is not leave:
        behind.name, leave.name = leave.name, f"{leave.name}.removed"
    kept = [value for value in outputs if value not in removed]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)


def _stream_out(blocks: Sequence[Sequence[ir.Node]], index: int) -> ir.Value:
    """The residual stream behind a block: what its last addition gives."""
    return blocks[index][-1].outputs[0]


def _stream_into(blocks: Sequence[Sequence[ir.Node]], index: int) -> ir.Value:
    """The residual stream in front of a block."""
    if index > 0:
        return _stream_out(blocks, index - 1)
    stream, names = _stream_out(blocks, 0), {node.name: node for node in blocks[0]}
    found = set()
    for node, i in stream.uses():
        twin = names.get(re.sub(r"\.1(?=[./])", ".0", str(node.name), count=1))
        if node in blocks[1] and twin is not None:
            found.add(twin.inputs[i])
    if len(found) != 1 or None in found:
        raise InternVLError(f"{blocks[0][0].name}: the blocks are not joined by one value")
    return found.pop()  # type: ignore[return-value]
