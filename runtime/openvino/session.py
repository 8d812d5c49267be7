"""OpenVINO as a ``Session``: what sees images alone, on the CPU.

A published graph opens there as it is, its Q/DQ pairs become products of INT8. What is gained is
the rest of a tower: OpenVINO multiplies bfloat16 where the CPU does (AVX512_BF16, AMX), at twice
the rate of float32 and more, and ONNX Runtime's CPU provider has float32 alone. Attention has no
Q/DQ pairs, and is two fifths of an INT8 tower's time at 1025 tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

from internvl_edge.files.telemetry import without_reports

try:
    with without_reports("openvino_telemetry"):
        from openvino import Core
except ImportError as error:  # or one of before 2023
    from internvl_edge.errors import MissingDependency

    raise MissingDependency.of("openvino", "openvino") from error

from internvl_edge.artifact import TensorSpec
from internvl_edge.artifact.pins import Watch
from internvl_edge.errors import (
    ArtifactError,
    InternVLError,
    ResourceError,
    UsageError,
)
from internvl_edge.files.cores import default_threads
from internvl_edge.files.forks import never_destroyed_in_children, require_own_process
from internvl_edge.runtime.feeds import check_feeds, check_outputs
from internvl_edge.runtime.openvino.options import BFLOAT16, FLOAT32
from internvl_edge.types import Array

__all__ = ["OpenVinoSession", "fastest_dtype"]

CPU = "CPU"
OUT_OF_MEMORY = re.compile(r"bad_alloc|allocat\w* fail|to allocate|out of memory", re.IGNORECASE)
NAMES = {FLOAT32: "f32", BFLOAT16: "bf16"}  # of dtypes, to OpenVINO


class OpenVinoSession:
    """A graph compiled by OpenVINO for the CPU; ``Session`` says what it does.

    Args:
        graph: the file; its external data is in the same folder.
        path: the file as errors name it.
        inputs, outputs: the tensors.
        watch: over its external data, which must not be written to while it is mapped.
        dtype: of what is not INT8, ``"float32"`` or ``"bfloat16"``.
        num_threads: within a call; None: every core this process may use.

    Raises:
        ArtifactError: OpenVINO refuses the file.
        ResourceError: memory ran out.
    """

    def __init__(
        self,
        graph: Path,
        path: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        watch: Watch | None = None,
        dtype: str = FLOAT32,
        num_threads: int | None = None,
    ) -> None:
        self._path, self._watch, self._process = path, watch, os.getpid()
        self._inputs = {spec.name: spec for spec in inputs}
        self._outputs = {spec.name: spec for spec in outputs}
        self.largest: Mapping[str, int] = {}  # nothing bounds a graph
        config = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": default_threads() if num_threads is None else num_threads,
            "INFERENCE_PRECISION_HINT": NAMES[dtype],
            "ENABLE_CPU_PINNING": False,  # another process would be bound to the same cores
        }
        core = _core()
        try:
            compiled = core.compile_model(core.read_model(str(graph)), CPU, config)
        except Exception as error:
            message = _message(error).replace(f"{graph.parent}/", f"{path.parent}/")
            if _is_memory(error, message):
                raise ResourceError(f"not enough memory to open {path}: {message}") from error
            raise ArtifactError(f"OpenVINO cannot open {path}: {message}") from error
        never_destroyed_in_children(compiled)
        self._require_promised(compiled)
        self._compiled: Any = compiled

    def _require_promised(self, compiled: Any) -> None:
        """Refuse a graph of other dtypes or sizes: a feed would be cast without a word."""
        for ports, specs in ((compiled.inputs, self._inputs), (compiled.outputs, self._outputs)):
            for spec in specs.values():
                port = next((port for port in ports if spec.name in port.get_names()), None)
                if port is None or not _is_as(port, spec):
                    raise ArtifactError(
                        f"{self._path}: manifest.json promises {spec.name} {spec.dtype} "
                        f"{list(spec.shape)}, OpenVINO finds {port or 'none'}; export again"
                    )

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._outputs

    def run(
        self,
        feeds: Mapping[str, Array],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """See ``Session.run``."""
        compiled, watch = self._opened(), self._watch
        names = list(self._outputs) if outputs is None else check_outputs(self._outputs, outputs)
        arrays = check_feeds(self._inputs, feeds, check)
        if watch is not None:
            watch.require_unchanged()
        try:
            # of its own: one that is kept would keep what a caller gave
            request = compiled.create_infer_request()
            # not infer(): with one thread that loses errors, and the outputs are of the call before
            request.start_async(arrays, share_inputs=True)
            request.wait()
            results = {name: request.get_tensor(name).data.copy() for name in names}
        except Exception as error:
            message = _message(error)
            if _is_memory(error, message):
                raise ResourceError(
                    f"not enough memory to run {self._path.name}: {message}; use a smaller batch"
                ) from error
            raise InternVLError(f"OpenVINO failed to run {self._path}: {message}") from error
        if watch is not None:
            watch.require_unchanged()
        return results

    def _opened(self) -> Any:
        compiled = self._compiled  # a close() by another thread waits for this reference
        if compiled is None:
            raise UsageError(f"the session of {self._path} is closed; open it again")
        require_own_process(self._process, f"the session of {self._path}")
        return compiled

    def close(self) -> None:
        """Free the graph once the runs that are under way have ended."""
        self._compiled = self._watch = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def fastest_dtype() -> str:
    """Choose bfloat16 where this CPU multiplies it; elsewhere float32 is as fast."""
    multiplies = _core().get_property(CPU, "OPTIMIZATION_CAPABILITIES")
    return BFLOAT16 if "BF16" in multiplies else FLOAT32


def _core() -> Any:
    """Return OpenVINO, in the process that started it.

    A child would be given threads that closed sessions of its parent left idle, and wait for ever.

    Raises:
        UsageError: this is a child, forked since.
    """
    core, process = _started()
    require_own_process(process, "OpenVINO")
    return core


@cache
def _started() -> tuple[Any, int]:
    core = Core()
    never_destroyed_in_children(core)  # it has the threads of sessions that were closed
    return core, os.getpid()


def _is_as(port: Any, spec: TensorSpec) -> bool:
    """Tell whether a tensor of a graph is what a manifest says; NumPy has no bfloat16."""
    name = port.element_type.get_type_name()
    dtype = BFLOAT16 if name == NAMES[BFLOAT16] else port.element_type.to_dtype().name
    shape = port.partial_shape
    return (
        dtype == spec.dtype
        and len(shape) == len(spec.shape)
        and all(
            isinstance(promised, str) or size.is_dynamic or size.get_length() == promised
            for promised, size in zip(spec.shape, shape, strict=True)
        )
    )


def _message(error: Exception) -> str:
    """Return OpenVINO's own words on one line, without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(said) or type(error).__name__


def _is_memory(error: Exception, message: str) -> bool:
    return isinstance(error, MemoryError) or OUT_OF_MEMORY.search(message) is not None
