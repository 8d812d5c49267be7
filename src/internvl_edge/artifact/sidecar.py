"""An engine's sidecar: a file that says what was built, and whether it fits a machine.

An engine is opaque bytes that only the release that built it accepts, on the GPUs it was built
for, with shapes inside its profile. The sidecar says all of that in JSON, so that a machine which
cannot run an engine learns why before a native library reads the first byte of it.

    engines/<component>.<target>-<key>.plan     the engine
    engines/<component>.<target>-<key>.json     its EngineInfo

Vendor rules: TensorRT and TensorRT-RTX engines run on the exact release that built them. A
TensorRT engine runs on the compute capability it was built on. A TensorRT-RTX engine is portable
over SM80, SM86, SM89, and SM120 and later, unless it was built for named ones; FP8 needs SM89.
Between them, on data centers' Hopper and Blackwell, it does not run: on an H100 (SM90) TensorRT-RTX
1.7 refuses every engine, and says that none can be built for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from internvl_edge.artifact.census import Census
from internvl_edge.artifact.manifest import TensorSpec
from internvl_edge.artifact.open import Artifact
from internvl_edge.errors import ArtifactError, HardwareError, UsageError
from internvl_edge.files.reading import parse_json, read_file

SCHEMA = 1
OPTIONAL = {"census"}  # keys that sidecars of earlier versions do not have
RTX, RTX_SMS, RTX_SMS_FROM = "tensorrt-rtx", (80, 86, 89), 120  # where a portable engine runs
RTX_SM_IF_ASKED = 75  # and where one runs that was built for it
MAX_SIDECAR_NBYTES = 1 << 20

Range = tuple[int, int, int]  # smallest, typical and largest size of a dimension


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeRanges:
    """The sizes an engine accepts for each symbolic dimension; it is tuned for the middle one.

    The engine of a component with a cache has a second optimization profile, where length is 1.
    """

    batch: Range = (1, 4, 16)
    length: Range = (1, 32, 80)  # tokens of one call
    past: Range = (0, 96, 256)  # cached positions: the image's queries and the text before

    def __post_init__(self) -> None:
        for name in ("batch", "length", "past"):
            _check_range(name, getattr(self, name), at_least=0 if name == "past" else 1)

    def range_of(self, symbol: str) -> Range:
        """Return the sizes of a symbolic dimension; ``total`` is past + length.

        Raises:
            UsageError: no profile has such a dimension.
        """
        if symbol in ("total", "past+length"):
            low, typical, high = (p + n for p, n in zip(self.past, self.length, strict=True))
            return low, typical, high
        if symbol not in ("batch", "length", "past"):
            raise UsageError(
                f"symbolic dimension {symbol!r}: an optimization profile has batch, length, past "
                "and total"
            )
        sizes: Range = getattr(self, symbol)
        return sizes

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ShapeRanges:
        if set(raw) != {"batch", "length", "past"}:
            raise ValueError(f"profile has {sorted(raw)}, not batch, length, past")
        return cls(**{name: tuple(sizes) for name, sizes in raw.items()})


def _check_range(name: str, sizes: object, *, at_least: int) -> None:
    ok = isinstance(sizes, tuple) and len(sizes) == 3 and all(type(n) is int for n in sizes)
    if not ok or not at_least <= sizes[0] <= sizes[1] <= sizes[2] or sizes[2] < 1:  # type: ignore[index]
        raise UsageError(
            f"profile {name} must be three integers {at_least} ≤ min ≤ opt ≤ max, found {sizes!r}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """An engine's sidecar."""

    component: str
    target: str  # "tensorrt-rtx" or "tensorrt"
    precision: str
    builder_version: str  # of the TensorRT package, all four numbers
    tool_version: str  # of internvl-edge
    compute_capabilities: tuple[str, ...]  # as ("SM89",); empty: every GPU from minimum_sm on
    minimum_sm: int  # 89 is compute capability 8.9
    profile: ShapeRanges
    onnx_sha256: str  # identifies the graph that was built
    nbytes: int  # of the plan
    sha256: str  # of the plan
    fused_attention: int  # attention layers that run as one kernel
    decomposed_attention: int  # attention layers that have no kernel: MatMul, Softmax, MatMul
    build_seconds: float
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    census: Census | None = None  # None: the builder did not list its layers, or an older version

    @property
    def layers_said(self) -> list[str]:
        """Say in words what the builder made of the graph."""
        if self.census is None:
            return [
                "layers: not known; the builder did not list them, or an older version built it"
            ]
        return self.census.lines()

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, raw: object) -> EngineInfo:
        """Invert ``to_json`` after a pass through JSON.

        Raises:
            ArtifactError: a key is missing, unknown or of the wrong kind.
        """
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            schema = raw.get("schema") if isinstance(raw, dict) else raw
            raise ArtifactError(f"engine sidecar: expected schema {SCHEMA}, found {schema!r:.80}")
        names = {field.name for field in fields(cls)} - (OPTIONAL - raw.keys())
        if raw.keys() != names | {"schema"}:
            odd = sorted(map(str, raw.keys() ^ (names | {"schema"})))
            raise ArtifactError(f"engine sidecar: missing or unknown keys {', '.join(odd)}")
        try:
            return cls(**{name: _READERS.get(name, _text)(raw[name]) for name in names})
        except (TypeError, ValueError, KeyError, AttributeError, UsageError) as error:
            raise ArtifactError(f"engine sidecar: {error}") from error


def read_engine_info(path: Path) -> EngineInfo:
    """Read a sidecar file.

    Raises:
        ArtifactError: it is not there, not JSON, or not an engine's sidecar.
    """
    return _engine_info(read_file(path, MAX_SIDECAR_NBYTES, ArtifactError), path)


def engine_info(artifact: Artifact, name: str) -> EngineInfo:
    """Read the sidecar of a directory's engine.

    Raises:
        ArtifactError: it is not listed, no longer what was opened, or not an engine's sidecar.
    """
    return _engine_info(artifact.read(name, MAX_SIDECAR_NBYTES), artifact.file(name))


def _engine_info(data: bytes, path: Path) -> EngineInfo:
    try:
        return EngineInfo.from_json(parse_json(data))
    except ValueError as error:
        raise ArtifactError(f"{path}: not readable as JSON: {error}") from error
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def check_engine(info: EngineInfo, trt: Any, *, sm: int | None = None) -> None:
    """Refuse an engine that this installation or this GPU cannot run, naming both sides.

    Args:
        info: the engine's sidecar.
        trt: the module ``tensorrt_rtx`` or ``tensorrt``, for its name and version.
        sm: the GPU's compute capability, 89 for 8.9; None where it is not known yet.

    Raises:
        HardwareError: another target, another release, or a GPU it was not built for.
    """
    installed = str(trt.__name__).replace("_", "-")
    built, runs = f"{info.target} {info.builder_version}", f"{installed} {trt.__version__}"
    rebuild = f"rebuild it here: internvl-edge build OUT --target {info.target}"
    if built != runs:
        raise HardwareError(
            f"{info.component}: engine of another version: built by {built}, installed is "
            f"{runs}; {rebuild}"
        )
    if sm is None:
        return
    named = info.compute_capabilities
    if info.target == RTX and lacks_rtx(sm) and not named:
        runs_on = ", ".join(f"SM{known}" for known in (*RTX_SMS, RTX_SMS_FROM))
        raise HardwareError(
            f"{info.component}: TensorRT-RTX does not run on this GPU, which is SM{sm}, but on "
            f"{runs_on} and later; use --target tensorrt here, or the backend 'onnxruntime'"
        )
    if sm < info.minimum_sm or (named and f"SM{sm}" not in named):
        expected = ", ".join(named) if named else f"SM{info.minimum_sm} and later"
        raise HardwareError(
            f"{info.component}: engine of another GPU: built for {expected} at {info.precision}, "
            f"this one is SM{sm}; {rebuild}"
        )


def lacks_rtx(sm: int) -> bool:
    """Tell whether TensorRT-RTX refuses a GPU of this compute capability, whatever the engine."""
    return sm < RTX_SMS_FROM and sm not in (RTX_SM_IF_ASKED, *RTX_SMS)


# --- reading JSON: each returns the value or raises ------------------------------------------


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a text, found {value!r:.80}")
    return value


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a number from 0 on, found {value!r:.80}")
    return value


def _seconds(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise ValueError(f"expected seconds, found {value!r:.80}")
    return float(value)  # type: ignore[arg-type]


def _specs(value: object) -> tuple[TensorSpec, ...]:
    return tuple(_spec(item) for item in _list(value))


def _spec(value: object) -> TensorSpec:
    if not isinstance(value, dict) or value.keys() != {"name", "dtype", "shape"}:
        raise ValueError(f"expected name, dtype and shape of a tensor, found {value!r:.80}")
    shape = tuple(_text(n) if isinstance(n, str) else _count(n) for n in _list(value["shape"]))
    return TensorSpec(name=_text(value["name"]), dtype=_text(value["dtype"]), shape=shape)


def _list(value: object) -> list[object]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"expected a list, found {value!r:.80}")
    return list(value)


_READERS: dict[str, Any] = {
    "census": Census.from_json,
    "compute_capabilities": lambda value: tuple(_text(item) for item in _list(value)),
    "minimum_sm": _count,
    "profile": ShapeRanges.from_json,
    "nbytes": _count,
    "fused_attention": _count,
    "decomposed_attention": _count,
    "build_seconds": _seconds,
    "inputs": _specs,
    "outputs": _specs,
}
