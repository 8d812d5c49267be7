"""Execution contexts of one stream: bound to shapes and addresses, captured as CUDA graphs.

A captured graph belongs to its shapes and addresses and to one execution context that nothing else
uses. So each combination gets a context of its own, all of them in the same scratch memory, since
one stream runs them in turn. The first run of a combination is a plain one, which lets TensorRT
finish what it does lazily; the second is captured and from then on replayed in one launch. The
combination that was not used for longest gives its context to a new one, as it does where there is
no memory for one more.

TensorRT-RTX captures by itself: there is one context, bound anew when the shapes change.

Shapes that do not come again, such as those of a cache that grows with every token, would fill all
that with what is used once. They pass through one context more, which is never captured.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl_edge.errors import InternVLError, ResourceError, SessionDead
from internvl_edge.runtime.gpu.handles import Buffer, Graph, Stream
from internvl_edge.runtime.trt.engine import Engine
from internvl_edge.runtime.trt.profiles import EngineSpec
from internvl_edge.types import Shape

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
        engine: what runs.
        spec: its tensors and profiles.
        stream: where they run.
        scratch: memory for the engine's largest call, of all of them.
        first: a context of the engine.
        graphs: capture CUDA graphs, where TensorRT-RTX does not do so by itself.
    """

    def __init__(
        self,
        engine: Engine,
        spec: EngineSpec,
        stream: Stream,
        scratch: Buffer,
        first: Any,
        *,
        graphs: bool,
    ) -> None:
        self._engine, self._spec, self._stream, self._scratch = engine, spec, stream, scratch
        self._captures = graphs and not engine.is_rtx
        self._bounds: OrderedDict[Key, Bound] = OrderedDict()  # the last used is last
        self._idle = [self._with_memory(first)]
        self._passing: Any = None

    def close(self) -> None:
        for bound in self._bounds.values():
            bound.drop_graph()
        self._bounds.clear()
        self._idle.clear()
        self._passing = None

    def bind(
        self, profile: int, shapes: Mapping[str, Shape], addresses: Mapping[str, int]
    ) -> Bound:
        """Find or make a context with these shapes and addresses, or take the least recent one."""
        key = profile, tuple(shapes.items()), tuple(addresses.items())
        bound = self._bounds.get(key)
        if bound is not None:
            self._bounds.move_to_end(key)
            return bound
        context = self._take_context()
        self._idle.append(context)  # where it stays if what follows fails
        bound = self._shaped(context, profile, shapes)
        self.address(bound, addresses)
        self._idle.remove(context)
        self._bounds[key] = bound
        return bound

    def pass_through(self, profile: int, shapes: Mapping[str, Shape]) -> Bound:
        """Give shapes that do not come again their context; ``address`` it next."""
        if self._passing is None:
            self._passing = self._take_context(recurs=False)
        self._stream.synchronize()  # it may still run
        return self._shaped(self._passing, profile, shapes)

    def address(self, bound: Bound, addresses: Mapping[str, int]) -> None:
        """Say where the inputs and outputs of a context are."""
        for name, address in addresses.items():
            if not bound.context.set_tensor_address(name, address):
                raise self._engine.failure(f"set_tensor_address of {name!r}")

    def _shaped(self, context: Any, profile: int, shapes: Mapping[str, Shape]) -> Bound:
        self._spec.set_shapes(context, profile, shapes, self._stream, self._engine)
        output_shapes = {name: tuple(context.get_tensor_shape(name)) for name in self._spec.outputs}
        return Bound(context=context, output_shapes=output_shapes)

    def _take_context(self, *, recurs: bool = True) -> Any:
        if recurs and self._idle:
            return self._idle.pop()
        if not recurs or len(self._bounds) < (MAX_GRAPHS if self._captures else 1):
            try:
                return self._with_memory(self._engine.create_context(recurs=recurs))
            except ResourceError as error:
                if not self._bounds:
                    raise
                logger.info("no memory for another context, one is used again: %s", error)
        self._stream.synchronize()  # it may still run for a call that was not awaited
        _, oldest = self._bounds.popitem(last=False)
        oldest.drop_graph()
        return oldest.context

    def _with_memory(self, context: Any) -> Any:
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
            raise self._engine.failure("execute_async_v3")

    def _captured(self, context: Any) -> Graph | None:
        """Capture the engine as a graph; None where it cannot be, and runs without."""
        try:
            return self._stream.capture(lambda: self._launch(context))
        except SessionDead:
            raise
        except InternVLError as error:
            logger.info("runs without a CUDA graph: %s", error)
            return None
