"""One ONNX graph per component: traced on the meta device, cleaned, named after the modules.

A trace needs shapes, never weights: the module is on the meta device, ``torch.export`` records it
and PyTorch's exporter converts it at opset 23, which has ``Attention``, ``RMSNormalization``,
``RotaryEmbedding`` and ``Gelu``. The exporter's own optimizer would read weights, which have no
data here, so it stays off, and the passes below do its work: constants are folded wherever no
weight is involved, unused nodes are dropped, equal subexpressions are shared.

The result has one initializer per parameter under the parameter's checkpoint name, without data
(``bind`` refers it to a stored tensor), and node names that say which module a node came from.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import Tensor, nn

from internvl_edge.errors import InternVLError
from internvl_edge.export.graph.lower import quick_lowering
from internvl_edge.files.signals import interrupts_held
from internvl_edge.types import Array

OPSET = 23
OPSETS = {"TensorScatter": 24}  # operators from a newer opset; opset 24 changed none of the others
IR_VERSION = 11  # the lowest that opset 23 allows
PRODUCER = "internvl-edge"
# Folding a constant of more elements than this would write data into the graph file.
MAX_FOLDED_ELEMENTS = 1 << 20
GARBAGE = 100_000  # new objects before the collector looks for cycles; saves an eighth of the time
NOISY_LOGGERS = (
    "torch.onnx._internal.exporter._registration",
    "onnx_ir.passes.common.initializer_deduplication",
    "onnxscript.optimizer",
)


def trace(
    module: nn.Module,
    example: Sequence[Tensor],
    dynamic: Sequence[Mapping[int, str]],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ir.Model:
    """Convert a module on the meta device to a clean ONNX model whose weights have no data.

    Args:
        module: in evaluation mode, all parameters on the meta device.
        example: meta tensors, one per input; a parameter ``*rest`` takes the last of them.
        dynamic: for each input, dimension → symbolic name; equal names are equal sizes, and a
            sum of names such as ``past+length`` is derived from them.
        input_names: names of the graph's inputs.
        output_names: names of the graph's outputs.
    """
    names = {name for dims in dynamic for name in dims.values()}
    symbols = {
        name: torch.export.Dim.DYNAMIC if "+" in name else torch.export.Dim(name)
        for name in sorted(names)
    }
    shapes = [{axis: symbols[name] for axis, name in dims.items()} for dims in dynamic]
    with _quiet_libraries(), interrupts_held(), _rare_collection(), quick_lowering():
        program = torch.onnx.export(
            module,
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            external_data=False,
            dynamic_shapes=_as_arguments(module, shapes),
            input_names=list(input_names),
            output_names=list(output_names),
            verbose=False,
        )
    assert program is not None
    model = program.model
    for value in model.graph.initializers.values():
        value.const_value = None  # a meta tensor, which no pass may mistake for data
    _require_dynamic(model, dynamic)
    _name_dimensions(model, dynamic)
    _read_sizes_from_first(model)
    _reshape_by_constants(model)
    return model


@contextlib.contextmanager
def _rare_collection() -> Iterator[None]:
    """Collect garbage rarely: tracing makes millions of objects, and few of them are garbage."""
    before = gc.get_threshold()
    gc.set_threshold(GARBAGE, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _as_arguments(module: nn.Module, shapes: Sequence[Any]) -> tuple[Any, ...]:
    """Arrange shapes by the parameters of ``forward``: ``*rest`` is one entry, a tuple."""
    parameters = inspect.signature(module.forward).parameters.values()
    if not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return tuple(shapes)
    fixed = len(parameters) - 1
    return (*shapes[:fixed], tuple(shapes[fixed:]))


def _name_dimensions(model: ir.Model, dynamic: Sequence[Mapping[int, str]]) -> None:
    """Give dimensions their requested names; the tracer has its own for sums of others."""
    names = {
        str(value.shape[axis]): name
        for value, dims in zip(model.graph.inputs, dynamic, strict=True)
        for axis, name in dims.items()
        if value.shape is not None
    }
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims = (d if isinstance(d, int) else str(d.value) for d in value.shape)
            value.shape = ir.Shape(
                [d if isinstance(d, int) else names.get(d, d.replace(" + ", "+")) for d in dims]
            )


def _require_dynamic(model: ir.Model, dynamic: Sequence[Mapping[int, str]]) -> None:
    """Refuse frozen sizes: the tracer silently freezes a size that the model reads as a number."""
    for value, dims in zip(model.graph.inputs, dynamic, strict=True):
        assert value.shape is not None
        frozen = [name for axis, name in dims.items() if isinstance(value.shape[axis], int)]
        if frozen:
            raise InternVLError(
                f"input {value.name!r}: expected {', '.join(frozen)} to stay dynamic, but the "
                "trace froze it"
            )


def set_constants(model: ir.Model, constants: Mapping[str, Array]) -> None:
    """Give small computed tables (rotary cos and sin) their values, to be stored in the graph."""
    for name, values in constants.items():
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = ir.tensor(values, name=name)


def simplify(model: ir.Model) -> ir.Model:
    """Fold constants, share subexpressions and drop unused nodes, in place; weights stay.

    Raises:
        InternVLError: the graph needs an operator outside the standard ONNX domain.
    """
    with _quiet_libraries():
        optimizer.optimize_ir(
            model,
            num_iterations=2,
            onnx_shape_inference=False,
            input_size_limit=MAX_FOLDED_ELEMENTS,
            output_size_limit=MAX_FOLDED_ELEMENTS,
            should_fold=_reads_no_weight,
        )
        _name_nodes(model)
        _clean(model)
    foreign = {node.domain for node in model.graph if node.domain not in ("", "ai.onnx")}
    if foreign:
        raise InternVLError(f"the graph needs operators outside standard ONNX: {sorted(foreign)}")
    newest = max((OPSETS.get(node.op_type, OPSET) for node in model.graph), default=OPSET)
    model.opset_imports[""] = newest
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = PRODUCER, None
    return model


def _clean(model: ir.Model) -> None:
    for clean in (
        passes.LiftConstantsToInitializersPass(size_limit=0),
        # each block has its own copy of some tables
        passes.DeduplicateInitializersPass(size_limit=MAX_FOLDED_ELEMENTS),
        passes.CommonSubexpressionEliminationPass(),
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        clean(model)
    name_values(model)


def name_values(model: ir.Model) -> None:
    """Name values after the nodes that produce them, and constants by the order of their use.

    Names then depend on the graph alone, however it was made.
    """
    graph = model.graph
    named = {*graph.inputs, *graph.outputs}
    for value in graph.inputs:
        value.metadata_props.clear()
    used: dict[ir.Value, None] = {}
    for node in graph:
        for i, value in enumerate(node.outputs):
            if value not in named:
                value.name = f"{node.name}:{i}" if i else node.name
            value.metadata_props.clear()
        used |= dict.fromkeys(v for v in node.inputs if v is not None and v.is_initializer())
    graph.initializers.clear()
    count = 0
    for value in used:
        value.metadata_props.clear()
        if value.const_value is not None and not value.is_graph_input():
            value.name, count = f"constant_{count}", count + 1
        graph.initializers[str(value.name)] = value


def _reads_no_weight(node: ir.Node) -> bool | None:
    """Return False, to keep a node, if it reads an initializer without data; None otherwise."""
    for value in node.inputs:
        if value is not None and value.is_initializer() and value.const_value is None:
            return False
    return None


def _name_nodes(model: ir.Model) -> None:
    """Name each node by its module and operator, as in ``encoder.layers.3.attn.qkv/MatMul``."""
    taken: dict[str, int] = {}
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        path = [part.strip("' ") for part in scopes.strip("[]").split(",")]
        # the last scope is the operator's own name; the one before it is the innermost module
        module = path[-2] if len(path) > 1 else ""
        module = "" if module.startswith("_") else module
        name = f"{module}/{node.op_type}" if module else node.op_type
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name] - 1}"


def _read_sizes_from_first(model: ir.Model) -> None:
    """Read each size from the first graph input that has it.

    The tracer reads it from the last one: the cache of a layer, which a tower of another depth may
    not have.
    """
    for node in model.graph:
        value = node.inputs[0] if node.op_type == "Shape" else None
        if value is None or not value.is_graph_input() or value.shape is None:
            continue
        axis = node.attributes.get_int("start", 0)
        if node.attributes.get_int("end", len(value.shape)) == axis + 1:
            first, place = _first_with(model, str(value.shape[axis]))
            node.replace_input_with(0, first)
            node.attributes["start"] = ir.AttrInt64("start", place)
            node.attributes["end"] = ir.AttrInt64("end", place + 1)


def _reshape_by_constants(model: ir.Model) -> None:
    """Use 0 in a Reshape's shape for dynamic sizes that keep their axis.

    The tracer computes the shape from sizes instead, which costs time in every run, and gives the
    first block values that all blocks share.
    """
    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        before, after = node.inputs[0].shape, node.outputs[0].shape  # type: ignore[union-attr]
        if before is None or after is None or all(isinstance(n, int) for n in after):
            continue
        kept = [isinstance(n, int) or before[i : i + 1] == (n,) for i, n in enumerate(after)]
        if all(kept):
            sizes = np.array([n if isinstance(n, int) else 0 for n in after], np.int64)
            shape = ir.node("Constant", [], {"value": ir.tensor(sizes)})
            shape.outputs[0].name = f"{node.name}.shape"
            model.graph.insert_before(node, shape)
            node.replace_input_with(1, shape.outputs[0])
            node.attributes.pop("allowzero", None)


def _first_with(model: ir.Model, dimension: str) -> tuple[ir.Value, int]:
    """Return the first input that has a dimension, and its axis there."""
    return next(
        (value, axis)
        for value in model.graph.inputs
        for axis, size in enumerate(value.shape or ())
        if str(size) == dimension
    )


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Suppress the exporter's notes on packages and internals, which do not concern users."""
    noisy = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
