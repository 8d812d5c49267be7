"""Programs lowered in place, against those that PyTorch's exporter lowers."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from support.checkpoints import TINY, write_chat
from torch import Tensor, nn

from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.compiler.steps.meta_model import meta_model
from internvl_edge.export.components import (
    build_component,
    example_inputs,
    input_specs,
    output_names,
)
from internvl_edge.export.config.checkpoint import CheckpointConfig, load_config
from internvl_edge.export.graph import lower, trace
from internvl_edge.export.graph.dtypes import POLICIES, apply_policy

pytestmark = pytest.mark.slow

SIZE = 28  # pixels of an image's side
COMPUTE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def serialized(module: nn.Module, example: Any, dynamic: Any, names: Any, outputs: Any) -> bytes:
    graph = trace.simplify(trace.trace(module, example, dynamic, names, outputs))
    data: bytes = ir.to_proto(graph).SerializeToString(deterministic=True)
    return data


def component(name: str, config: CheckpointConfig, base: str, capacity: int | None) -> bytes:
    model = meta_model(config, config.image_size)
    apply_policy(model, POLICIES[base])
    known = COMPONENTS[name]
    specs = input_specs(known, config, config.image_size, COMPUTE[base], capacity)
    return serialized(
        build_component(known, model),
        example_inputs(specs),
        [{i: d for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs],
        [spec.name for spec in specs],
        output_names(known, config),
    )


def by_the_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "quick_lowering", contextlib.nullcontext)


@pytest.mark.parametrize(
    ("name", "base", "capacity"),
    [
        ("image_embed", "fp16", None),
        ("matcher", "bf16", None),
        ("decoder", "fp16", None),
        ("decoder", "fp32", 40),
        ("chat_vision", "fp16", None),
        ("chat_decoder", "bf16", None),
    ],
)
def test_the_graph_is_the_same_to_the_byte(
    name: str,
    base: str,
    capacity: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = CheckpointConfig(kind="internvl", vision=TINY.vision, internvl=TINY)
    if name.startswith("chat"):
        config = load_config(write_chat(tmp_path / "chat").path)
    lowered: list[bool] = []
    real = lower.lower
    monkeypatch.setattr(lower, "lower", lambda *args: lowered.append(real(*args)) or lowered[-1])
    ours = component(name, config, base, capacity)
    assert lowered == [True]
    by_the_exporter(monkeypatch)
    assert ours == component(name, config, base, capacity)
    assert lowered == [True]


class Foreign(nn.Module):
    """A module with one operator, which ``lower`` leaves to the exporter."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.operator(x)
        return result


def written(x: Tensor) -> Tensor:
    x = x + 1
    x.mul_(2)
    return x


@pytest.mark.parametrize(
    "operator",
    [
        written,  # into its input
        lambda x: x.chunk(2, dim=2)[0] + 1,  # may be a view, and has no ONNX form
        lambda x: x.mT + 1,  # may be a view, and has one
        lambda x: x.flatten(0, 1) + 1,  # to a size that no axis of its input has
        lambda x: x.to(torch.float16, copy=True),  # with more arguments
        torch.square,  # which has no ONNX form
    ],
)
def test_other_operators_are_left_to_the_exporter(
    operator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = [torch.empty(2, 3, 4, device="meta")]
    dynamic = [{0: "batch", 1: "length"}]
    program = torch.export.export(
        Foreign(operator),
        tuple(example),
        dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},),
    )
    before = str(program.graph)
    ours = serialized(Foreign(operator), example, dynamic, ["x"], ["y"])
    with lower.quick_lowering():
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        registry = ONNXRegistry().from_torchlib(opset_version=trace.OPSET)
    assert not lower.lower(program, registry.is_registered)
    assert str(program.graph) == before
    by_the_exporter(monkeypatch)
    assert ours == serialized(Foreign(operator), example, dynamic, ["x"], ["y"])


def test_the_exporter_is_left_as_it_was() -> None:
    from torch.onnx._internal.exporter import _fx_passes as passes
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before = passes.decompose_with_registry, ONNXRegistry.from_torchlib
    with contextlib.suppress(ZeroDivisionError), lower.quick_lowering():
        assert passes.decompose_with_registry is not before[0]
        raise ZeroDivisionError
    assert (passes.decompose_with_registry, ONNXRegistry.from_torchlib) == before


def test_a_pytorch_without_these_functions_lowers_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.onnx._internal.exporter._registration", None)
    with lower.quick_lowering():
        from torch.onnx._internal.exporter import _fx_passes as passes

        assert passes.decompose_with_registry.__module__ == passes.__name__
