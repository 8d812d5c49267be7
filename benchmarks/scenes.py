"""The cost of a precision in the demo's tasks, on enough held-out scenes to tell.

    python benchmarks/scenes.py                    # results/scenes.json
    python benchmarks/scenes.py --work DIR         # keep the directories, and use those there
    python benchmarks/scenes.py --backend openvino --json benchmarks/results/scenes-openvino.json

A scene more or less of 300 is a third of a point. Most scenes are answered alike at two precisions,
so that the difference is known far better than either share: both see the same scenes, and with d
the difference of each (−1, 0 or 1) the figure is mean d ± √(var d / n). Scenes are of seeds that
nothing else uses. Their strokes are of 359 held-out scans, distorted anew each time, which the
standard error does not know of.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import internvl_edge
from internvl_edge import compiler
from internvl_edge.benchmark.machine import environment
from internvl_edge.demo import evaluate, scenes

RESULTS = Path(__file__).parent / "results" / "scenes.json"
NUM_SCENES = 4000
AT_ONCE = 500  # scenes: images and caches of all would take memory
SEEDS = {"zero-shot": 101, "matching": 104, "captions": 103, "answers": 105}


def hits(out: Path, num_scenes: int, backend: str) -> dict[str, evaluate.Hits]:
    """Find which scenes a compiled directory gets right, by task."""
    with internvl_edge.load(out, backend) as model:
        tasks = {
            "zero-shot": lambda n, seed: evaluate.zero_shot_hits(model, n, "c", seed),
            "matching": lambda n, seed: evaluate.matching_hits(model, n, seed),
            "captions": lambda n, seed: evaluate.caption_hits(model, n, seed),
            "answers": lambda n, seed: evaluate.vqa_hits(model, n, seed),
        }
        return {
            name: np.concatenate(
                [task(AT_ONCE, 1000 * i + SEEDS[name]) for i in range(num_scenes // AT_ONCE)]
            )
            for name, task in tasks.items()
        }


def compared(usual: evaluate.Hits, own: evaluate.Hits) -> dict[str, Any]:
    """Compute shares in percent, and the difference in points with its standard error."""
    gained, lost = int((own & ~usual).sum()), int((usual & ~own).sum())
    difference = own.astype(float) - usual
    return {
        "fp32": round(100 * float(usual.mean()), 3),
        "right": round(100 * float(own.mean()), 3),
        "difference": round(100 * float(difference.mean()), 3),
        "standard_error": round(100 * float(difference.std(ddof=1)) / len(own) ** 0.5, 3),
        "gained": gained,
        "lost": lost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--precisions", nargs="+", default=["int8"])
    parser.add_argument("--scenes", type=int, default=NUM_SCENES)
    parser.add_argument("--backend", default="auto", help="of the precisions; not of fp32")
    parser.add_argument("--work", type=Path, help="keep the directories here")
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if chosen.scenes < AT_ONCE or chosen.scenes % AT_ONCE:
        parser.error(f"--scenes: expected a multiple of {AT_ONCE}, found {chosen.scenes}")
    scored: dict[str, dict[str, evaluate.Hits]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", *chosen.precisions):
            out = (chosen.work or Path(folder)) / precision
            if not out.exists():
                compiler.export(
                    compiler.ExportOptions(
                        out=out,
                        precision=precision,
                        samples=scenes.calibration_set,
                        verify="none",
                    )
                )
            backend = "auto" if precision == "fp32" else chosen.backend
            scored[precision] = hits(out, chosen.scenes, backend)
    quality = {
        precision: {task: compared(scored["fp32"][task], right) for task, right in tasks.items()}
        for precision, tasks in scored.items()
        if precision != "fp32"
    }
    print(json.dumps(quality, indent=1))
    report = {
        "scenes": chosen.scenes,
        "backend": chosen.backend,
        "quality": quality,
        "environment": environment(),
    }
    chosen.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
