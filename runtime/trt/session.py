"""TensorRT and TensorRT-RTX as a ``Session``: one engine, several places to run it.

The two share one interface under two module names; the module is passed in. A session holds one
engine and a pool of slots (``slot``), each with a stream and memory for the largest call its
profiles allow, taken when the session opens: what is not there is missed before the first request.
Shapes that come again take an execution context and a graph each, as long as there is memory for
them. A run leases a slot, so that as many calls run at once as there are slots, and the next one
waits.

    run          outputs as arrays of their own
    lease        a slot for a while: outputs as views of its memory, or left on the GPU
    submit       a ``concurrent.futures.Future``;  run_async  the same to await
    run_device   outputs in GPU memory of their own;  step, take_rows  a decoder's cache, which
                 never crosses to the host
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from threading import Condition, get_ident
from typing import Any, Self

import numpy as np

from internvl_edge.artifact import Artifact, TensorSpec
from internvl_edge.errors import UsageError
from internvl_edge.runtime.feeds import check_feeds, check_outputs, numpy_dtype
from internvl_edge.runtime.gpu.device import GB, Device
from internvl_edge.runtime.gpu.device_array import DeviceArray
from internvl_edge.runtime.gpu.handles import Buffer, Stream
from internvl_edge.runtime.trt.engine import Engine, find_engine, require_engine
from internvl_edge.runtime.trt.options import TrtOptions
from internvl_edge.runtime.trt.profiles import EngineSpec, read_engine_spec
from internvl_edge.runtime.trt.slot import Slot
from internvl_edge.runtime.trt.vendor import import_tensorrt
from internvl_edge.types import Array

__all__ = ["TrtSession", "open_component"]

logger = logging.getLogger(__name__)


class TrtSession:
    """An engine on a GPU; ``Session`` says what it does. Close it to free the memory.

    Args:
        engine: what runs.
        spec: its tensors and profiles.
        device: the GPU.
        options: how to run it.

    Raises:
        ResourceError: the GPU has no room for the slots; nothing stays allocated.
    """

    def __init__(
        self, engine: Engine, spec: EngineSpec, device: Device, options: TrtOptions = TrtOptions()
    ) -> None:
        self._engine, self._spec, self.device = engine, spec, device
        self._changed = Condition()
        self._free: list[Slot] = []
        self._holders: list[int] = []  # threads, once for every slot they lease
        self._num_slots = self._num_open = options.slots
        self._closed = False
        self._executor: ThreadPoolExecutor | None = None
        contexts = [engine.create_context() for _ in range(options.slots)]
        with Stream(device) as stream:
            capacities = spec.capacities(contexts[0], stream, engine)
            stream.synchronize()
        scratch, tensors = int(engine.native.device_memory_size_v2), sum(capacities.values())
        device.require(
            options.slots * (scratch + tensors),
            f"{engine.path.name}: slots={options.slots}, each of {scratch / GB:.2f} GB for the "
            f"engine and {tensors / GB:.2f} GB for the largest inputs and outputs (which it needs "
            "of host memory too),",
        )
        slots = []
        with ExitStack() as stack:
            for context in contexts:
                slot = Slot(
                    engine,
                    spec,
                    device,
                    context,
                    capacities,
                    graphs=options.graphs,
                    batch_buckets=options.batch_buckets,
                )
                stack.callback(slot.close)
                slots.append(slot)
            stack.pop_all()
        self._free = slots

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._spec.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._spec.outputs

    @property
    def optional(self) -> Mapping[str, TensorSpec]:
        """See ``DecoderSession.optional``; an engine computes the logits of all positions."""
        return {}

    @property
    def pads(self) -> bool:
        """See ``DecoderSession.pads``."""
        return True

    @property
    def largest(self) -> Mapping[str, int]:
        """See ``Session.largest``."""
        return self._spec.largest

    def run(
        self,
        feeds: Mapping[str, Any],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """See ``Session.run``; feeds may also be on the GPU.

        A batch of NumPy arrays above the largest that the engine takes runs in several calls.

        Raises:
            SessionDead: the GPU failed, now or before.
        """
        calls = self._split(feeds, check)
        check = check and len(calls) == 1  # of several, the whole was checked
        with self.lease() as slot:
            parts = [
                {n: view.copy() for n, view in slot.run(call, check=check, outputs=outputs).items()}
                for call in calls
            ]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def run_device(
        self,
        feeds: Mapping[str, Any],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceArray]:
        """Like ``run``, but outputs stay on the GPU, complete, in memory of their own.

        For shapes that do not come again: no graph is captured. ``lease`` has what is faster for
        those that do. One block holds all outputs and is freed with the last of them.
        """
        wanted = None if outputs is None else check_outputs(self._spec.outputs, outputs)
        with self.lease() as slot:
            _, arrays = slot.run_kept(feeds, check=check)
        return arrays if wanted is None else {name: arrays[name] for name in wanted}

    def step(
        self, feeds: Mapping[str, Array], names: Sequence[str], cache: Sequence[DeviceArray]
    ) -> tuple[Array, list[DeviceArray]]:
        """Like ``run_device`` of a decoder, unchecked: for what an earlier call left.

        Args:
            feeds: what is not in the cache.
            names: of the cache's inputs; its outputs come in the same order, after the logits.
            cache: what ``run_device``, ``step`` or ``take_rows`` gave. It is used up: the step
                after this one writes over it, also where others were given it.

        Returns:
            The logits, and the next cache.
        """
        logits = next(iter(self._spec.outputs))
        given = {**feeds, **dict(zip(names, cache, strict=True))}
        with self.lease() as slot:
            host, presents = slot.run_kept(given, used_up=cache, fetch=[logits])
        return host[logits], list(presents.values())

    def fetch(self, cache: Sequence[DeviceArray]) -> list[Array]:
        """See ``DecoderSession.fetch``."""
        return [value.numpy() for value in cache]

    def take_rows(self, cache: Sequence[DeviceArray], rows: Array) -> list[DeviceArray]:
        """Copy these rows of a cache on the GPU, in this order; it is used up, see ``step``."""
        with self.lease() as slot:
            return slot.take_rows(cache, rows)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Slot]:
        """Lease a slot to this thread until the block ends; wait until one is free.

        Raises:
            UsageError: the session is closed, or this thread would wait for itself.
            SessionDead: the GPU failed before.
        """
        self.device.activate()
        me = get_ident()
        with self._changed:
            if self._holders.count(me) == self._num_slots:
                raise UsageError(
                    f"this thread leases every slot of the session ({self._num_slots}) and would "
                    "wait for itself: run on the slot it has, or open the session with more slots"
                )
            self._changed.wait_for(lambda: self._free or self._closed)
            self._require_open()
            slot = self._free.pop()
            self._holders.append(me)
        try:
            yield slot
        finally:
            self._give_back(slot, me)

    def submit(self, feeds: Mapping[str, Any], **options: Any) -> Future[dict[str, Array]]:
        """Run in a thread of the session's own."""
        self.device.require_usable()
        with self._changed:
            self._require_open()
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._num_slots, "internvl-edge")
            return self._executor.submit(partial(self.run, feeds, **options))

    async def run_async(self, feeds: Mapping[str, Any], **options: Any) -> dict[str, Array]:
        """Run, to be awaited; a cancelled call still ends on the GPU, and its result is dropped."""
        import asyncio  # which takes longer than all else here

        return await asyncio.wrap_future(self.submit(feeds, **options))

    def empty(self, name: str, shape: tuple[int, ...]) -> DeviceArray:
        """Allocate GPU memory for a value of a tensor, uninitialised, freed with the array."""
        self.device.activate()
        dtype = numpy_dtype(self._spec.tensors[name].dtype)
        buffer = Buffer(self.device, math.prod(shape) * dtype.itemsize)
        return DeviceArray(
            pointer=buffer.pointer,
            shape=shape,
            dtype=dtype,
            device=self.device.index,
            owner=buffer,
        )

    def close(self) -> None:
        """Refuse new runs and free what is at rest; runs under way end, and free theirs."""
        if self.device.is_forked():
            return  # it is the parent's
        with self._changed:
            self._closed = True
            at_rest, self._free = self._free, []
            executor, self._executor = self._executor, None
            self._changed.notify_all()
        for slot in at_rest:
            self._free_slot(slot)
        if executor is not None:
            executor.shutdown(wait=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_free", None) and not sys.is_finalizing():
            self.close()

    def _split(self, feeds: Mapping[str, Any], check: bool) -> list[Mapping[str, Any]]:
        """Split the feeds of a call, checked, where the batch is above the largest."""
        limit = self._spec.max_batch
        values = list(feeds.values()) if isinstance(feeds, Mapping) else []
        arrays = [value for value in values if isinstance(value, np.ndarray)]
        batches = {len(array) if array.ndim else 0 for array in arrays}
        if limit is None or len(arrays) < len(values) or len(batches) != 1 or max(batches) <= limit:
            return [feeds]
        (batch,) = batches
        whole = check_feeds(self._spec.inputs, feeds, check)
        return [
            {name: array[start : start + limit] for name, array in whole.items()}
            for start in range(0, batch, limit)
        ]

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError(f"the session of {self._engine.path} is closed; open it again")

    def _give_back(self, slot: Slot, holder: int) -> None:
        with self._changed:
            self._holders.remove(holder)
            if not self._closed:
                self._free.append(slot)
                self._changed.notify()
                return
        self._free_slot(slot)

    def _free_slot(self, slot: Slot) -> None:
        """Free a slot of a closed session; with the last one, the engine."""
        slot.close()
        with self._changed:
            self._num_open -= 1
            is_last = self._num_open == 0
        if is_last:
            self._engine.close()


def open_component(
    artifact: Artifact,
    component: str,
    device: str = "auto",
    backend: str = "tensorrt-rtx",
    *,
    options: TrtOptions = TrtOptions(),
    trt: Any = None,
    cudart: Any = None,
) -> TrtSession:
    """Open the engine of a component.

    Args:
        artifact: the directory.
        component: a name in its manifest.
        device: ``"auto"``, ``"cuda"`` or ``"cuda:1"``.
        backend: ``"tensorrt-rtx"`` or ``"tensorrt"``.
        options: how to run it.
        trt: the backend's module; None imports it.
        cudart: the module ``cuda.bindings.runtime``; None imports it.

    Raises:
        UsageError: not a GPU, options of another backend, or no engine was built for this one.
        MissingDependency, HardwareError: the backend, the driver or a GPU that fits is missing.
        ArtifactError: the engine is not the one that was recorded.
        ResourceError: the GPU has no room for it.
    """
    if not isinstance(options, TrtOptions):
        raise UsageError(f"{backend}: expected TrtOptions, found {type(options).__name__}")
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if match is None:
        raise UsageError(f"device {device!r}: {backend} runs on 'cuda' or such as 'cuda:1'")
    require_engine(artifact, component, backend)
    trt = import_tensorrt(backend) if trt is None else trt
    gpu = Device(int(match[1] or 0), cudart)
    name = find_engine(artifact, component, backend, trt, gpu.sm)
    record = artifact.manifest.components[component]
    before = gpu.free_nbytes()
    engine = Engine(
        artifact.file(name), artifact.manifest.files[name], trt, gpu, graphs=options.graphs
    )
    with ExitStack() as stack:
        stack.callback(engine.close)
        spec = read_engine_spec(engine, record.inputs, record.outputs)
        session = TrtSession(engine, spec, gpu, options)
        stack.pop_all()
    engine.keep_kernels()  # compiled by now; of a process that is killed, they stay
    free = gpu.free_nbytes()
    logger.info("%s: %.2f GB of GPU memory, %.2f GB free", name, (before - free) / GB, free / GB)
    return session
