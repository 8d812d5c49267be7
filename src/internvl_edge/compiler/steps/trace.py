"""Every component traced, on the meta device: graphs whose weights have no data yet.

Towers are traced a few blocks deep and stamped (``export.graph.repeat``). A trace takes seconds and
depends on the configuration and dtypes alone, never on weights, so the last ones are kept: exports
of one checkpoint at several precisions share them.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import onnx_ir as ir

from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.compiler.cost import IMPORTS_NBYTES, Cost
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress, Report
from internvl_edge.compiler.steps.meta_model import (
    AnyModel,
    meta_model,
    rotary_constants,
    shallow_config,
)
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.weights.layout import block_sizes, towers_of
from internvl_edge.export.components import (
    build_component,
    example_inputs,
    input_specs,
    output_names,
)
from internvl_edge.export.config.checkpoint import CheckpointConfig, VisionConfig
from internvl_edge.export.graph.dtypes import POLICIES, apply_policy
from internvl_edge.export.graph.last_logits import take_last_logits
from internvl_edge.export.graph.repeat import blocks_of, stamp
from internvl_edge.export.graph.trace import name_values, set_constants, simplify, trace
from internvl_edge.export.graph.uint8_input import take_levels

logger = logging.getLogger(__name__)

MAX_KEPT_NBYTES = 100_000_000  # of traces
NODE_NBYTES = 3_000  # of a node with its values
START_SECONDS = 3.0
TRACE_SECONDS_PER_COMPONENT = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Trace every component, at the precision that ONNX Runtime's graphs compute in."""

    model: AnyModel  # of ``shallow_model``

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        """State what all graphs need, those for engines too, which are traced when written."""
        graphs = len(plan.bases)
        blocks = len(block_sizes(plan))
        cost = Cost(
            name="trace",
            memory_nbytes=IMPORTS_NBYTES + 1_000_000 * blocks,
            disk_nbytes=15_000 * blocks * graphs,
            seconds=START_SECONDS + TRACE_SECONDS_PER_COMPONENT * len(plan.components) * graphs,
        )
        return (cost,)

    def run(self, plan: Plan, build: Build) -> None:
        build.models = trace_all(plan, self.model, plan.base, build.report)


def trace_all(plan: Plan, model: AnyModel, base: str, report: Report) -> dict[str, ir.Model]:
    """Trace every component of a plan at a base precision; the graphs have no weights yet.

    Towers are traced a few blocks deep and stamped; one that does not repeat is traced in full.

    Args:
        plan: what is compiled.
        model: of ``shallow_model``; its parameters get the dtypes of ``base``.
        base: a key of ``POLICIES``.
        report: told before each component, of the graphs of all bases together.
    """
    config = plan.source.config
    total, before = len(plan.bases) * len(plan.components), plan.bases.index(base)
    shallow = shallow_config(config)
    apply_policy(model, POLICIES[base])
    traced = {}
    for done, name in enumerate(plan.components, before * len(plan.components)):
        report(Progress(step="trace", detail=name, done=done, total=total))
        traced[name] = _trace(plan, name, shallow, model)
        if not stamp_towers(traced[name], config):
            logger.info("%s: blocks that differ, traced one by one", name)
            full = meta_model(config, plan.image_size)
            apply_policy(full, POLICIES[base])
            traced[name] = _trace(plan, name, config, full)
        take_last_logits(traced[name])
        if plan.options.input == "uint8":
            take_levels(traced[name], plan.preprocessing)
    return traced


def stamp_towers(model: ir.Model, config: CheckpointConfig) -> bool:
    """Make the towers of a graph that was traced shallow as deep as they are; False if it fails."""
    for prefix, (period, depth) in towers_of(config).items():
        if blocks_of(model, prefix) and not stamp(model, prefix, period, depth):
            return False
    name_values(model)
    return True


def _trace(plan: Plan, name: str, config: CheckpointConfig, model: AnyModel) -> ir.Model:
    """Trace one component of a model on the meta device, or clone the trace of an equal one."""
    linear = next((p for n, p in model.named_parameters() if n.endswith("q_proj.weight")), None)
    compute = "float32" if linear is None else str(linear.dtype).removeprefix("torch.")
    component = COMPONENTS[name]
    capacity = plan.options.cache_capacity if component.takes_cache else None
    module = build_component(component, model)

    def traced() -> ir.Model:
        specs = input_specs(component, config, plan.image_size, compute, capacity)
        graph = trace(
            module,
            example_inputs(specs),
            [{i: d for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs],
            [spec.name for spec in specs],
            output_names(component, config),
        )
        set_constants(graph, rotary_constants(config))
        return simplify(graph)

    parameters = tuple((k, v.dtype, tuple(v.shape)) for k, v in module.state_dict().items())
    read = config if hasattr(module, "vision_model") else _as_read_outside(config)
    if read.chat is not None and read.queries is None:
        read = replace(read, chat=read.chat.of_graphs(has_language=component.takes_cache))
    return _kept.get((component, capacity, read, plan.image_size, compute, parameters), traced)


# --- traces that are kept ------------------------------------------------------------------------


def _as_read_outside(config: CheckpointConfig) -> CheckpointConfig:
    """Leave out what folding changes inside the vision tower, which is not seen from outside."""

    def unfolded(vision: VisionConfig) -> VisionConfig:
        return replace(vision, has_layer_scale=True, is_rotated=False, has_shift=False)

    internvl = config.internvl
    if internvl is not None:
        internvl = replace(internvl, vision=unfolded(internvl.vision))
    return replace(config, vision=unfolded(config.vision), internvl=internvl)


class _Kept:
    """The traces used last, of ``most_nbytes`` together; threads may share it."""

    def __init__(self, most_nbytes: int) -> None:
        self._most_nbytes = most_nbytes
        self._lock = threading.Lock()
        # each with its size; the one used last is the last one
        self._graphs: dict[Hashable, tuple[ir.Model, int]] = {}

    def get(self, key: Hashable, make: Callable[[], ir.Model]) -> ir.Model:
        """Give the caller a graph of its own; two threads that miss the same key both make it."""
        with self._lock:
            held = self._graphs.get(key)
        if held is None:
            graph = make()
            held = graph, _nbytes(graph)
        with self._lock:
            self._graphs.pop(key, None)
            self._graphs[key] = held
            while sum(nbytes for _, nbytes in self._graphs.values()) > self._most_nbytes:
                del self._graphs[next(iter(self._graphs))]
        return _cloned(held[0])


_kept = _Kept(MAX_KEPT_NBYTES)


def _nbytes(graph: ir.Model) -> int:
    """Estimate the memory of a graph: its constants and its nodes."""
    held = (value.const_value for value in graph.graph.initializers.values())
    constants = sum(0 if tensor is None else tensor.nbytes for tensor in held)
    return constants + NODE_NBYTES * graph.graph.num_nodes()


def _cloned(graph: ir.Model) -> ir.Model:
    """Clone a graph, with types and shapes, which passes change in place."""
    clone = graph.clone()
    outputs = [value for node in clone.graph.all_nodes() for value in node.outputs]
    for value in (*clone.graph.inputs, *clone.graph.initializers.values(), *outputs):
        value.type = copy.copy(value.type)
        value.shape = copy.deepcopy(value.shape)
    return clone
