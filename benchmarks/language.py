"""The cost of quantization in the demo's language tasks, on held-out scenes.

    python benchmarks/language.py                  # results/language.json
    python benchmarks/language.py --work DIR       # keep the directories, and use those there

Per precision: the perplexity of captions on their images, how far what it expects of each of their
tokens is from float32 (the mean of Σ p log p/q, in nats, and its standard error over tokens),
captions and answers that are right word for word, and pairs of image and text told apart. Targets
in float32: captions 85 %, answers 85 %, matching 95 %; int8 within a point.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import internvl_edge
from internvl_edge import compiler
from internvl_edge.benchmark.machine import environment
from internvl_edge.compiler.precision import recipe_of
from internvl_edge.demo import evaluate, scenes
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

RESULTS = Path(__file__).parent / "results" / "language.json"
PRECISIONS = ("fp32", "int8", "int8-wo", "int4-wo", "vision=int8,decoder=int4-wo")


def changed(precision: str, **choices: Any) -> Recipe:
    """Make the recipe of a precision with other choices; what it leaves alone stays so."""
    recipe = recipe_of(precision)
    assert recipe is not None
    return replace(recipe, **choices)


# name → precision, and the recipe where it is not the precision's own
VARIANTS: dict[str, tuple[str, Recipe | None]] = {
    **{name: (name, None) for name in PRECISIONS},
    "int4-wo without AWQ's factors": ("int4-wo", changed("int4-wo", smooth=None)),
    "int8-wo, int8 head": ("int8-wo", changed("int8-wo", head="int8")),
    "int4-wo, int8 head": ("int4-wo", changed("int4-wo", head="int8")),
    "int8, gptq": ("int8", changed("int8", rounding="gptq")),
    "int8-wo, gptq": ("int8-wo", changed("int8-wo", rounding="gptq")),
    "int4-wo, gptq": ("int4-wo", changed("int4-wo", rounding="gptq")),
    "int4-wo, gptq, without AWQ's factors": (
        "int4-wo",
        changed("int4-wo", smooth=None, rounding="gptq"),
    ),
}
COMPONENTS = ("vision", "image_queries", "decoder", "matcher")
NUM_SCENES, SEED = 300, 3


def quality(out: Path, usual: Array | None) -> tuple[dict[str, float], Array]:
    """Compute perplexity, divergence from ``usual``, shares of right answers in 0..1; log p."""
    with internvl_edge.load(out) as model, internvl_edge.open_session(out, "decoder") as decoder:
        logs, ids = evaluate.caption_logs(model, decoder, NUM_SCENES, SEED)
        lost = np.zeros(len(ids)) if usual is None else (np.exp(usual) * (usual - logs)).sum(axis=1)
        return {
            "perplexity": float(np.exp(-logs[np.arange(len(ids)), ids].mean())),
            "divergence": float(lost.mean()),
            "divergence_error": float(lost.std() / len(lost) ** 0.5),
            "captions": evaluate.caption_exact_match(model, NUM_SCENES),
            "answers": evaluate.vqa_accuracy(model, NUM_SCENES),
            "matching": evaluate.matching_accuracy(model, NUM_SCENES),
        }, logs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work", type=Path, help="keep the directories here")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    command = shlex.join(["python", *sys.argv])
    result: dict[str, Any] = {"command": command, "scenes": NUM_SCENES, "quality": {}}
    usual: Array | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name in dict.fromkeys(("fp32", *chosen.variants)):  # what the others are held against
            precision, recipe = VARIANTS[name]
            out = (chosen.work or Path(folder)) / name
            if not out.exists():
                compiler.export(
                    compiler.ExportOptions(
                        out=out,
                        precision=precision,
                        recipe=recipe,
                        components=COMPONENTS,
                        samples=scenes.calibration_set,
                        verify="none",
                    )
                )
            result["quality"][name], logs = quality(out, usual)
            usual = logs if usual is None else usual  # of fp32, the first
            print(name, result["quality"][name], flush=True)
    result["environment"] = environment()
    chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
