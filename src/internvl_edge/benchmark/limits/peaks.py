"""Peaks of a machine: products per second of each type, and bytes per second.

A peak is no figure of a data sheet but the best of several calls, on the machine, the threads and
the runtime that components run on, of something that does nothing else:

    operations   products of [n, n] by one weight, as the graphs here have them: after
                 QuantizeLinear and DequantizeLinear where the type has 8 bits
    bandwidth    on the host, sums of arrays far larger than any cache, one piece to a thread:
                 two reads and a write, as STREAM's Add counts them; on a GPU, a copy

The graph takes one number and gives one, so that no transfer is in the figure, and runtimes with
memory of their own need no other code. Others' load makes a peak look lower and a component
better than it is, never the other way.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from internvl_edge.artifact import FileRecord, TensorSpec
from internvl_edge.errors import InternVLError
from internvl_edge.runtime.gpu.device import Device
from internvl_edge.runtime.gpu.handles import Buffer, Stream
from internvl_edge.runtime.session import Session, runs_engines
from internvl_edge.runtime.trt.vendor import import_tensorrt
from internvl_edge.types import Array

__all__ = [
    "Peaks",
    "build_peak_engine",
    "device_bandwidth",
    "host_bandwidth",
    "measure_backend",
    "measure_peaks",
    "open_graph_with",
    "product_model",
]

SIDE, GPU_SIDE = 2048, 8192  # n of the products
REPEATS, CALLS = 4, 5  # products in a graph, calls of which the best counts
ARRAY_NBYTES = 1 << 28  # of each array whose sum or copy measures the bandwidth
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int8": TensorProto.INT8,
    "float8": TensorProto.FLOAT8E4M3FN,
}
EIGHT_BITS = ("int8", "float8")
NUMBER = TensorSpec(name="number", dtype="float32", shape=(1, 1))
MEAN = TensorSpec(name="y", dtype="float32", shape=(1,))
SCALE = 0.05  # of both factors; speed does not depend on it

Clock = Callable[[], float]  # seconds, monotonic
OpenGraph = Callable[[bytes], Session]  # a serialized model → a session, to be closed


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """The most that a machine did, per second."""

    operations: dict[str, float]  # by type; types that do not run there are missing
    bytes: float


def measure_peaks(
    kinds: Iterable[str],
    open_graph: OpenGraph,
    bytes_per_s: float,
    *,
    side: int,
    base: str = "float32",
    clock: Clock = time.perf_counter,
) -> Peaks:
    """Measure the peaks of the runtime and device that ``open_graph`` opens graphs on.

    Args:
        kinds: what products are computed in; one that does not run is left out.
        open_graph: opens a model; the session is closed after.
        bytes_per_s: the bandwidth there.
        side: n of the products.
        base: the type around 8-bit products.
        clock: seconds.
    """
    operations = {}
    feeds: Mapping[str, Any] = {"number": np.ones((1, 1), np.float32)}
    for kind in kinds:
        try:
            with open_graph(product_model(kind, side, base=base)) as session:
                seconds = _best_seconds(lambda s=session: s.run(feeds), clock)  # type: ignore[misc]
        except InternVLError:  # such as bfloat16 on a CPU
            continue
        operations[kind] = REPEATS * 2 * side**3 / seconds
    return Peaks(operations=operations, bytes=bytes_per_s)


def measure_backend(kinds: Iterable[str], backend: str, device: str = "auto") -> Peaks:
    """Measure the peaks of the device that a backend runs components on.

    Args:
        kinds: what their products are computed in.
        backend: that runs them; ONNX Runtime's peaks are those of every backend without engines.
        device: of ONNX Runtime.
    """
    graphs = open_graph_with(backend, device)
    if not runs_engines(backend):
        from internvl_edge.files.cores import usable_cores
        from internvl_edge.runtime.ort.options import CPU, choose_providers

        if choose_providers(device) == [CPU]:
            bandwidth = host_bandwidth(usable_cores(), ARRAY_NBYTES)
            return measure_peaks(kinds, graphs, bandwidth, side=SIDE)
    bandwidth = device_bandwidth(Device(0), ARRAY_NBYTES)
    return measure_peaks(kinds, graphs, bandwidth, side=GPU_SIDE, base="float16")


def host_bandwidth(threads: int, nbytes: int, *, clock: Clock = time.perf_counter) -> float:
    """Measure the bytes per second that threads move, with three arrays of ``nbytes`` each."""
    one, other, total = (np.ones(nbytes // 4, np.float32) for _ in range(3))
    parts = [slice(i * len(one) // threads, (i + 1) * len(one) // threads) for i in range(threads)]

    def add(part: slice) -> None:
        np.add(one[part], other[part], out=total[part])

    with ThreadPoolExecutor(threads, "bandwidth") as pool:
        seconds = _best_seconds(lambda: list(pool.map(add, parts)), clock)
    return 3 * one.nbytes / seconds


def device_bandwidth(device: Device, nbytes: int, *, clock: Clock = time.perf_counter) -> float:
    """Measure the bytes per second of a copy in a GPU's memory: as many reads as writes.

    Raises:
        ResourceError: it has no room for two arrays.
    """
    with (
        Buffer(device, nbytes) as source,
        Buffer(device, nbytes) as target,
        Stream(device) as stream,
    ):

        def copy() -> None:
            for _ in range(REPEATS):
                stream.copy(target.pointer, source.pointer, nbytes)
            stream.synchronize()

        seconds = _best_seconds(copy, clock)
    return REPEATS * 2 * nbytes / seconds


def product_model(kind: str, side: int, *, base: str = "float32") -> bytes:
    """Make the model ``y = mean(x · W · … · W)`` of x filled with one number, serialized.

    Args:
        kind: what the products are computed in.
        side: of x and W.
        base: the type around products of 8 bits.
    """
    around = base if kind in EIGHT_BITS else kind
    weight = np.random.default_rng(0).standard_normal((side, side), np.float32) / side**0.5
    constants = {"shape": np.array([side, side]), "axis": np.array([0]), "flat": np.array([-1])}
    nodes = [
        helper.make_node("Cast", ["number"], ["cast"], to=TYPES[around]),
        helper.make_node("Expand", ["cast", "shape"], ["x0"]),
    ]
    tensors = [_tensor("weight", weight, kind)]
    factor = "weight"
    if kind in EIGHT_BITS:
        tensors += [
            _tensor("scale", np.array(SCALE, np.float32), around),
            _tensor("zero", np.array(0, np.float32), kind),
        ]
        nodes.append(helper.make_node("DequantizeLinear", ["weight", "scale"], ["factor"]))
        factor = "factor"
    for i in range(REPEATS):
        given = f"x{i}"
        if kind in EIGHT_BITS:
            quantization = ["scale", "zero"]
            nodes += [
                helper.make_node("QuantizeLinear", [given, *quantization], [f"q{i}"]),
                helper.make_node("DequantizeLinear", [f"q{i}", *quantization], [f"d{i}"]),
            ]
            given = f"d{i}"
        nodes.append(helper.make_node("MatMul", [given, factor], [f"x{i + 1}"]))
    nodes += [
        helper.make_node("Reshape", [f"x{REPEATS}", "flat"], ["values"]),
        helper.make_node("ReduceMean", ["values", "axis"], ["mean"]),
        helper.make_node("Cast", ["mean"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "peak",
        [helper.make_tensor_value_info("number", TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        tensors + [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opset = helper.make_opsetid("", 23)
    model: bytes = helper.make_model(
        graph, opset_imports=[opset], ir_version=10
    ).SerializeToString()
    return model


def _tensor(name: str, values: Array, kind: str) -> onnx.TensorProto:
    """Make a tensor of a type; one of 8 bits is in units of the scale."""
    if kind in EIGHT_BITS:
        values = np.clip(np.rint(values / SCALE), -127, 127)
    dtype = helper.tensor_dtype_to_np_dtype(TYPES[kind])
    raw = values.astype(dtype).tobytes()
    return helper.make_tensor(name, TYPES[kind], values.shape, raw, raw=True)


def open_graph_with(backend: str, device: str = "auto") -> OpenGraph:
    """Choose how graphs are opened on a backend; engines are built first.

    Args:
        backend: one that runs engines; every other is ONNX Runtime.
        device: of ONNX Runtime.
    """
    if runs_engines(backend):
        return lambda model: _open_engine(model, backend)
    from internvl_edge.runtime.ort.options import OrtOptions
    from internvl_edge.runtime.ort.session import OrtSession

    options = OrtOptions(graphs=False)
    return lambda model: OrtSession(Path("peak.onnx"), graph=model, device=device, options=options)


def _open_engine(model: bytes, backend: str) -> Session:
    from internvl_edge.runtime.trt.engine import Engine
    from internvl_edge.runtime.trt.profiles import read_engine_spec
    from internvl_edge.runtime.trt.session import TrtSession

    device, trt = Device(0), import_tensorrt(backend)
    with TemporaryDirectory() as folder:
        plan = build_peak_engine(model, Path(folder), backend)
        nbytes, sha256 = plan.stat().st_size, hashlib.sha256(plan.read_bytes()).hexdigest()
        engine = Engine(plan, FileRecord(nbytes=nbytes, sha256=sha256), trt, device, graphs=False)
        try:
            return TrtSession(engine, read_engine_spec(engine, (NUMBER,), (MEAN,)), device)
        except BaseException:
            engine.close()
            raise


def build_peak_engine(model: bytes, folder: Path, target: str) -> Path:
    """Build an engine of a graph of ``product_model``, in a folder."""
    from internvl_edge.export.engine.build import ShapeRanges, build_engine

    path = folder / "peak.onnx"
    path.write_bytes(model)
    built = build_engine(
        path,
        folder / "engines",
        component="peak",
        target=target,
        profile=ShapeRanges(),
        precision="fp32",
        inputs=(NUMBER,),
        onnx_sha256=hashlib.sha256(model).hexdigest(),
    )
    return folder / built.record.file


def _best_seconds(run: Callable[[], object], clock: Clock) -> float:
    run()
    seconds = []
    for _ in range(CALLS):
        start = clock()
        run()
        seconds.append(clock() - start)
    return min(seconds)
