"""Answers of a chat model on the CPU, ours and others', in one interleaved run.

    python benchmarks/answers.py --work DIR                  # every contender that is installed
    python benchmarks/answers.py --work DIR --only int4-wo "llama.cpp Q4_0" --rounds 3
    python benchmarks/answers.py --table                     # the tables of docs/performance.md

The shapes of InternVL3-1B (a tower of 300M at 448 px, a Qwen2 language model of 0.5 B), synthetic
weights: speed does not depend on them. Batch 1, one image tile, 256 image tokens and 64 of text;
also seven tiles' tokens, 1792 and 64.

    fp32, int8, int8-wo, int4-wo    compiled here, on ONNX Runtime; int8 rounds activations too;
                                    the vocabulary's product as it is stored, or in INT8
    llama.cpp Q8_0, Q4_0            llama-cpp-python, files of the same weights (``gguf_files``)
    OpenVINO int8, int4             NNCF's compression of our float32 graphs (``openvino_files``)
    PyTorch eager, compiled         the reference in float32, and in bfloat16

Each contender has a process of its own (``answer_peers``) with the same number of threads. In every
round each of them does everything once, one after the other, while the rest sleep, the prompt of
seven tiles in every second round; figures are medians over rounds, after one that warms up. A
contender that is not installed is named, not measured.

    first token     vision, and the prompt of one tile
    tokens/s        at the median of single tokens after that prompt
    memory          the most that the process had resident
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import answer_peers

from internvl_edge import compiler
from internvl_edge.benchmark.machine import environment
from internvl_edge.compiler.precision import recipe_of
from internvl_edge.export.synthetic import PRESETS, Synthesis, shrink, write_checkpoint
from internvl_edge.quantize.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "answers.json"
PRESET = "internvl3-1b"
TILE_TOKENS, TEXT_TOKENS = 256, 64
PROMPTS = {"1 tile": TILE_TOKENS + TEXT_TOKENS, "7 tiles": 7 * TILE_TOKENS + TEXT_TOKENS}
TOKENS = 12  # a round
SETTLE_S = 0.1  # between contenders
TOWER, DECODER = "chat_vision", "chat_decoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A contender: what it needs, how its files are made, and how it is opened."""

    packages: tuple[str, ...]
    make: Callable[[Path], None]  # its files in a folder that has ``checkpoint``
    open: Callable[[Path, int], Any]  # in its own process, by so many threads


# --- ours ----------------------------------------------------------------------------------------


def compiled(work: Path, precision: str, components: Sequence[str], head: Any = None) -> Path:
    """Compile the checkpoint, unless it is there; any scales are as fast as the best ones."""
    out = work / f"{precision}{'' if head is None else '-head'}-{'-'.join(components)}"
    if out.exists():
        return out
    options = compiler.ExportOptions(
        checkpoint=work / "checkpoint",
        out=out,
        precision=precision,
        components=tuple(components),
        verify="none",
        recipe=_quick(recipe_of(precision)),
        head=head,
    )
    compiler.export(options)
    return out


def _quick(recipe: Recipe | None) -> Recipe | None:
    if recipe is None:
        return None
    return replace(recipe, num_samples=1, smooth=None, language=_quick(recipe.language))


def ours(precision: str, head: str | None = None) -> Entry:
    tower = "fp32" if precision == "fp32" else "int8"

    def made(work: Path) -> tuple[Path, Path]:
        return compiled(work, tower, [TOWER]), compiled(work, precision, [DECODER], head)

    return Entry(
        packages=("onnxruntime",),
        make=lambda work: [*made(work)].clear(),
        open=lambda work, threads: answer_peers.Ours(*made(work), threads),
    )


# --- others --------------------------------------------------------------------------------------


def llama_cpp(kind: str) -> Entry:
    def make(work: Path) -> None:
        import gguf_files

        for path, write, its in (
            (work / "vision-Q8_0.gguf", gguf_files.write_vision, "Q8_0"),
            (work / f"language-{kind}.gguf", gguf_files.write_language, kind),
        ):
            if not path.exists():
                write(work / "checkpoint", path, its)

    def opened(work: Path, threads: int) -> Any:
        language, vision = work / f"language-{kind}.gguf", work / "vision-Q8_0.gguf"
        return answer_peers.LlamaCpp(language, vision, threads)

    return Entry(packages=("llama_cpp", "gguf"), make=make, open=opened)


def openvino(kind: str) -> Entry:
    def make(work: Path) -> None:
        import openvino_files

        decoder, tower = work / f"decoder-{kind}.xml", work / "vision-int8.xml"
        if not decoder.exists():
            graph = compiled(work, "fp32", [DECODER]) / f"{DECODER}.onnx"
            openvino_files.write_decoder(graph, decoder, kind)
        if not tower.exists():
            graph = compiled(work, "fp32", [TOWER]) / f"{TOWER}.onnx"
            openvino_files.write_vision(graph, tower, [answer_peers.pixels()])

    def opened(work: Path, threads: int) -> Any:
        files = work / "vision-int8.xml", work / f"decoder-{kind}.xml"
        return answer_peers.OpenVino(*files, compiled(work, "fp32", [DECODER]), threads)

    return Entry(packages=("openvino", "nncf"), make=make, open=opened)


def pytorch(dtype: str, *, compiles: bool) -> Entry:
    return Entry(
        packages=("torch",),
        make=lambda work: None,
        open=lambda work, threads: answer_peers.PyTorch(
            work / "checkpoint", threads, dtype, compiled=compiles
        ),
    )


CONTENDERS: Mapping[str, Entry] = {
    "int4-wo": ours("int4-wo"),
    "int4-wo, int8 head": ours("int4-wo", "int8"),
    "int8-wo": ours("int8-wo"),
    "int8-wo, int8 head": ours("int8-wo", "int8"),
    "int8": ours("int8"),
    "fp32": ours("fp32"),
    "llama.cpp Q4_0": llama_cpp("Q4_0"),
    "llama.cpp Q8_0": llama_cpp("Q8_0"),
    "OpenVINO int4": openvino("int4"),
    "OpenVINO int8": openvino("int8"),
    "PyTorch eager, float32": pytorch("float32", compiles=False),
    "PyTorch eager, bfloat16": pytorch("bfloat16", compiles=False),
    "PyTorch compiled, float32": pytorch("float32", compiles=True),
}


# --- the run -------------------------------------------------------------------------------------


class Process:
    """A contender in a process of its own, which sleeps until it is told what to do."""

    def __init__(self, name: str, work: Path, threads: int, log: Path) -> None:
        command = [sys.executable, __file__, "--serve", name, "--work", str(work)]
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.name, self._log = name, log
        self._read()

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            told = self._log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"{self.name}: {told[-1] if told else 'it ended'}")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def opened(names: Sequence[str], work: Path, threads: int) -> Iterator[list[Process]]:
    processes = []
    try:
        for name in names:
            say(f"opening {name}")
            processes.append(Process(name, work, threads, work / "contender.log"))
        yield processes
    finally:
        for process in processes:
            process.close()


def measured(names: Sequence[str], work: Path, args: Any) -> dict[str, dict[str, Any]]:
    """Let each contender do everything once a round, and one round more for warming up."""
    samples: dict[str, dict[str, list[Any]]] = {name: {} for name in names}
    begun = time.monotonic()
    with opened(names, work, args.threads) as processes:
        for number in range(args.rounds + 1):
            if number > 1 and time.monotonic() - begun > 60 * args.minutes:
                say(f"{args.minutes:g} minutes are over after {number - 1} round(s)")
                break
            start = number % len(processes)
            for process in (*processes[start:], *processes[:start]):
                time.sleep(SETTLE_S)
                if number == 0:  # long prompts warm nothing up that short ones do not
                    told = {"warm": process.ask("vision"), "up": process.ask("prompt 320")}
                    process.ask("tokens 3")
                else:
                    told = once(process, is_long=number % 2 == 1)
                    for what, seconds in told.items():
                        samples[process.name].setdefault(what, []).append(seconds)
                say(f"round {number}, {process.name}: {told}")
        memory = {process.name: process.ask("memory") for process in processes}
    return {name: figures(samples[name]) | {"peak_rss_bytes": memory[name]} for name in names}


def once(process: Process, *, is_long: bool) -> dict[str, Any]:
    """Let a contender do everything once; the tokens come after the prompt of one tile."""
    done = {"vision": process.ask("vision")}
    if is_long:
        done["7 tiles"] = process.ask(f"prompt {PROMPTS['7 tiles']}")
    done["1 tile"] = process.ask(f"prompt {PROMPTS['1 tile']}")
    seconds = process.ask(f"tokens {TOKENS}")
    return done | {"token": None if seconds is None else statistics.median(seconds)}


def figures(samples: Mapping[str, list[float | None]]) -> dict[str, Any]:
    """Compute medians over rounds, in milliseconds, with all samples."""
    result: dict[str, Any] = {}
    for what, seconds in samples.items():
        known = [1e3 * one for one in seconds if one is not None]
        if known:
            result[f"{what} ms"] = statistics.median(known)
            result[f"{what} samples_ms"] = known
    if "token ms" in result:
        result["tokens_per_second"] = 1e3 / result["token ms"]
    if "vision ms" in result and "1 tile ms" in result:
        result["first_token_ms"] = result["vision ms"] + result["1 tile ms"]
    return result


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(result: Mapping[str, Any]) -> str:
    """Write the results as Markdown."""
    lines = [
        "| | first token | tower | prompt, 320 | prompt, 1856 | tokens/s | memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in result["results"].items():
        stages = ("first_token_ms", "vision ms", "1 tile ms", "7 tiles ms")
        cells = [f"{row[key] / 1e3:.2f} s" if key in row else "–" for key in stages]
        cells.append(f"{row['tokens_per_second']:.1f}")
        cells.append(f"{row['peak_rss_bytes'] / 1e9:.2f} GB")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"\n{name} was skipped: {why}" for name, why in result["skipped"].items()]
    return "\n".join(lines)


def missing(entry: Entry) -> str | None:
    names = [name for name in entry.packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(names)} not installed" if names else None


def run(args: Any, work: Path) -> None:
    if not (work / "checkpoint").exists():
        config = shrink(PRESETS[PRESET], args.layers)
        write_checkpoint(Synthesis(config=config), work / "checkpoint")
    chosen = args.only or [*CONTENDERS]
    skipped = {name: why for name in chosen if (why := missing(CONTENDERS[name])) is not None}
    names = [name for name in chosen if name not in skipped]
    for name in names:
        say(f"making {name}")
        CONTENDERS[name].make(work)
    if args.make:
        return
    result = {
        "command": " ".join(["python", *sys.argv]),
        "preset": PRESET,
        "layers": args.layers,
        "rounds": args.rounds,  # at most; samples say how many
        "threads": args.threads,
        "results": measured(names, work, args),
        "skipped": skipped,
        "environment": environment(),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work", type=Path, help="keep checkpoint and files here")
    parser.add_argument("--only", nargs="+", choices=[*CONTENDERS], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no round after these")
    parser.add_argument("--layers", type=int, help="keep the widths, take fewer layers")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--make", action="store_true", help="only make the files in --work")
    parser.add_argument("--table", action="store_true", help="print the last run's table")
    parser.add_argument("--serve", choices=[*CONTENDERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.json.read_text(encoding="utf-8"))))
    elif args.serve:
        answer_peers.serve(CONTENDERS[args.serve].open(args.work, args.threads))
    elif args.work:
        args.work.mkdir(parents=True, exist_ok=True)
        run(args, args.work)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(args, Path(folder))


if __name__ == "__main__":
    main()
