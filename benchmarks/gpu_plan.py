"""Find out what is fastest on a GPU, in ten minutes, and print what follows from it.

    python benchmarks/gpu_plan.py                      # goes on where results/gpu-plan.json ended
    python benchmarks/gpu_plan.py --minutes 4 --only products,attention
    python benchmarks/gpu_plan.py --layers 12 --work DIR   # what was compiled there is taken again

Ceilings come first (what the products, the attention and the copies of an InternViT-6B block take
alone), then the tower on ONNX Runtime, as published and as rewritten for CUDA, with CUDA graphs and
without, compared with ``torch.compile`` in the same run, then a decoder's token. Inputs and outputs
stay on the GPU, so that no row measures copies. Weights are synthetic.

The checkpoints are written and compiled by this machine's CPU while the ceilings are measured.
Every experiment is a process of its own (``gpu_experiments``); the JSON is replaced after each, and
what is in it is not measured again. What has not begun when the minutes are over is left for the
next call.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_experiments import EXPERIMENTS

from internvl_edge.benchmark.machine import environment
from internvl_edge.runtime.gpu.probe import gpu_count

RESULTS = Path(__file__).parent / "results" / "gpu-plan.json"
WORKER = Path(__file__).parent / "gpu_experiments.py"
BATCHES = (1, 8, 32)
ROWS_OF_BATCH = {1: 257, 8: 2056, 32: 8224}  # 257 tokens an image
CAPACITY = 1024  # positions of the decoder's cache
TOWER, DECODER = "tower", "decoder"
NEEDS = {"torch": (TOWER,), TOWER: (TOWER,), DECODER: (DECODER,)}
# What a decision is made by, from the model of ../docs/howto/gpu.md
WORTH_8_BITS = 0.7  # of the time of bf16 products
CLOSE = 1.05  # times torch.compile
WORTH_CAPTURE = 1.25  # times as fast

Rows = dict[str, list[dict[str, Any]]]  # by experiment


def compile_tower(work: Path, layers: int) -> dict[str, str]:
    """Write and compile an image tower of 6B widths; return its places for a job."""
    from internvl_edge import compiler
    from internvl_edge.compiler import ExportOptions

    checkpoint, out = work / f"tower-{layers}-checkpoint", work / f"tower-{layers}"
    if not out.exists():
        _write(checkpoint, "internvit-6b-224", layers)
        options = {"precision": "bf16", "components": ("vision",), "verify": "none"}
        compiler.export(ExportOptions(**options, checkpoint=checkpoint, out=out))
    return {TOWER: str(out)}


def compile_decoder(work: Path, layers: int) -> dict[str, str]:
    """Write and compile a decoder of QLLaMA-8B widths at int4-wo; return its places for a job."""
    from dataclasses import replace

    from internvl_edge import compiler
    from internvl_edge.compiler import ExportOptions
    from internvl_edge.compiler.precision import recipe_of

    checkpoint, out = work / f"decoder-{layers}-checkpoint", work / f"decoder-{layers}"
    recipe = recipe_of("int4-wo")
    assert recipe is not None
    if not out.exists():
        _write(checkpoint, "qllama-8b", layers)
        compiler.export(
            ExportOptions(
                checkpoint=checkpoint,
                out=out,
                precision="int4-wo",
                components=("decoder",),
                cache_capacity=CAPACITY,
                verify="none",
                recipe=replace(recipe, num_samples=1, smooth=None),  # any scales are as fast
            )
        )
    return {DECODER: str(out)}


COMPILERS: dict[str, Callable[[Path, int], dict[str, str]]] = {
    TOWER: compile_tower,
    DECODER: compile_decoder,
}


def _write(path: Path, preset: str, layers: int) -> None:
    from internvl_edge.export.synthetic import PRESETS, Synthesis, shrink, write_checkpoint

    if not path.exists():
        write_checkpoint(Synthesis(config=shrink(PRESETS[preset], layers)), path)


def perform(name: str, job: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    """Run an experiment in a process of its own; a failure is its only row."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "rows.json"
        command = [sys.executable, str(WORKER), name, json.dumps(job), str(answer)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            return [{"failed": f"took longer than {timeout_s:.0f} s"}]
        if done.returncode or not answer.exists():
            told = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
            return [{"failed": told[-1]}]
        rows: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
        return rows


def is_done(rows: Sequence[dict[str, Any]]) -> bool:
    """Tell whether an experiment ran; a format that this GPU lacks is one of its findings."""
    return any("failed" not in row for row in rows)


def carry_out(
    names: Sequence[str], rows: Rows, args: argparse.Namespace, work: Path
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Perform what is not done yet, in this order, until the minutes are over."""
    ends = time.monotonic() + 60 * args.minutes
    wanted = [name for name in names if not is_done(rows.get(name, []))]
    needed = dict.fromkeys(place for name in wanted for place in NEEDS.get(name, ()))
    with ThreadPoolExecutor(max(1, len(needed))) as pool:
        compiled: dict[str, Future[dict[str, str]]] = {
            place: pool.submit(_compiled, place, work, args.layers) for place in needed
        }
        for name in wanted:
            left_s = ends - time.monotonic()
            if left_s <= 0:
                sys.stderr.write(f"{name}: no time is left; call again\n")
                continue
            job = {"layers": args.layers, "batches": list(args.batches)}
            try:
                for place in NEEDS.get(name, ()):
                    job |= compiled[place].result()
            except subprocess.CalledProcessError as error:
                told = str(error.stderr).strip().splitlines() or [str(error)]
                yield name, [{"failed": told[-1]}]
                continue
            yield name, perform(name, job, left_s)


def _compiled(place: str, work: Path, layers: int) -> dict[str, str]:
    """Compile in a process of its own, so that two do so at a time."""
    command = [sys.executable, __file__, "--compile", place, "--work", str(work)]
    done = subprocess.run(
        [*command, "--layers", str(layers)], check=True, capture_output=True, text=True
    )
    places: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return places


# --- decisions -------------------------------------------------------------------------------


def decisions(rows: Rows) -> list[str]:
    """Say what follows from the rows; nothing where they are missing."""
    return [*_of_products(rows), *_of_attention(rows), *_of_tower(rows), *_of_decoder(rows)]


def _of_products(rows: Rows) -> Iterator[str]:
    sums = {
        (r["format"], r["rows"]): r["sum_us"] for r in rows.get("products", []) if "sum_us" in r
    }
    for batch, count in ROWS_OF_BATCH.items():
        wide = sums.get(("bf16", count))
        for kind, words in (("fp8", "FP8"), ("int8", "INT8")):
            narrow = sums.get((kind, count))
            if wide is None or narrow is None:
                continue
            share = narrow / wide
            worth = "an engine is worth it" if share <= WORTH_8_BITS else "not worth it"
            yield f"batch {batch}: {words} products take {share:.2f} of bf16's: {worth}"
        with_bias = sums.get(("bf16 + bias", count))
        if wide is not None and with_bias is not None:
            yield f"batch {batch}: bf16 products with a bias take {with_bias / wide:.2f} of bf16's"
        turned = sums.get(("bf16 [K,N]", count))
        if wide is not None and turned is not None:
            yield f"batch {batch}: bf16 weights as [K,N] take {turned / wide:.2f} of those as [N,K]"


def _of_attention(rows: Rows) -> Iterator[str]:
    for row in rows.get("attention", []):
        if "flash_us" in row and "cudnn_us" in row:
            gain = row["flash_us"] - row["cudnn_us"]
            yield f"batch {row['batch']}: cuDNN's attention saves {gain:.1f} µs a block"


def _of_tower(rows: Rows) -> Iterator[str]:
    torch = {r["batch"]: r["block_us"] for r in rows.get("torch", []) if "block_us" in r}
    for row in rows.get(TOWER, []):
        if "block_us" not in row or row["batch"] not in torch:
            continue
        times = row["block_us"] / torch[row["batch"]]
        verdict = "faster" if times <= 1 else "close" if times <= CLOSE else "slower"
        how = f"{row['runs']}, {'CUDA graphs' if row['graphs'] else 'no CUDA graphs'}"
        yield f"batch {row['batch']}: {how}: {times:.2f} times torch.compile: {verdict}"


def _of_decoder(rows: Rows) -> Iterator[str]:
    tokens = {
        (r["runs"], r["graphs"]): r["token_us"] for r in rows.get(DECODER, []) if "token_us" in r
    }
    for runs in dict.fromkeys(runs for runs, _ in tokens):
        if (runs, False) in tokens and (runs, True) in tokens:
            gain = tokens[runs, False] / tokens[runs, True]
            verdict = "capture it" if gain >= WORTH_CAPTURE else "little is gained"
            yield f"decoder, {runs}: {gain:.2f} times as fast as a CUDA graph: {verdict}"


# --- the file of results ---------------------------------------------------------------------


def load(path: Path, layers: int, batches: Sequence[int]) -> Rows:
    """Read the rows of earlier calls; none where they are of another depth or other batches."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    is_same = document["layers"] == layers and document["batches"] == list(batches)
    rows: Rows = document["rows"] if is_same else {}
    return rows


def save(path: Path, rows: Rows, args: argparse.Namespace) -> None:
    """Replace the JSON; there is a whole one at any moment."""
    document = {
        "command": " ".join(["python", "benchmarks/gpu_plan.py", *sys.argv[1:]]),
        "layers": args.layers,
        "batches": list(args.batches),
        "environment": environment(),
        "decisions": decisions(rows),
        "rows": rows,
    }
    staged = path.with_suffix(".partial")
    staged.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--only", type=names, default=list(EXPERIMENTS), help="experiments")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batches", type=lambda t: [int(n) for n in t.split(",")], default=BATCHES)
    parser.add_argument("--work", type=Path, help="keep checkpoints and directories here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--compile", choices=list(COMPILERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        print(json.dumps(COMPILERS[args.compile](args.work, args.layers)))
        return
    unknown = sorted(set(args.only) - set(EXPERIMENTS))
    if unknown:
        parser.error(f"--only: expected some of {', '.join(EXPERIMENTS)}, found {unknown[0]!r}")
    if not gpu_count():
        sys.stderr.write("skipped: the plan needs a CUDA device, found none\n")
        return
    rows = load(args.out, args.layers, args.batches)
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        for name, measured in carry_out(args.only, rows, args, work):
            rows[name] = measured
            save(args.out, rows, args)
            sys.stderr.write("".join(f"{name}: {_line(row)}\n" for row in measured))
    sys.stderr.write("".join(f"{decision}\n" for decision in decisions(rows)))
    left = [name for name in args.only if not is_done(rows.get(name, []))]
    sys.stderr.write(f"not measured: {', '.join(left)}; call again\n" if left else "")


def _line(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
    )


if __name__ == "__main__":
    main()
