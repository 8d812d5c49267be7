"""The run-time half of the TensorRT stand-in: engines that compute, on the memory of ``FakeCuda``.

An engine computes, in the stream and when the stream gets there,

    y     float32 [batch, 3]         x W + ½ Σ ids
    part  float16 [batch, length]    ids / 4

of x float32 [batch, 4] and ids int64 [batch, length]; or it is a decoder with a cache. It keeps
the rules of the real one: shapes inside the active profile, which forgets them when it changes;
addresses aligned to 256 bytes; a run of a shape before its capture; a captured graph only as long
as its context stays as it was.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from support.gpu.fake_cuda import FakeCuda, Fault
from support.gpu.fake_trt import DataType, FakeTrt, Severity, _Base

from internvl_edge.artifact.manifest import TensorSpec
from internvl_edge.types import Array

Mode = enum.Enum("Mode", "INPUT OUTPUT")
Place = enum.Enum("Place", "DEVICE HOST")
Seek = enum.Enum("Seek", "SET CUR END")
Strategy = enum.Enum("Strategy", "STATIC USER_MANAGED")
GraphStrategy = enum.Enum("GraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
KernelStrategy = enum.Enum("KernelStrategy", "LAZY EAGER NONE")

SCRATCH_NBYTES = 1000
WEIGHT = np.random.default_rng(7).standard_normal((4, 3)).astype(np.float32)
NAMES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64"}  # TensorRT's
WIDE = {"x": [[1, 4], [2, 4], [8, 4]], "ids": [[1, 1], [2, 3], [8, 6]]}
NARROW = {"x": [[1, 4], [2, 4], [4, 4]], "ids": [[1, 1], [2, 1], [4, 1]]}
PLAN = json.dumps([WIDE, NARROW]).encode() + b" " * 1000
Shapes = dict[str, tuple[int, ...]]
Arrays = dict[str, Array]

KERNEL_MS = 5.0
INPUTS = (
    TensorSpec(name="x", dtype="float32", shape=("batch", 4)),
    TensorSpec(name="ids", dtype="int64", shape=("batch", "length")),
)
OUTPUTS = (
    TensorSpec(name="y", dtype="float32", shape=("batch", 3)),
    TensorSpec(name="part", dtype="float16", shape=("batch", "length")),
)


def expected(feeds: dict[str, Array]) -> dict[str, Array]:
    """What the engine computes."""
    x, ids = feeds["x"], feeds["ids"]
    product = sum(x[:, i, None] * WEIGHT[i] for i in range(4))  # rounds alike at every batch size
    return {
        "y": (product + 0.5 * ids.sum(1, keepdims=True)).astype(np.float32),
        "part": (ids / 4).astype(np.float16),
    }


@dataclass(frozen=True, kw_only=True)
class Computation:
    """What an engine is of."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapes: Callable[[Shapes], Shapes]  # of the inputs → of the outputs
    compute: Callable[[Arrays], Arrays]
    plan: bytes
    aliases: dict[str, str] = field(default_factory=dict)  # output → input in the same memory

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in (*self.inputs, *self.outputs)}


LINEAR = Computation(
    inputs=INPUTS,
    outputs=OUTPUTS,
    shapes=lambda shapes: {"y": (shapes["ids"][0], 3), "part": shapes["ids"]},
    compute=lambda feeds: expected(feeds),
    plan=PLAN,
)

KEY, PRESENT = "past_key_values.0.key", "present.0.key"
VOCABULARY = 7
CACHE_RANGE = {
    "input_ids": [[1, 1], [2, 1], [8, 16]],
    "attention_mask": [[1, 1], [2, 8], [8, 64]],
    "position_ids": [[1, 1], [2, 1], [8, 16]],
    KEY: [[1, 1, 0, 2], [2, 1, 7, 2], [8, 1, 48, 2]],
}


def decoded(feeds: Arrays) -> Arrays:
    """The cache holds ids and positions; the logits depend on all of it that is not masked."""
    ids, past = feeds["input_ids"], feeds[KEY]
    new = np.stack([ids, feeds["position_ids"]], axis=-1)[:, None].astype(np.float16)
    present = np.concatenate([past, new], axis=2)  # (B, 1, P+T, 2)
    read = (present[:, 0].astype(np.float64) @ [3, 1]) * feeds["attention_mask"]
    sums = np.cumsum(read, axis=1)[:, past.shape[2] :, None]  # (B, T, 1)
    logits = np.cos((sums + 1) * np.arange(1, VOCABULARY + 1))
    return {"logits": logits.astype(np.float32), PRESENT: present}


DECODER = Computation(
    inputs=(
        TensorSpec(name="input_ids", dtype="int64", shape=("batch", "length")),
        TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "past+length")),
        TensorSpec(name="position_ids", dtype="int64", shape=("batch", "length")),
        TensorSpec(name=KEY, dtype="float16", shape=("batch", 1, "past", 2)),
    ),
    outputs=(
        TensorSpec(name="logits", dtype="float32", shape=("batch", "length", VOCABULARY)),
        TensorSpec(name=PRESENT, dtype="float16", shape=("batch", 1, "past+length", 2)),
    ),
    shapes=lambda shapes: {
        "logits": (*shapes["input_ids"], VOCABULARY),
        PRESENT: (shapes["input_ids"][0], 1, shapes["attention_mask"][1], 2),
    },
    compute=decoded,
    plan=json.dumps([CACHE_RANGE]).encode(),
)


CAPACITY = 48
IN_PLACE_RANGE = {
    **{name: CACHE_RANGE[name] for name in ("input_ids", "position_ids")},
    "attention_mask": [[1, CAPACITY], [2, CAPACITY], [8, CAPACITY]],
    "write_indices": [[1], [2], [8]],
    KEY: [[1, 1, CAPACITY, 2], [2, 1, CAPACITY, 2], [8, 1, CAPACITY, 2]],
}


def decoded_in_place(feeds: Arrays) -> Arrays:
    """As ``decoded``, of the positions up to the new ones."""
    first, length = int(feeds["write_indices"][0]), feeds["input_ids"].shape[1]
    assert (feeds["write_indices"] == first).all()
    found = decoded(
        feeds
        | {
            KEY: feeds[KEY][:, :, :first],
            "attention_mask": feeds["attention_mask"][:, : first + length],
        }
    )
    whole = feeds[KEY].copy()
    whole[:, :, : first + length] = found[PRESENT]
    return {"logits": found["logits"], PRESENT: whole}


def _of_capacity(spec: TensorSpec) -> TensorSpec:
    sizes = {"past": CAPACITY, "past+length": CAPACITY}
    return replace(spec, shape=tuple(sizes.get(str(n), n) for n in spec.shape))


IN_PLACE = Computation(
    inputs=(
        *map(_of_capacity, DECODER.inputs),
        TensorSpec(name="write_indices", dtype="int64", shape=("batch",)),
    ),
    outputs=tuple(map(_of_capacity, DECODER.outputs)),
    shapes=lambda shapes: {"logits": (*shapes["input_ids"], VOCABULARY), PRESENT: shapes[KEY]},
    compute=decoded_in_place,
    plan=json.dumps([IN_PLACE_RANGE]).encode(),
    aliases={PRESENT: KEY},
)


class FakeRuntimeTrt(FakeTrt):
    """The module, with engines. ``refuses`` names the calls that fail."""

    TensorIOMode, TensorLocation = Mode, Place
    SeekPosition, ExecutionContextAllocationStrategy = Seek, Strategy
    IStreamReaderV2 = type("IStreamReaderV2", (_Base,), {})

    def __init__(
        self,
        cuda: FakeCuda,
        name: str = "tensorrt",
        version: str = "11.4.0.106",
        computation: Computation = LINEAR,
    ) -> None:
        super().__init__(name, version)
        self.cuda, self.computation = cuda, computation
        self.refuses: dict[str, str] = {}  # call → what is logged
        self.runtimes: list[Any] = []
        self.contexts: list[Context] = []
        self.changes: dict[str, Any] = {}  # of what the engine says of its tensors
        self.cache = b"kernels"
        self.caches: list[Any] = []
        self.logger: Any = None
        self.staged: set[bool] = set()  # whether pieces of the plan were in page-locked memory
        if name == "tensorrt_rtx":
            self.CudaGraphStrategy = GraphStrategy
            self.DynamicShapesKernelSpecializationStrategy = KernelStrategy

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        assert logger.initialised
        self.logger = logger
        if self.refuse("Runtime"):
            raise TypeError("factory function returned nullptr")
        runtime = SimpleNamespace(
            deserialize_cuda_engine=self._deserialize, engine_host_code_allowed=False
        )
        self.runtimes.append(runtime)
        return runtime

    def refuse(self, call: str) -> bool:
        if call in self.refuses:
            self.logger.log(Severity.ERROR, self.refuses[call])
        return call in self.refuses

    def _deserialize(self, reader: Any) -> Any:
        assert reader.initialised
        assert reader.seek(-16, Seek.END)
        assert reader.seek(0, Seek.SET)
        assert not reader.seek(-1, Seek.CUR)
        data = b""
        while len(piece := memoryview(reader.read(600, 0))):
            assert piece.nbytes <= 600
            self.staged.add(np.asarray(piece).ctypes.data in self.cuda.pinned)
            data += piece  # as cuMemcpyHtoD: done before the next piece is asked for
        if data != self.computation.plan or self.refuse("deserialize"):
            return None
        return Engine(self, json.loads(data))


class Engine:
    def __init__(self, trt: FakeRuntimeTrt, profiles: list[Any]) -> None:
        self.trt, self.profiles = trt, profiles
        self.device_memory_size_v2 = SCRATCH_NBYTES
        self.computation = trt.computation
        self.num_io_tensors = len(self.computation.specs)
        self.num_optimization_profiles = len(profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self.computation.specs)[index]

    def get_tensor_mode(self, name: str) -> Any:
        is_input = name in [spec.name for spec in self.computation.inputs]
        return Mode.INPUT if is_input else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        dtype = self.computation.specs[name].dtype
        return DataType[self.trt.changes.get(name, NAMES[dtype])]

    def get_tensor_location(self, name: str) -> Any:
        return Place.HOST if self.trt.changes.get("host") == name else Place.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.computation.aliases.get(name)

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        return self.profiles[index][name]

    def create_runtime_config(self) -> Any:
        assert hasattr(self.trt, "CudaGraphStrategy")
        config = SimpleNamespace(create_runtime_cache=lambda: Cache(self.trt))
        config.set_execution_context_allocation_strategy = lambda s: setattr(config, "strategy", s)
        config.set_runtime_cache = lambda cache: self._set_cache(config, cache)
        return config

    def _set_cache(self, config: Any, cache: Any) -> bool:
        config.cache = cache
        return "set_runtime_cache" not in self.trt.refuses

    def create_execution_context(self, how: Any) -> Any:
        config = how if self.trt.__name__ == "tensorrt_rtx" else SimpleNamespace(strategy=how)
        assert config.strategy is Strategy.USER_MANAGED
        if self.trt.refuse("create_execution_context"):
            return None
        context = Context(self, config)
        self.trt.contexts.append(context)
        return context


class Cache:
    def __init__(self, trt: FakeRuntimeTrt) -> None:
        self.trt = trt
        self.loaded: bytes | None = None
        trt.caches.append(self)

    def deserialize(self, data: bytes) -> bool:
        self.loaded = data
        return data.startswith(b"kernels")

    def serialize(self) -> bytes:
        return self.trt.cache


class Context:
    def __init__(self, engine: Engine, config: Any) -> None:
        self.engine, self.trt, self.config = engine, engine.trt, config
        self.active_optimization_profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = 0, 0
        self.generation = 0  # of the settings
        self.ran = -1  # the generation that ran last
        self.busy = False

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert nbytes >= SCRATCH_NBYTES
        assert address % 256 == 0
        self.scratch = address, nbytes

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if self.trt.refuse("set_optimization_profile_async"):
            return False
        self.active_optimization_profile, self.shapes = index, {}
        self.generation += 1
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.profiles[self.active_optimization_profile][name]
        inside = all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        if self.trt.refuse("set_input_shape") or not inside:
            return False
        self.shapes[name] = tuple(shape)
        self.generation += 1
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self.trt.refuse("set_tensor_address") or address % 256:
            return False
        self.addresses[name] = address
        self.generation += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if "shape" in self.trt.changes:
            return (-1, 3)
        return (self.shapes | self.engine.computation.shapes(self.shapes))[name]

    def execute_async_v3(self, stream: int) -> bool:
        if self.trt.refuse("execute_async_v3"):
            return False
        computation = self.engine.computation
        assert self.shapes.keys() == {spec.name for spec in computation.inputs}
        assert len({shape[0] for shape in self.shapes.values()}) == 1
        assert self.addresses.keys() == computation.specs.keys()
        for output, source in computation.aliases.items():
            assert self.addresses[output] == self.addresses[source]
        cuda, generation = self.trt.cuda, self.generation
        is_captured = cuda.streams[stream].captured is not None
        if is_captured and self.ran != generation:
            cuda.streams[stream].invalidated = True  # allocates what the first run would have
            return True
        self.ran = generation
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        outputs = {spec.name: self.get_tensor_shape(spec.name) for spec in computation.outputs}

        def kernel() -> None:
            if is_captured and self.generation != generation:
                raise Fault("a graph of a context that was changed")
            cuda.bytes_at(*self.scratch)[:] = 1
            feeds = {
                name: load(cuda, addresses[name], shape, computation.specs[name].dtype)
                for name, shape in shapes.items()
            }
            for name, array in computation.compute(feeds).items():
                assert array.shape == outputs[name]
                data = np.ascontiguousarray(array).view(np.uint8).ravel()
                cuda.bytes_at(addresses[name], len(data))[:] = data
            cuda.now_ms += KERNEL_MS

        cuda.queue(stream, kernel)
        return True


def load(cuda: FakeCuda, address: int, shape: tuple[int, ...], name: str) -> Array:
    dtype = np.dtype(name)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return cuda.bytes_at(address, nbytes).copy().view(dtype).reshape(shape)
