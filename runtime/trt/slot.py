"""One place where an engine runs: a stream, memory for the largest call, and CUDA graphs.

A call goes through six steps, the last four queued in the slot's one stream:

    1. an execution context is bound to the call's shapes, under the profile that holds them most
       narrowly; the batch is filled up to the next bucket, so that few shapes occur
    2. host inputs are copied to pinned memory
    3. and from there to the GPU, with zeros in the rows that fill up, so that rows of earlier
       calls never stay there; inputs that are on the GPU are bound where they are, unless they
       are not aligned to 256 bytes
    4. the engine runs: one launch where it can be a CUDA graph (``contexts``)
    5. the wanted outputs are copied to pinned memory, without the rows that were filled up
    6. the stream is waited for

Where nothing is waited for, arrays of the caller are kept until the GPU is done with them: when
the inputs of a call have been copied, whatever was queued before is over.
"""

from __future__ import annotations

import contextlib
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_edge.artifact import TensorSpec
from internvl_edge.errors import FeedError, InternVLError
from internvl_edge.runtime.feeds import check_feeds, check_outputs
from internvl_edge.runtime.gpu.device import Device
from internvl_edge.runtime.gpu.device_array import DeviceArray, as_device_array, is_on_device
from internvl_edge.runtime.gpu.handles import Buffer, Event, PinnedBuffer, Stream
from internvl_edge.runtime.gpu.memory import ALIGNMENT, copy_rows, find_overlap, new_arrays
from internvl_edge.runtime.trt.contexts import Bound, Contexts
from internvl_edge.runtime.trt.engine import Engine
from internvl_edge.runtime.trt.profiles import EngineSpec
from internvl_edge.types import Array

__all__ = ["Slot"]

CALLS_KEPT = 2  # whose arrays the GPU may use: the last one, and the one being queued

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that is about to be queued."""

    feeds: Mapping[str, Any]
    bound: Bound
    shapes: Shapes  # of the inputs as they run, filled up
    outputs: Shapes  # without the rows that fill up
    targets: Mapping[str, DeviceArray]  # outputs that are not written to the slot's own memory
    addresses: Mapping[str, int]  # of all


class Slot:
    """See above; used by one thread at a time.

    Args:
        engine: what runs.
        spec: its inputs, outputs and profiles.
        device: the GPU.
        context: the first execution context.
        capacities: bytes of the largest value of every tensor.
        graphs: capture CUDA graphs; TensorRT-RTX does so by itself where the engine says so.
        batch_buckets: batch sizes to fill up to where the engine takes them; none: every batch
            runs as it is.

    Raises:
        ResourceError: the memory for the largest call is not there; all that was taken is freed.
    """

    def __init__(
        self,
        engine: Engine,
        spec: EngineSpec,
        device: Device,
        context: Any,
        capacities: Mapping[str, int],
        *,
        graphs: bool = True,
        batch_buckets: Sequence[int] = (),
    ) -> None:
        self._spec, self._device = spec, device
        self._buckets = sorted(batch_buckets)
        self._kept: deque[Any] = deque(maxlen=CALLS_KEPT)
        self.on_step: Callable[[str], None] | None = None  # told each step that was queued
        with ExitStack() as stack:
            self.stream = stack.enter_context(Stream(device))
            self._staged = stack.enter_context(Event(device))  # when inputs were last copied
            scratch = stack.enter_context(Buffer(device, int(engine.native.device_memory_size_v2)))
            self._contexts = Contexts(engine, spec, self.stream, scratch, context, graphs=graphs)
            stack.callback(self._contexts.close)
            self._buffers: dict[str, Buffer] = {}
            self._pinned: dict[str, PinnedBuffer] = {}
            for name, nbytes in capacities.items():
                self._buffers[name] = stack.enter_context(Buffer(device, nbytes))
                self._pinned[name] = stack.enter_context(PinnedBuffer(device, nbytes))
            self._resources = stack.pop_all()

    def run(
        self,
        feeds: Mapping[str, Any],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Like ``Session.run``, but the arrays are views, valid until the slot's next run."""
        specs = self._spec.outputs
        names = list(specs) if outputs is None else check_outputs(specs, outputs)
        with self._tidied():
            call = self._bound(self._checked(feeds, check), {})
            self._queue(call)
            views = {name: self._fetched(name, call) for name in names}
            self._tell("fetched")
            self._rest()
        return views

    def run_device(
        self,
        feeds: Mapping[str, Any],
        *,
        out: Mapping[str, Any] | None = None,
        check: bool = True,
    ) -> dict[str, DeviceArray]:
        """Like ``run``, but outputs stay on the GPU and nothing is waited for.

        Args:
            feeds: host arrays, or arrays on the GPU by DLPack or ``__cuda_array_interface__``;
                these are kept until the GPU has read them, but must not be written before.
            out: arrays on the GPU to write outputs to; the others go to the slot's own memory and
                are valid until its next run.
            check: scan host inputs for NaN and infinity.

        Returns:
            Every output; its ``stream`` is where it is being computed.
        """
        with self._tidied():
            targets = {name: self._target(name, value) for name, value in (out or {}).items()}
            call = self._bound(self._checked(feeds, check), targets)
            _require_apart(call, self._spec)
            self._queue(call)
            ready = Event(self._device)
            ready.record(self.stream.handle)
        return {
            name: DeviceArray(
                pointer=call.addresses[name],
                shape=shape,
                dtype=self._spec.dtypes[name],
                device=self._device.index,
                stream=int(self.stream.handle),
                ready=ready,
                owner=targets.get(name, self),
            )
            for name, shape in call.outputs.items()
        }

    def run_kept(
        self,
        feeds: Mapping[str, Any],
        *,
        check: bool = True,
        used_up: Sequence[DeviceArray] | None = None,
        fetch: Sequence[str] = (),
    ) -> tuple[dict[str, Array], dict[str, DeviceArray]]:
        """Make a call whose outputs outlive the slot's next run, of shapes that do not come again.

        Args:
            feeds: as for ``run_device``.
            check: scan host inputs for NaN and infinity.
            used_up: of the feeds, arrays of an earlier call of this kind, whose memory may be
                written once they were read; then no feed is checked.
            fetch: outputs that are wanted on the host.

        Returns:
            Those; and the others, complete, in GPU memory of their own.
        """
        with self._tidied():
            given = self._checked(feeds, check) if used_up is None else feeds
            call, ready = self._passing(given, used_up or (), fetch)
            self._queue(call)
            ready.record(self.stream.handle)
            views = {name: self._fetched(name, call) for name in fetch}
            self._rest()
        return {name: view.copy() for name, view in views.items()}, dict(call.targets)

    def take_rows(self, arrays: Sequence[DeviceArray], rows: Array) -> list[DeviceArray]:
        """Copy these rows of every array, in this order; ``arrays`` are used up.

        Args:
            arrays: of an earlier call, [B,...].
            rows: indices, 0 to B-1; any may be taken several times.
        """
        shapes = {str(i): (len(rows), *array.shape[1:]) for i, array in enumerate(arrays)}
        dtypes = {str(i): array.dtype for i, array in enumerate(arrays)}
        with self._tidied():
            taken, ready = new_arrays(self._device, shapes, dtypes, arrays)
            for source, target in zip(arrays, taken.values(), strict=True):
                copy_rows(self.stream, source, target, rows.tolist())
            ready.record(self.stream.handle)
            self._rest()
        return list(taken.values())

    def close(self) -> None:
        """Wait for what was queued, and free everything; the slot must not be in use."""
        with contextlib.suppress(InternVLError):  # a GPU that failed has nothing to wait for
            self._device.activate()
            self._rest()
        self._kept.clear()
        self._resources.close()

    # --- inputs ----------------------------------------------------------------------------------

    def _checked(self, feeds: Mapping[str, Any], check: bool) -> dict[str, Any]:
        if isinstance(feeds, Mapping):
            feeds = {
                name: self._on_device(name, value) if is_on_device(name, value) else value
                for name, value in feeds.items()
            }
        return check_feeds(self._spec.inputs, feeds, check)

    def _on_device(self, name: str, value: Any) -> DeviceArray:
        """Take an array on this GPU, that our stream may read once it reaches that point."""
        if not is_on_device(name, value):
            raise FeedError(f"{name!r}: expected an array on the GPU, found {type(value).__name__}")
        array = as_device_array(name, value, int(self.stream.handle))
        if not self._device.owns(array.pointer):
            raise FeedError(
                f"{name!r}: address {array.pointer:#x} is not memory of cuda:{self._device.index}; "
                "copy the array to that device, or hand over a NumPy array"
            )
        if array.ready is not None:
            array.ready.hold(self.stream.handle)
        elif array.stream is not None:
            self.stream.wait_for(array.stream)
        return array

    # --- binding: what a call will read and write -------------------------------------------------

    def _bound(self, feeds: dict[str, Any], targets: Mapping[str, DeviceArray]) -> _Call:
        """Bind a call whose shapes may come again; nothing of it is queued yet."""
        shapes, profile, batch = self._fit(feeds, fills=not targets)
        addresses = self._addresses(feeds, targets)
        bound = self._contexts.bind(profile, shapes, addresses)
        outputs = bound.output_shapes
        if batch is not None:
            outputs = {name: self._rows(name, shape, batch) for name, shape in outputs.items()}
        return _Call(feeds, bound, shapes, outputs, targets, addresses)

    def _passing(
        self, feeds: Mapping[str, Any], used_up: Sequence[DeviceArray], fetch: Sequence[str]
    ) -> tuple[_Call, Event]:
        """Bind a call whose outputs last longer than it; also when they will be computed.

        What is written where it lies is the next call's too: its shapes and addresses come again.
        """
        if used_up and self._spec.aliases:
            written = {output: feeds[source] for output, source in self._spec.aliases.items()}
            return self._bound(dict(feeds), written), Event(self._device)
        shapes = {name: tuple(array.shape) for name, array in feeds.items()}
        bound = self._contexts.pass_through(self._spec.choose_profile(shapes), shapes)
        outputs = bound.output_shapes
        kept = {name: shape for name, shape in outputs.items() if name not in fetch}
        targets, ready = new_arrays(self._device, kept, self._spec.dtypes, used_up)
        addresses = self._addresses(feeds, targets)
        self._contexts.address(bound, addresses)
        return _Call(feeds, bound, shapes, outputs, targets, addresses), ready

    def _fit(self, feeds: Mapping[str, Any], *, fills: bool) -> tuple[Shapes, int, int | None]:
        """Choose the shapes to run in, their profile, and the batch where it is filled up.

        Raises:
            FeedError: the engine takes no such shapes.
        """
        batch = next((array.shape[0] for name, array in feeds.items() if self._has_batch(name)), 0)
        # Memory of others has no room to fill up.
        if fills and batch and not any(isinstance(a, DeviceArray) for a in feeds.values()):
            for size in self._buckets[bisect_left(self._buckets, batch) :]:
                filled = {name: self._rows(name, a.shape, size) for name, a in feeds.items()}
                profile = self._spec.find_profile(filled)
                if profile is not None:
                    return filled, profile, batch
        shapes = {name: tuple(array.shape) for name, array in feeds.items()}
        return shapes, self._spec.choose_profile(shapes), None

    def _has_batch(self, name: str) -> bool:
        spec: TensorSpec = self._spec.tensors[name]
        return bool(spec.shape) and spec.shape[0] == "batch"

    def _rows(self, name: str, shape: Sequence[int], batch: int) -> tuple[int, ...]:
        return (batch, *shape[1:]) if self._has_batch(name) else tuple(shape)

    def _addresses(
        self, feeds: Mapping[str, Any], targets: Mapping[str, DeviceArray]
    ) -> dict[str, int]:
        """Say where tensors are: in the slot's memory, but for those in memory of others."""
        addresses = {name: buffer.pointer for name, buffer in self._buffers.items()}
        addresses |= {name: a.pointer for name, a in feeds.items() if _is_bound_in_place(a)}
        addresses |= {name: array.pointer for name, array in targets.items()}
        for output, source in self._spec.aliases.items():  # what is written is nobody else's
            own = targets.get(output, self._buffers[source])
            addresses[output] = addresses[source] = own.pointer
        return addresses

    # --- queueing --------------------------------------------------------------------------------

    def _queue(self, call: _Call) -> None:
        """Queue steps 2 to 4."""
        self._staged.synchronize()  # pinned memory may still be read for a run that was not awaited
        self._kept.append((call.feeds, call.targets))
        for name, array in call.feeds.items():
            if not isinstance(array, DeviceArray):
                np.copyto(self._pinned[name].view(array.shape, array.dtype), array)
        self._tell("begun")
        for name, array in call.feeds.items():
            address = call.addresses[name]
            if not isinstance(array, DeviceArray) or array.pointer != address:
                self._stage(address, name, array, call.shapes[name])
        self._staged.record(self.stream.handle)
        self._tell("staged")
        self._contexts.execute(call.bound)
        self._tell("computed")

    def _stage(self, buffer: int, name: str, array: Any, shape: tuple[int, ...]) -> None:
        """Copy an input to memory that is the engine's, with zeros in what it is filled up."""
        is_there = isinstance(array, DeviceArray)
        self.stream.copy(
            buffer, array.pointer if is_there else self._pinned[name].pointer, array.nbytes
        )
        nbytes = math.prod(shape) * array.dtype.itemsize
        self.stream.zero(buffer + array.nbytes, nbytes - array.nbytes)

    def _fetched(self, name: str, call: _Call) -> Array:
        """Copy an output to pinned memory, once the stream gets there."""
        pinned = self._pinned[self._spec.aliases.get(name, name)]
        view = pinned.view(call.outputs[name], self._spec.dtypes[name])
        self.stream.copy(pinned.pointer, call.addresses[name], view.nbytes)
        return view

    def _tell(self, step: str) -> None:
        if self.on_step is not None:
            self.on_step(step)

    # --- outputs in memory of others --------------------------------------------------------------

    def _target(self, name: str, value: Any) -> DeviceArray:
        """Check the memory that an output is to be written to."""
        check_outputs(self._spec.outputs, [name])
        array, dtype = self._on_device(name, value), self._spec.dtypes[name]
        if array.dtype != dtype or array.pointer % ALIGNMENT or array.readonly:
            access = "read-only " if array.readonly else ""
            raise FeedError(
                f"output {name!r}: expected {dtype} to write to, aligned to {ALIGNMENT} bytes, "
                f"found {access}{array.dtype} at {array.pointer:#x}"
            )
        return array

    @contextlib.contextmanager
    def _tidied(self) -> Iterator[None]:
        """After a failure, let the stream come to rest and forget how contexts were bound."""
        self._device.activate()
        try:
            yield
        except BaseException:
            self._rest()
            raise

    def _rest(self) -> None:
        """Wait for what was queued before memory that it uses is used again.

        Raises:
            SessionDead: the GPU failed, which is why.
        """
        self.stream.synchronize()
        self._kept.clear()


def _is_bound_in_place(array: Any) -> bool:
    """Tell whether an engine can read an input where it is."""
    return isinstance(array, DeviceArray) and array.pointer % ALIGNMENT == 0


def _require_apart(call: _Call, spec: EngineSpec) -> None:
    """Refuse targets of other shapes, or in memory that something else of the call is in.

    An engine may write its outputs in any order, and before it has read all inputs; what it writes
    in place is its business.

    Raises:
        FeedError: which ones.
    """
    for name, array in call.targets.items():
        if array.shape != call.outputs[name]:
            raise FeedError(
                f"output {name!r}: expected {list(call.outputs[name])}, found {list(array.shape)}"
            )
    written = []
    for name, shape in call.outputs.items():
        start, nbytes = call.addresses[name], math.prod(shape) * spec.dtypes[name].itemsize
        written.append((start, start + nbytes, f"output {name!r}"))
    in_place = spec.aliases.values()
    read = [
        (array.pointer, array.pointer + array.nbytes, f"input {name!r}")
        for name, array in call.feeds.items()
        # what is copied before the run is safe, but for a copy to where something is written
        if _is_bound_in_place(array) or (in_place and isinstance(array, DeviceArray))
        if not (name in in_place and array.pointer == call.addresses[name])
    ]
    overlap = find_overlap(written, read)
    if overlap is not None:
        raise FeedError(
            f"{overlap[1]} is where this run writes {overlap[0]}; give that other memory with "
            "out=, such as session.empty(...)"
        )
