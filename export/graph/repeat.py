"""Towers of identical blocks: traced a few blocks deep, the rest stamped.

Tracing takes time in proportion to the number of blocks, and the blocks of a tower differ in
nothing but the names of their weights. So a tower is traced with a few blocks, and the last of
them are copied until it has all.

**Why the copy is what a trace would give.** Blocks repeat with a period p: one in the vision
tower, the cross-attention frequency in QLLaMA. The traced tower has T ≥ 3p blocks, T ≡ depth
(mod p), so that its end has the phase of the real end. A value's place in its block is its node's
name behind the block's; each block b of the last period is held against block b − p, node by
node. Both must have the same operators, attributes, types and shapes at the same places, and every
input of every node must be one of

    parameter   of this block, at the same place in it
    internal    the output of an earlier node of this block
    carried     an output of the block before, at a place that all blocks of its phase have
    fed         an input of the graph that every block has for itself, as ``past.3.key``
    shared      one and the same value in both

That is the step of an induction: whatever adds blocks T − p … T − 1 to a tower of T − p blocks
adds the next p to one of T. It leaves two things to show, of all blocks (``_is_closed``). What
comes behind the tower must see nothing of it that would be elsewhere in a deeper one: parameters
are read by their own block, and what every block computes anew by itself and the next one; only
the last block's values go further. And each block takes the same inputs from the graph and gives
it the same outputs, all of them behind the others. At last, the copied nodes must stand together.
Where any of this does not hold, nothing is stamped and the tower is traced in full. The first
period is never copied: what all blocks share is computed there, at places no later block has.

What no look at T blocks can show is that the blocks behind them are built alike. The reference
model does so: it knows of a block only its index modulo p.

``keep_block`` is the opposite: it takes all blocks but one out of a graph, for a comparison with
PyTorch that needs no more memory than one block.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common as passes

from internvl_edge.errors import InternVLError

ON_THE_STREAM = {"Add": 2, "Cast": 1, "Concat": 2, "Slice": 1}  # → inputs that may be the stream
Place = tuple[str, int]  # of a value in its block: its node's name behind the block's, its output


def shallow_depth(depth: int, period: int) -> int:
    """How many blocks of a tower to trace so that the rest can be stamped."""
    return min(depth, 3 * period + (depth - 3 * period) % period)


def blocks_of(model: ir.Model, stack: str) -> list[list[ir.Node]]:
    """The nodes of each block of a tower, in order; no block where there is no such tower."""
    blocks: dict[int, list[ir.Node]] = {}
    for node in model.graph:
        match = re.match(rf"{re.escape(stack)}\.(\d+)[./]", str(node.name))
        if match is not None:
            blocks.setdefault(int(match[1]), []).append(node)
    return [blocks.get(i, []) for i in range(max(blocks, default=-1) + 1)]


class _Block:
    """A block's nodes, and its values by their places."""

    def __init__(self, stack: str, index: int, nodes: Sequence[ir.Node]) -> None:
        self.index, self.name, self.nodes = index, f"{stack}.{index}", nodes
        self.places: dict[ir.Value, Place] = {
            value: (str(node.name).removeprefix(self.name), i)
            for node in nodes
            for i, value in enumerate(node.outputs)
        }
        self.values = {place: value for value, place in self.places.items()}

    def parameter(self, value: ir.Value | None) -> str | None:
        """The name behind the block's, if the value is a parameter of it."""
        name = "" if value is None else str(value.name)
        is_own = value is not None and value.is_initializer() and name.startswith(f"{self.name}.")
        return name.removeprefix(self.name) if is_own else None

    def fed(self, value: ir.Value | None) -> str | None:
        """The name with a star for the block's index, if the value is a graph input of its own."""
        is_input = value is not None and value.is_graph_input()
        name = _starred(value, self.index)
        return name if is_input and ".*." in name else None


def _blocks(model: ir.Model, stack: str) -> list[_Block]:
    return [_Block(stack, i, nodes) for i, nodes in enumerate(blocks_of(model, stack))]


# --- stamping ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Where an input of a node of a repeated block comes from; nothing is set if it is absent."""

    parameter: str | None = None  # its name behind the block's
    internal: Place | None = None
    carried: Place | None = None
    fed: str | None = None  # its name with a star for the block's index
    shared: ir.Value | None = None


def stamp(model: ir.Model, stack: str, period: int, depth: int) -> bool:
    """Add blocks to a traced tower until it is ``depth`` deep, in place; values get no names yet.

    Args:
        model: simplified, its initializers without data, ``shallow_depth`` blocks deep.
        stack: the tower's blocks, such as ``vision_model.encoder.layers``.
        period: after how many blocks they repeat.
        depth: how many blocks it should have.

    Returns:
        False, and nothing is changed, where the blocks are not found to repeat.
    """
    tower = _blocks(model, stack)
    traced = len(tower)
    if traced == depth:
        return True
    if traced < 3 * period or depth < traced or (depth - traced) % period:
        return False
    found = [_template(tower, i, period) for i in range(traced - period, traced)]
    templates = [template for template in found if template is not None]
    is_closed = all(_is_closed(model, tower, i, period) for i in range(traced))
    if len(templates) < period or not is_closed or not _stand_together(model, tower, period):
        return False
    last = tower[-1]
    tail = [(v, {use.node for use in v.uses()} - set(last.nodes)) for v in last.places]
    ends = [v for v in model.graph.outputs if v in last.places and not _is_layer_output(last, v)]
    for index in range(traced, depth):
        phase = (index - traced) % period
        like = tower[traced - period + phase]
        tower.append(_copy(model, stack, like, tower[-1], index, templates[phase]))
    moved = {v: tower[-1].values[place] for v, place in last.places.items()}
    for value, readers in tail:
        _let_read(readers, value, moved[value])
    for value in ends:
        _let_give(model, value, moved[value])
    return True


def _template(tower: Sequence[_Block], index: int, period: int) -> list[list[_Source]] | None:
    """The source of every input of a block, if it is the same as ``period`` blocks before."""
    block, twin = tower[index], tower[index - period]
    before, twin_before = tower[index - 1], tower[index - period - 1]
    repeated = _last_like(tower, index - 1, period).values
    is_alike = list(block.places.values()) == list(twin.places.values())
    if not is_alike or not block.nodes or len(block.values) < len(block.places):
        return None
    template = []
    for node, like in zip(block.nodes, twin.nodes, strict=True):
        sources = [_source(value, block, before, repeated) for value in node.inputs]
        wanted = [_source(value, twin, twin_before, repeated) for value in like.inputs]
        if sources != wanted or not _same_operator(node, like):
            return None
        template.append(sources)
    return template


def _last_like(tower: Sequence[_Block], index: int, period: int) -> _Block:
    """The block of the last period that has a block's phase."""
    return tower[len(tower) - period + (index - len(tower)) % period]


def _source(
    value: ir.Value | None, block: _Block, before: _Block, repeated: Container[Place]
) -> _Source:
    if value is None:
        return _Source()
    if value in block.places:
        return _Source(internal=block.places[value])
    if before.places.get(value) in repeated:
        return _Source(carried=before.places[value])
    parameter, fed = block.parameter(value), block.fed(value)
    return _Source(parameter=parameter, fed=fed, shared=None if parameter or fed else value)


def _same_operator(node: ir.Node, twin: ir.Node) -> bool:
    return (
        node.op_identifier() == twin.op_identifier()
        and node.attributes.keys() == twin.attributes.keys()
        and all(
            a.type == twin.attributes[key].type and a.value == twin.attributes[key].value
            for key, a in node.attributes.items()
        )
        and _same_tensors(node.inputs, twin.inputs)
        and _same_tensors(node.outputs, twin.outputs)
    )


def _same_tensors(values: Sequence[ir.Value | None], others: Sequence[ir.Value | None]) -> bool:
    kinds, wanted = ([v and (v.type, v.shape) for v in some] for some in (values, others))
    return kinds == wanted


def _stand_together(model: ir.Model, tower: Sequence[_Block], period: int) -> bool:
    """Whether the nodes of the last two periods, and inputs and outputs of all, stand together."""
    wanted = [node for block in tower[-2 * period :] for node in block.nodes]
    nodes = list(model.graph)
    start = nodes.index(wanted[0]) if wanted else 0
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    fed = [v for block in tower for v in inputs if block.fed(v)]
    own = [v for block in tower for v in outputs if _is_layer_output(block, v)]
    return (
        nodes[start : start + len(wanted)] == wanted
        and inputs[len(inputs) - len(fed) :] == fed
        and outputs[len(outputs) - len(own) :] == own
    )


def _is_closed(model: ir.Model, tower: Sequence[_Block], index: int, period: int) -> bool:
    """Whether others read of a block, and the graph gives of it, what they do of every block."""
    block, is_last = tower[index], index == len(tower) - 1
    template = _last_like(tower, index, period)
    readers, anew = set(block.nodes), [v for node in block.nodes for v in node.inputs]
    private = [v for v in anew if v is not None and (block.parameter(v) or block.fed(v))]
    outputs = [v for v in model.graph.outputs if v in block.places]
    if not is_last:
        readers |= set(tower[index + 1].nodes)
        private += [v for place, v in block.values.items() if place in template.values]
        if not all(_is_layer_output(block, v) for v in outputs):
            return False
    is_same = _layer_inputs(model, block) == _layer_inputs(model, template)
    is_same &= _layer_outputs(model, block) == _layer_outputs(model, template)
    return is_same and all(use.node in readers for v in private for use in v.uses())


def _is_layer_output(block: _Block, value: ir.Value) -> bool:
    """Whether a graph output is one that every block has for itself, such as ``present.3.key``."""
    return value in block.places and f".{block.index}." in str(value.name)


def _starred(value: ir.Value | None, index: int) -> str:
    return "" if value is None else str(value.name).replace(f".{index}.", ".*.", 1)


def _layer_inputs(model: ir.Model, block: _Block) -> list[str]:
    """Names of the graph inputs that are a block's own, a star for its index, in order."""
    return [name for name in map(block.fed, model.graph.inputs) if name is not None]


def _layer_outputs(model: ir.Model, block: _Block) -> list[tuple[Place, str]]:
    """Their places and their names, a star for the block's index, in order."""
    values = [value for value in model.graph.outputs if _is_layer_output(block, value)]
    return [(block.places[v], _starred(v, block.index)) for v in values]


def _copy(
    model: ir.Model,
    stack: str,
    template: _Block,
    last: _Block,
    index: int,
    sources: Sequence[Sequence[_Source]],
) -> _Block:
    """One more block, behind the tower's last one."""
    name = f"{stack}.{index}"
    values: dict[Place, ir.Value] = {}
    fed = {v.name: v for v in _fed_copies(model, template, index)}
    copies: list[ir.Node] = []
    for node, wanted in zip(template.nodes, sources, strict=True):
        inputs = list(node.inputs)
        for i, source in enumerate(wanted):
            if source.parameter is not None:
                inputs[i] = _parameter(model, inputs[i], name + source.parameter)
            elif source.internal is not None:
                inputs[i] = values[source.internal]
            elif source.carried is not None:
                inputs[i] = last.values[source.carried]
            elif source.fed is not None:
                inputs[i] = fed[source.fed.replace(".*.", f".{index}.", 1)]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=name + str(node.name).removeprefix(template.name),
        )
        for value, like in zip(copy.outputs, node.outputs, strict=True):
            value.type, value.shape = like.type, like.shape
            values[template.places[like]] = value
        copies.append(copy)
    model.graph.insert_after(last.nodes[-1], copies)
    for place, output in _layer_outputs(model, template):
        values[place].name = output.replace(".*.", f".{index}.", 1)
        model.graph.outputs.append(values[place])
    return _Block(stack, index, copies)


def _fed_copies(model: ir.Model, template: _Block, index: int) -> list[ir.Value]:
    """New inputs of the graph for one more block, behind the others."""
    copies = [
        ir.Value(name=name.replace(".*.", f".{index}.", 1), type=value.type, shape=value.shape)
        for value in model.graph.inputs
        if (name := template.fed(value))
    ]
    model.graph.inputs.extend(copies)
    return copies


def _parameter(model: ir.Model, like: ir.Value | None, name: str) -> ir.Value:
    initializers = model.graph.initializers
    if name not in initializers:
        assert like is not None
        initializers[name] = ir.Value(name=name, type=like.type, shape=like.shape)
    return initializers[name]


def _let_read(readers: Collection[ir.Node], old: ir.Value, new: ir.Value) -> None:
    for node, i in list(old.uses()):
        if node in readers:
            node.replace_input_with(i, new)


def _let_give(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Make another value the graph's output, under the same name."""
    position = list(model.graph.outputs).index(old)
    new.name, old.name = old.name, None
    model.graph.outputs[position] = new


# --- one block -----------------------------------------------------------------------------------


def keep_block(model: ir.Model, stack: str, index: int) -> None:
    """Take every block of a tower but one out of a graph, in place.

    What comes before the tower feeds the block, and the block feeds what comes behind it; inputs
    and outputs that belong to other blocks go, those that belong to none stay.

    Args:
        model: a component's graph, with or without data, quantized or not.
        stack: the tower's blocks.
        index: the block to keep, from 0.

    Raises:
        InternVLError: there is no such block, or the blocks are not joined by one value.
    """
    tower = _blocks(model, stack)
    if not 0 <= index < len(tower) or not all(block.nodes for block in tower):
        found = f"{len(tower)} blocks, {sum(not block.nodes for block in tower)} of them empty"
        raise InternVLError(f"{stack}: expected a block {index}, found {found}")
    if len(tower) > 1:
        kept, last = tower[index], tower[-1]
        enter, before = _stream_into(tower, 0), _stream_into(tower, index)
        leave, behind = _stream_behind(last), _stream_behind(kept)
        tail = {use.node for use in leave.uses()} - set(last.nodes)
        _let_read(kept.nodes, before, enter)
        _let_read(tail, leave, behind)
        if leave in model.graph.outputs and leave is not behind:
            _let_give(model, leave, behind)
        removed = {v for block in tower if block is not kept for v in block.places}
        outputs = [v for v in model.graph.outputs if v not in removed]
        model.graph.outputs.clear()
        model.graph.outputs.extend(outputs)
        others = [v for b in tower if b is not kept for v in model.graph.inputs if b.fed(v)]
        passes.RemoveUnusedNodesPass()(model)
        for value in others:
            model.graph.inputs.remove(value)
    passes.RemoveUnusedNodesPass()(model)


def residual_stream(model: ir.Model, stack: str, index: int) -> tuple[ir.Value, ir.Value]:
    """The residual stream before a block of a tower, and behind it; raises as ``keep_block``."""
    tower = _blocks(model, stack)
    if not 0 <= index < len(tower) or not all(block.nodes for block in tower):
        raise InternVLError(f"{stack}: expected a block {index}, found {len(tower)} blocks")
    return _stream_into(tower, index), _stream_behind(tower[index])


def _stream_behind(block: _Block) -> ir.Value:
    """The residual stream behind a block: what its last addition gives."""
    return block.nodes[-1].outputs[0]


def _stream_into(tower: Sequence[_Block], index: int) -> ir.Value:
    """The residual stream in front of a block; of the first, what additions carry to its end."""
    if index > 0:
        return _stream_behind(tower[index - 1])
    block, found = tower[0], set()
    waiting = [_stream_behind(block)]
    while waiting:
        value = waiting.pop()
        if value not in block.places:
            found.add(value)
        elif node := value.producer():
            given = node.inputs[: ON_THE_STREAM.get(node.op_type, 0)]
            waiting += [v for v in given if v is not None and not v.is_initializer()]
    if len(found) != 1:
        raise InternVLError(f"{block.name}: the blocks are not joined by one value")
    return found.pop()
