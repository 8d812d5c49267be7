"""A serialized engine, brought onto the GPU: verified, streamed in, ready to make contexts.

A plan is native code: whoever writes it runs as us. So it is opened once, through no link, and
its size and sha256 are compared with the manifest's on that very descriptor before TensorRT reads
from it, in pieces and without a second copy in memory. Pieces are read into page-locked memory,
from which TensorRT copies straight to the GPU. Host code in a plan stays forbidden
(``engine_host_code_allowed``), and nothing here loads plugins.

TensorRT-RTX compiles kernels when an engine first runs. What it compiled is kept next to the plan

    <plan>.SM89.cache      sha256 of the rest, 32 bytes; the rest, TensorRT-RTX's own bytes

and is read again only if this user wrote it and nobody else may; TensorRT-RTX itself refuses
another version, driver or GPU. A cache that does not fit is ignored: it only costs time.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from internvl_edge.artifact import Artifact, FileRecord
from internvl_edge.artifact.open import sha256
from internvl_edge.artifact.pins import Pin, changed
from internvl_edge.artifact.sidecar import check_engine, engine_info
from internvl_edge.errors import (
    ArtifactError,
    HardwareError,
    InternVLError,
    ResourceError,
    UsageError,
)
from internvl_edge.files.disk import open_regular, write_atomically
from internvl_edge.runtime.gpu.device import Device
from internvl_edge.runtime.gpu.handles import PinnedBuffer
from internvl_edge.runtime.trt.vendor import NativeLog, callback
from internvl_edge.types import Array

__all__ = ["Engine", "find_engine", "require_engine"]

logger = logging.getLogger(__name__)

PIECE_NBYTES = 64 << 20  # of the plan, read at a time
OUT_OF_MEMORY = re.compile(r"out of memory|outofmemory|cudaMalloc|bad_alloc", re.IGNORECASE)
HASH_NBYTES = 32


def require_engine(artifact: Artifact, component: str, backend: str) -> None:
    """Make sure that there is an engine to look for.

    Raises:
        UsageError: none was built for the backend.
    """
    if not artifact.engines(component, backend):
        raise UsageError(
            f"{artifact.path} has no {backend} engine of {component!r}; "
            f"run: internvl-edge build {artifact.path} --target {backend}"
        )


def find_engine(artifact: Artifact, component: str, backend: str, trt: Any, sm: int) -> str:
    """Find the newest engine of a component that this installation and this GPU can run.

    Raises:
        HardwareError: none of them fits.
    """
    refusals = []
    for record in reversed(artifact.engines(component, backend)):
        try:
            check_engine(engine_info(artifact, record.sidecar), trt, sm=sm)
        except HardwareError as error:
            refusals.append(error)
        else:
            return record.file
    raise refusals[0]


class Engine:
    """A deserialized engine; it makes execution contexts.

    Args:
        path: the plan.
        record: what it must be.
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        device: the GPU.
        graphs: let TensorRT-RTX capture CUDA graphs of its own.

    Raises:
        ArtifactError: the file is not the one recorded, or not an engine.
        ResourceError: the GPU has no room for it.
        HardwareError: TensorRT cannot start.
    """

    def __init__(
        self, path: Path, record: FileRecord, trt: Any, device: Device, *, graphs: bool
    ) -> None:
        self.path, self.trt, self._device = path, trt, device
        self.log = NativeLog()
        self._logger = callback(trt.ILogger, log=self.log.log)
        device.require(record.nbytes, f"{path.name}: loading the engine")
        try:
            self._runtime = trt.Runtime(self._logger)
        except (TypeError, RuntimeError) as error:  # the factory gave none
            raise HardwareError(f"{trt.__name__} cannot start: {self._reason(error)}") from error
        with _open(path, record) as file, _staging(device, record.nbytes) as staging:
            reader = _reader(trt, file, record.nbytes, staging)
            before = Pin.of(file)
            self.native = self._runtime.deserialize_cuda_engine(reader)
            if not Pin.of(file).has_content_of(before):
                raise changed(path.parent.parent, f"{path.name} was written to while it was read")
        if self.native is None:
            raise self.failure("loading the engine", ArtifactError)
        # TensorRT-RTX captures graphs itself; for TensorRT, each slot does.
        self.is_rtx = hasattr(trt, "CudaGraphStrategy")
        self._cache = _RuntimeCache(self.native, path, device.sm) if self.is_rtx else None
        self._graphs = graphs
        self._lock = Lock()

    def create_context(self, *, recurs: bool = True) -> Any:
        """Make an execution context, whose memory the caller provides.

        Args:
            recurs: its shapes come again, so that it pays to prepare for them.

        Raises:
            ResourceError, InternVLError: there is none to be had.
        """
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        with self._lock:
            how = self._rtx_config(strategy, recurs) if self.is_rtx else strategy
            context = self.native.create_execution_context(how)
            if context is None:
                raise self.failure("creating an execution context")
            return context

    def _rtx_config(self, strategy: Any, recurs: bool) -> Any:
        """Configure what TensorRT-RTX decides as it runs: CUDA graphs, and its kernels' cache.

        Kernels for the very shapes of a call are compiled in the background, while general ones
        serve: nobody waits for a compiler. For shapes that do not come again neither pays.
        """
        config = self.native.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        graphs, captures = self.trt.CudaGraphStrategy, self._graphs and recurs
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if captures else graphs.DISABLED
        kernels = self.trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = (
            kernels.LAZY if recurs else kernels.NONE
        )
        if self._cache is not None:
            self._cache.attach(config)
        return config

    def failure(self, what: str, kind: type[InternVLError] = InternVLError) -> InternVLError:
        """Make the error for a call that failed, from what TensorRT logged."""
        told = self._reason(None)
        self.log.errors.clear()
        if OUT_OF_MEMORY.search(told):
            kind = ResourceError
        return kind(f"{self.path.name}: {what} failed: {told}")

    def keep_kernels(self) -> None:
        """Write what TensorRT-RTX compiled so far; not of a GPU that failed, nor during a run."""
        if self._cache is not None and not self._device.is_dead:
            self._cache.save()

    def close(self) -> None:
        """Free the engine, once no context is left; keep what TensorRT-RTX compiled."""
        self.keep_kernels()
        self._cache = None
        self.native = self._runtime = None

    def _reason(self, error: Exception | None) -> str:
        name = self.trt.__name__
        return self.log.decisive() or (str(error) if error else f"{name} logged no reason")


def _open(path: Path, record: FileRecord) -> io.BufferedReader:
    """Open the plan, once it is found to be what the manifest says."""
    try:
        file = open_regular(path)
    except OSError as error:
        raise ArtifactError(f"{path}: expected an engine: {error.strerror}") from error
    nbytes, digest = os.fstat(file.fileno()).st_size, sha256(file)
    if (nbytes, digest) != (record.nbytes, record.sha256):
        file.close()
        raise ArtifactError(
            f"{path}: the manifest says {record.nbytes} bytes of sha256 {record.sha256}, found "
            f"{nbytes} of {digest}; an engine is native code and this one is not loaded: "
            "build again"
        )
    file.seek(0)
    return file


@contextmanager
def _staging(device: Device, nbytes: int) -> Iterator[Array]:
    """Lend memory for a piece of the plan: page-locked, or ordinary where none can be had."""
    size = max(1, min(nbytes, PIECE_NBYTES))
    with ExitStack() as stack:
        try:
            pinned = stack.enter_context(PinnedBuffer(device, size))
        except ResourceError as error:
            logger.info("the engine is read through pageable memory: %s", error)
            yield np.empty(size, np.uint8)
        else:
            yield pinned.view((size,), np.dtype(np.uint8))


def _reader(trt: Any, file: io.BufferedReader, nbytes: int, staging: Array) -> Any:
    """Make TensorRT's view of the file; errors end the stream, and it then refuses the engine.

    TensorRT has copied a piece when it asks for the next one, which is read over it.
    """

    def read(count: int, stream: int) -> Array:
        try:
            return staging[: file.readinto(staging[:count].data)]
        except OSError:
            return staging[:0]

    def seek(offset: int, where: Any) -> bool:
        base = {"SET": 0, "CUR": file.tell(), "END": nbytes}[where.name]
        target = base - abs(offset) if where.name == "END" else base + offset
        if not 0 <= target <= nbytes:
            return False
        file.seek(target)
        return True

    return callback(trt.IStreamReaderV2, read=read, seek=seek)


class _RuntimeCache:
    """Kernels that TensorRT-RTX compiled, shared by the contexts of an engine."""

    def __init__(self, engine: Any, plan: Path, sm: int) -> None:
        self._path = plan.with_name(f"{plan.name}.SM{sm}.cache")
        self._cache = engine.create_runtime_config().create_runtime_cache()
        self._saved = _read_own(self._path)
        if self._saved is not None and not self._cache.deserialize(self._saved):
            logger.info("%s: not for this GPU and release; compiling anew", self._path)
            self._saved = None

    def attach(self, config: Any) -> None:
        if not config.set_runtime_cache(self._cache):
            logger.info("%s: not taken; each context compiles its own kernels", self._path)

    def save(self) -> None:
        """Write it where it changed; a directory that cannot be written is left alone."""
        memory = self._cache.serialize()
        data = None if memory is None else bytes(memory)
        if not data or data == self._saved:
            return
        try:
            write_atomically(self._path, hashlib.sha256(data).digest() + data)
            self._path.chmod(0o600)
        except (InternVLError, OSError) as error:
            logger.info("compiled kernels are not kept: %s", error)
        else:
            self._saved = data


def _read_own(path: Path) -> bytes | None:
    """Read a cache that this user wrote, nobody else could, and that is whole; else None."""
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                logger.warning("%s: others may have written it; ignored", path)
                return None
            digest, data = file.read(HASH_NBYTES), file.read()
    except OSError:
        return None
    return data if hashlib.sha256(data).digest() == digest else None
