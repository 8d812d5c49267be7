"""What quantization costs the demo's language tasks, on held-out scenes.

    python benchmarks/language.py                  # results/language.json
    python benchmarks/language.py --work DIR       # keep the directories, and use those there

Per precision: the perplexity of captions on their images, captions and answers that are right word
for word, and pairs of image and text told apart. Targets in float32: captions 85 %, answers 85 %,
matching 95 %; int8 within a point.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import internvl_edge
from internvl_edge import compiler
from internvl_edge.demo import evaluate
from internvl_edge.quantize.recipe import Recipe, recipe_for
from internvl_edge.runtime.environment import environment

RESULTS = Path(__file__).parent / "results" / "language.json"
PRECISIONS = ("fp32", "int8", "int8-wo", "int4-wo", "vision=int8,decoder=int4-wo")
# name → precision, and the recipe where it is not the precision's own
VARIANTS: dict[str, tuple[str, Recipe | None]] = {
    **{name: (name, None) for name in PRECISIONS},
    "int4-wo without AWQ's factors": ("int4-wo", replace(recipe_for("int4-wo"), smooth=None)),
}
COMPONENTS = ("vision", "image_queries", "decoder", "matcher")
NUM_SCENES = 300


def quality(out: Path) -> dict[str, float]:
    """Perplexity, and shares of right answers in 0..1."""
    with internvl_edge.load(out) as model, internvl_edge.open_session(out, "decoder") as decoder:
        return {
            "perplexity": evaluate.caption_perplexity(model, decoder, NUM_SCENES),
            "captions": evaluate.caption_exact_match(model, NUM_SCENES),
            "answers": evaluate.vqa_accuracy(model, NUM_SCENES),
            "matching": evaluate.matching_accuracy(model, NUM_SCENES),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work", type=Path, help="keep the directories here")
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    result: dict[str, Any] = {"scenes": NUM_SCENES, "quality": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, (precision, recipe) in VARIANTS.items():
            out = (chosen.work or Path(folder)) / name
            if not out.exists():
                compiler.export(
                    compiler.ExportOptions(
                        out=out,
                        precision=precision,
                        recipe=recipe,
                        components=COMPONENTS,
                        verify="none",
                    )
                )
            result["quality"][name] = quality(out)
            print(name, result["quality"][name], flush=True)
    result["environment"] = environment()
    chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
