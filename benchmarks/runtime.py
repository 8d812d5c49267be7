"""INT8 on the CPU, compared with what others make of the same model, in one interleaved run.

    python benchmarks/runtime.py                    # InternViT-6B widths, 4 layers, and the demo
    python benchmarks/runtime.py --models demo --seconds 1

    internvl-edge int8, fp32     this project's graphs on ONNX Runtime
    pytorch eager fp32           the reference model
    onnxruntime int8             our float32 graph through onnxruntime's quantize_static
    openvino int8                our float32 graph through NNCF, where both are installed

All have the same number of threads and the same image, and take turns: 20 rounds at least, of one
call each where calls are slow, so that intervals are what they say (``benchmark.timing``). The
share of matrix products is from ONNX Runtime's profile of the INT8 graph, and is shown with the
share of this machine's peaks (``benchmark.limits.peaks``) that the whole run reached: what could
still go.
Targets: INT8 at least 3 times as fast as PyTorch eager, and not slower than OpenVINO's INT8.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.artifact import open_artifact
from internvl_edge.benchmark.contenders import contender_of
from internvl_edge.benchmark.limits.peaks import (
    ARRAY_NBYTES,
    SIDE,
    Peaks,
    host_bandwidth,
    measure_peaks,
)
from internvl_edge.benchmark.limits.roofline import component_workload, locate
from internvl_edge.benchmark.machine import environment
from internvl_edge.benchmark.timing import MIN_ROUNDS, Timing, measure_many, ratio_of
from internvl_edge.runtime.ort.session import OrtOptions, OrtSession
from internvl_edge.types import Array

RESULTS = Path(__file__).parent / "results" / "runtime.json"
OURS = "internvl-edge int8"
CALIBRATION_IMAGES = 8
PRODUCTS = ("MatMul", "Gemm", "Conv", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul")
PRODUCTS += ("QGemm", "MatMulIntegerToFloat", "QLinearConv", "FusedMatMul", "QAttention")

Feeds = dict[str, Array]


class Images:
    """Calibration data, as onnxruntime reads it."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(1)
        self._left = [
            {name: rng.standard_normal(shape).astype(np.float32)} for _ in range(CALIBRATION_IMAGES)
        ]

    def get_next(self) -> Feeds | None:
        return self._left.pop() if self._left else None

    def __iter__(self) -> Any:
        return iter(self._left)


def ort_int8(fp32: Path, work: Path, shape: tuple[int, ...]) -> Path:
    """Quantize the float32 graph by onnxruntime's own static quantization, weights per channel.

    Activations are unsigned, as its documentation advises; signed ones, it cannot open again.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    out = work / "ort-int8.onnx"
    quantize_static(
        str(fp32),
        str(out),
        Images("pixel_values", shape),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
        use_external_data_format=True,
    )
    return out


def openvino_int8(fp32: Path, shape: tuple[int, ...], threads: int) -> Callable[[Feeds], object]:
    """Quantize the float32 graph by NNCF, for OpenVINO."""
    import nncf
    import openvino

    core = openvino.Core()
    data = nncf.Dataset(list(Images("pixel_values", shape)))
    # ``read_model`` would leave a Transpose after each weight, and its product in 16 bits
    graph = openvino.convert_model(str(fp32))
    model = nncf.quantize(graph, data, subset_size=CALIBRATION_IMAGES)
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return request.infer


def product_share(path: Path, feeds: Feeds, work: Path, threads: int) -> float:
    """Find the share of a run's operator time in matrix products, from a profile of 5 runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(work / "profile")
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(5):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return sum(spent[name] for name in PRODUCTS) / sum(spent.values())


def measured_peaks(threads: int) -> Peaks:
    """Measure the peaks of ONNX Runtime's products of each type, and of this machine's memory."""
    options = OrtOptions(num_threads=threads)
    return measure_peaks(
        ["float32", "int8"],
        lambda model: OrtSession(Path("peak.onnx"), graph=model, options=options),
        host_bandwidth(threads, ARRAY_NBYTES),
        side=SIDE,
    )


def export(checkpoint: list[str], out: Path, precision: str) -> None:
    command = [sys.executable, "-m", "internvl_edge", "export", *checkpoint, "-o", str(out)]
    subprocess.run([*command, "-p", precision, "--verify", "none", "-q"], check=True)


def compare(model: str, checkpoint: list[str], work: Path, args: Any) -> dict[str, Any]:
    """Compare all contenders on one model; those that are missing are named, not measured."""
    component = "image_embed" if model == "demo" else "vision"
    outs = {precision: work / f"{model}-{precision}" for precision in ("fp32", "int8")}
    for precision, out in outs.items():
        export(checkpoint, out, precision)
    artifacts = {precision: open_artifact(out) for precision, out in outs.items()}
    paths = {precision: artifact.onnx_path(component) for precision, artifact in artifacts.items()}
    side = artifacts["fp32"].manifest.image_size
    shape = (1, 3, side, side)
    feeds = {"pixel_values": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    options = OrtOptions(num_threads=args.threads)
    sessions = {
        OURS: OrtSession(paths["int8"], options=options),
        "internvl-edge fp32": OrtSession(paths["fp32"], options=options),
        "onnxruntime int8": OrtSession(ort_int8(paths["fp32"], work, shape), options=options),
    }
    contenders: dict[str, Callable[[], object]] = {
        name: lambda s=session: s.run(feeds)  # type: ignore[misc]
        for name, session in sessions.items()
    }
    source = Path(checkpoint[0]) if checkpoint else None
    eager = contender_of("pytorch", source, {"fp32": artifacts["fp32"]})
    pytorch = eager(component)
    contenders["pytorch eager fp32"] = lambda: pytorch(feeds)
    missing = [name for name in ("openvino", "nncf") if importlib.util.find_spec(name) is None]
    if not missing:
        infer = openvino_int8(paths["fp32"], shape, args.threads)
        contenders["openvino int8"] = lambda: infer(feeds)
    peaks = measured_peaks(args.threads)  # in the same minutes as what is compared with them
    timings = measure_many(contenders, min_duration_s=args.seconds, min_iterations=MIN_ROUNDS)
    workload = component_workload(artifacts["int8"], component, feeds, "onnxruntime")
    return {
        "model": model,
        "results": [{"name": name, **timing.to_json()} for name, timing in timings.items()],
        "speedups": speedups(timings),
        "peaks": asdict(peaks),
        "roofline": asdict(locate(workload, peaks, timings[OURS].percentile_ms(50))),
        "product_share": product_share(paths["int8"], feeds, work, args.threads),
        "skipped": {"openvino int8": f"{', '.join(missing)} not installed"} if missing else {},
    }


def speedups(timings: dict[str, Timing]) -> dict[str, Any]:
    """Compute how many times as long others take as our INT8, with 95 % intervals."""
    ours = timings[OURS]
    return {name: asdict(ratio_of(t, ours)) for name, t in timings.items() if name != OURS}


def show(figures: dict[str, Any]) -> None:
    for result in figures["results"]:
        ratio = figures["speedups"].get(result["name"])
        compared = ""
        if ratio is not None:
            interval = ratio["reason"] or f"{ratio['low']:.2f}-{ratio['high']:.2f}"
            compared = f"  our int8 is {ratio['median']:.2f} times as fast ({interval})"
        p50 = result["latency"]["p50"]
        sys.stderr.write(f"{figures['model']:14} {result['name']:20} p50 {p50:9.3f} ms{compared}\n")
    for name, reason in figures["skipped"].items():
        sys.stderr.write(f"{figures['model']:14} {name:20} skipped: {reason}\n")
    peaks, roofline = figures["peaks"]["operations"], figures["roofline"]
    sys.stderr.write(
        f"{figures['model']:14} int8: {figures['product_share']:.0%} of its time in products, MFU "
        f"{roofline['mfu']:.0%} of {peaks['int8'] / 1e12:.2f} TOPS\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="demo,6b", help="of demo, 6b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    models = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for model in args.models.split(","):
            checkpoint = [] if model == "demo" else [str(work / "checkpoint")]
            if checkpoint:
                module = "internvl_edge.export.synthetic"
                command = [sys.executable, "-m", module, "internvit-6b-224", checkpoint[0]]
                subprocess.run([*command, "--layers", str(args.layers)], check=True)
            models.append(compare(model, checkpoint, work, args))
            show(models[-1])
    result = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "models": models,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
