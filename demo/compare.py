"""One precision of a bundled model, compiled and measured in a process of its own.

An export keeps one core busy, so the demo compiles as many precisions at a time as there are cores
(two at most: each process holds PyTorch). ``main`` is what such a process runs: it writes
``OUT/PRECISION``, says on stderr how far it is, and prints its accuracy as one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import internvl_edge
from internvl_edge import compiler
from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.artifact.components import CHAT_VISION, IMAGE_EMBED
from internvl_edge.demo import MODELS, bundled, evaluate, scenes
from internvl_edge.errors import InternVLError
from internvl_edge.files.cores import usable_cores
from internvl_edge.files.helper import helper_call

__all__ = ["compare", "export", "main"]

NUM_SCENES = 300  # held-out single digits to classify
NUM_CAPTIONS = 100  # distinct captions to retrieve among
NUM_TEXTS = 300  # captions, and as many answers, that must be right word for word
NUM_PAIRS = 300  # of image and text to match, half of them near misses
NUM_DIALOGUES = 100  # conversations of three turns, about one image and two
MAX_PROCESSES = 2

Say = Callable[[str], None]


def compare(
    out: Path,
    precisions: Sequence[str],
    compiled: str | None = None,
    *,
    force: bool,
    model: str = "demo",
) -> dict[str, dict[str, float]]:
    """Compile and measure every precision, several at a time.

    Args:
        out: the folder of the demo.
        precisions: of the model.
        compiled: the one that lies there already. TensorRT-RTX engines are built for it, where the
            package is installed.
        force: replace the others.
        model: a bundled one, by its name.

    Returns:
        The accuracy of each, by its name.

    Raises:
        InternVLError: one failed; the others are stopped.
    """
    processes = min(MAX_PROCESSES, usable_cores())
    threads = str(max(1, usable_cores() // processes))
    running: list[subprocess.Popen[str]] = []
    starting = threading.Lock()  # none is started once they are being ended
    failed = False

    def end() -> None:
        nonlocal failed
        with starting:
            failed = True
            for child in running:
                child.terminate()  # nothing happens to those that have ended

    def measured(precision: str) -> dict[str, float]:
        how = ["--compiled"] if precision == compiled else ["--force"] * force
        command, environment = helper_call(__name__, [model, str(out), precision, *how])
        environment["OMP_NUM_THREADS"] = threads
        with starting:
            if failed:
                raise InternVLError(f"{precision}: not compiled, since another precision failed")
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            running.append(child)
        answer, _ = child.communicate()
        if child.returncode:
            end()
            raise InternVLError(f"{precision}: the process that compiled it failed, see above")
        figures: dict[str, float] = json.loads(answer)
        return figures

    with ThreadPoolExecutor(processes) as pool:
        try:
            tasks = {precision: pool.submit(measured, precision) for precision in precisions}
            for task in as_completed(tasks.values()):
                task.result()  # the first that failed is the one that is told
            return {precision: task.result() for precision, task in tasks.items()}
        except BaseException:
            end()
            raise


def export(
    out: Path, precision: str, say: Say, *, force: bool = False, model: str = "demo"
) -> Artifact:
    """Compile a bundled model at one precision into ``out/precision``."""
    started = time.perf_counter()
    options = compiler.ExportOptions(
        checkpoint=bundled(model),
        out=out / precision,
        precision=precision,
        samples=scenes.samples_of(bundled(model)),
        force=force,
    )
    artifact = compiler.export(options, _by_step(precision, say))
    say(
        f"{artifact.path}: {len(artifact.manifest.components)} components in "
        f"{time.perf_counter() - started:.0f} s"
    )
    return artifact


def build_engines(artifact: Artifact, say: Say) -> None:
    """Build TensorRT-RTX engines into a directory, where the package is installed."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        say('no engines: tensorrt-rtx is missing; pip install "internvl-edge[rtx]"')
        return
    started = time.perf_counter()
    report = _by_step(artifact.path.name, say)
    engines = compiler.build(artifact.path, ["tensorrt-rtx"], report=report)
    say(
        f"{artifact.path}: {len(engines)} TensorRT-RTX engines in "
        f"{time.perf_counter() - started:.0f} s"
    )


def quality(artifact: Artifact) -> dict[str, float]:
    """Measure accuracy on held-out scans; add the image tower's agreement with PyTorch."""
    components = artifact.manifest.components
    seen = components[CHAT_VISION if CHAT_VISION in components else IMAGE_EMBED].verification or {}
    agreement = {"cosine": float(seen["cosine"])}
    any_speed = internvl_edge.OrtOptions(allow_slow=True)  # also INT8 on a GPU, for comparison
    with internvl_edge.load(artifact.path, options=any_speed) as model:
        if CHAT_VISION in components:
            return {"dialogues": evaluate.dialogue_accuracy(model, NUM_DIALOGUES)} | agreement
        return {
            "zero_shot": evaluate.zero_shot_accuracy(model, NUM_SCENES),
            "recall_at_1_c": evaluate.retrieval_recall_at_1(model, NUM_CAPTIONS, mode="c"),
            "recall_at_1_g": evaluate.retrieval_recall_at_1(model, NUM_CAPTIONS, mode="g"),
            "matching": evaluate.matching_accuracy(model, NUM_PAIRS),
            "captions": evaluate.caption_exact_match(model, NUM_TEXTS),
            "answers": evaluate.vqa_accuracy(model, NUM_TEXTS),
        } | agreement


def _by_step(name: str, say: Say) -> Callable[[compiler.Progress], None]:
    """Say each step of an export or a build once."""
    told: set[str] = set()

    def report(now: compiler.Progress) -> None:
        if now.step not in told:
            told.add(now.step)
            say(f"{name}: {now.step}")

    return report


def main() -> None:
    """Compile one precision, or build its engines; measure it, and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("out", type=Path)
    parser.add_argument("precision")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument("--compiled", action="store_true", help="it is there; build its engines")
    given = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        if given.compiled:
            artifact = open_artifact(given.out / given.precision)
            build_engines(artifact, say)
        else:
            artifact = export(given.out, given.precision, say, force=given.force, model=given.model)
        print(json.dumps(quality(artifact)))
    except InternVLError as error:
        say(f"error: {given.precision}: {error}")
        sys.exit(error.exit_code)
