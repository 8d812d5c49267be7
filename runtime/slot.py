"""One place where an engine runs: a stream, memory for the largest call, and CUDA graphs.

A call goes through five steps, all queued in the slot's one stream:

    1. host inputs are copied to pinned memory and from there to the GPU; inputs that are on the
       GPU are bound where they are, unless they are not aligned to 256 bytes
    2. the batch is filled up with zeros to the next bucket, so that few shapes occur; rows of
       earlier calls never stay in it
    3. the engine runs under the profile that holds the shapes most narrowly
    4. the wanted outputs are copied to pinned memory, without the rows that were filled up
    5. the stream is waited for

Step 3 is one launch where it can be a CUDA graph (``contexts``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from internvl_edge.artifact import TensorSpec
from internvl_edge.errors import FeedError
from internvl_edge.runtime.contexts import Contexts
from internvl_edge.runtime.cuda import Buffer, Event, PinnedBuffer, Stream
from internvl_edge.runtime.device import Device
from internvl_edge.runtime.device_array import DeviceArray, as_device_array, is_on_device
from internvl_edge.runtime.plan import Plan
from internvl_edge.runtime.profiles import EngineSpec
from internvl_edge.runtime.session import Array, check_feeds, check_outputs

__all__ = ["Slot"]

ALIGNMENT = 256  # of every address an engine is given

Shapes = Mapping[str, tuple[int, ...]]


class Slot:
    """See above; used by one thread at a time.

    Args:
        plan: the engine.
        spec: its inputs, outputs and profiles.
        device: the GPU.
        graphs: capture CUDA graphs; TensorRT-RTX does so by itself where its plan says so.
        batch_buckets: batch sizes to fill up to; none: every batch runs as it is.

    Raises:
        ResourceError: the memory for the largest call is not there; all that was taken is freed.
    """

    def __init__(
        self,
        plan: Plan,
        spec: EngineSpec,
        device: Device,
        *,
        graphs: bool = True,
        batch_buckets: Sequence[int] = (),
    ) -> None:
        self._plan, self._spec, self._device = plan, spec, device
        self._buckets = sorted(batch_buckets)
        self._kept: Any = None  # device inputs, until they were read
        self.on_step: Callable[[str], None] | None = None  # told each step that was queued
        with ExitStack() as stack:
            self.stream = stack.enter_context(Stream(device))
            self._staged = stack.enter_context(Event(device))  # when inputs were last copied
            scratch = stack.enter_context(Buffer(device, int(plan.engine.device_memory_size_v2)))
            self._contexts = Contexts(plan, spec, self.stream, scratch, graphs=graphs)
            stack.callback(self._contexts.close)
            self._buffers: dict[str, Buffer] = {}
            self._pinned: dict[str, PinnedBuffer] = {}
            for name, nbytes in self._contexts.capacities().items():
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
        wanted = self._wanted(outputs)
        with self._tidied():
            shapes = self._enqueue(self._checked(feeds, check), {})
            views = {}
            for name in wanted:
                views[name] = self._pinned[name].view(shapes[name], self._spec.dtypes[name])
                source = self._buffers[name].pointer
                self.stream.copy(self._pinned[name].pointer, source, views[name].nbytes)
            self._tell("fetched")
            self.stream.synchronize()
        self._kept = None
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
            feeds: host arrays, or arrays on the GPU by DLPack or ``__cuda_array_interface__``.
            out: arrays on the GPU to write outputs to; the others go to the slot's own memory and
                are valid until its next run.
            check: scan host inputs for NaN and infinity.

        Returns:
            Every output; its ``stream`` is where it is being computed.
        """
        with self._tidied():
            targets = {name: self._target(name, value) for name, value in (out or {}).items()}
            shapes = self._enqueue(self._checked(feeds, check), targets)
        return {
            name: DeviceArray(
                pointer=targets[name].pointer if name in targets else self._buffers[name].pointer,
                shape=shape,
                dtype=self._spec.dtypes[name],
                device=self._device.index,
                stream=int(self.stream.handle),
                owner=targets.get(name, self),
            )
            for name, shape in shapes.items()
        }

    def close(self) -> None:
        """Free everything; the slot must be at rest."""
        self._kept = None
        self._resources.close()

    # --- inputs and outputs ----------------------------------------------------------------------

    def _wanted(self, outputs: Sequence[str] | None) -> list[str]:
        return (
            list(self._spec.outputs)
            if outputs is None
            else check_outputs(self._spec.outputs, outputs)
        )

    def _checked(self, feeds: Mapping[str, Any], check: bool) -> dict[str, Any]:
        given = {
            name: self._on_device(name, value) if is_on_device(value) else value
            for name, value in feeds.items()
        }
        return check_feeds(self._spec.inputs, given, check)

    def _on_device(self, name: str, value: Any) -> DeviceArray:
        """An array on this GPU, that our stream may read once it reaches that point."""
        if not is_on_device(value):
            raise FeedError(f"{name!r}: expected an array on the GPU, found {type(value).__name__}")
        array = as_device_array(name, value, int(self.stream.handle))
        if not self._device.owns(array.pointer):
            raise FeedError(
                f"{name!r}: address {array.pointer:#x} is not memory of cuda:{self._device.index}; "
                "copy the array to that device, or hand over a NumPy array"
            )
        if array.stream is not None and array.stream != int(self.stream.handle):
            self.stream.wait_for(array.stream)
        return array

    def _enqueue(self, feeds: dict[str, Any], targets: Mapping[str, DeviceArray]) -> Shapes:
        """Steps 1 to 3; the shapes of the outputs, without the rows that were filled up."""
        self._staged.synchronize()  # pinned memory may still be read for a run that was not awaited
        self._tell("begun")
        self._kept = feeds
        batch, padded = self._batches(feeds, targets)
        shapes = {name: self._padded(name, feeds[name].shape, padded) for name in feeds}
        profile = self._spec.choose_profile(shapes)
        addresses = {name: buffer.pointer for name, buffer in self._buffers.items()}
        addresses |= {name: self._stage(name, feeds[name], shapes[name]) for name in feeds}
        self._staged.record(self.stream.handle)
        addresses |= {name: array.pointer for name, array in targets.items()}
        self._check_apart(feeds, addresses)
        bound = self._contexts.bind(profile, shapes, addresses)
        found = {
            name: self._padded(name, shape, batch) for name, shape in bound.output_shapes.items()
        }
        self._check_shapes(targets, found)
        self._tell("staged")
        self._contexts.execute(bound)
        self._tell("computed")
        return found

    def _tell(self, step: str) -> None:
        if self.on_step is not None:
            self.on_step(step)

    def _batches(
        self, feeds: Mapping[str, Any], targets: Mapping[str, DeviceArray]
    ) -> tuple[int, int]:
        """The batch of a call, and the one to run."""
        named = [name for name in feeds if self._has_batch(name)]
        if not named:
            return 0, 0
        batch: int = feeds[named[0]].shape[0]
        if targets or any(isinstance(array, DeviceArray) for array in feeds.values()):
            return batch, batch  # memory of others has no room to fill up
        return batch, next((size for size in self._buckets if size >= batch), batch)

    def _has_batch(self, name: str) -> bool:
        spec: TensorSpec = self._spec.tensors[name]
        return bool(spec.shape) and spec.shape[0] == "batch"

    def _padded(self, name: str, shape: Sequence[int], batch: int) -> tuple[int, ...]:
        return (batch, *shape[1:]) if self._has_batch(name) else tuple(shape)

    def _stage(self, name: str, array: Any, shape: tuple[int, ...]) -> int:
        """Bring an input to the GPU; its address there."""
        buffer = self._buffers[name].pointer
        if isinstance(array, DeviceArray):
            if array.pointer % ALIGNMENT == 0:
                return array.pointer
            self.stream.copy(buffer, array.pointer, array.nbytes)
            return buffer
        pinned = self._pinned[name]
        np.copyto(pinned.view(array.shape, array.dtype), array)
        self.stream.copy(buffer, pinned.pointer, array.nbytes)
        nbytes = math.prod(shape) * array.dtype.itemsize
        self.stream.zero(buffer + array.nbytes, nbytes - array.nbytes)
        return buffer

    def _check_apart(self, feeds: Mapping[str, Any], addresses: Mapping[str, int]) -> None:
        """An engine may write its outputs before it has read all inputs."""
        written = {addresses[name] for name in self._spec.outputs}
        for name, array in feeds.items():
            if isinstance(array, DeviceArray) and addresses[name] in written:
                raise FeedError(
                    f"input {name!r} is where this run writes an output; give that output other "
                    "memory with out=, such as session.empty(...)"
                )

    def _target(self, name: str, value: Any) -> DeviceArray:
        """Where an output is to be written."""
        check_outputs(self._spec.outputs, [name])
        array, dtype = self._on_device(name, value), self._spec.dtypes[name]
        if array.dtype != dtype or array.pointer % ALIGNMENT:
            raise FeedError(
                f"output {name!r}: expected {dtype} aligned to {ALIGNMENT} bytes, found "
                f"{array.dtype} at {array.pointer:#x}"
            )
        return array

    def _check_shapes(self, targets: Mapping[str, DeviceArray], shapes: Shapes) -> None:
        for name, array in targets.items():
            if array.shape != shapes[name]:
                raise FeedError(
                    f"output {name!r}: expected {list(shapes[name])}, found {list(array.shape)}"
                )

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
        self._kept = None
