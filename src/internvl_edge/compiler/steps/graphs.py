"""One ONNX graph per component: quantized if the recipe says so, bound to the weights, written.

A quantized component has two graphs on the same weights: ``vision.onnx`` computes in float32
around its 8-bit products, which is what ONNX Runtime's CPU kernels fuse; ``vision.fp16.onnx``
computes in 16 bits, which is what engines are built from. Where products are INT8 there is a third,
``vision.u8.onnx``, the first one for CPUs without VNNI (``quantize.graph.unsigned``). There may be
``vision.cuda.onnx`` and ``decoder.cpu.onnx`` for ONNX Runtime's providers (``provider_graphs``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from internvl_edge.artifact.components import (
    COMPONENTS,
    cpu_graph,
    cuda_graph,
    engine_graph,
    unsigned_graph,
)
from internvl_edge.compiler.cost import Cost
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.steps.meta_model import AnyModel
from internvl_edge.compiler.steps.provider_graphs import make_cpu_graph, make_cuda_graph
from internvl_edge.compiler.steps.step import Build, Emitted
from internvl_edge.compiler.steps.trace import trace_all
from internvl_edge.export.graph.bind import bind, save
from internvl_edge.export.graph.signature import tensor_specs
from internvl_edge.quantize.calibration.attention import scales_by_attention
from internvl_edge.quantize.graph.qdq import QuantizedLinear, insert_attention_qdq, insert_qdq
from internvl_edge.quantize.graph.unsigned import take_unsigned_weights
from internvl_edge.quantize.numerics.int4 import block_of


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteGraphs:
    """Write the graphs that were traced, and trace and write those for engines."""

    model: AnyModel  # of ``shallow_model``

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        return ()  # ``Trace`` counts them

    def run(self, plan: Plan, build: Build) -> None:
        for name, model in build.models.items():
            build.graphs[name] = write_graph(plan, name, model, build, f"{name}.onnx")
        build.models = {}
        if plan.engine_base != plan.base:
            others = trace_all(plan, self.model, plan.engine_base, build.report)
            for name, model in others.items():
                write_graph(plan, name, model, build, engine_graph(name, plan.engine_base))


def write_graph(plan: Plan, name: str, model: ir.Model, build: Build, file: str) -> Emitted:
    """Quantize a traced graph if the plan says so, bind its weights, write it as ``file``."""
    directory, stored = build.directory, build.stored
    stream = COMPONENTS[name].stream
    if plan.recipe is not None and stream is not None:
        drop_ones(model, build)
        scales = build.scales[stream]
        linears = {
            weight: _linear(plan, weight, scale)
            for weight, scale in scales.items()
            if weight in model.graph.initializers
        }
        insert_attention_qdq(model, scales_by_attention(scales))
        insert_qdq(model, linears)
    nbytes = bind(model, stored, directory)
    save(model, directory / file)
    emitted = Emitted(
        file=file,
        inputs=tensor_specs(model.graph.inputs),
        outputs=tensor_specs(model.graph.outputs),
        nbytes=nbytes,
    )
    if take_unsigned_weights(model):
        save(model, directory / unsigned_graph(name))
    if file == f"{name}.onnx":
        fused = make_cuda_graph(plan, name, model)
        if fused is not None:
            save(fused, directory / cuda_graph(name))
        joined = make_cpu_graph(name, directory / file)
        if joined is not None:
            save(joined, directory / cpu_graph(name))
    return emitted


def drop_ones(model: ir.Model, build: Build) -> None:
    """Take out the products with factors after GELU that calibration left at one."""
    for name, factors in [*model.graph.initializers.items()]:
        if not name.endswith(".mlp.spread"):
            continue
        place = build.stored[name]
        count = math.prod(place.shape)
        path = build.directory / place.location
        values = np.fromfile(path, place.dtype, count, offset=place.offset)
        if not (values == 1).all():
            continue
        for use in factors.uses():
            (x,) = (value for value in use.node.inputs if value is not factors)
            assert x is not None and use.node.op_type == "Mul"
            ir.convenience.replace_all_uses_with(use.node.outputs[0], x)
            model.graph.remove(use.node, safe=True)
        del model.graph.initializers[name]


def _linear(plan: Plan, weight: str, scale: float | None) -> QuantizedLinear:
    assert plan.recipe is not None
    recipe, block = plan.recipe.of(weight), None
    if recipe.weights == "int4":
        block = block_of(plan.source.tensors[weight].shape[1], recipe.block_size)
    return QuantizedLinear(
        weight=weight, activation_scale=scale, format=recipe.weights, block=block
    )
