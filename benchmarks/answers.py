"""Answers of a chat model on the CPU, ours and others', in interleaved rounds.

    python benchmarks/answers.py --work DIR                  # every contender that is installed
    python benchmarks/answers.py --work DIR --preset internvl2_5-2b
    python benchmarks/answers.py --work DIR --only int4-wo "llama.cpp Q4_0" --rounds 3
    python benchmarks/answers.py --table                     # the tables of docs/performance.md

The shapes of InternVL3-1B (a tower of 300M at 448 px, a Qwen2 language model of 0.5 B) or of
InternVL2.5-2B (the same tower, an InternLM2 of 1.8 B), synthetic weights: speed does not depend on
them. Batch 1, one image tile, 256 image tokens and 64 of text; also seven tiles' tokens, 1792 and
64.

    int8, int8-wo, int4-wo          compiled here, on ONNX Runtime; int8 rounds activations too;
                                    the vocabulary's product as it is stored, or in INT8; "tower by
                                    OpenVINO" is --backend openvino
    llama.cpp Q8_0, Q4_0            llama-cpp-python, files of the same weights (``gguf_files``)
    OpenVINO int8, int4             NNCF's compression of our float32 graphs (``openvino_files``)
    PyTorch eager, compiled         the reference in bfloat16; compiled by Inductor, whole, for each
                                    length of prompt, with a cache of a fixed size written in place

In every round each contender does everything once, in a process of its own (``answer_peers``) with
the same number of threads, alone: it opens its files, warms up, and is measured; the prompt of
seven tiles in every second round. Figures are medians over rounds. Every one is written down as it
is done, and the next run goes on there: ``--minutes`` bounds a piece of it, ``--again`` forgets
what was measured before. A contender that is not installed, or fails, is named.

    first token     vision, and the prompt of one tile
    tokens/s        at the median of single tokens after that prompt
    memory          the most that the process had resident
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
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
from answer_peers import PROMPTS

from internvl_edge import compiler
from internvl_edge.benchmark.machine import environment
from internvl_edge.compiler.precision import recipe_of
from internvl_edge.export.synthetic import PRESETS, Synthesis, shrink, write_checkpoint
from internvl_edge.files.disk import write_atomically
from internvl_edge.files.packages import versions
from internvl_edge.quantize.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "answers.json"
MODELS = {"internvl3-1b": "InternVL3-1B", "internvl2_5-2b": "InternVL2.5-2B"}
SHORT, LONG = PROMPTS
TOKENS = 12  # a round
ABSENT = "not installed"
PEERS = ("llama-cpp-python", "openvino", "nncf", "torch")
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


def ours(precision: str, head: str | None = None, tower: str = "onnxruntime") -> Entry:
    def made(work: Path) -> tuple[Path, Path]:
        return compiled(work, "int8", [TOWER]), compiled(work, precision, [DECODER], head)

    return Entry(
        packages=("onnxruntime", tower),
        make=lambda work: [*made(work)].clear(),
        open=lambda work, threads: answer_peers.Ours(*made(work), threads, tower),
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


@contextmanager
def removed(folder: Path) -> Iterator[Path]:
    """Give a folder that is removed in the end."""
    yield folder
    shutil.rmtree(folder)


def openvino(kind: str) -> Entry:
    def make(work: Path) -> None:  # of both kinds, since they come from the same large graph
        import openvino_files

        if not (work / "decoder-int4.xml").exists():
            with removed(compiled(work, "fp32", [DECODER])) as graphs:
                for its in ("int8", "int4"):
                    out = work / f"decoder-{its}.xml"
                    openvino_files.write_decoder(graphs / f"{DECODER}.onnx", out, its)
        if not (work / "vision-int8.xml").exists():
            with removed(compiled(work, "fp32", [TOWER])) as graphs:
                graph, image = graphs / f"{TOWER}.onnx", answer_peers.pixels()
                openvino_files.write_vision(graph, work / "vision-int8.xml", [image])

    def opened(work: Path, threads: int) -> Any:
        files = work / "vision-int8.xml", work / f"decoder-{kind}.xml"
        return answer_peers.OpenVino(*files, work / "checkpoint", threads)

    return Entry(packages=("openvino", "nncf"), make=make, open=opened)


def pytorch(*, compiles: bool) -> Entry:
    return Entry(
        packages=("torch",),
        make=lambda work: None,
        open=lambda work, threads: answer_peers.PyTorch(
            work / "checkpoint", threads, compiled=compiles
        ),
    )


CONTENDERS: Mapping[str, Entry] = {
    "int4-wo, int8 head": ours("int4-wo", "int8"),
    "int4-wo, int8 head, tower by OpenVINO": ours("int4-wo", "int8", "openvino"),
    "int4-wo": ours("int4-wo"),
    "int8-wo, int8 head": ours("int8-wo", "int8"),
    "int8-wo": ours("int8-wo"),
    "int8": ours("int8"),
    "int8, tower by OpenVINO": ours("int8", tower="openvino"),
    "int8, int8 head, tower by OpenVINO": ours("int8", "int8", "openvino"),
    "llama.cpp Q4_0": llama_cpp("Q4_0"),
    "llama.cpp Q8_0": llama_cpp("Q8_0"),
    "OpenVINO int4": openvino("int4"),
    "OpenVINO int8": openvino("int8"),
    "PyTorch eager, bfloat16": pytorch(compiles=False),
    "PyTorch compiled, bfloat16": pytorch(compiles=True),
}


# --- the run -------------------------------------------------------------------------------------


class Process:
    """A contender in a process of its own, which sleeps until it is told what to do."""

    def __init__(self, name: str, work: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--serve", name, "--work", str(work)]
        log = work / "contender.log"
        # what Inductor compiled is kept with the other files
        kept = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=os.environ | kept | {"OMP_NUM_THREADS": str(threads)},
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


def measure(name: str, work: Path, threads: int, *, is_long: bool) -> dict[str, Any]:
    """Let a contender do everything once; the tokens come after the prompt of one tile."""
    begun = time.monotonic()
    process = Process(name, work, threads)
    done: dict[str, Any] = {"opening": time.monotonic() - begun}
    try:
        for warming in ("vision", f"prompt {SHORT}", "tokens 3"):
            process.ask(warming)
        done["vision"] = process.ask("vision")
        if is_long:  # short prompts have warmed up what it needs
            done["7 tiles"] = process.ask(f"prompt {LONG}")
        done["1 tile"] = process.ask(f"prompt {SHORT}")
        seconds = process.ask(f"tokens {TOKENS}")
        done["token"] = None if seconds is None else statistics.median(seconds)
        return done | {"peak_rss_bytes": process.ask("memory")}
    finally:
        process.close()


def add(row: dict[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """Add a round to a contender's samples, in milliseconds, and compute its figures anew."""
    samples = {what: [*its] for what, its in row.get("samples_ms", {}).items()}
    for what, seconds in done.items():
        if what != "peak_rss_bytes" and seconds is not None:
            samples.setdefault(what, []).append(1e3 * seconds)
    result: dict[str, Any] = {f"{what} ms": statistics.median(its) for what, its in samples.items()}
    if "token" in samples:
        result["tokens_per_second"] = 1e3 / result["token ms"]
    if "vision" in samples and "1 tile" in samples:
        result["first_token_ms"] = result["vision ms"] + result["1 tile ms"]
    most = max(done["peak_rss_bytes"], row.get("peak_rss_bytes", 0))
    return result | {"peak_rss_bytes": most, "samples_ms": samples}


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def table(result: Mapping[str, Any]) -> str:
    """Write the results of a preset as Markdown."""
    lines = [
        "| | first token | tower | prompt, 320 | prompt, 1856 | tokens/s | memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    rows = result["results"]
    for name in (name for name in CONTENDERS if name in rows):
        row = rows[name]
        stages = ("first_token_ms", "vision ms", "1 tile ms", "7 tiles ms")
        cells = [f"{row[key] / 1e3:.2f} s" if key in row else "–" for key in stages]
        cells.append(f"{row['tokens_per_second']:.1f}")
        cells.append(f"{row['peak_rss_bytes'] / 1e9:.2f} GB")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"\n{name} was skipped: {why}" for name, why in result["skipped"].items()]
    return "\n".join(lines)


def missing(entry: Entry) -> str | None:
    names = [name for name in entry.packages if importlib.util.find_spec(name) is None]
    return f"{', '.join(names)} {ABSENT}" if names else None


def run(args: Any, work: Path) -> None:
    """Make what is missing, and measure what the results file does not have yet."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "checkpoint").exists():
        config = shrink(PRESETS[args.preset], args.layers)
        write_checkpoint(Synthesis(config=config), work / "checkpoint")
    chosen = args.only or [*CONTENDERS]
    skipped = {name: why for name in chosen if (why := missing(CONTENDERS[name])) is not None}
    names = [name for name in chosen if name not in skipped]
    for name in names:
        say(f"making {name}")
        CONTENDERS[name].make(work)
    if args.make:
        return
    everything = stored(args.json)
    known = {} if args.again else everything.get(args.preset, {})
    measured = {
        "layers": args.layers,
        "threads": args.threads,
        "environment": environment() | {"peers": versions(PEERS)},
    }
    if known and conditions(known) != conditions(measured):
        raise SystemExit(
            f"{args.json}: {args.preset} was measured on another machine, with other versions or "
            "other options; --again forgets it, --json FILE writes to another file"
        )
    failed = {n: why for n, why in known.get("skipped", {}).items() if not why.endswith(ABSENT)}
    rows, skipped = known.get("results", {}), failed | skipped
    begun = time.monotonic()
    for number in range(args.rounds):
        start = number % len(names) if names else 0
        for name in (*names[start:], *names[:start]):
            row = rows.get(name, {})
            is_over = time.monotonic() - begun > 60 * args.minutes
            if (
                name in skipped
                or is_over
                or len(row.get("samples_ms", {}).get("token", ())) > number
            ):
                continue
            try:
                done = measure(name, work, args.threads, is_long=number % 2 == 0)
            except RuntimeError as error:
                skipped[name] = str(error)
            else:
                rows[name] = add(row, done)
            say(f"round {number + 1}, {name}: {skipped.get(name) or done}")
            everything[args.preset] = {
                "command": shlex.join(["python", *sys.argv]).replace(str(args.work), "DIR"),
                "results": rows,
                "skipped": skipped,
                **measured,
            }
            write_atomically(args.json, (json.dumps(everything, indent=1) + "\n").encode())
    print(table({"results": rows, "skipped": skipped}))


def conditions(measured: Mapping[str, Any]) -> tuple[Any, ...]:
    """Choose what rounds of one table have in common."""
    environment = measured["environment"]
    machine = [environment.get(name) for name in ("cpu", "cores_usable", "packages", "peers")]
    return (measured["layers"], measured["threads"], *machine)


def stored(path: Path) -> dict[str, Any]:
    """Read the results of all presets."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--preset", choices=[*MODELS], default=next(iter(MODELS)))
    parser.add_argument("--work", type=Path, help="keep checkpoints and files here")
    parser.add_argument("--only", nargs="+", choices=[*CONTENDERS], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3, help="of each contender, in all")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing after these")
    parser.add_argument("--again", action="store_true", help="forget what the preset measured")
    parser.add_argument("--layers", type=int, help="keep the widths, take fewer layers")
    parser.add_argument("--threads", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--make", action="store_true", help="only make the files in --work")
    parser.add_argument("--table", action="store_true", help="print the tables of the results file")
    parser.add_argument("--serve", choices=[*CONTENDERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        for preset, result in stored(args.json).items():
            print(f"**{MODELS[preset]}**\n\n{table(result)}\n")
    elif args.serve:
        answer_peers.serve(CONTENDERS[args.serve].open(args.work, args.threads))
    elif args.work:
        run(args, args.work / args.preset)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(args, Path(folder))


if __name__ == "__main__":
    main()
