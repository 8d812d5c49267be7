"""Calls of ONNX Runtime on a GPU, replayed as CUDA graphs.

Queueing the kernels of a tower one by one takes the host longer than the GPU takes to compute one
image. A call whose shapes came before is bound to buffers of its own and captured once; from then
on it is two copies and one launch.

What a captured call computed in goes back to the session's memory pool, and every replay writes
there again. So calls take turns, and no output may stay in the pool: those of captured calls lie
outside it, those of others are copied to the host before the next call begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any

import onnxruntime

from internvl_edge.runtime.ort.values import Place, array_of, value_of
from internvl_edge.types import Array

__all__ = ["MAX_GRAPHS", "Replays"]

MAX_GRAPHS = 16  # of one session: each keeps its inputs and outputs on the GPU, and none is freed
GRAPH_ID, UNCAPTURED = "gpu_graph_id", -1  # ONNX Runtime's option of a run, and its "no graph"

Shapes = tuple[tuple[int, ...], ...]


class Replays:
    """The calls of a session that was opened for capture.

    Args:
        session: ONNX Runtime's.
        place: where it computes.
        limit: calls of so many shapes are captured, others run kernel by kernel.
    """

    def __init__(self, session: Any, place: Place, limit: int = MAX_GRAPHS) -> None:
        self._session, self._place, self._limit = session, place, limit
        self._names = [value.name for value in session.get_outputs()]
        self._turn = Lock()
        self._may_capture: dict[Shapes, bool] = {}  # of shapes that came before
        self._captured: dict[Shapes, _Captured] = {}
        self._num_tried = 0

    def run(self, names: Sequence[str], arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Compute these outputs; shapes that come for the second time are captured."""
        shapes = tuple(array.shape for array in arrays.values())
        with self._turn:
            if shapes in self._captured:
                return self._captured[shapes].run(names, arrays)
            if self._may_capture.get(shapes) and self._num_tried < self._limit:
                self._may_capture[shapes] = False  # what fails once stays plain
                with suppress(Exception):  # the plain call says what there is to say
                    return self._capture(shapes, names, arrays)
            outputs = self._session.run(names, dict(arrays), _options(UNCAPTURED))
            self._may_capture.setdefault(shapes, True)
        return dict(zip(names, outputs, strict=True))

    def _capture(
        self, shapes: Shapes, names: Sequence[str], arrays: Mapping[str, Array]
    ) -> dict[str, Array]:
        self._num_tried += 1
        call = _Captured(self._session, self._place, self._names, arrays, self._num_tried)
        outputs = call.run(names, arrays)
        self._captured[shapes] = call
        return outputs


class _Captured:
    """A call of certain shapes, bound to buffers; its first run captures it."""

    def __init__(
        self,
        session: Any,
        place: Place,
        names: Sequence[str],
        arrays: Mapping[str, Array],
        graph_id: int,
    ) -> None:
        self._session, self._place, self._options = session, place, _options(graph_id)
        self._binding = session.io_binding()
        self._inputs = {name: value_of(array, place) for name, array in arrays.items()}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        outputs = session.run(names, dict(arrays), _options(UNCAPTURED))
        self._outputs = {n: value_of(array, place) for n, array in zip(names, outputs, strict=True)}
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self, names: Sequence[str], arrays: Mapping[str, Array]) -> dict[str, Array]:
        for name, value in self._inputs.items():
            value.update_inplace(arrays[name])
        self._session.run_with_iobinding(self._binding, self._options)
        return {name: array_of(self._outputs[name], self._place) for name in names}


def _options(graph_id: int) -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph_id))
    return options
