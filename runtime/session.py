"""Where hardware varies: the ``Session`` protocol, what it accepts, and who implements it.

A session runs one component. It refuses what it cannot run *before* any work, by the names,
dtypes and dimensions of its ``TensorSpec``s. A dimension of a spec is

    an int            exactly this size
    a name            any size, the same wherever the name stands in one call: ``batch``
    a sum of those    ``past+length``

and sizes are at least 1, but for ``past``, which is 0 when a decoder starts. Nothing is cast:
an array of another dtype or byte order is an error. A strided array is copied to a contiguous one
first and so gives the same result.
"""

from __future__ import annotations

import ctypes
import difflib
import importlib
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from internvl_edge.artifact import Artifact, TensorSpec, open_artifact
from internvl_edge.errors import FeedError, HardwareError, MissingDependency, UsageError
from internvl_edge.runtime.device_array import DeviceArray

__all__ = [
    "BACKENDS",
    "Array",
    "Session",
    "check_feeds",
    "check_outputs",
    "cuda_device_count",
    "did_you_mean",
    "open_component",
    "open_session",
    "require_backend",
]

Array = np.ndarray[Any, Any]

# Backend → the module whose ``open_component`` opens a session of it.
BACKENDS = {
    "onnxruntime": "internvl_edge.runtime.ort",
    "tensorrt-rtx": "internvl_edge.runtime.trt",
    "tensorrt": "internvl_edge.runtime.trt",
}
# Backend → its Python package, and the extra that installs it.
PACKAGES = {
    "onnxruntime": ("onnxruntime", "ort"),
    "tensorrt-rtx": ("tensorrt_rtx", "rtx"),
    "tensorrt": ("tensorrt", "trt"),
}
MAY_BE_EMPTY = frozenset({"past"})
SIMILAR = 0.75  # of difflib's ratio, 0 to 1: a typo, not another name of the same family


class Session(Protocol):
    """A component, opened on some hardware. Thread-safe; a context manager that closes itself."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What ``run`` takes."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What ``run`` gives."""

    def run(
        self,
        feeds: Mapping[str, Array],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Compute the outputs of one call.

        Args:
            feeds: one array per input.
            check: scan float inputs for NaN and infinity; names, dtypes and dimensions are
                checked in any case.
            outputs: the outputs that are wanted, to spare the copies of the others; None is all.

        Raises:
            FeedError: what ``check_feeds`` refuses.
            UsageError: an output that does not exist, or the session is closed.
            ResourceError: memory ran out.
        """

    def close(self) -> None:
        """Free everything; may be called again."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def open_session(
    out: str | os.PathLike[str], component: str, backend: str = "auto", device: str = "auto"
) -> Session:
    """Open one component of a compiled directory.

    Args:
        out: the directory that ``internvl-edge export`` published.
        component: a name in its manifest, such as ``"vision"``.
        backend: ``"onnxruntime"``, ``"tensorrt-rtx"``, ``"tensorrt"``, or ``"auto"``: ONNX
            Runtime.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``: a GPU when both the backend
            and the machine have one.

    Raises:
        ArtifactError: the directory is not what its manifest says.
        UsageError: an unknown component, backend or device.
        MissingDependency: the backend's package is not installed.
        HardwareError: the backend or the component cannot run on this machine.
    """
    return open_component(open_artifact(out), component, backend, device)


def open_component(
    artifact: Artifact, component: str, backend: str = "auto", device: str = "auto"
) -> Session:
    """Like ``open_session``, of a directory that is already open."""
    present = artifact.manifest.components
    if component not in present:
        raise UsageError(
            f"component {component!r}: {artifact.path} has {', '.join(present)}"
            f"{did_you_mean(component, present)}"
        )
    chosen = require_backend(backend)
    module = importlib.import_module(BACKENDS[chosen])
    session: Session = module.open_component(artifact, component, device, chosen)
    return session


def require_backend(backend: str) -> str:
    """The backend that a name stands for, once its package and its hardware are found.

    Raises:
        UsageError: an unknown name.
        MissingDependency: its package is not installed.
        HardwareError: it needs a GPU and there is none.
    """
    if backend not in (*BACKENDS, "auto"):
        raise UsageError(
            f"backend {backend!r}: expected auto, {', '.join(BACKENDS)}"
            f"{did_you_mean(backend, BACKENDS)}"
        )
    chosen = "onnxruntime" if backend == "auto" else backend
    package, extra = PACKAGES[chosen]
    if importlib.util.find_spec(package) is None:
        raise MissingDependency.of(package, extra)
    if chosen != "onnxruntime" and cuda_device_count() == 0:
        raise HardwareError(
            f"backend {backend!r} needs an NVIDIA GPU and found no CUDA device; "
            "use backend 'onnxruntime' on this machine"
        )
    return chosen


def cuda_device_count() -> int:
    """NVIDIA GPUs that the driver shows this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A hint to append to an error, or nothing."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=SIMILAR)
    return f"; did you mean {close[0]!r}?" if close else ""


# --- feeds ---------------------------------------------------------------------------------------


def check_feeds(
    specs: Mapping[str, TensorSpec], feeds: Mapping[str, Any], check_finite: bool = True
) -> dict[str, Any]:
    """Refuse what a session cannot run; the feeds, contiguous.

    Args:
        specs: the session's inputs.
        feeds: one array per input; a ``DeviceArray`` too, whose values are not looked at.
        check_finite: refuse NaN and infinity too.

    Raises:
        FeedError: a missing or unknown name, not an array, another dtype, byte order, rank or
            dimension, dimensions that contradict each other, an empty batch, a non-finite value.
    """
    if specs.keys() != feeds.keys():
        raise FeedError(_wrong_names(specs, feeds))
    sizes: dict[str, int] = {}
    sums: list[tuple[TensorSpec, int, str]] = []
    for name, spec in specs.items():
        array = feeds[name]
        _check_kind(spec, array)
        for axis, (expected, found) in enumerate(zip(spec.shape, array.shape, strict=True)):
            if isinstance(expected, int):
                if found != expected:
                    raise FeedError(_wrong_size(spec, array, axis, str(expected)))
            elif "+" in expected:
                sums.append((spec, axis, expected))
            elif sizes.setdefault(expected, found) != found:
                wanted = f"{expected}={sizes[expected]} as in the inputs before it"
                raise FeedError(_wrong_size(spec, array, axis, wanted))
            elif found == 0 and expected not in MAY_BE_EMPTY:
                raise FeedError(_wrong_size(spec, array, axis, "at least 1"))
    for spec, axis, expression in sums:
        _check_sum(spec, feeds[spec.name], axis, expression, sizes)
    if check_finite:
        for name, array in feeds.items():
            _check_finite(name, array)
    return {name: _contiguous(array) for name, array in feeds.items()}


def check_outputs(specs: Mapping[str, TensorSpec], names: Sequence[str]) -> list[str]:
    """The wanted outputs, refused when one does not exist.

    Raises:
        UsageError: an unknown name, or none.
    """
    for name in names:
        if name not in specs:
            raise UsageError(
                f"output {name!r}: expected some of {', '.join(specs)}{did_you_mean(name, specs)}"
            )
    if not names:
        raise UsageError(f"no outputs asked for; expected some of {', '.join(specs)}")
    return list(names)


def _wrong_names(specs: Mapping[str, TensorSpec], feeds: Mapping[str, Array]) -> str:
    missing = [name for name in specs if name not in feeds]
    unknown = [str(name) for name in feeds if name not in specs]
    hints = "".join(did_you_mean(name, missing) for name in unknown)
    found = [f"missing {', '.join(missing)}"] if missing else []
    found += [f"unknown {', '.join(unknown)}"] if unknown else []
    return f"expected the inputs {', '.join(specs)}; {'; '.join(found)}{hints}"


def _check_kind(spec: TensorSpec, array: object) -> None:
    if not isinstance(array, np.ndarray | DeviceArray):
        raise FeedError(
            f"input {spec.name!r}: expected a NumPy array of {_described(spec)}, "
            f"found {type(array).__name__}"
        )
    if array.dtype.name != spec.dtype or not array.dtype.isnative:
        order = "" if array.dtype.isnative else " of foreign byte order"
        raise FeedError(
            f"input {spec.name!r}: expected {_described(spec)}, found {array.dtype.name}{order} "
            f"{list(array.shape)}; nothing is cast silently, use .astype({spec.dtype!r})"
        )
    if array.ndim != len(spec.shape):
        raise FeedError(
            f"input {spec.name!r}: expected {len(spec.shape)} dimensions, {_described(spec)}, "
            f"found {array.ndim}: {list(array.shape)}"
        )


def _check_sum(
    spec: TensorSpec, array: Array, axis: int, expression: str, sizes: dict[str, int]
) -> None:
    terms = [term.strip() for term in expression.split("+")]
    if not all(term.isdigit() or term in sizes for term in terms):
        # A term that no input fixes leaves the sum free, though the same for all inputs.
        if sizes.setdefault(expression, array.shape[axis]) != array.shape[axis]:
            raise FeedError(_wrong_size(spec, array, axis, f"{expression}={sizes[expression]}"))
        return
    total = sum(int(term) if term.isdigit() else sizes[term] for term in terms)
    if array.shape[axis] != total:
        raise FeedError(_wrong_size(spec, array, axis, f"{expression}={total}"))


def _check_finite(name: str, array: Array | DeviceArray) -> None:
    if isinstance(array, DeviceArray) or array.dtype.kind in "iub" or np.isfinite(array).all():
        return
    count = array.size - int(np.isfinite(array).sum())
    raise FeedError(
        f"input {name!r}: expected finite values, found {count} of {array.size} that are NaN or "
        "infinite; check=False skips this check"
    )


def _contiguous(array: Array | DeviceArray) -> Array | DeviceArray:
    """The array as a plain block of memory: itself where it is one."""
    if isinstance(array, DeviceArray):
        return array
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy(order="C")


def _wrong_size(spec: TensorSpec, array: Array, axis: int, expected: str) -> str:
    return (
        f"input {spec.name!r}: expected {_described(spec)}, found {list(array.shape)}: "
        f"dimension {axis} must be {expected}"
    )


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"
