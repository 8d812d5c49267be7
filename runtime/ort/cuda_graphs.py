"""Calls of ONNX Runtime on a GPU, replayed as CUDA graphs.

Queueing the kernels of a tower one by one takes the host longer than the GPU takes to compute one
image. A call whose shapes came before is bound to buffers of its own and captured once; from then
on it is two copies and one launch. Both copies are from and to page-locked memory (``pinned``).

What a captured call computed in goes back to the session's memory pool, and every replay writes
there again. So calls take turns, and no output may stay in the pool: those of captured calls lie
outside it, those of others are copied to the host before the next call begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Lock
from typing import Any, cast

import onnxruntime

from internvl_edge.runtime.ort.pinned import PinnedPool
from internvl_edge.runtime.ort.values import Place, array_of, copied, is_value, value_of
from internvl_edge.types import Array

__all__ = ["MAX_GRAPHS", "UNCAPTURED", "Replays", "run_options"]

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
            outputs = self._session.run(names, dict(arrays), run_options(UNCAPTURED))
            self._may_capture.setdefault(shapes, True)
        return dict(zip(names, outputs, strict=True))

    def run_device(self, names: Sequence[str], feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Compute these outputs of arrays or ``OrtValue``s, and leave copies on the device.

        The first call of its shapes is captured at once; where that fails, it fails. Beyond the
        limit calls run kernel by kernel.
        """
        shapes = tuple(tuple(map(int, _shape(value))) for value in feeds.values())
        with self._turn:
            if shapes not in self._captured:
                arrays = {
                    n: array_of(v, self._place) if is_value(v) else v for n, v in feeds.items()
                }
                if self._num_tried >= self._limit:
                    outputs = self._session.run(names, arrays, run_options(UNCAPTURED))
                    return {
                        n: value_of(array, self._place)
                        for n, array in zip(names, outputs, strict=True)
                    }
                self._capture(shapes, (), arrays)
            return self._captured[shapes].run_device(names, feeds)

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
        self._session, self._place, self._options = session, place, run_options(graph_id)
        self._binding = session.io_binding()
        self._inputs = {name: value_of(array, place) for name, array in arrays.items()}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        outputs = session.run(names, dict(arrays), run_options(UNCAPTURED))
        self._outputs = {n: value_of(array, place) for n, array in zip(names, outputs, strict=True)}
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        given = dict(zip(names, outputs, strict=True))
        self._like = {name: (array.shape, array.dtype) for name, array in given.items()}
        nbytes = {name: array.nbytes for name, array in (given | dict(arrays)).items()}
        is_gpu = place[0] == "cuda"
        self._pools = {name: PinnedPool(n if is_gpu else 0) for name, n in nbytes.items()}

    def run(self, names: Sequence[str], arrays: Mapping[str, Array]) -> dict[str, Array]:
        self._replay(arrays)
        return {name: self._fetched(name) for name in names}

    def run_device(self, names: Sequence[str], feeds: Mapping[str, Any]) -> dict[str, Any]:
        self._replay(feeds)
        return {name: copied(self._outputs[name], self._place) for name in names}

    def _replay(self, feeds: Mapping[str, Any]) -> None:
        for name, value in self._inputs.items():
            source = feeds[name]
            if not is_value(source):
                staged = self._pools[name].empty(source.shape, source.dtype)
                if staged is not None:
                    staged[...] = source
                    source = staged
            value.update_inplace(source)
        self._session.run_with_iobinding(self._binding, self._options)

    def _fetched(self, name: str) -> Array:
        value = self._outputs[name]
        array = self._pools[name].fetch(value.data_ptr(), *self._like[name])
        return array_of(value, self._place) if array is None else array


def _shape(value: Any) -> Sequence[int]:
    return cast(Sequence[int], value.shape() if is_value(value) else value.shape)


def run_options(graph_id: int) -> Any:
    """Make the options of a run that is captured under this number, or replayed."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph_id))
    return options
