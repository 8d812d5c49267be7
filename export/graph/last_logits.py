"""Logits of the last positions alone, where whoever runs a decoder asks for no more.

The vocabulary head is as much arithmetic at every position of a prompt as a quarter of a small
language model, and generation throws all but the last row of it away. So a call says from which of
its positions on it wants logits:

    logits = head(hidden[:, logits_from:])       (B, ·, V)      0: of all; −1: of the last; −K: of K

``logits_from`` is an int64 [1] with a value of its own, 0: an initializer that is listed among the
inputs. Without it a decoder is fed and answers as its contract says. ONNX Runtime lets a call
replace the value; TensorRT reads a constant, and the slice folds away.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from internvl_edge.runtime.feeds import LOGITS_FROM

__all__ = ["take_last_logits"]

LOGITS = "logits"
PASSED = ("Cast", "Identity")  # between the head and the graph's output
END = np.iinfo(np.int64).max


def take_last_logits(model: ir.Model) -> None:
    """Let a call choose which logits it wants; a graph without ``logits`` is unchanged."""
    logits = next((value for value in model.graph.outputs if value.name == LOGITS), None)
    head = None if logits is None else logits.producer()
    while head is not None and head.op_type in PASSED:
        head = head.inputs[0].producer()  # type: ignore[union-attr]
    if head is None:
        return
    hidden = head.inputs[0]
    assert head.op_type == "MatMul", head.op_type
    assert hidden is not None
    assert hidden.shape is not None
    start = _constant(model, LOGITS_FROM, 0)
    model.graph.inputs.append(start)
    end, axis = (_constant(model, f"{LOGITS_FROM}.{n}", i) for n, i in (("end", END), ("axis", 1)))
    taken = ir.node("Slice", [hidden, start, end, axis], name=f"{LOGITS_FROM}/Slice")
    (some,) = taken.outputs
    some.name, some.type, some.shape = taken.name, hidden.type, hidden.shape
    model.graph.insert_before(head, taken)
    head.replace_input_with(0, some)
    for value in {some, head.outputs[0]} - {logits}:
        assert value.shape is not None
        value.shape = ir.Shape([value.shape[0], LOGITS, value.shape[2]])


def _constant(model: ir.Model, name: str, number: int) -> ir.Value:
    tensor = ir.tensor(np.array([number], np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    model.graph.register_initializer(value)
    return value
