"""Towers of identical blocks: a few blocks are traced, the others are copies of them.

Tracing takes time in proportion to the number of blocks, and the blocks of a tower differ only in
the names of their weights. So a tower is traced with a few blocks, and the last of these are
copied ("stamped") until it has all.

**Why the copies equal a full trace.** Blocks repeat with a period p: one in the vision tower, the
cross-attention frequency in QLLaMA. The traced tower has T ≥ 3p blocks, T ≡ depth (mod p), so that
its end has the phase of the real end. A value's place in its block is its node's name without the
block's name; each block b of the last period is compared with block b − p, node by node. Both must
have the same operators, attributes, types and shapes at the same places, and every input of every
node must be one of

    parameter   of this block, at the same place in it
    internal    the output of an earlier node of this block
    carried     an output of the previous block, at a place that all blocks of its phase have
    fed         an input of the graph that every block has for itself, such as ``past.3.key``
    shared      the very same value in both

That is the step of an induction: whatever adds blocks T − p … T − 1 to a tower of T − p blocks
adds the next p to one of T. Two more conditions must hold for all blocks (``_is_closed``). First,
nodes after the tower must not read any value of it that would be elsewhere in a deeper tower:
parameters are read only by their own block, values that every block computes anew only by that
block and the next one, and only the last block's values are read after the tower. Second, each
block takes the same inputs from the graph and gives it the same outputs, and all of these come
after the graph's others. Finally, the copied nodes must be adjacent. Where any of this does not
hold, nothing is copied and the tower is traced in full. The first period is never copied: values
that all blocks share are computed there, at places that no later block has.

Looking at T blocks cannot show that the blocks after them are built in the same way. The reference
model guarantees that: the only thing it knows of a block is its index modulo p.

``keep_block`` does the opposite: it removes all blocks but one from a graph, for a comparison with
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
Place = tuple[str, int]  # of a value in its block: its node's name without the block's, and output


def shallow_depth(depth: int, period: int) -> int:
    """Return how many blocks of a tower to trace so that the rest can be copied."""
    return min(depth, 3 * period + (depth - 3 * period) % period)


def blocks_of(model: ir.Model, stack: str) -> list[list[ir.Node]]:
    """Collect the nodes of each block of a tower, in order; an empty list without the tower."""
    blocks: dict[int, list[ir.Node]] = {}
    for node in model.graph:
        match = re.match(rf"{re.escape(stack)}\.(\d+)[./]", str(node.name))
        if match is not None:
            blocks.setdefault(int(match[1]), []).append(node)
    return [blocks.get(i, []) for i in range(max(blocks, default=-1) + 1)]


class _Block:
    """A block's nodes, and its values by place."""

    def __init__(self, stack: str, index: int, nodes: Sequence[ir.Node]) -> None:
        self.index, self.name, self.nodes = index, f"{stack}.{index}", nodes
        self.places: dict[ir.Value, Place] = {
            value: (str(node.name).removeprefix(self.name), i)
            for node in nodes
            for i, value in enumerate(node.outputs)
        }
        self.values = {place: value for value, place in self.places.items()}

    def parameter(self, value: ir.Value | None) -> str | None:
        """Return a value's name without the block's, if it is a parameter of the block."""
        name = "" if value is None else str(value.name)
        is_own = value is not None and value.is_initializer() and name.startswith(f"{self.name}.")
        return name.removeprefix(self.name) if is_own else None

    def fed(self, value: ir.Value | None) -> str | None:
        """Return a value's name with a star for the index, if it is the block's own graph input."""
        is_input = value is not None and value.is_graph_input()
        name = _starred(value, self.index)
        return name if is_input and ".*." in name else None


def _blocks(model: ir.Model, stack: str) -> list[_Block]:
    return [_Block(stack, i, nodes) for i, nodes in enumerate(blocks_of(model, stack))]


# --- stamping ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """The source of a node's input in a repeated block; nothing is set if the input is absent."""

    parameter: str | None = None  # its name without the block's
    internal: Place | None = None
    carried: Place | None = None
    fed: str | None = None  # its name with a star for the block's index
    shared: ir.Value | None = None


def stamp(model: ir.Model, stack: str, period: int, depth: int) -> bool:
    """Add blocks to a traced tower until it is ``depth`` deep, in place; values get no names yet.

    Args:
        model: simplified, its initializers without data, ``shallow_depth`` blocks deep.
        stack: the tower's blocks, such as ``vision_model.encoder.layers``.
        period: the number of blocks after which they repeat.
        depth: the number of blocks it should have.

    Returns:
        False, with nothing changed, where the blocks do not repeat as required.
    """
    tower = _blocks(model, stack)
    traced = len(tower)
    if traced == depth:
        return True
    if traced < 3 * period or depth < traced or (depth - traced) % period:
        return False
    last_period = [_template(tower, i, period) for i in range(traced - period, traced)]
    templates = [template for template in last_period if template is not None]
    is_closed = all(_is_closed(model, tower, i, period) for i in range(traced))
    if len(templates) < period or not is_closed or not _are_adjacent(model, tower, period):
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
        _replace_output(model, value, moved[value])
    return True


def _template(tower: Sequence[_Block], index: int, period: int) -> list[list[_Source]] | None:
    """Return the source of every input of a block, if it is the same ``period`` blocks before."""
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
    """Return the block of the last period that has the phase of the block at ``index``."""
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


def _are_adjacent(model: ir.Model, tower: Sequence[_Block], period: int) -> bool:
    """Tell whether the last two periods' nodes, and all own inputs and outputs, are adjacent."""
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
    """Tell whether other nodes and the graph's outputs use a block as they use every block."""
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
    """Tell whether a graph output is a block's own, such as ``present.3.key``."""
    return value in block.places and f".{block.index}." in str(value.name)


def _starred(value: ir.Value | None, index: int) -> str:
    return "" if value is None else str(value.name).replace(f".{index}.", ".*.", 1)


def _layer_inputs(model: ir.Model, block: _Block) -> list[str]:
    """Return the names of a block's own graph inputs, with a star for its index, in order."""
    return [name for name in map(block.fed, model.graph.inputs) if name is not None]


def _layer_outputs(model: ir.Model, block: _Block) -> list[tuple[Place, str]]:
    """Return places and names of a block's own outputs, with a star for its index, in order."""
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
    """Add one more block after the tower's last one."""
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
    """Add the graph inputs of one more block, after the others."""
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


def _replace_output(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Make another value the graph's output, under the same name."""
    position = list(model.graph.outputs).index(old)
    new.name, old.name = old.name, None
    model.graph.outputs[position] = new


# --- one block -----------------------------------------------------------------------------------


def keep_block(model: ir.Model, stack: str, index: int) -> None:
    """Remove every block of a tower but one from a graph, in place.

    The nodes before the tower feed the block, and the block feeds the nodes after it; inputs and
    outputs of other blocks are removed, those that belong to no block stay.

    Args:
        model: a component's graph, with or without data, quantized or not.
        stack: the tower's blocks.
        index: the block to keep, from 0.

    Raises:
        InternVLError: there is no such block, or the blocks are not joined by one value.
    """
    tower = _blocks(model, stack)
    if not 0 <= index < len(tower) or not all(block.nodes for block in tower):
        blocks = f"{len(tower)} blocks, {sum(not block.nodes for block in tower)} of them empty"
        raise InternVLError(f"{stack}: expected a block {index}, found {blocks}")
    if len(tower) > 1:
        kept, last = tower[index], tower[-1]
        enter, before = _stream_before(tower, 0), _stream_before(tower, index)
        leave, after = _stream_after(last), _stream_after(kept)
        tail = {use.node for use in leave.uses()} - set(last.nodes)
        _let_read(kept.nodes, before, enter)
        _let_read(tail, leave, after)
        if leave in model.graph.outputs and leave is not after:
            _replace_output(model, leave, after)
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
    """Return the residual stream before and after a block; raises like ``keep_block``."""
    tower = _blocks(model, stack)
    if not 0 <= index < len(tower) or not all(block.nodes for block in tower):
        raise InternVLError(f"{stack}: expected a block {index}, found {len(tower)} blocks")
    return _stream_before(tower, index), _stream_after(tower[index])


def _stream_after(block: _Block) -> ir.Value:
    """Return the residual stream after a block: the result of its last addition."""
    return block.nodes[-1].outputs[0]


def _stream_before(tower: Sequence[_Block], index: int) -> ir.Value:
    """Return the residual stream before a block; for the first, traced back from its end."""
    if index > 0:
        return _stream_after(tower[index - 1])
    block, entering = tower[0], set()
    waiting = [_stream_after(block)]
    while waiting:
        value = waiting.pop()
        if value not in block.places:
            entering.add(value)
        elif node := value.producer():
            inputs = node.inputs[: ON_THE_STREAM.get(node.op_type, 0)]
            waiting += [v for v in inputs if v is not None and not v.is_initializer()]
    if len(entering) != 1:
        raise InternVLError(f"{block.name}: the blocks are not joined by one value")
    return entering.pop()
