"""Where hardware varies: the ``Session`` protocol, and who implements it.

A session runs one component. It refuses what it cannot run before any work (``feeds``).
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from internvl_edge.artifact import Artifact, TensorSpec, open_artifact
from internvl_edge.errors import HardwareError, UsageError, did_you_mean, shortened
from internvl_edge.files.packages import require
from internvl_edge.runtime.gpu.probe import gpu_count
from internvl_edge.types import Array

if TYPE_CHECKING:
    from internvl_edge.runtime.openvino.options import OpenVinoOptions
    from internvl_edge.runtime.ort.options import OrtOptions
    from internvl_edge.runtime.trt.options import TrtOptions

__all__ = [
    "BACKENDS",
    "Backend",
    "DecoderSession",
    "RowSession",
    "Rows",
    "Session",
    "open_component",
    "open_session",
    "options_for",
    "require_backend",
    "require_device",
    "runs_engines",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """What computes a component."""

    module: str  # whose ``open_component`` opens a session of it
    needs_gpu: bool
    device: str = "auto"  # that "auto" stands for, where there is one alone


BACKENDS = {  # by the package that brings it, of ``files.packages``
    "onnxruntime": Backend(module="internvl_edge.runtime.ort.session", needs_gpu=False),
    "openvino": Backend(
        module="internvl_edge.runtime.openvino.opening", needs_gpu=False, device="cpu"
    ),
    "tensorrt-rtx": Backend(module="internvl_edge.runtime.trt.session", needs_gpu=True),
    "tensorrt": Backend(module="internvl_edge.runtime.trt.session", needs_gpu=True),
}
DEVICES = ("auto", "cpu", "cuda")


class Session(Protocol):
    """A component, opened on some hardware. Thread-safe; a context manager that closes itself."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The tensors that ``run`` takes."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The tensors that ``run`` gives."""

    @property
    def largest(self) -> Mapping[str, int]:
        """The largest size of each named dimension: batch, length, past; none where unbounded."""

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


@runtime_checkable
class DecoderSession(Session, Protocol):
    """A session that leaves what it computed on its device: a decoder's cache stays there."""

    @property
    def optional(self) -> Mapping[str, TensorSpec]:
        """The tensors that it also takes, and has values of its own for: ``logits_from``."""

    @property
    def pads(self) -> bool:
        """Whether it reads the mask: where not, no row has padding, and a prompt is one row."""

    def run_device(
        self,
        feeds: Mapping[str, Any],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Like ``run``, but outputs stay where they were computed; ``.numpy()`` copies them.

        Args:
            feeds: NumPy arrays, or outputs of an earlier call, which are not copied.
            check: as for ``run``; what is on the device is not read.
            outputs: as for ``run``.
        """

    def step(
        self, feeds: Mapping[str, Array], names: Sequence[str], cache: Sequence[Any]
    ) -> tuple[Array, Sequence[Any]]:
        """Like ``run_device`` of a decoder, unchecked, on what an earlier call left.

        Args:
            feeds: the inputs that are not in the cache.
            names: the cache's inputs; its outputs come in the same order, after the logits.
            cache: what ``run_device``, ``step`` or ``take_rows`` gave; it is used up.

        Returns:
            The logits, and the next cache.
        """

    def fetch(self, cache: Sequence[Any]) -> list[Array]:
        """Copy a cache to the host."""

    def take_rows(self, cache: Sequence[Any], rows: Array) -> list[Any]:
        """Copy these rows of a cache, in this order; the cache is used up."""


class Rows(Protocol):
    """Rows of a cache in host memory, each at its own position; for one thread at a time."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The decoder's."""

    @property
    def values(self) -> Mapping[str, Array]:
        """The cache, ``past_key_values.{i}.*`` [count,heads,C,d], to be read and written."""

    def run(self, rows: slice, feeds: Mapping[str, Array]) -> Array:
        """Read tokens of some rows, unchecked, and write the cache where it lies.

        Args:
            rows: which, from a start to a stop.
            feeds: what is not in the cache.

        Returns:
            The logits, float32 [B,T,V], or those from ``logits_from`` on.
        """


@runtime_checkable
class RowSession(Session, Protocol):
    """A session of a decoder, of which rows may go on independently."""

    @property
    def has_rows(self) -> bool:
        """True where its cache has a fixed capacity, in host memory."""

    def rows(self, count: int) -> Rows:
        """Make so many rows of an empty cache."""


def open_session(
    out: str | os.PathLike[str],
    component: str,
    backend: str = "auto",
    device: str = "auto",
    *,
    options: OrtOptions | OpenVinoOptions | TrtOptions | None = None,
) -> Session:
    """Open one component of a compiled directory.

    Args:
        out: the directory that ``internvl-edge export`` published.
        component: a name in its manifest, such as ``"vision"``.
        backend: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt-rtx"``, ``"tensorrt"``, or
            ``"auto"``: ONNX Runtime.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``: a GPU when both the backend
            and the machine have one.
        options: how the backend computes: its threads, or its slots, graphs and buckets; None:
            its defaults.

    Raises:
        ArtifactError: the directory is not what its manifest says.
        UsageError: an unknown component, backend or device, or options of another backend.
        MissingDependency: the backend's package is not installed.
        HardwareError: the backend or the component cannot run on this machine.
    """
    return open_component(open_artifact(out), component, backend, device, options=options)


def open_component(
    artifact: Artifact,
    component: str,
    backend: str = "auto",
    device: str = "auto",
    *,
    options: OrtOptions | OpenVinoOptions | TrtOptions | None = None,
) -> Session:
    """Like ``open_session``, of a directory that is already open."""
    present = artifact.manifest.components
    if component not in present:
        raise UsageError(
            f"component {component!r}: {artifact.path} has {', '.join(present)}"
            f"{did_you_mean(component, present)}"
        )
    chosen, device = require_backend(backend), require_device(device)
    module = importlib.import_module(BACKENDS[chosen].module)
    given = {} if options is None else {"options": options}
    session: Session = module.open_component(artifact, component, device, chosen, **given)
    return session


def require_device(device: object) -> str:
    """Return the name of a device, of PyTorch's object too; None is ``"auto"``.

    Raises:
        UsageError: an unknown name.
    """
    if device is None:
        return "auto"
    name = str(device) if type(device).__name__ == "device" else device  # torch.device
    if not isinstance(name, str) or re.fullmatch(r"auto|cpu|cuda(?::\d{1,3})?", name) is None:
        hint = "; a GPU is 'cuda'" if name in ("gpu", "GPU") else did_you_mean(name, DEVICES)
        raise UsageError(
            f"device {shortened(device)}: expected 'auto', 'cpu', 'cuda' or 'cuda:1'{hint}"
        )
    return name


def require_options(backend: str, options: object) -> None:
    """Refuse options of another kind than those of a backend; None is its defaults.

    Raises:
        UsageError: says which are expected.
    """
    if options is None:
        return
    from internvl_edge.runtime.openvino.options import OpenVinoOptions
    from internvl_edge.runtime.ort.options import OrtOptions
    from internvl_edge.runtime.trt.options import TrtOptions

    others: dict[str, type] = {"onnxruntime": OrtOptions, "openvino": OpenVinoOptions}
    known = others.get(backend, TrtOptions)
    if not isinstance(options, known):
        found = type(options).__name__
        raise UsageError(f"{backend}: options: expected {known.__name__}(...), found {found}")


def runs_engines(backend: str) -> bool:
    """Tell whether a backend runs engines, on a GPU; else it opens graphs."""
    return backend in BACKENDS and BACKENDS[backend].needs_gpu


def options_for(
    backend: str, threads: int | None = None, *, spin: bool = True, allow_slow: bool = False
) -> OrtOptions | OpenVinoOptions | None:
    """Make the options of a backend's sessions; None: the defaults of one that runs engines.

    Args:
        backend: its name, or ``"auto"``.
        threads: within a call; None: every core this process may use.
        spin: see ``OrtOptions``.
        allow_slow: see ``OrtOptions``.

    Raises:
        UsageError: threads, or leave to be slow, of engines.
    """
    if runs_engines(backend):
        given = {"--threads": threads is not None, "--allow-slow": allow_slow}
        for option in (option for option, is_given in given.items() if is_given):
            raise UsageError(f"{option}: {backend} computes on a GPU; leave {option} out")
        return None
    from internvl_edge.runtime.openvino.options import OpenVinoOptions
    from internvl_edge.runtime.ort.options import OrtOptions

    own = OrtOptions(num_threads=threads, spin=spin, allow_slow=allow_slow)
    return OpenVinoOptions(num_threads=threads, language=own) if backend == "openvino" else own


def require_backend(backend: str) -> str:
    """Return the backend that a name stands for, once its package and hardware are found.

    Raises:
        UsageError: an unknown name.
        MissingDependency: its package is not installed.
        HardwareError: it needs a GPU and there is none.
    """
    if not isinstance(backend, str) or backend not in (*BACKENDS, "auto"):
        raise UsageError(
            f"backend {shortened(backend)}: expected auto, {', '.join(BACKENDS)}"
            f"{did_you_mean(backend, BACKENDS)}"
        )
    chosen = "onnxruntime" if backend == "auto" else backend
    if BACKENDS[chosen].needs_gpu and gpu_count() == 0:
        raise HardwareError(
            f"backend {backend!r} needs an NVIDIA GPU and found no CUDA device; "
            "use backend 'onnxruntime' on this machine"
        )
    require(chosen)
    return chosen
