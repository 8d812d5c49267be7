"""Check what runs on this machine's GPU, how exactly and how fast: one table, one JSON.

    python benchmarks/gpu_check.py           # the demo, and 6B widths as deep as the GPU has memory
    python benchmarks/gpu_check.py --layers 4
    python benchmarks/gpu_check.py --layers "" --precisions fp16,int8 --components image_embed
    python benchmarks/gpu_check.py --layers "" --untimed --artifacts DIR   # DIR/demo-fp16, …

Each component runs at each precision on each backend that is installed here, on the same seeded
inputs, and by ``torch.compile`` in the types that PyTorch has. Its error is the largest difference
from ONNX Runtime's result on the CPU, of the same precision (of float32 where the CPU cannot run
it), over the largest value of that result. Latencies are of host arrays to host arrays; with CUDA
graphs and without. Roofline shares are of what the same backend reached on plain
products, and the memory on plain copies. GPU memory is what opening and the first calls took.

Every row is a process of its own (``gpu_row``), and the JSON is replaced after each: what fails,
faults the GPU or never ends is a row with the reason, and the rest goes on. It needs no network and
installs nothing: any interpreter that has the packages will do, from a clone with PYTHONPATH=src.
Directories compiled elsewhere, engines with them, are taken from ``--artifacts`` where they are
there. ``--untimed`` only compares, several rows at a time. Rows of the component ``answers`` are of
the whole model: embeddings of an image, and a caption that has to be the CPU's to the letter.
On a machine without a GPU it checks the demo on the CPU and says what it skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_row import TORCH_TYPES

from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.benchmark.inputs import seeded_feeds
from internvl_edge.benchmark.limits.peaks import Peaks
from internvl_edge.benchmark.limits.roofline import Roofline, component_workload, locate
from internvl_edge.benchmark.machine import environment, gpu_nbytes
from internvl_edge.errors import InternVLError
from internvl_edge.runtime.session import require_backend

RESULTS = Path(__file__).parent / "results" / "gpu-check.json"
ROW = Path(__file__).parent / "gpu_row.py"
CPU = ("onnxruntime", "cpu")
PLACES = (CPU, ("onnxruntime", "cuda"), ("tensorrt-rtx", "cuda"), ("tensorrt", "cuda"))
TORCH = ("torch-compile", "cuda")
DEPTHS = (4, 48)  # layers at InternViT-6B's widths
BLOCK_PARAMETERS = 122_900_000  # of one such layer: 4 · 3200² + 2 · 3200 · 12800
NBYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}  # of a weight
HEADROOM = 1.25  # times the weights: activations, scratch, the CUDA context
TIMEOUT_S = 1800.0  # of a row
ANSWERS = "answers"  # of the whole model, after its components
SIDE_BY_SIDE = 6  # rows that nothing is timed of

Place = tuple[str, str]  # backend, device


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
    items_per_s: float | None = None
    p50_ms_without_graphs: float | None = None  # on a GPU
    p50_ms_on_device: float | None = None  # outputs stay on the GPU
    phases_ms: dict[str, float] | None = None  # of engines: medians of trtexec's metrics
    gpu_memory_nbytes: int | None = None  # that opening and the first calls took
    peak_rss_nbytes: int | None = None  # of the row's process
    mfu: float | None = None  # of the peak that the same backend reached here
    mbu: float | None = None
    skipped: str | None = None  # the reason
    failed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is checked."""

    name: str
    checkpoint: Path | None  # None: the demo
    timed_on_cpu: bool  # the CPU gives the reference in any case


class Bench:
    """Runs jobs in processes of their own, and remembers the peaks that it asked for."""

    def __init__(self, work: Path, args: Any) -> None:
        self.work, self.args = work, args
        self._peaks: dict[tuple[str, str, str], dict[str, Any]] = {}

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the answer of ``gpu_row``, or why there is none."""
        answer = self.work / f"answer-{threading.get_ident()}.json"
        answer.unlink(missing_ok=True)
        command = [sys.executable, str(ROW), json.dumps(job), str(answer)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=self.args.timeout
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"took longer than {self.args.timeout:.0f} s"}
        if not answer.exists():
            told = done.stderr.strip().splitlines() or [""]
            return {"failed": f"the process ended with code {done.returncode}: {told[-1]}"}
        figures: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return figures

    def peaks(self, kind: str, place: Place) -> dict[str, Any]:
        """Measure the peak of a type at a place, once; empty where it cannot be."""
        key = (kind, *place)
        if key not in self._peaks:
            job = {"job": "peak", "kind": kind, "backend": place[0], "device": place[1]}
            peak = self.answer(job)
            self._peaks[key] = peak if "bytes" in peak else {}
        return self._peaks[key]

    def below_roof(
        self, artifact: Artifact, component: str, place: Place, latency_ms: float
    ) -> Roofline | None:
        """Compute the share of the machine's peaks that was reached; None where none is known."""
        feeds = seeded_feeds(artifact, component, self.args.batch)
        work = component_workload(artifact, component, feeds, place[0])
        each = [peak for kind in work.operations if (peak := self.peaks(kind, place))]
        if not each:
            return None
        operations = {kind: value for peak in each for kind, value in peak["operations"].items()}
        merged = Peaks(operations=operations, bytes=max(peak["bytes"] for peak in each))
        return locate(work, merged, latency_ms)

    def rows(self, model: Model, artifact: Artifact) -> Iterator[Row]:
        """Measure every component in every place, the CPU first where rows run at once."""
        precision, components = artifact.manifest.precision, self.args.components
        has_torch = precision in TORCH_TYPES and not self.args.untimed
        places = [*PLACES, *([TORCH] if has_torch else [])]
        cells = [(c, p) for c in components or all_of(artifact) for p in places]
        cells = [cell for cell in cells if cell != (ANSWERS, TORCH)]
        if not self.args.untimed:
            yield from (self.row(model, artifact, *cell) for cell in cells)
            return
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            on_cpu = [cell for cell in cells if cell[1] == CPU]
            others = [cell for cell in cells if cell[1] != CPU]
            for wave in (on_cpu, others):
                yield from pool.map(lambda cell: self.row(model, artifact, *cell), wave)

    def row(self, model: Model, artifact: Artifact, component: str, place: Place) -> Row:
        """Measure a component in a place."""
        precision = artifact.manifest.precision
        try:
            figures = self.figures(model, artifact, component, place)
        except Exception as error:  # a fault of this script's: a row like any other
            figures = {"failed": f"{type(error).__name__}: {error}"}
        return Row(
            model=model.name,
            component=component,
            precision=precision,
            backend=" ".join(place),
            **figures,
        )

    def figures(
        self, model: Model, artifact: Artifact, component: str, place: Place
    ) -> dict[str, Any]:
        """Collect the figures of a row."""
        own, fp32 = (
            self.work / f"{model.name}-{precision}-{component}.npz"
            for precision in (artifact.manifest.precision, "fp32")
        )
        reference = next((path for path in (own, fp32) if path.exists()), None)
        job = {
            "job": "torch" if place == TORCH else ANSWERS if component == ANSWERS else "component",
            "out": str(artifact.path),
            "component": component,
            "backend": place[0],
            "device": place[1],
            "batch": self.args.batch,
            "seconds": self.args.seconds,
            "timed": not self.args.untimed and (place != CPU or model.timed_on_cpu),
            "checkpoint": None if model.checkpoint is None else str(model.checkpoint),
            "reference": None if place == CPU or reference is None else str(reference),
            "save": str(own) if place == CPU else None,
        }
        figures = self.answer(job)
        if figures.get("p50_ms") is not None and place != TORCH and component != ANSWERS:
            roofline = self.below_roof(artifact, component, place, figures["p50_ms"])
            if roofline is not None:
                figures |= {"mfu": roofline.mfu, "mbu": roofline.mbu}
        return figures


def all_of(artifact: Artifact) -> Sequence[str]:
    """List its components; of a model that captions, its answers too."""
    components = list(artifact.manifest.components)
    return [*components, *([ANSWERS] if "decoder" in components else [])]


def line(row: Row) -> str:
    place = f"{row.model:14} {row.component:14} {row.precision:5} {row.backend:18}"
    if row.skipped or row.failed:
        word, reason = ("skipped", row.skipped) if row.skipped else ("FAILED", row.failed)
        return f"{place} {word}: {reason}"
    words = ["no reference" if row.max_error is None else f"error {row.max_error:.1e}"]
    if row.backend == " ".join(CPU):
        words = ["reference"]
    if row.p50_ms is not None:
        words += [f"p50 {row.p50_ms:.3f} ms p99 {row.p99_ms:.3f} ms {row.items_per_s:.1f}/s"]
    if row.p50_ms_without_graphs is not None:
        words.append(f"without graphs {row.p50_ms_without_graphs:.3f} ms")
    if row.p50_ms_on_device is not None:
        words.append(f"outputs on the GPU {row.p50_ms_on_device:.3f} ms")
    if row.gpu_memory_nbytes is not None:
        words.append(f"{row.gpu_memory_nbytes / 1e9:.2f} GB")
    if row.mbu is not None:
        words.append(f"MFU {row.mfu or 0:.0%} MBU {row.mbu:.0%}")
    return f"{place} {' '.join(words)}"


def targets() -> list[str]:
    """List the engines that can be built and run here."""
    usable = []
    for backend in ("tensorrt-rtx", "tensorrt"):
        try:
            require_backend(backend)
        except InternVLError as error:
            sys.stderr.write(f"no {backend} engines: {error}\n")
        else:
            usable.append(backend)
    return usable


def export(checkpoint: Path | None, out: Path, precision: str, built: list[str]) -> str | None:
    """Compile; the error's last line where it fails."""
    source = [] if checkpoint is None else [str(checkpoint)]
    command = [sys.executable, "-m", "internvl_edge", "export", *source, "-o", str(out)]
    for target in ["onnx", *built]:
        command += ["--target", target]
    done = subprocess.run(
        [*command, "-p", precision, "--verify", "none", "-q"], capture_output=True, text=True
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"export ended with code {done.returncode}"])[-1]


def compiled_before(bench: Bench, name: str) -> Path | None:
    """Find this name in the directory that was given."""
    path = None if bench.args.artifacts is None else bench.args.artifacts / name
    return path if path is not None and path.exists() else None


def check_model(model: Model, precisions: list[str], bench: Bench) -> Iterator[Row]:
    """Check all precisions of a checkpoint; float32 first, as others are compared with it."""
    built = targets()
    for precision in sorted(precisions, key=lambda name: name != "fp32"):
        given = compiled_before(bench, f"{model.name}-{precision}")
        out = given or bench.work / f"{model.name}-{precision}"
        head = {"model": model.name, "component": "", "precision": precision, "backend": ""}
        try:
            error = None if given else export(model.checkpoint, out, precision, built)
            if error is not None:
                yield Row(**head, failed=error)
                continue
            yield from bench.rows(model, open_artifact(out))
        except Exception as error:
            yield Row(**head, failed=f"{type(error).__name__}: {error}")
        finally:
            if given is None:  # 48 layers at five precisions fill a disk
                shutil.rmtree(out, ignore_errors=True)


def check_depth(layers: int, precisions: list[str], bench: Bench) -> Iterator[Row]:
    """Check 6B widths, so many layers deep, at the precisions whose weights fit the GPU."""
    memory, fitting = gpu_nbytes(), []
    name = f"6b-{layers}-layers"
    head = {"model": name, "component": "vision", "backend": ""}
    if memory is None and bench.args.layers is None:
        reason = f"no GPU to run 6B widths on; --layers {layers} runs them on the CPU"
        yield Row(**head, precision="", skipped=reason)
        return
    for precision in precisions:
        needed = int(HEADROOM * layers * BLOCK_PARAMETERS * NBYTES[precision])
        if memory is None or needed <= memory:
            fitting.append(precision)
        else:
            reason = f"needs about {needed / 1e9:.1f} GB of GPU memory, found {memory / 1e9:.1f} GB"
            yield Row(**head, precision=precision, skipped=reason)
    if not fitting:
        return
    given = compiled_before(bench, name)
    checkpoint = given or bench.work / name
    try:
        if given is None:
            synthesize(layers, checkpoint)
    except Exception as error:
        yield Row(**head, precision="", failed=f"{type(error).__name__}: {error}")
    else:
        model = Model(name=name, checkpoint=checkpoint, timed_on_cpu=False)
        yield from check_model(model, fitting, bench)
    finally:
        if given is None:
            shutil.rmtree(checkpoint, ignore_errors=True)


def synthesize(layers: int, path: Path) -> None:
    module = "internvl_edge.export.synthetic"
    command = [sys.executable, "-m", module, "internvit-6b-224", str(path), "--layers", str(layers)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def check(bench: Bench) -> Iterator[Row]:
    """Check everything that the arguments ask for."""
    args = bench.args
    if args.demo:
        demo = Model(name="demo", checkpoint=None, timed_on_cpu=True)
        yield from check_model(demo, args.precisions, bench)
    args.components = ["vision"]
    for layers in DEPTHS if args.layers is None else args.layers:
        yield from check_depth(layers, args.precisions, bench)


def save(path: Path, rows: list[Row], *, is_complete: bool) -> None:
    """Replace the JSON by one of these rows; there is a whole one at any moment."""
    result = {
        "command": " ".join(["python", *sys.argv]),
        "environment": environment(),
        "is_complete": is_complete,
        "rows": [asdict(row) for row in rows],
    }
    staged = path.with_suffix(".partial")
    staged.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(staged, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(n) for n in text.split(",") if n]  # noqa: E731
    parser.add_argument("--precisions", type=names, default=list(NBYTES))
    parser.add_argument("--components", type=names, help="default: all of the demo")
    parser.add_argument("--layers", type=numbers, help="default: 4 and 48 as the GPU allows")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="of a row, in seconds")
    parser.add_argument("--untimed", action="store_true", help="only errors, rows side by side")
    parser.add_argument("--no-demo", dest="demo", action="store_false", help="only 6B widths")
    parser.add_argument("--artifacts", type=Path, help="MODEL-PRECISION, compiled before")
    parser.add_argument("--work", type=Path, help="where to compile; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        for row in check(Bench(Path(folder), args)):
            sys.stderr.write(line(row) + "\n")
            rows.append(row)
            save(args.out, rows, is_complete=False)
    save(args.out, rows, is_complete=True)
    ran = sum(row.skipped is None and row.failed is None for row in rows)
    sys.stderr.write(
        f"{ran} ran, {sum(row.skipped is not None for row in rows)} skipped, "
        f"{sum(row.failed is not None for row in rows)} failed: {args.out}\n"
    )
    sys.exit(any(row.failed for row in rows))


if __name__ == "__main__":
    main()
