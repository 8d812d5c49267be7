"""One measurement of ``gpu_check`` in a process of its own: whatever breaks here breaks no other.

    python benchmarks/gpu_row.py '{"job": "component", …}' ANSWER.json

A GPU that faulted, a native library that aborts or a call that never ends take their process along,
and the CUDA context with it. The answer is a file, as libraries write to stdout as they like.
"""

from __future__ import annotations

import io
import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl_edge import load
from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.artifact.components import find_component
from internvl_edge.benchmark.contenders import contender_of
from internvl_edge.benchmark.inputs import as_taken, seeded_feeds, seeded_picture
from internvl_edge.benchmark.limits.peaks import measure_backend
from internvl_edge.benchmark.timing import measure
from internvl_edge.errors import InternVLError
from internvl_edge.files.memory import peak_rss_nbytes
from internvl_edge.runtime.gpu.device import Device
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.session import open_component, require_backend
from internvl_edge.runtime.trt.options import TrtOptions
from internvl_edge.runtime.trt.session import TrtSession
from internvl_edge.types import Array

TORCH_TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
CALLS = 3  # before results are compared: the second captures graphs, the third replays them
SKIPPED_CODES = (2, 4)  # an engine, a package or a GPU that is not there

Job = dict[str, Any]


def component(job: Job) -> dict[str, Any]:
    """Measure a component on a backend: error, latencies, memory; without CUDA graphs too."""
    artifact = open_artifact(job["out"])
    name, backend, device = job["component"], job["backend"], job["device"]
    require_backend(backend)
    before = free_nbytes(device)
    with open_component(artifact, name, backend, device, options=slow_too(backend)) as session:
        feeds = as_taken(seeded_feeds(artifact, name, job["batch"]), session.inputs)
        for _ in range(CALLS):
            outputs = session.run(feeds)
        after = free_nbytes(device)
        figures = compared(outputs, job)
        if job["timed"]:
            figures |= latencies(session.run, feeds, job["seconds"])
        if job["timed"] and device != "cpu":  # without the copies, that is
            there = latencies(session.run_device, feeds, job["seconds"])
            figures["p50_ms_on_device"] = there["p50_ms"]
        if job["timed"] and isinstance(session, TrtSession):
            figures["phases_ms"] = phases(session, feeds)
    has_graphs = backend != "onnxruntime" or find_component(name).is_vision
    if job["timed"] and device != "cpu" and has_graphs:
        figures |= without_graphs(artifact, job, feeds)
    figures["peak_rss_nbytes"] = peak_rss_nbytes()
    if job["timed"] and before is not None and after is not None:  # else others run too
        figures["gpu_memory_nbytes"] = before - after
    return figures


def slow_too(backend: str) -> OrtOptions | None:
    """Let ONNX Runtime run what it computes slowly: how slowly is what rows say."""
    return OrtOptions(allow_slow=True) if backend == "onnxruntime" else None


def without_graphs(artifact: Artifact, job: Job, feeds: dict[str, Array]) -> dict[str, Any]:
    """Measure the latency, or say why there is none: what was measured before is kept."""
    name, backend, device = job["component"], job["backend"], job["device"]
    options: OrtOptions | TrtOptions = OrtOptions(graphs=False, allow_slow=True)
    if backend != "onnxruntime":
        options = TrtOptions(graphs=False)
    try:
        with open_component(artifact, name, backend, device, options=options) as session:
            timing = latencies(session.run, feeds, job["seconds"])
    except InternVLError as error:
        return {"failed": f"without graphs: {error}"}
    return {"p50_ms_without_graphs": timing["p50_ms"]}


def answers(job: Job) -> dict[str, Any]:
    """Check the whole model: embeddings of an image, and the caption, letter by letter."""
    artifact = open_artifact(job["out"])
    backend, device = job["backend"], job["device"]
    require_backend(backend)
    options = slow_too(backend)
    with load(artifact.path, backend=backend, device=device, options=options) as model:
        picture = Image.open(io.BytesIO(seeded_picture()))
        caption = model.caption([picture], num_beams=5, max_new_tokens=30)[0]
        outputs = {mode: model.encode_image([picture], mode=mode) for mode in "cg"}
        figures = compared(outputs, job) | said(caption, job)
        if job["timed"]:
            seen = model.see([picture])
            one = {"image": np.zeros(1)}  # what is timed is a caption by five beams
            figures |= latencies(lambda _: model.caption(seen), one, job["seconds"])
    return figures


def said(caption: str, job: Job) -> dict[str, Any]:
    """Compare the caption with the reference's; another one is a failure."""
    if job["save"] is not None:
        Path(job["save"]).with_suffix(".txt").write_text(caption, encoding="utf-8")
    if job["reference"] is None:
        return {}
    wanted = Path(job["reference"]).with_suffix(".txt").read_text(encoding="utf-8")
    if caption == wanted:
        return {}
    return {"failed": f"caption {caption!r}, expected {wanted!r}"}


def compiled_torch(job: Job) -> dict[str, Any]:
    """Do the same job by ``torch.compile`` on the GPU, from host arrays to host arrays."""
    artifact = open_artifact(job["out"])
    feeds = seeded_feeds(artifact, job["component"], job["batch"])
    checkpoint = None if job["checkpoint"] is None else Path(job["checkpoint"])
    dtype = TORCH_TYPES[artifact.manifest.precision]
    contender = contender_of(
        "torch-compile", checkpoint, {job["out"]: artifact}, device="cuda", dtype=dtype
    )
    run = contender(job["component"])
    outputs: Any = run(feeds)
    values = outputs if isinstance(outputs, list) else [outputs]
    names = [spec.name for spec in artifact.manifest.components[job["component"]].outputs]
    arrays = {n: v.float().numpy() for n, v in zip(names, values, strict=True)}
    figures = compared(arrays, job) | latencies(run, feeds, job["seconds"])
    import torch

    return figures | {"gpu_memory_nbytes": torch.cuda.max_memory_allocated()}


def peak(job: Job) -> dict[str, Any]:
    """Measure the peak of products of one type on a backend, and the bandwidth there."""
    return asdict(measure_backend([job["kind"]], job["backend"], job["device"]))


def latencies(run: Any, feeds: dict[str, Array], seconds: float) -> dict[str, Any]:
    timing = measure(run, feeds, min_duration_s=seconds)
    return {
        "p50_ms": timing.percentile_ms(50),
        "p99_ms": timing.percentile_ms(99),
        "items_per_s": timing.throughput,
    }


def phases(session: Any, feeds: dict[str, Array]) -> dict[str, float]:
    """Measure where the GPU spends a call: the median of each of ``trtexec``'s metrics."""
    from internvl_edge.benchmark.gpu_phases import measure_phases

    return {name: phase.p50 for name, phase in measure_phases(session, feeds).items()}


def compared(outputs: dict[str, Array], job: Job) -> dict[str, Any]:
    """Compute the error against the reference, where there is one; keep the outputs if asked."""
    if job["save"] is not None:
        np.savez(job["save"], **{n: v.astype(np.float32) for n, v in outputs.items()})
    if job["reference"] is None:
        return {}
    with np.load(job["reference"]) as right:
        return {"max_error": largest_error(outputs, dict(right))}


def largest_error(outputs: dict[str, Array], right: dict[str, Array]) -> float:
    """Find the largest difference of all outputs, relative to the output's largest value."""
    errors = []
    for name, array in right.items():
        wanted, got = array.astype(np.float64), outputs[name].astype(np.float64)
        scale = float(np.abs(wanted).max()) or 1.0
        errors.append(float(np.abs(got - wanted).max()) / scale)
    return max(errors)


def free_nbytes(device: str) -> int | None:
    """Read a GPU's free memory, where the CUDA bindings can say it."""
    if device == "cpu":
        return None
    try:
        return Device(0).free_nbytes()
    except InternVLError:
        return None


def refusal(error: BaseException) -> dict[str, str]:
    """Call it skipped where an engine, a package or a GPU is missing; else failed."""
    if not isinstance(error, InternVLError):
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"skipped" if error.exit_code in SKIPPED_CODES else "failed": str(error)}


JOBS = {"component": component, "answers": answers, "torch": compiled_torch, "peak": peak}


def main() -> None:
    job, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    try:
        figures = JOBS[job["job"]](job)
    except Exception as error:
        if not isinstance(error, InternVLError):
            traceback.print_exc()
        figures = refusal(error)
    answer.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
