"""The tensors of an engine, and the optimization profiles that bound their shapes.

A profile is a range of shapes that an engine was built and tuned for. An engine may have several,
such as one for a decoder's prompt and one for its single tokens; a call runs under the narrowest
one that holds all its shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_edge.artifact import TensorSpec
from internvl_edge.errors import ArtifactError, FeedError
from internvl_edge.runtime.feeds import numpy_dtype
from internvl_edge.runtime.gpu.handles import Stream
from internvl_edge.runtime.trt.engine import Engine
from internvl_edge.runtime.trt.vendor import DTYPES
from internvl_edge.types import Shape

__all__ = ["EngineSpec", "Profile", "read_engine_spec"]

_Tensor = tuple[str, bool, str | None]  # name, whether an input, dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The smallest and largest shape of every input."""

    index: int  # in the engine
    low: dict[str, Shape]
    high: dict[str, Shape]

    def holds(self, shapes: Mapping[str, Shape]) -> bool:
        return all(
            all(a <= n <= b for a, n, b in zip(self.low[name], shape, self.high[name], strict=True))
            for name, shape in shapes.items()
        )

    @property
    def volume(self) -> int:
        """Elements of the largest call."""
        return sum(map(math.prod, self.high.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """An engine's tensors, and its profiles, the narrowest first."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    tensors: dict[str, TensorSpec]  # both
    dtypes: dict[str, np.dtype[Any]]
    profiles: tuple[Profile, ...]
    aliases: dict[str, str]  # output → the input in whose memory it is written

    @property
    def max_batch(self) -> int | None:
        """The largest batch; None where a tensor has none, so that it cannot be divided."""
        if any(spec.shape[:1] != ("batch",) for spec in self.tensors.values()):
            return None
        return max(shape[0] for profile in self.profiles for shape in profile.high.values())

    @property
    def largest(self) -> dict[str, int]:
        """The largest size of every named dimension: batch, length, past."""
        sizes = [
            (symbol, size)
            for profile in self.profiles
            for name, spec in self.inputs.items()
            for symbol, size in zip(spec.shape, profile.high[name], strict=True)
            if isinstance(symbol, str) and "+" not in symbol
        ]
        return dict(sorted(sizes))  # of equal names, the last and largest stays

    def find_profile(self, shapes: Mapping[str, Shape]) -> int | None:
        """Return the index of the narrowest profile that holds these shapes; None without one."""
        return next((p.index for p in self.profiles if p.holds(shapes)), None)

    def choose_profile(self, shapes: Mapping[str, Shape]) -> int:
        """Return the index of the narrowest profile that holds these shapes.

        Raises:
            FeedError: none does.
        """
        profile = self.find_profile(shapes)
        if profile is None:
            raise FeedError(f"found {_shapes(shapes)}; the engine takes {self._ranges()}")
        return profile

    def capacities(self, context: Any, stream: Stream, engine: Engine) -> dict[str, int]:
        """Count the bytes of the largest value of every tensor with memory of its own."""
        nbytes = dict.fromkeys((n for n in self.tensors if n not in self.aliases), 0)
        for profile in self.profiles:
            self.set_shapes(context, profile.index, profile.high, stream, engine)
            for name in nbytes:
                shape = (
                    profile.high[name] if name in self.inputs else _output(context, name, engine)
                )
                needed = math.prod(shape) * self.dtypes[name].itemsize
                nbytes[name] = max(nbytes[name], needed)
        return nbytes

    def set_shapes(
        self,
        context: Any,
        profile: int,
        shapes: Mapping[str, Shape],
        stream: Stream,
        engine: Engine,
    ) -> None:
        """Put a context under a profile and give its inputs their shapes.

        Raises:
            InternVLError: TensorRT refuses.
        """
        is_active = context.active_optimization_profile == profile
        if not is_active and not context.set_optimization_profile_async(
            profile, int(stream.handle)
        ):
            raise engine.failure(f"set_optimization_profile_async({profile})")
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise engine.failure(f"set_input_shape({name!r}, {list(shape)})")

    def _ranges(self) -> str:
        return " or ".join(
            "; ".join(
                f"{name} {list(profile.low[name])} to {list(profile.high[name])}"
                for name in self.inputs
            )
            for profile in self.profiles
        )


def read_engine_spec(
    engine: Engine, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> EngineSpec:
    """Read what an engine says of itself, and compare it with what the manifest promises.

    Raises:
        ArtifactError: other names or dtypes, or a tensor that is on the host.
    """
    trt, native = engine.trt, engine.native
    names = [native.get_tensor_name(index) for index in range(native.num_io_tensors)]
    is_input = {n: native.get_tensor_mode(n) == trt.TensorIOMode.INPUT for n in names}
    present: set[_Tensor] = {
        (n, is_input[n], DTYPES.get(native.get_tensor_dtype(n).name)) for n in names
    }
    promised: set[_Tensor] = {(s.name, True, s.dtype) for s in inputs} | {
        (s.name, False, s.dtype) for s in outputs
    }
    if present != promised:
        raise ArtifactError(
            f"{engine.path}: the manifest promises {_described(promised - present)}, the engine "
            f"has {_described(present - promised)}; build again"
        )
    on_host = [n for n in names if native.get_tensor_location(n) != trt.TensorLocation.DEVICE]
    if on_host:
        raise ArtifactError(f"{engine.path}: {', '.join(on_host)} in host memory; export again")
    specs = {spec.name: spec for spec in (*inputs, *outputs)}
    profiles = [
        _profile(native, index, [spec.name for spec in inputs])
        for index in range(native.num_optimization_profiles)
    ]
    return EngineSpec(
        inputs={spec.name: spec for spec in inputs},
        outputs={spec.name: spec for spec in outputs},
        tensors=specs,
        dtypes={name: numpy_dtype(spec.dtype) for name, spec in specs.items()},
        profiles=tuple(sorted(profiles, key=lambda profile: profile.volume)),
        aliases=_aliases(native, [spec.name for spec in outputs]),
    )


def _aliases(native: Any, outputs: Sequence[str]) -> dict[str, str]:
    """Find outputs that are written in place, as a fixed cache is; TensorRT 10.15 and newer."""
    if not hasattr(native, "get_aliased_input_tensor"):
        return {}
    sources = {name: native.get_aliased_input_tensor(name) for name in outputs}
    return {name: source for name, source in sources.items() if source}


def _profile(native: Any, index: int, names: Sequence[str]) -> Profile:
    ranges = {name: native.get_tensor_profile_shape(name, index) for name in names}
    return Profile(
        index=index,
        low={name: tuple(low) for name, (low, _, _) in ranges.items()},
        high={name: tuple(high) for name, (_, _, high) in ranges.items()},
    )


def _output(context: Any, name: str, engine: Engine) -> Shape:
    """Return the shape of an output, once the inputs have theirs."""
    shape = tuple(context.get_tensor_shape(name))
    if min(shape, default=0) < 0:
        raise engine.failure(f"the shape {list(shape)} of output {name!r} depends on values; this")
    return shape


def _shapes(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


def _described(tensors: set[_Tensor]) -> str:
    return (
        ", ".join(
            f"{'input' if is_input else 'output'} {name} {dtype}"
            for name, is_input, dtype in sorted(tensors, key=str)
        )
        or "nothing else"
    )
