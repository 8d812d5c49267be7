"""Full-size models on a small machine: what each step takes, and what others take.

    python benchmarks/fullsize.py                              # InternViT-6B: all steps, peers
    python benchmarks/fullsize.py --preset internvl-14b-224 --steps synthetic,bf16
    python benchmarks/fullsize.py --layers 4 --steps synthetic,int8,run --no-peers
    python benchmarks/fullsize.py --preset internvl3-8b --steps synthetic,bf16,int4-wo --no-peers

Every step runs as a process of its own. Measured of it: wall time, largest resident set (kernel),
largest anonymous memory (sampled from /proc, mapped files not counted) and bytes written. The
checkpoint is synthetic: real shapes, made-up weights. Peers get the same widths with few enough
layers to stay in memory; what they take per layer is what compares.

Free disk is checked first; everything goes into a temporary directory that is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peers

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fullsize.json"
PRECISIONS = ("bf16", "fp16", "int8", "fp8", "int4-wo")
STEPS = ("synthetic", *PRECISIONS, "run", "forwards", *(f"engine-{p}" for p in PRECISIONS))
PEERS = ("torch.onnx.export", "onnxruntime quantize_static", "modelopt")
PEER_LAYERS = 4
SAMPLING_SECONDS = 0.05
KILLED = "exit status -9"
LABELS = {
    "synthetic": "write the checkpoint",
    "bf16": "`export -p bf16 --weights link --verify none`",
    **{p: f"`export -p {p} --verify none`" for p in PRECISIONS[1:]},
    "forwards": "block forwards of the calibration alone",
    "run": "INT8: one image on ONNX Runtime, CPU",
    **{f"engine-{p}": f"`build`: {p} engine" for p in PRECISIONS},
    "modelopt": "ModelOpt 0.47, INT8",
    "torch.onnx.export": "`torch.onnx.export`",
    "onnxruntime quantize_static": "ONNX Runtime `quantize_static`",
}
TOOL = [sys.executable, "-m", "internvl_edge"]
ENGINES = {  # what is built of each kind; a batch is smallest, typical and largest
    "vit": ["--components", "vision", "--batch", "1,1,4"],
    "internvl": ["--components", "image_queries", "--batch", "1,1,4"],
    "chat": ["--components", "chat_vision,chat_decoder"],
}
PACKAGES = ("torch", "onnx", "onnxruntime", "tensorrt-rtx", "nvidia-modelopt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One step of the benchmark."""

    step: str
    layers: int
    seconds: float
    peak_rss_nbytes: int
    peak_anonymous_nbytes: int
    written_nbytes: int
    error: str | None = None  # its last line; the rest is what it took until then
    forecast: dict[str, float] | None = None  # what --dry-run said before


def measure(step: str, layers: int, command: list[str]) -> Measured:
    """Run a command and watch what it takes."""
    sys.stderr.write(f"{step} ({layers} layers) ...\n")
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        peaks = {"resident": 0, "anonymous": 0, "written": 0}
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks))
        watcher.start()
        process.wait()
        watcher.join()
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    failed = process.returncode != 0
    measured = Measured(
        step=step,
        layers=layers,
        seconds=round(time.monotonic() - started, 1),
        peak_rss_nbytes=peaks["resident"],
        peak_anonymous_nbytes=peaks["anonymous"],
        written_nbytes=peaks["written"],
        error=(lines[-1] if lines else f"exit status {process.returncode}") if failed else None,
    )
    sys.stderr.write(f"    {_line(measured)}\n")
    return measured


def _watch(pid: int, peaks: dict[str, int]) -> None:
    """Sample a process until it ends; processes that it starts are not counted.

    Resident memory is the kernel's own high-water mark of this program. ``ru_maxrss`` is not: it
    begins at the size of the process that started it.
    """
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            io = Path(f"/proc/{pid}/io").read_text()
        except OSError:
            return
        fields = dict(line.split(":", 1) for line in (status + io).splitlines())
        if "RssAnon" not in fields:
            return
        peaks["resident"] = int(fields["VmHWM"].split()[0]) * 1024
        anonymous = int(fields["RssAnon"].split()[0]) * 1024
        peaks["anonymous"] = max(peaks["anonymous"], anonymous)
        peaks["written"] = int(fields["wchar"])
        time.sleep(SAMPLING_SECONDS)


def _line(m: Measured) -> str:
    return m.error or (
        f"{m.seconds:.1f} s, RSS {m.peak_rss_nbytes / 1e9:.2f} GB, anonymous "
        f"{m.peak_anonymous_nbytes / 1e9:.2f} GB, written {m.written_nbytes / 1e9:.2f} GB"
    )


# --- ours ----------------------------------------------------------------------------------------


def run_steps(
    preset: str, layers: int, steps: list[str], work: Path, keep: Callable[[Measured], None]
) -> None:
    """Run the steps asked for, in order, on one synthetic checkpoint."""
    from internvl_edge.export.synthetic import PRESETS

    python, checkpoint = sys.executable, work / "checkpoint"
    worker = [python, __file__, "--worker"]
    commands = {
        "synthetic": [python, "-m", "internvl_edge.export.synthetic", preset, str(checkpoint),
                      "--layers", str(layers)],
        "forwards": [*worker, "forwards", str(checkpoint)],
    }  # fmt: skip
    for precision in PRECISIONS:
        commands[precision] = [*TOOL, *_export(work, precision)]
        if precision == "int8":
            commands["run"] = [*worker, "run", str(work / "int8")]
        build = [*TOOL, "build", str(work / precision), *ENGINES[PRESETS[preset].kind]]
        commands[f"engine-{precision}"] = build
    for step in (s for s in commands if s in steps):
        precision = step.removeprefix("engine-")
        said = None
        if precision in PRECISIONS:
            asked = [*commands[step], "--dry-run", "--json"]
            if step == precision:  # what is there already cannot be exported again
                asked[asked.index("-o") + 1] += "-dry"
            said = forecast(asked)
        keep(replace(measure(step, layers, commands[step]), forecast=said))
        if step.startswith("engine"):  # as large as the checkpoint, and of no more use
            shutil.rmtree(work / precision)


def _export(work: Path, precision: str) -> list[str]:
    checkpoint, out = str(work / "checkpoint"), str(work / precision)
    links = ["--weights", "link"] if precision == "bf16" else []
    return ["export", checkpoint, "-o", out, "-p", precision, *links, "--verify", "none"]


def forecast(command: list[str]) -> dict[str, float] | None:
    """Ask a command with ``--dry-run --json`` what it will take; None if it says nothing.

    A forecast of what cannot fit is one too: the command refuses after it.
    """
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in said.stdout.splitlines() if line.startswith("{")]
    steps = next((line["steps"] for line in lines if "steps" in line), None)
    if steps is None:
        sys.stderr.write(f"no forecast: {said.stdout}{said.stderr}")
        return None
    return {
        "seconds": round(sum(step["seconds"] for step in steps), 1),
        "peak_rss_nbytes": max(step["memory_nbytes"] for step in steps),
        "peak_anonymous_nbytes": max(
            step["memory_nbytes"] - step["mapped_nbytes"] for step in steps
        ),
        "disk_nbytes": sum(step["disk_nbytes"] for step in steps),
    }


def work_forwards(checkpoint: str) -> None:
    """Run the calibration's block forwards alone: load each block, run it, forget it."""
    import numpy as np
    import torch

    from internvl_edge.artifact.workspace import Workspace
    from internvl_edge.compiler.steps.calibration.samples import BATCH
    from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
    from internvl_edge.export.towers.streams import Samples, calibration_blocks
    from internvl_edge.files.spool import Budget

    opened = open_checkpoint(checkpoint)
    side = opened.config.vision.image_size
    noise = np.random.default_rng(0).standard_normal((peers.IMAGES, 3, side, side), np.float32)
    pixels = torch.from_numpy(noise)
    samples = Samples(pixel_values=[pixels[i : i + BATCH] for i in range(0, peers.IMAGES, BATCH)])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        work = Workspace(Path(folder), Budget(1 << 30))
        for block, streams in calibration_blocks(opened, samples, {"image"}, work):
            stream, outputs = streams["image"], work.scratch()
            for x in stream.hidden:
                outputs.append(block.run(torch.from_numpy(x), None).numpy())
            stream.hidden.close()
            stream.hidden = outputs
        work.close()


def work_run(out: str) -> None:
    """Run one image through the INT8 tower, on ONNX Runtime's CPU kernels."""
    import numpy as np

    from internvl_edge import open_session

    with open_session(out, "vision") as session:
        side = session.inputs["pixel_values"].shape[-1]
        pixels = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
        session.run({"pixel_values": pixels})


# --- peers ---------------------------------------------------------------------------------------


def run_peers(
    preset: str, work: Path, keep: Callable[[Measured], None], modelopt: str | None
) -> None:
    """Measure what others take on the same widths, ``PEER_LAYERS`` deep, and what we take."""
    run_steps(preset, PEER_LAYERS, ["synthetic", "bf16", "int8", "forwards"], work, keep)
    for name in PEERS:
        python = modelopt if name == "modelopt" else sys.executable
        if python is None:
            why = "needs an environment of its own, see --modelopt-python"
            keep(Measured(step=name, layers=PEER_LAYERS, seconds=0.0, peak_rss_nbytes=0,
                          peak_anonymous_nbytes=0, written_nbytes=0, error=why))  # fmt: skip
            continue
        keep(measure(name, PEER_LAYERS, [python, __file__, "--worker", name, str(work)]))


WORKERS = {
    "forwards": work_forwards,
    "run": work_run,
    "torch.onnx.export": peers.torch_export,
    "onnxruntime quantize_static": peers.ort_quantize_static,
    "modelopt": peers.modelopt_quantize,
}


# --- results -------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Describe the machine, and the versions of the packages measured."""
    from internvl_edge.files.packages import versions

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_nbytes": memory,
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def save(key: str, chosen: argparse.Namespace, row: Measured) -> None:
    """Put a step into the results file, in the place of an older one; others stay."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    part = results.setdefault(key, {"steps": {}})
    local = {str(chosen.modelopt_python): "PYTHON", str(chosen.directory): "DIRECTORY"}
    words = [local.get(word, word) for word in sys.argv[1:]]
    command = " ".join(["python", "benchmarks/fullsize.py", *words])
    part["steps"][row.step] = {**asdict(row), "command": command, "environment": environment()}
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=2) + "\n")


def table() -> str:
    """Write the results file as Markdown, a table per model."""
    lines: list[str] = []
    for title, part in json.loads(RESULTS.read_text()).items():
        lines += ["", f"**{title}**", "", "| step | time | RSS | anonymous | written | CPU |"]
        lines += ["|---|--:|--:|--:|--:|---|"]
        for step, row in part["steps"].items():
            fields = Measured.__dataclass_fields__
            measured = Measured(**{k: v for k, v in row.items() if k in fields})
            cpu = row["environment"]["cpu"].replace("(R)", "").removesuffix(" Processor")
            lines.append(f"| {LABELS.get(step, step)} | {_cells(measured)} | {cpu} |")
    return "\n".join(lines[1:])


def _cells(m: Measured) -> str:
    sizes = (m.peak_rss_nbytes, m.peak_anonymous_nbytes, m.written_nbytes)
    killed = "killed, out of memory" if m.error == KILLED else m.error
    return " | ".join([killed or f"{m.seconds:.0f} s", *(f"{size / 1e9:.2f} GB" for size in sizes)])


def main() -> None:
    """Run the command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="internvit-6b-224")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--directory", type=Path, help="where the temporary directory goes")
    parser.add_argument(
        "--modelopt-python", help='Python of an environment with "nvidia-modelopt[onnx]"'
    )
    parser.add_argument("--table", action="store_true", help="show the results file and end")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        WORKERS[chosen.worker[0]](chosen.worker[1])
        return
    if chosen.table:
        sys.stdout.write(table() + "\n")
        return
    steps = [step for step in chosen.steps.split(",") if step]
    if unknown := set(steps) - set(STEPS):
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, found {sorted(unknown)}")
    _require_disk(chosen.preset, chosen.layers, steps, chosen.directory)
    if not chosen.no_peers:
        _require_disk(chosen.preset, PEER_LAYERS, ["bf16", "int8", *PEERS], chosen.directory)
    name = f"{chosen.preset}, {chosen.layers} layers"
    parts: list[tuple[str, Callable[[Path, Callable[[Measured], None]], None]]] = []
    if steps:
        parts.append((name, lambda work, keep: run_steps(
            chosen.preset, chosen.layers, steps, work, keep)))  # fmt: skip
    if not chosen.no_peers:
        parts.append((f"peers at {PEER_LAYERS} layers", lambda work, keep: run_peers(
            chosen.preset, work, keep, chosen.modelopt_python)))  # fmt: skip
    for title, run in parts:
        with tempfile.TemporaryDirectory(dir=chosen.directory) as folder:
            run(Path(folder), partial(save, title, chosen))
    for title, _ in parts:
        sys.stdout.write(f"{title}: {RESULTS}\n")


def _require_disk(preset: str, layers: int, steps: list[str], directory: Path | None) -> None:
    """Refuse to begin what the disk cannot hold: the checkpoint, and exports until their engine."""
    import math

    from internvl_edge.export.checkpoint.parameters import expected_shapes
    from internvl_edge.export.synthetic import PRESETS, shrink

    if preset not in PRESETS:
        sys.exit(f"--preset: expected one of {', '.join(PRESETS)}, found {preset!r}")
    shapes = expected_shapes(shrink(PRESETS[preset], layers)).values()
    checkpoint = 2 * sum(math.prod(shape) for shape in shapes)
    # of the checkpoint, per export; embeddings keep 16 bits, and so does a tower at int4-wo
    part = {"bf16": 0.0, "fp16": 1.0, "int8": 0.5, "fp8": 0.5, "int4-wo": 0.5}
    kept = sum(part[p] for p in PRECISIONS if p in steps and f"engine-{p}" not in steps)
    engines = [part[p] + (1.0 if "16" in p else 0.5) for p in PRECISIONS if f"engine-{p}" in steps]
    peer = 4.0 if set(PEERS) & set(steps) else 0.0  # a float32 graph, and what is made of it
    factor = 1.0 + kept + max(engines, default=0.0) + peer
    free = shutil.disk_usage(directory or tempfile.gettempdir()).free
    if free < factor * checkpoint + 2e9:
        sys.exit(
            f"{factor * checkpoint / 1e9 + 2:.1f} GB of disk are needed, {free / 1e9:.1f} GB are "
            "free; choose another --directory, fewer --layers or fewer --steps"
        )


if __name__ == "__main__":
    main()
