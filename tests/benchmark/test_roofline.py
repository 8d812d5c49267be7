"""Peaks on a clock that is known, and where components stand below them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from support.gpu.fake_cuda import FakeCuda

from internvl_edge.benchmark.limits import peaks as peaks_module
from internvl_edge.benchmark.limits.peaks import (
    REPEATS,
    SCALE,
    Peaks,
    build_peak_engine,
    device_bandwidth,
    host_bandwidth,
    measure_backend,
    measure_peaks,
    open_graph_with,
    product_model,
)
from internvl_edge.benchmark.limits.roofline import locate
from internvl_edge.benchmark.limits.workload import Workload, read_workload
from internvl_edge.errors import HardwareError
from internvl_edge.runtime.gpu.device import Device
from internvl_edge.runtime.session import Session

PEAKS = Peaks(operations={"float32": 100e9, "int8": 400e9}, bytes=20e9)


def work(weight_nbytes: int = 10_000_000, **operations: int) -> Workload:
    return Workload(operations=operations, weight_nbytes=weight_nbytes, io_nbytes=0)


def ticks(*seconds: float) -> Any:
    """A clock that says these times one after another, and again from the last on."""
    times = itertools.accumulate(itertools.cycle(seconds))
    return lambda: next(times)


# --- where a component stands --------------------------------------------------------------------


def test_a_component_bound_by_products() -> None:
    """1 G of float32 takes 10 ms at the peak, 2 G of int8 5 ms; it took 30 ms."""
    found = locate(work(float32=10**9, int8=2 * 10**9), PEAKS, 30.0)
    assert found.operations == 3 * 10**9
    assert found.mfu == pytest.approx(0.5)
    assert found.mbu == pytest.approx(10e6 / 20e9 / 30e-3)
    assert found.intensity == pytest.approx(300)


def test_a_component_bound_by_memory() -> None:
    """40 MB take 2 ms at 20 GB/s."""
    found = locate(work(40_000_000, float32=1000), PEAKS, 2.5)
    assert found.mbu == pytest.approx(0.8)
    assert found.mfu is not None
    assert found.mfu < 1e-5


def test_without_the_peak_of_a_type_there_is_no_mfu() -> None:
    found = locate(work(float32=10**9, float8=1), PEAKS, 30.0)
    assert found.mfu is None
    assert found.mbu > 0


# --- peaks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "float8"])
def test_the_graph_is_a_chain_of_products(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "peak.onnx"
    path.write_bytes(product_model(kind, 16))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    found = read_workload(path, {"number": (1, 1)})
    assert found.operations == {kind: REPEATS * 2 * 16**3}


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_the_graph_computes_what_it_says(kind: str) -> None:
    """Compared with the reference, and (float32) with NumPy."""
    model, feeds = product_model(kind, 16), {"number": np.full((1, 1), 0.5, np.float32)}
    with open_graph_with("onnxruntime")(model) as session:
        found = session.run(feeds)["y"]
    (wanted,) = ReferenceEvaluator(onnx.load_from_string(model)).run(None, feeds)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=SCALE)
    if kind == "float32":
        (weight,) = (
            onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load_from_string(model).graph.initializer
            if tensor.name == "weight"
        )
        product = np.full((16, 16), 0.5) @ np.linalg.matrix_power(
            weight.astype(np.float64), REPEATS
        )
        np.testing.assert_allclose(found, [product.mean()], atol=1e-5)


def test_a_peak_is_the_best_call() -> None:
    clock = ticks(0.0, 4.0, 0.0, 2.0, 0.0, 8.0)  # calls of 4, 2, 8, 4 and 2 seconds
    graphs = open_graph_with("onnxruntime")
    found = measure_peaks(["float32"], graphs, 7.0, side=8, clock=clock)
    assert found == Peaks(operations={"float32": REPEATS * 2 * 8**3 / 2.0}, bytes=7.0)


def test_what_does_not_run_has_no_peak() -> None:
    """As bfloat16 where there are no kernels for it; nothing else is swallowed."""
    graphs = open_graph_with("onnxruntime")

    def refuse(model: bytes) -> Session:
        if b"bad" in model:
            raise HardwareError("no kernel")
        return graphs(model)

    real = peaks_module.product_model

    def marked(kind: str, side: int, *, base: str) -> bytes:
        return b"bad" if kind == "bfloat16" else real(kind, side, base=base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peaks_module, "product_model", marked)
        found = measure_peaks(["bfloat16", "float32"], refuse, 1.0, side=8)
    assert list(found.operations) == ["float32"]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_bandwidth_counts_two_reads_and_a_write(threads: int) -> None:
    clock = ticks(0.0, 0.5)
    assert host_bandwidth(threads, 12_000, clock=clock) == pytest.approx(3 * 12_000 / 0.5)


def test_a_gpus_bandwidth_counts_a_read_and_a_write() -> None:
    cuda = FakeCuda()
    device = Device(0, cuda)
    found = device_bandwidth(device, 8000, clock=lambda: cuda.now_ms / 1e3)
    assert found == pytest.approx(2 * 8000 / 0.008)  # the stand-in copies 1000 bytes per ms
    assert cuda.num_live == 0


def test_this_machine_has_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks_module, "SIDE", 64)
    monkeypatch.setattr(peaks_module, "ARRAY_NBYTES", 1 << 20)
    found = measure_backend(["float32", "int8"], "onnxruntime")
    assert found.operations.keys() == {"float32", "int8"}
    assert min(*found.operations.values(), found.bytes) > 1e6


@pytest.mark.rtx
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16", "int8", "float8"])
def test_every_graph_becomes_an_engine(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = product_model(kind, 256, base="float16")
    assert build_peak_engine(model, tmp_path, "tensorrt-rtx").stat().st_size > 100_000
