"""A Q/DQ graph as its matrix products see it: which inputs are pairs, weights, or neither.

In many exports, nodes that only move or convert numbers (``MOVES``) stand between a pair and its
product: the Transpose of a weight, the Reshape and Transpose that split heads. Builders see
through them, and so does this view; an output axis is followed back through every Transpose.

No weights are loaded: sizes come from shapes, and of the constants only scales and zero points of
up to ``MAX_CONSTANT`` elements are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir

from internvl_edge.types import Array

MAX_SCORE_STEPS = 16  # between q kᵀ and its softmax
MAX_CONSTANT = 1 << 20  # elements of a constant that is read
MAX_CONSTANT_STEPS = 64  # nodes between stored values and a constant that follows from them
STANDARD_DOMAINS = ("", "ai.onnx")

MOVES = {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast"}
MOVES |= {"Slice", "Split", "Gather", "Expand"}  # they move their first input
JOINS = {"Concat"}
KEEPS = {
    "Identity",
    "Cast",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
}  # all values
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"}
RANDOM |= {"Multinomial", "Dropout"}
# Products as ONNX Runtime's optimizer writes them, together with what stood around them.
FUSED = {"FusedMatMul", "TransposeMatMul", "GemmFastGelu", "FusedGemm", "FusedConv"}
PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose"} | FUSED
ATTENTIONS = {"Attention", "MultiHeadAttention"}
SCORE_STEPS = {"Mul", "Div", "Add", "Where", "Cast", "Identity", "QuantizeLinear"}
SCORE_STEPS |= {"DequantizeLinear"}  # between the scores and their softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One input of a product."""

    value: ir.Value  # the value that the product reads
    dequantize: ir.Node | None  # None: it is not quantized
    quantize: ir.Node | None  # None: it is not quantized, or stored in 8 bits
    source: ir.Value  # the value before the pair
    is_constant: bool  # it is a weight
    output_axis: int | None  # of the source, for a weight; None: not known, or no weight
    input_axis: int | None  # likewise

    @property
    def element(self) -> ir.DataType | None:
        """The type of its 8-bit values; None where it is not quantized."""
        return None if self.dequantize is None else dtype_of(self.dequantize.inputs[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A matrix product or convolution."""

    node: ir.Node
    operands: tuple[Operand, ...]

    @property
    def weight(self) -> Operand | None:
        """The constant operand, where one is constant and the other is not."""
        constant = [operand for operand in self.operands if operand.is_constant]
        return constant[0] if len(constant) == 1 else None

    @property
    def is_quantized(self) -> bool:
        return any(operand.dequantize is not None for operand in self.operands)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCore:
    """An attention softmax(q kᵀ) v, as one node or as two products around a softmax."""

    name: str
    operands: tuple[Operand, ...]  # q, k, v and, where it is a node, the softmax's output
    probabilities: Operand | None  # the softmax's output; None inside one node
    head_size: int | None
    length: int | None  # of the keys


class View:
    """The nodes of a model that rules are about, by kind."""

    def __init__(self, model: ir.Model, sm: int | None = None) -> None:
        self.model = model
        self.sm = sm  # compute capability of the GPU it will run on, 86 for 8.6; None: any
        self.opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
        self.functions = {(domain, name) for domain, name, _ in model.functions}
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        self.nodes = [node for g in graphs for node in ir.traversal.RecursiveGraphIterator(g)]

    @cached_property
    def quantizers(self) -> list[ir.Node]:
        return [node for node in self.nodes if node.op_type == "QuantizeLinear"]

    @cached_property
    def dequantizers(self) -> list[ir.Node]:
        return [node for node in self.nodes if node.op_type == "DequantizeLinear"]

    @cached_property
    def products(self) -> list[Product]:
        return [_product(node) for node in self.nodes if node.op_type in PRODUCTS]

    @cached_property
    def attentions(self) -> list[AttentionCore]:
        fused = [_fused(node) for node in self.nodes if node.op_type in ATTENTIONS]
        parts = [_decomposed(node) for node in self.nodes if node.op_type == "Softmax"]
        return [core for core in (*fused, *parts) if core is not None]


# --- values --------------------------------------------------------------------------------------


def name_of(node: ir.Node) -> str:
    """Return a node's name, or that of its first output, by which graph viewers find it too."""
    return node.name or (node.outputs[0].name if node.outputs else None) or node.op_type


def is_stored(value: ir.Value) -> bool:
    """Tell whether a value is an initializer or a Constant."""
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def is_constant(value: ir.Value | None) -> bool:
    """Tell whether a value is stored in the model, or follows from stored ones alone.

    Builders and ONNX Runtime compute such values once. Values of a pair are not among them: what
    is rounded is the rules' matter.
    """
    if value is None:
        return False
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        if is_stored(current):
            continue
        node = current.producer()
        if node is None or len(seen) > MAX_CONSTANT_STEPS or not _is_pure(node):
            return False
        fresh = [source for source in node.inputs if source is not None and source not in seen]
        seen.update(fresh)
        pending += fresh
    return True


def _is_pure(node: ir.Node) -> bool:
    """Tell whether a node's outputs follow from its inputs alone, and no pair is made by it."""
    has_graph = any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for attribute in node.attributes.values()
    )
    pairs = {"QuantizeLinear", "DequantizeLinear"}
    is_standard = node.domain in STANDARD_DOMAINS
    return is_standard and not has_graph and node.op_type not in RANDOM | pairs


def constant(value: ir.Value | None) -> Array | None:
    """Read a small constant, through nodes that keep its values and their number.

    Returns:
        None if it is computed in another way, large, or in a file that is absent.
    """
    keeps: list[ir.Node] = []
    while value is not None and not is_stored(value):
        node = value.producer()
        if node is None or node.op_type not in KEEPS or len(keeps) == MAX_CONSTANT_STEPS:
            return None
        keeps.append(node)
        value = node.inputs[0] if node.inputs else None
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > MAX_CONSTANT:
        return None
    if isinstance(tensor, ir.ExternalTensor) and not _is_file_in_folder(tensor):
        return None
    try:
        values = np.asarray(tensor.numpy())
        for node in reversed(keeps):
            values = _kept(node, values)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return values


def _kept(node: ir.Node, values: Array) -> Array:
    """Compute a node of ``KEEPS``; of shapes only the order of the values matters."""
    if node.op_type == "Cast":
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(ir.DataType(node.attributes["to"].as_int()).numpy())
    if node.op_type == "Transpose" and values.ndim > 1:
        order = node.attributes.get("perm")
        return values.transpose(None if order is None else order.as_ints())
    return values


def _is_file_in_folder(tensor: ir.ExternalTensor) -> bool:
    """Tell whether an external tensor's file is a regular one in or below the model's folder."""
    folder, path = (Path(p).resolve() for p in (tensor.base_dir or ".", tensor.path))
    return path.is_relative_to(folder) and path.is_file()


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype


def size_of(value: ir.Value | None, axis: int | None) -> int | None:
    """Return the size of a dimension; None where it is not known."""
    if value is None or value.shape is None or axis is None:
        return None
    if not -len(value.shape) <= axis < len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def readers(value: ir.Value) -> Iterator[ir.Node | None]:
    """Yield the nodes that use a value's numbers, seen through ``MOVES``; None: a graph output."""
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        if current.is_graph_output():
            yield None
        for use in current.uses():
            if use.node.op_type not in MOVES | JOINS:
                yield use.node
            elif use.node.op_type in JOINS or use.idx == 0:
                fresh = [output for output in use.node.outputs if output not in seen]
                seen.update(fresh)
                pending += fresh


def origin(value: ir.Value, steps: set[str] = MOVES) -> ir.Value:
    """Follow a value back through nodes of some kinds, by their first inputs."""
    seen = {value}
    while (node := value.producer()) is not None and node.op_type in steps:
        source = node.inputs[0] if node.inputs else None
        if source is None or source in seen:
            break
        seen.add(source)
        value = source
    return value


def _scores(value: ir.Value, steps: int = MAX_SCORE_STEPS) -> ir.Node | None:
    """Find the product whose scores a softmax reads; the mask may be either input of its Add."""
    node = value.producer()
    if node is None or steps == 0 or node.op_type == "MatMul":
        return node
    if node.op_type not in MOVES | SCORE_STEPS:
        return None
    products = (_scores(x, steps - 1) for x in node.inputs if x is not None)
    return next((product for product in products if product is not None), None)


# --- products ------------------------------------------------------------------------------------


def _product(node: ir.Node) -> Product:
    operands = [
        _operand(value, *_axes(node, i, value))
        for i, value in enumerate(node.inputs[:2])
        if value is not None
    ]
    return Product(node=node, operands=tuple(operands))


def _axes(node: ir.Node, index: int, value: ir.Value) -> tuple[int | None, int | None]:
    """Return the axes of the product's outputs and inputs in an input, if it were the weight."""
    if node.op_type in ("Conv", "FusedConv"):
        return 0, 1
    if node.op_type == "ConvTranspose":
        return 1, 0
    attribute = node.attributes.get("transB" if index else "transA")
    is_transposed = attribute is not None and bool(attribute.value)
    if node.op_type in ("Gemm", "FusedGemm"):
        first = bool(index) == is_transposed
        return (0, 1) if first else (1, 0)
    rank = None if value.shape is None else len(value.shape)
    if rank is None or rank < 2:
        return None, None
    last = bool(index) != is_transposed  # only a fused MatMul says that it transposes
    return (rank - 1, rank - 2) if last else (rank - 2, rank - 1)


def _operand(value: ir.Value, output_axis: int | None, input_axis: int | None) -> Operand:
    """Follow an input back to its pair, and from there to the value that was quantized."""
    axes: list[int | None] = [output_axis, input_axis]
    source = _origin_with_axes(value, axes)
    dequantize = source.producer()
    quantize = None
    if dequantize is not None and dequantize.op_type == "DequantizeLinear" and dequantize.inputs[0]:
        source = _origin_with_axes(dequantize.inputs[0], axes)
        quantize = source.producer()
        if quantize is not None and quantize.op_type == "QuantizeLinear" and quantize.inputs[0]:
            source = _origin_with_axes(quantize.inputs[0], axes)
        else:
            quantize = None
    else:
        dequantize = None
    is_weight = is_constant(source)
    return Operand(
        value=value,
        dequantize=dequantize,
        quantize=quantize,
        source=source,
        is_constant=is_weight,
        output_axis=axes[0] if is_weight else None,
        input_axis=axes[1] if is_weight else None,
    )


def _origin_with_axes(value: ir.Value, axes: list[int | None]) -> ir.Value:
    """Follow a value back as ``origin`` does, updating the axes; a reshape makes them unknown."""
    seen = {value}
    while (node := value.producer()) is not None and node.op_type in MOVES:
        source = node.inputs[0] if node.inputs else None
        if source is None or source in seen:
            break
        seen.add(source)
        if node.op_type == "Transpose":
            order = node.attributes.get("perm")
            rank = len(source.shape) if source.shape is not None else 2
            perm = list(order.value) if order is not None else list(range(rank))[::-1]
            axes[:] = [None if a is None or a >= len(perm) else int(perm[a]) for a in axes]
        elif node.op_type not in ("Identity", "Cast"):
            axes[:] = [None, None]
        value = source
    return value


# --- attention -----------------------------------------------------------------------------------


def _fused(node: ir.Node) -> AttentionCore | None:
    values = [value for value in node.inputs[:3] if value is not None]
    if len(values) < 3:
        return None
    attribute = node.attributes.get("q_num_heads") or node.attributes.get("num_heads")
    heads = int(attribute.value) if attribute is not None else 0
    query, key = values[:2]
    size = size_of(query, -1)
    rank = 0 if query.shape is None else len(query.shape)
    if rank == 3:
        size = None if size is None or heads < 1 else size // heads
    return AttentionCore(
        name=name_of(node),
        operands=tuple(_operand(value, None, None) for value in values),
        probabilities=None,
        head_size=size,
        length=size_of(key, -2),
    )


def _decomposed(softmax: ir.Node) -> AttentionCore | None:
    """Return the attention whose products surround a softmax, if neither product has a weight."""
    if not softmax.inputs or softmax.inputs[0] is None:
        return None
    scores = _scores(softmax.inputs[0])
    through = [softmax.outputs[0]]
    through += [
        output
        for node in readers(softmax.outputs[0])
        if node is not None and node.op_type == "QuantizeLinear"
        for pair in readers(node.outputs[0])
        if pair is not None and pair.op_type == "DequantizeLinear"
        for output in pair.outputs
    ]
    mixes = [n for v in through for n in readers(v) if n is not None and n.op_type == "MatMul"]
    if scores is None or scores.op_type != "MatMul" or not mixes:
        return None
    first, second = _product(scores), _product(mixes[0])
    if len(first.operands) < 2 or len(second.operands) < 2:
        return None
    probabilities, values = second.operands
    if any(operand.is_constant for operand in (*first.operands, probabilities, values)):
        return None
    return AttentionCore(
        name=name_of(softmax),
        operands=(*first.operands, values, probabilities),
        probabilities=probabilities,
        head_size=size_of(first.operands[0].value, -1),
        length=size_of(values.value, -2),
    )
