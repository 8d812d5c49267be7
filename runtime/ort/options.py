"""How and where ONNX Runtime computes: its options, and its providers by preference.

Options can be written down where ONNX Runtime is not installed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any

from internvl_edge.errors import HardwareError, MissingDependency, UsageError
from internvl_edge.files.cores import MAX_THREADS, default_threads
from internvl_edge.runtime.gpu.probe import gpu_count

__all__ = [
    "CPU",
    "CUDA",
    "GPU_PROVIDERS",
    "OrtOptions",
    "captures",
    "choose_providers",
    "load_gpu_libraries",
    "names_of",
    "native_options",
    "place_of",
    "require_threads",
    "share_threads",
    "threads_of",
]

Provider = str | tuple[str, dict[str, str]]  # with its options

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# What computes on a GPU → ONNX Runtime's provider; what it does not take goes to CUDA's, if there.
GPU_PROVIDERS = {
    "cuda": CUDA,
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
ERRORS, FATAL_ONLY = 3, 4
PRODUCTS_ACCURACY = "session.qdq_matmulnbits_accuracy_level"
EXACT_PRODUCTS, ROUNDED_PRODUCTS = 1, 4  # MatMulNBits' accuracy_level: float32 and int8


@dataclass(frozen=True, slots=True, kw_only=True)
class OrtOptions:
    """How ONNX Runtime computes; the defaults are the fastest of a process that has the cores.

    Raises:
        UsageError: a number of threads that is none.
    """

    # Within an operator; None: OMP_NUM_THREADS, else every core this process may use. Each session
    # has so many, or all of them together: share_threads.
    num_threads: int | None = None
    arena: bool = True  # keep intermediate buffers between runs
    prepack: bool = True  # weights in the layout of the kernels: faster, twice the memory
    # Constants are computed once, at opening: faster, and they are copies. None: but those of large
    # graphs with unsigned weights, where no decoder reads them for a token at a time.
    fold: bool | None = None
    # Threads wait for the next operator of a run in a loop: faster where the cores are free, and
    # much slower where other programs compute on them. Between runs they sleep either way.
    spin: bool = True
    gpu_provider: str = "cuda"  # a name in GPU_PROVIDERS
    # Copy weights into memory of this process instead of mapping the directory's files: what is
    # written to the files later, or cut off, reaches no run.
    copy: bool = False
    # On a GPU, replay an image tower's calls of shapes seen before as CUDA graphs, and a decoder's
    # tokens where its cache has a fixed capacity; they take turns.
    graphs: bool = True
    # On a GPU, by the provider "cuda": run a component's graph in ONNX Runtime's own operators.
    contrib: bool = True
    tf32: bool = False  # on a GPU, round the factors of float32 products to 10 bits: faster
    # On a GPU, by the provider "cuda": run INT8 and FP8, whose weights each call dequantizes.
    allow_slow: bool = False
    qdq: bool = True  # make products of 8 bits of what DequantizeLinear stands around
    # Weight-only products: rounding x to int8 by blocks is faster; exact: x stays in float32.
    exact: bool = False

    def __post_init__(self) -> None:
        require_threads(self.num_threads)


def require_threads(count: object) -> None:
    """Refuse a number of threads that is none.

    Raises:
        UsageError: says what was expected.
    """
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_THREADS):
        raise UsageError(
            f"num_threads {count!r}: expected a whole number from 1 to {MAX_THREADS}, or None"
        )


class _Pool:
    """The one pool of threads that sessions of a process can share in place of pools of their own.

    ONNX Runtime makes it once, and from then on refuses every session of the process that has a
    pool of its own, those of other libraries too. So only a process's owner decides for it.
    """

    def __init__(self) -> None:
        self._is_wanted = False
        self._threads: int | None = None  # None: not made yet

    def want(self) -> None:
        self._is_wanted = True

    def serves(self, threads: int) -> bool:
        """Tell whether sessions run on it; the first one decides its size."""
        if not self._is_wanted:
            return False
        if self._threads is None:
            import onnxruntime

            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            self._threads = threads
        return True


_POOL = _Pool()


def share_threads() -> None:
    """Let all sessions of this process compute with one pool of threads; once, before any opens.

    For programs whose only ONNX Runtime sessions are ours, as the command line and a server are:
    ONNX Runtime then refuses sessions with threads of their own, which other libraries open. The
    pool has as many threads as the first session asks for. Without it, each component has a pool of
    so many, which sleep between its runs. Not to be combined with a fork after the first run.
    """
    _POOL.want()


def threads_of(options: OrtOptions) -> int:
    """Count the threads within an operator."""
    return default_threads() if options.num_threads is None else options.num_threads


def native_options(options: OrtOptions) -> Any:
    """Make ONNX Runtime's own object."""
    import onnxruntime

    native = onnxruntime.SessionOptions()
    native.log_severity_level = FATAL_ONLY
    threads = threads_of(options)
    if _POOL.serves(threads):
        native.use_per_session_threads = False
    else:
        native.intra_op_num_threads = threads
    native.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    native.enable_cpu_mem_arena = options.arena
    native.add_session_config_entry("session.disable_prepacking", str(int(not options.prepack)))
    native.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spin)))
    # Threads sleep after a run: else they take their cores from the next component for 10-20 ms.
    native.add_session_config_entry("session.force_spinning_stop", "1")
    level = str(EXACT_PRODUCTS if options.exact else ROUNDED_PRODUCTS)
    native.add_session_config_entry(PRODUCTS_ACCURACY, level)
    return native


def place_of(providers: Sequence[Provider]) -> tuple[str, int]:
    """Return the device type and index where the preferred provider leaves its outputs."""
    first = providers[0]
    return ("cpu", 0) if isinstance(first, str) else ("cuda", int(first[1]["device_id"]))


def choose_providers(device: str, options: OrtOptions = OrtOptions()) -> list[Provider]:
    """Choose ONNX Runtime's providers for a device, in the order of preference."""
    import onnxruntime

    gpu_provider = options.gpu_provider
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise UsageError(f"device {device!r}: expected 'auto', 'cpu', 'cuda' or 'cuda:1'")
    if gpu_provider not in GPU_PROVIDERS:
        raise UsageError(f"gpu_provider {gpu_provider!r}: expected {', '.join(GPU_PROVIDERS)}")
    available, preferred = onnxruntime.get_available_providers(), GPU_PROVIDERS[gpu_provider]
    wanted = [name for name in dict.fromkeys((preferred, CUDA)) if name in available]
    has_provider = preferred in available
    if device == "cpu" or (device == "auto" and not (has_provider and gpu_count())):
        return [CPU]
    if gpu_count() == 0:
        raise HardwareError(f"device {device!r}: found no CUDA device; use device 'cpu'")
    if not has_provider:
        raise MissingDependency.of("onnxruntime-gpu", "ort-gpu")
    index = int(match[1] or 0)
    if index >= gpu_count():
        raise HardwareError(
            f"device {device!r}: found {gpu_count()} CUDA devices; use device 'cpu'"
        )
    computing = {
        CUDA: {
            "use_tf32": str(int(options.tf32)),
            "enable_cuda_graph": str(int(options.graphs and gpu_provider == "cuda")),
        }
    }
    return [*((name, {"device_id": str(index), **computing.get(name, {})}) for name in wanted), CPU]


@cache
def load_gpu_libraries() -> str:
    """Load CUDA and cuDNN from NVIDIA's wheels, where the system's paths may not have them.

    Once per process, and for all of it: ONNX Runtime's warnings are turned off, as it has one for
    each session on a GPU, and what is printed meanwhile is taken for its own.

    Returns:
        The libraries not found, in ONNX Runtime's words; they may be found later, or not needed.
    """
    import onnxruntime

    said = io.StringIO()
    with redirect_stdout(said):  # it prints, and a library does not
        onnxruntime.preload_dlls()
    onnxruntime.set_default_logger_severity(ERRORS)
    return "; ".join(said.getvalue().split("\n")).strip("; ")


def captures(providers: Sequence[Provider]) -> bool:
    """Tell whether calls are captured as CUDA graphs there."""
    first = providers[0]
    return not isinstance(first, str) and first[1].get("enable_cuda_graph") == "1"


def names_of(providers: Sequence[Provider]) -> list[str]:
    return [entry if isinstance(entry, str) else entry[0] for entry in providers]
