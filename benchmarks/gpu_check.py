"""What runs on this machine's GPU, how close to the CPU's results, how fast: one table, one JSON.

    python benchmarks/gpu_check.py                         # the demo at every precision
    python benchmarks/gpu_check.py --layers 4,48           # and InternViT-6B widths, so deep
    python benchmarks/gpu_check.py --precisions fp16,int8 --components image_embed --seconds 1

Each component runs at each precision on each backend that is installed here, on the same seeded
inputs. Its error is the largest difference from ONNX Runtime's result on the CPU, of the same
precision (bfloat16, which the CPU cannot run: of float32), over the largest value of that result.
Roofline shares are of what the same
backend reached on plain products, and the memory on plain copies. What cannot run is a row too,
with the reason. It needs no network, and on a machine without a GPU
it checks the CPU and says what it skipped.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.cli.measure import seeded_feeds
from internvl_edge.compiler.peaks import Peaks, measure_backend
from internvl_edge.compiler.roofline import Roofline, component_workload, locate
from internvl_edge.errors import InternVLError
from internvl_edge.runtime.bench import measure
from internvl_edge.runtime.device import Device
from internvl_edge.runtime.environment import environment
from internvl_edge.runtime.session import Array, open_component, require_backend

RESULTS = Path(__file__).parent / "results" / "gpu-check.json"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
CPU = ("onnxruntime", "cpu")
PLACES = (CPU, ("onnxruntime", "cuda"), ("tensorrt-rtx", "cuda"), ("tensorrt", "cuda"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A component at a precision on a backend; what is None was not reached."""

    model: str
    component: str
    precision: str
    backend: str
    max_error: float | None = None  # relative to the largest value
    p50_ms: float | None = None
    p99_ms: float | None = None
    gpu_memory_nbytes: int | None = None  # that opening took
    mfu: float | None = None  # of the peak that the same backend reached here
    mbu: float | None = None
    skipped: str | None = None  # the reason
    failed: str | None = None


def check(model: str, artifact: Artifact, baseline: Artifact | None, args: Any) -> Iterator[Row]:
    """Every component of a directory in every place.

    Args:
        model: what to call it in the table.
        artifact: the directory.
        baseline: whose CPU results are right where this one has none.
        args: the command's.
    """
    precision = artifact.manifest.precision
    for component in args.components or artifact.manifest.components:
        feeds = seeded_feeds(artifact, component, args.batch)
        right: dict[str, Array] | None = None
        for backend, device in PLACES:
            name = f"{backend} {device}"
            cell = {"model": model, "component": component, "precision": precision, "backend": name}
            try:
                require_backend(backend)
                before = free_nbytes(device)
                with open_component(artifact, component, backend, device) as session:
                    after = free_nbytes(device)
                    found = session.run(feeds)
                    timing = measure(session, feeds, min_duration_s=args.seconds)
                p50_ms = timing.percentile_ms(50)
                roofline = below_roof(artifact, component, feeds, (backend, device), p50_ms)
            except InternVLError as error:
                row = Row(**cell, **refusal(error))
                if (backend, device) == CPU and baseline is not None:
                    right = cpu_results(baseline, component, feeds)
            else:
                right = found if (backend, device) == CPU else right
                row = Row(
                    **cell,
                    max_error=None if right is None else largest_error(found, right),
                    p50_ms=p50_ms,
                    p99_ms=timing.percentile_ms(99),
                    gpu_memory_nbytes=None if before is None or after is None else before - after,
                    mfu=roofline.mfu,
                    mbu=roofline.mbu,
                )
            sys.stderr.write(line(row) + "\n")
            yield row


def below_roof(
    artifact: Artifact,
    component: str,
    feeds: dict[str, Array],
    place: tuple[str, str],
    latency_ms: float,
) -> Roofline:
    """What share of the machine's peaks a component reached."""
    work = component_workload(artifact, component, feeds, place[0])
    each = [peaks_of(kind, *place) for kind in work.operations]
    merged = Peaks(
        operations={kind: value for peaks in each for kind, value in peaks.operations.items()},
        bytes=max(peaks.bytes for peaks in each),
    )
    return locate(work, merged, latency_ms)


@functools.cache
def peaks_of(kind: str, backend: str, device: str) -> Peaks:
    return measure_backend([kind], backend, device)


def refusal(error: InternVLError) -> dict[str, str]:
    """Skipped where an engine, a package or a GPU is missing (exit codes 2 and 4); else failed."""
    return {"skipped" if error.exit_code in (2, 4) else "failed": str(error)}


def cpu_results(artifact: Artifact, component: str, feeds: dict[str, Array]) -> dict[str, Array]:
    with open_component(artifact, component, *CPU) as session:
        return session.run(feeds)


def largest_error(found: dict[str, Array], right: dict[str, Array]) -> float:
    """Over all outputs, the largest difference relative to the output's largest value."""
    errors = []
    for name, array in right.items():
        wanted, got = array.astype(np.float64), found[name].astype(np.float64)
        scale = float(np.abs(wanted).max()) or 1.0
        errors.append(float(np.abs(got - wanted).max()) / scale)
    return max(errors)


def free_nbytes(device: str) -> int | None:
    return None if device == "cpu" else Device(0).free_nbytes()


def line(row: Row) -> str:
    place = f"{row.model:14} {row.component:14} {row.precision:5} {row.backend:18}"
    if row.skipped or row.failed:
        word, reason = ("skipped", row.skipped) if row.skipped else ("FAILED", row.failed)
        return f"{place} {word}: {reason}"
    memory = "" if row.gpu_memory_nbytes is None else f" {row.gpu_memory_nbytes / 1e9:.2f} GB"
    error = "no reference" if row.max_error is None else f"error {row.max_error:.1e}"
    roof = "" if row.mbu is None else f" MFU {row.mfu or 0:.0%} MBU {row.mbu:.0%}"
    return f"{place} {error} p50 {row.p50_ms:.3f} ms p99 {row.p99_ms:.3f} ms{memory}{roof}"


def targets() -> list[str]:
    """Engines that can be built and run here."""
    found = []
    for backend in ("tensorrt-rtx", "tensorrt"):
        try:
            require_backend(backend)
        except InternVLError as error:
            sys.stderr.write(f"no {backend} engines: {error}\n")
        else:
            found.append(backend)
    return found


def export(checkpoint: list[str], out: Path, precision: str, built: list[str]) -> str | None:
    """Compile; the error's last line where it fails."""
    command = [sys.executable, "-m", "internvl_edge", "export", *checkpoint, "-o", str(out)]
    for target in ["onnx", *built]:
        command += ["--target", target]
    done = subprocess.run(
        [*command, "-p", precision, "--verify", "none", "-q"], capture_output=True, text=True
    )
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def check_model(model: str, checkpoint: list[str], work: Path, args: Any) -> Iterator[Row]:
    """All precisions of a checkpoint; float32 first, as it is what others are held against."""
    built, baseline = targets(), None
    for precision in sorted(args.precisions, key=lambda name: name != "fp32"):
        out = work / f"{model}-{precision}"
        error = export(checkpoint, out, precision, built)
        if error is not None:
            yield Row(model=model, component="", precision=precision, backend="", failed=error)
            continue
        artifact = open_artifact(out)
        baseline = artifact if precision == "fp32" else baseline
        yield from check(model, artifact, baseline, args)


def synthetic(layers: int, work: Path) -> list[str]:
    path = work / f"internvit-6b-{layers}"
    module = "internvl_edge.export.synthetic"
    command = [sys.executable, "-m", module, "internvit-6b-224", str(path), "--layers", str(layers)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [str(path)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--precisions", type=names, default=list(PRECISIONS))
    parser.add_argument("--components", type=names, help="default: all of the demo")
    parser.add_argument("--layers", type=lambda text: [int(n) for n in text.split(",")], default=[])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows += check_model("demo", [], work, args)
        args.components = ["vision"]
        for layers in args.layers:
            rows += check_model(f"6b-{layers}-layers", synthetic(layers, work), work, args)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "rows": [asdict(row) for row in rows],
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    ran = sum(row.skipped is None and row.failed is None for row in rows)
    sys.stderr.write(
        f"{ran} ran, {sum(row.skipped is not None for row in rows)} skipped, "
        f"{sum(row.failed is not None for row in rows)} failed: {args.out}\n"
    )
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
