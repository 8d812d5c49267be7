"""Lower a captured program to operators that have an ONNX form, without running it again.

PyTorch's exporter lowers a program by running it twice more on symbolic tensors, makes types equal
by running it once more, and reads the sources of five hundred operators anew for each program: two
thirds of the time of a trace. Of what our models record, only a few operators have no ONNX form
that the exporter takes as it is:

    x.to(dtype)                   x itself if it has that dtype, else ``_to_copy``
    x.flatten(…), x.unflatten(…)  a reshape to the sizes that were recorded
    x & y, x | y                  ``bitwise_and``, ``bitwise_or``, which take booleans too

``lower`` replaces these. Where a program has another operator without an ONNX form, or one that
writes into its input, the exporter lowers it. Types are made equal by the exporter's own rules, on
the values that were recorded: only what changes is run. Either way the graph is the same.

The exporter offers no place to plug this in, so three of its functions are replaced while a trace
runs. A PyTorch without these functions goes its own way, and takes its time.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

aten = torch.ops.aten

BITWISE = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
}
RESHAPES = (aten.flatten.using_ints, aten.unflatten.int)
# Checks, which the exporter drops
CHECKS = (
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
)

_replacing = threading.RLock()  # held while functions of the exporter are replaced


@contextlib.contextmanager
def quick_lowering() -> Iterator[None]:
    """Let PyTorch's exporter lower programs by ``lower``, and set up its operators only once."""
    try:
        from torch.onnx._internal.exporter import _fx_passes as passes
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        decompose, set_up = passes.decompose_with_registry, ONNXRegistry.from_torchlib
        promote, promoted = passes.insert_type_promotion_nodes, _promotion()
    except (ImportError, AttributeError):
        yield
        return

    def lowered(exported_program: ExportedProgram, registry: ONNXRegistry) -> ExportedProgram:
        is_done = lower(exported_program, registry.is_registered)
        return exported_program if is_done else decompose(exported_program, registry)

    with _replacing:
        passes.decompose_with_registry = lowered
        passes.insert_type_promotion_nodes = promoted  # type: ignore[assignment]
        ONNXRegistry.from_torchlib = staticmethod(functools.partial(_once, set_up))  # type: ignore[method-assign]
        try:
            yield
        finally:
            passes.decompose_with_registry = decompose
            passes.insert_type_promotion_nodes = promote
            ONNXRegistry.from_torchlib = set_up  # type: ignore[method-assign]


@functools.cache
def _once(set_up: Callable[..., Any], opset_version: int) -> Any:
    return set_up(opset_version=opset_version)


@functools.cache
def _promotion() -> Callable[[fx.GraphModule], None]:
    """Make the exporter's pass that makes types equal, without running what it leaves as it is.

    Raises:
        ImportError, AttributeError: this PyTorch has no such pass.
    """
    from torch.onnx._internal.fx.passes import type_promotion

    find_rule = type_promotion.get_type_promotion_rule

    class OnRecorded(type_promotion._TypePromotionInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            with self._set_current_node(n):
                if rule := find_rule(n, self.type_promotion_table):
                    self._maybe_promote_node(n, rule)
            if n.op == "call_function" and "val" in n.meta:
                return n.meta["val"]
            return fx.Interpreter.run_node(self, n)

    def promoted(graph_module: fx.GraphModule) -> None:
        for module in graph_module.modules():
            assert isinstance(module, fx.GraphModule)  # as the exporter has it
            insert = type_promotion.InsertTypePromotion(module)
            insert.interpreter = OnRecorded(module, insert.interpreter.type_promotion_table)
            insert.run()

    return promoted


def lower(program: ExportedProgram, has_form: Callable[[Any], bool]) -> bool:
    """Replace what has no ONNX form, in place.

    Args:
        program: as ``torch.export.export`` returns it.
        has_form: whether the exporter knows an ONNX form of an operator.

    Returns:
        False, with nothing changed, where the program has other such operators.
    """
    nodes = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    if not all(_is_known(node, has_form) for node in nodes):
        return False
    for node in nodes:
        if node.target is aten.to.dtype:
            _replace_cast(node)
        elif node.target in RESHAPES:
            _replace_reshape(node)
        else:
            node.target = BITWISE.get(node.target, node.target)
    return True


def _is_known(node: fx.Node, has_form: Callable[[Any], bool]) -> bool:
    """Tell whether a node may stay as it is, or is replaced."""
    target = node.target
    if node.op != "call_function":
        return False
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem or has_form(target)
    if target in RESHAPES:
        return None not in _sizes(node)
    if target is aten.to.dtype:
        return len(node.args) == 2 and not node.kwargs
    if target.namespace == "onnx" or target in BITWISE or target in CHECKS:
        return True
    return has_form(target) and not target._schema.is_mutable and not _is_decomposed(target)


def _is_decomposed(target: torch._ops.OpOverload) -> bool:
    """Tell whether the exporter decomposes an operator although it has an ONNX form.

    It does so where the result may or may not be a view of the input. A reshape is the same in
    ONNX in any case.
    """
    if target is aten.reshape.default:
        return False
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    may_alias = any(argument.alias_info is not None for argument in target._schema.arguments)
    return may_alias and target.has_kernel_for_dispatch_key(composite)


def _replace_cast(node: fx.Node) -> None:
    x, dtype = node.args
    assert isinstance(x, fx.Node)
    if x.meta["val"].dtype == dtype:
        node.target, node.args = aten.alias.default, (x,)
    else:
        node.target, node.args, node.kwargs = aten._to_copy.default, (x,), {"dtype": dtype}


def _replace_reshape(node: fx.Node) -> None:
    x, graph = node.args[0], node.graph
    shape: list[Any] = []
    for size, axis in zip(node.meta["val"].shape, _sizes(node), strict=True):
        if isinstance(size, int):
            shape.append(size)
            continue
        with graph.inserting_before(node):
            read = graph.call_function(aten.sym_size.int, (x, axis))
        read.meta = {**node.meta, "val": size}
        shape.append(read)
    node.target, node.args, node.kwargs = aten.reshape.default, (x, shape), {}


def _sizes(node: fx.Node) -> list[int | None]:
    """For each axis of a reshape's result: the axis of its input that has the same dynamic size.

    It is -1 for a size that is a number, and None where no axis of the input has the size.
    """
    x = node.args[0]
    assert isinstance(x, fx.Node)
    before = [str(size) for size in x.meta["val"].shape]
    after = node.meta["val"].shape
    return [
        -1 if isinstance(size, int) else before.index(str(size)) if str(size) in before else None
        for size in after
    ]
