"""ONNX Runtime as a ``Session``: on the CPU, or with its CUDA provider.

The CPU provider computes float32, float16 and every Q/DQ graph (INT8 and FP8). It has no
bfloat16 arithmetic: MatMul, Conv, Add, Softmax, RMSNormalization and all other operators that
compute are missing there, only those that move data exist. A bfloat16 graph needs a GPU.

``run`` takes and gives NumPy arrays. ``run_device`` leaves outputs where they were computed and
takes them back as inputs: a decoder's cache never crosses to the host.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

try:
    import onnxruntime
except ImportError as error:
    from internvl_edge.errors import MissingDependency

    raise MissingDependency.of("onnxruntime", "ort") from error

from internvl_edge.artifact import Artifact, TensorSpec, Watch
from internvl_edge.errors import InternVLError, UsageError
from internvl_edge.files.forks import never_destroyed_in_children, require_own_process
from internvl_edge.runtime.feeds import (
    LOGITS_FROM,
    POSITIONS,
    ROWS_UP_TO,
    WRITE_INDICES,
    check_feeds,
    check_outputs,
)
from internvl_edge.runtime.ort.choice import choose_graph
from internvl_edge.runtime.ort.cuda_graphs import Replays
from internvl_edge.runtime.ort.failures import run_error
from internvl_edge.runtime.ort.growing import grow
from internvl_edge.runtime.ort.opening import Graph, open_native
from internvl_edge.runtime.ort.options import (
    OrtOptions,
    captures,
    place_of,
)
from internvl_edge.runtime.ort.rows import FIRST, HOST, OrtRows
from internvl_edge.runtime.ort.steps import Lent, Steps
from internvl_edge.runtime.ort.values import (
    BFLOAT16,
    array_of,
    described,
    is_numpy,
    is_value,
    spec_of,
    value_of,
)
from internvl_edge.types import Array


class OrtSession:
    """An ONNX file, opened by ONNX Runtime; ``Session`` says what it does.

    Args:
        path: the file; its external data lies beside it.
        graph: open these bytes in place of the file's, with the external data beside ``path``.
        folder: where to open the file of this name, in place of ``path``'s own folder.
        watch: over its external data, which must not be written to while it is mapped.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"auto"``.
        options: how it computes.
        pads: see ``DecoderSession.pads``.
        constants: of inputs with values of their own, other ones for every call.

    Raises:
        ArtifactError: ONNX Runtime refuses the file.
        HardwareError, MissingDependency: the device is not there, or cannot compute the graph.
        ResourceError: memory ran out.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        graph: bytes | None = None,
        folder: Path | None = None,
        watch: Watch | None = None,
        device: str = "cpu",
        options: OrtOptions = OrtOptions(),
        pads: bool = True,
        constants: Mapping[str, Array] = {},
    ) -> None:
        self._path, self.pads = Path(path), pads
        folder = self._path.parent if folder is None else folder
        given = Graph(path=self._path, folder=folder, data=graph, watch=watch)
        session, providers = open_native(given, device, options)
        self._session: Any = session
        never_destroyed_in_children(session)
        self._watch = None if options.copy else watch  # where nothing is mapped
        self._process = os.getpid()
        self._inputs = {value.name: spec_of(value) for value in session.get_inputs()}
        self._outputs = {value.name: spec_of(value) for value in session.get_outputs()}
        free = {value.name: spec_of(value) for value in session.get_overridable_initializers()}
        self._optional = {name: spec for name, spec in free.items() if name != ROWS_UP_TO}
        # of those that the graph has: not every one has heads that share keys
        self._constants = {name: array for name, array in constants.items() if name in free}
        self._names = list(self._outputs)
        self.largest: Mapping[str, int] = {}  # nothing bounds a graph
        self._place = place_of(providers)
        self._is_numpy = is_numpy(session)
        is_in_place, has_graphs = WRITE_INDICES in self._inputs, captures(providers)
        self._replays = Replays(session, self._place) if has_graphs and not is_in_place else None
        self._steps = Steps(session, self._place) if has_graphs and is_in_place else None

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._outputs

    @property
    def optional(self) -> Mapping[str, TensorSpec]:
        """See ``DecoderSession.optional``."""
        return self._optional

    def run(
        self,
        feeds: Mapping[str, Array],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """See ``Session.run``."""
        session, replays, watch = self._opened(), self._replays, self._watch
        names = self._names if outputs is None else check_outputs(self._outputs, outputs)
        arrays = check_feeds(self._inputs, feeds, check, self._optional)
        if watch is not None:
            watch.require_unchanged()
        if not self._is_numpy or self._steps is not None:
            values = self.run_device(arrays, check=False, outputs=names)
            return {name: array_of(value, self._place) for name, value in values.items()}
        try:
            if replays is not None:
                return replays.run(names, arrays)
            results = dict(
                zip(names, session.run(names, {**arrays, **self._constants}), strict=True)
            )
        except Exception as error:
            raise run_error(error, self._path) from error
        if watch is not None:
            watch.require_unchanged()
        return results

    def run_device(
        self,
        feeds: Mapping[str, Any],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Like ``run``, but outputs stay where they were computed.

        Args:
            feeds: NumPy arrays, or ``OrtValue``s of an earlier call, which are not copied.
            check: scan float arrays for NaN and infinity; values of an ``OrtValue`` are not read.
            outputs: the outputs that are wanted; None is all.

        Returns:
            An ``OrtValue`` for each: ``.numpy()`` brings it to the host.
        """
        self._opened()
        names = self._names if outputs is None else check_outputs(self._outputs, outputs)
        given: Any = feeds
        if isinstance(feeds, Mapping):
            given = {n: described(v) if is_value(v) else v for n, v in feeds.items()}
        arrays = check_feeds(self._inputs, given, check, self._optional)
        taken = {n: feeds[n] if is_value(feeds[n]) else a for n, a in arrays.items()}
        if self._replays is not None:
            return self._replayed(names, taken)
        return dict(zip(names, self._computed(taken, names), strict=True))

    def _computed(self, feeds: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
        """Run a call on arrays and values; its outputs, which no other call writes to."""
        binding = self._binding()
        for name, array in feeds.items():
            if is_value(array):
                binding.bind_ortvalue_input(name, array)
            elif array.dtype.name == BFLOAT16 or name in self._optional:
                binding.bind_ortvalue_input(name, value_of(array, HOST))
            else:
                binding.bind_cpu_input(name, array)
        for name in names:
            binding.bind_output(name, *self._place)
        return self._outputs_of(binding)

    def _replayed(self, names: Sequence[str], feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Replay a call whose outputs stay on the device, as copies of what the next one writes."""
        watch, replays = self._watch, self._replays
        assert replays is not None
        try:
            if watch is not None:
                watch.require_unchanged()
            return replays.run_device(names, feeds)
        except InternVLError:
            raise
        except Exception as error:
            raise run_error(error, self._path) from error

    def step(
        self, feeds: Mapping[str, Array], names: Sequence[str], cache: Sequence[Any]
    ) -> tuple[Array, Sequence[Any]]:
        """Like ``run_device`` of a decoder, unchecked: for what an earlier call left.

        Args:
            feeds: what is not in the cache.
            names: of the cache's inputs; its outputs come in the same order, after the logits.
            cache: their ``OrtValue``s.

        Returns:
            The logits, and the next cache.
        """
        session, steps = self._opened(), self._steps
        if steps is not None and feeds[POSITIONS].shape[1] == 1:
            with self._watched():
                taken = steps.step(feeds, names, cache, self._names[0])
            if taken is not None:
                return taken
        if WRITE_INDICES not in self._inputs:
            if self._place == HOST:
                with self._watched():
                    given = {**feeds, **self._constants}
                    return grow(session, given, names, cache, self._names)
            bound = {**feeds, **dict(zip(names, cache, strict=True))}
            logits, *presents = self._computed(bound, self._names)
            return array_of(logits, self._place), presents
        held = cache if isinstance(cache, _Held) else _Held(self._binding(), names, cache)
        start = feeds.get(LOGITS_FROM, FIRST)
        for name, array in feeds.items():
            if name not in self._optional:
                held.binding.bind_cpu_input(name, array)
        for name in self._optional:  # a binding that lasts has that of the call before
            held.binding.bind_ortvalue_input(name, value_of(start, HOST))
        rows, length = feeds[POSITIONS].shape
        some = len(range(length)[int(start[0]) :])
        held.write_back(self._names, (rows, some), self._outputs)
        self._run_bound(held.binding)
        return held.logits.numpy(), cache if isinstance(cache, Lent) else held

    @property
    def has_rows(self) -> bool:
        """See ``RowSession.has_rows``."""
        return WRITE_INDICES in self._inputs and self._place[0] == "cpu" and self._is_numpy

    def rows(self, count: int) -> OrtRows:
        """See ``RowSession.rows``."""
        return OrtRows(
            count,
            self._inputs,
            self._names[0],
            optional=LOGITS_FROM in self._optional,
            binding=self._binding,
            run=self._run_bound,
        )

    def _binding(self) -> Any:
        """Make a binding, with what every call is given."""
        binding = self._opened().io_binding()
        for name, array in self._constants.items():
            binding.bind_ortvalue_input(name, value_of(array, HOST))
        return binding

    def _run_bound(self, binding: Any) -> None:
        session, steps = self._opened(), self._steps
        with self._watched():
            if steps is None:
                session.run_with_iobinding(binding)
            else:
                steps.run(binding)

    def _outputs_of(self, binding: Any) -> list[Any]:
        """Run a call that is bound; its outputs, which no other call writes to."""
        if self._steps is not None:
            self._opened()
            with self._watched():
                return self._steps.outputs_of(binding)
        self._run_bound(binding)
        outputs: list[Any] = binding.get_outputs()
        return outputs

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Say in our words what fails, and refuse weights that are written to meanwhile."""
        watch = self._watch
        if watch is not None:
            watch.require_unchanged()
        try:
            yield
        except InternVLError:
            raise
        except Exception as error:
            raise run_error(error, self._path) from error
        if watch is not None:
            watch.require_unchanged()

    def fetch(self, cache: Sequence[Any]) -> list[Array]:
        """See ``DecoderSession.fetch``."""
        return [array_of(value, self._place) for value in cache]

    def take_rows(self, cache: Sequence[Any], rows: Array) -> list[Any]:
        """Copy these rows of a cache, in this order; they pass through the host."""
        return [value_of(array[rows], self._place) for array in self.fetch(cache)]

    def _opened(self) -> Any:
        session = self._session  # a close() by another thread waits for this reference
        if session is None:
            raise UsageError(f"the session of {self._path} is closed; open it again")
        require_own_process(self._process, f"the session of {self._path}")
        return session

    def close(self) -> None:
        """Free the session once the runs that are under way have ended."""
        self._session = self._replays = self._steps = self._watch = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Held(list[Any]):
    """The values of a cache, bound to a decoder's inputs; written in place, the binding lasts."""

    def __init__(self, binding: Any, names: Sequence[str], values: Sequence[Any]) -> None:
        super().__init__(values)
        self.binding = binding
        self.logits: Any = None  # of the last step, where the cache is written in place
        for name, value in zip(names, values, strict=True):
            binding.bind_ortvalue_input(name, value)

    def write_back(
        self, names: Sequence[str], places: tuple[int, int], specs: Mapping[str, TensorSpec]
    ) -> None:
        """Bind logits of these (rows, positions), and the cache to where it is read."""
        shape = [*places, specs[names[0]].shape[-1]]
        if self.logits is None:
            for name, value in zip(names[1:], self, strict=True):
                self.binding.bind_ortvalue_output(name, value)
        elif self.logits.shape() == shape:
            return
        self.logits = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
        self.binding.bind_ortvalue_output(names[0], self.logits)


def open_component(
    artifact: Artifact,
    component: str,
    device: str = "auto",
    backend: str = "onnxruntime",
    *,
    options: OrtOptions = OrtOptions(),
) -> OrtSession:
    """Open the ONNX graph of a component; see ``OrtSession``. There is one backend here.

    Raises:
        UsageError: options of another backend.
    """
    if not isinstance(options, OrtOptions):
        raise UsageError(f"{backend}: expected OrtOptions, found {type(options).__name__}")
    chosen = choose_graph(artifact, component, device, options)
    with artifact.held(chosen.path.name) as (folder, watch):
        return OrtSession(
            chosen.path,
            folder=folder,
            watch=watch,
            device=device,
            options=chosen.options,
            pads=chosen.pads,
            constants=chosen.constants,
        )
