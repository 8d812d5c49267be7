"""Execution contexts of one stream: bound to shapes and addresses, captured as CUDA graphs.

A captured graph belongs to its shapes and addresses and to one execution context that nothing else
uses. So each combination gets a context of its own, all of them in the same scratch memory, since
one stream runs them in turn. The first run of a combination is a plain one, which lets TensorRT
finish what it does lazily; the second is captured and from then on replayed in one launch. The
combination that was not used for longest gives its context to a new one.

TensorRT-RTX captures by itself: there is one context, bound anew when the shapes change.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl_edge.errors import InternVLError, SessionDead
from internvl_edge.runtime.cuda import Buffer, Graph, Stream
from internvl_edge.runtime.plan import Plan
from internvl_edge.runtime.profiles import EngineSpec, Shape

__all__ = ["Bound", "Contexts"]

logger = logging.getLogger(__name__)

MAX_GRAPHS = 16  # of a stream, each with its execution context
Key = tuple[Any, ...]


@dataclass(slots=True)
class Bound:
    """An execution context with its shapes and addresses set."""

    context: Any
    output_shapes: dict[str, Shape]
    num_runs: int = 0
    graph: Graph | None = None

    def drop_graph(self) -> None:
        if self.graph is not None:
            self.graph.close()
            self.graph = None


class Contexts:
    """The execution contexts that run in a stream.

    Args:
        plan: the engine.
        spec: its tensors and profiles.
        stream: where they run.
        scratch: memory for the engine's largest call, of all of them.
        graphs: capture CUDA graphs, where TensorRT-RTX does not do so by itself.

    Raises:
        ResourceError, InternVLError: there is no context to be had.
    """

    def __init__(
        self, plan: Plan, spec: EngineSpec, stream: Stream, scratch: Buffer, *, graphs: bool
    ) -> None:
        self._plan, self._spec, self._stream, self._scratch = plan, spec, stream, scratch
        self._captures = graphs and not plan.is_rtx
        self._bounds: OrderedDict[Key, Bound] = OrderedDict()  # the last used is last
        self._idle = [self._new_context()]

    def capacities(self) -> dict[str, int]:
        """Bytes of the largest value of every tensor."""
        return self._spec.capacities(self._idle[0], self._stream, self._plan)

    def close(self) -> None:
        for bound in self._bounds.values():
            bound.drop_graph()
        self._bounds.clear()
        self._idle.clear()

    def bind(
        self, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int]
    ) -> Bound:
        """A context with these shapes and addresses; a new one, or that of least recent use."""
        key = profile, tuple(shapes.items()), tuple(addresses.items())
        bound = self._bounds.get(key)
        if bound is not None:
            self._bounds.move_to_end(key)
            return bound
        context = self._take_context()
        self._idle.append(context)  # where it stays if what follows fails
        self._spec.set_shapes(context, profile, shapes, self._stream, self._plan)
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise self._plan.failure(f"set_tensor_address of {name!r}")
        output_shapes = {name: tuple(context.get_tensor_shape(name)) for name in self._spec.outputs}
        self._idle.remove(context)
        self._bounds[key] = Bound(context=context, output_shapes=output_shapes)
        return self._bounds[key]

    def _take_context(self) -> Any:
        if self._idle:
            return self._idle.pop()
        if len(self._bounds) < (MAX_GRAPHS if self._captures else 1):
            return self._new_context()
        self._stream.synchronize()  # it may still run for a call that was not awaited
        _, oldest = self._bounds.popitem(last=False)
        oldest.drop_graph()
        return oldest.context

    def _new_context(self) -> Any:
        context = self._plan.create_context()
        context.set_device_memory(self._scratch.pointer, self._scratch.nbytes)
        return context

    def execute(self, bound: Bound) -> None:
        """Queue the engine: the first time as it is, then as a graph where that can be."""
        bound.num_runs += 1
        if self._captures and bound.num_runs == 2:
            bound.graph = self._captured(bound.context)
        if bound.graph is not None:
            self._stream.launch(bound.graph)
        else:
            self._launch(bound.context)

    def _launch(self, context: Any) -> None:
        if not context.execute_async_v3(int(self._stream.handle)):
            raise self._plan.failure("execute_async_v3")

    def _captured(self, context: Any) -> Graph | None:
        """The engine as a graph; None where it cannot be captured, and runs without."""
        try:
            return self._stream.capture(lambda: self._launch(context))
        except SessionDead:
            raise
        except InternVLError as error:
            logger.info("runs without a CUDA graph: %s", error)
            return None
