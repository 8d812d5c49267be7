"""``--precision auto``: quantize to INT8, and leave in 16 bits what the budget asks for.

The model is quantized once with the default recipe. Its towers are then run block by block, one in
memory at a time, with some layers fake-quantized (``simulate``): first each by itself, which ranks
them, then all but the first k, for several k in one pass, the errors going on from block to block.
``quantize.sensitivity`` says which k come next. The recipe that is found is exported as any other.

Metrics, each the worst drop compared with the model in float32:

    cosine      1 − cosine of a tower's last hidden states, of the sample and stream that is worst
    zero-shot   share of calibration images whose own caption is the nearest of all, images → texts
    recall@1    the same, texts → images

The last two need captions and the embeddings of a whole model, which is exported for every k.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from internvl_edge.artifact import Artifact
from internvl_edge.artifact.components import EMBEDDERS
from internvl_edge.compiler.compile import export
from internvl_edge.compiler.oracle.rounded_towers import RoundedTowers
from internvl_edge.compiler.plan import ExportOptions, Plan, make_plan, require_choice
from internvl_edge.compiler.progress import Report, silent
from internvl_edge.compiler.report.plots import SEARCH_FILE
from internvl_edge.compiler.steps.calibration.samples import load_samples
from internvl_edge.errors import UsageError
from internvl_edge.quantize.sensitivity import Search, Sensitivity, exactly, fewest
from internvl_edge.runtime.model import load
from internvl_edge.runtime.ort.options import OrtOptions

NEEDED = {"cosine": set[str](), "zero-shot": set(EMBEDDERS), "recall@1": set(EMBEDDERS)}
LEVELS = 8  # sets of layers that one pass tries


def export_auto(
    options: ExportOptions, max_drop: float, metric: str = "cosine", report: Report = silent
) -> tuple[Artifact, Search]:
    """Export at INT8 with as few layers in 16 bits as the budget allows.

    Args:
        options: as for ``export``; the precision is ours to choose.
        max_drop: how much the metric may lose compared with float32, in its own unit (0..1).
        metric: a key of ``NEEDED``.
        report: told before each step.

    Raises:
        UsageError: a metric or budget that cannot be; captions or components that it needs.
        InternVLError: as ``export``.
    """
    require_choice("--metric", metric, tuple(NEEDED))
    if not 0.0 <= max_drop <= 1.0:
        raise UsageError(f"--max-drop: expected a number from 0 to 1, found {max_drop}")
    plan = make_plan(replace(options, precision="int8"))
    assert plan.recipe is not None
    if missing := NEEDED[metric] - set(plan.components):
        raise UsageError(f"--metric {metric} needs the components {', '.join(sorted(missing))}")
    result = search(plan, max_drop, metric, report)
    chosen = result.recipe(plan.recipe)
    notes = {
        "recipe.json": json.dumps(chosen.to_json(), indent=2) + "\n",
        SEARCH_FILE: json.dumps(result.to_json(), indent=2) + "\n",
    }
    return export(replace(plan.options, recipe=chosen, notes=notes), report), result


def search(plan: Plan, max_drop: float, metric: str, report: Report = silent) -> Search:
    """Find the recipe; until it is found, a folder of its own lies next to OUT."""
    out = plan.options.out.absolute()
    folder = out.with_name(f".{out.name}.search")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        bare = replace(plan.options, verify="none", min_sqnr=None, max_drop=None)
        trial = replace(bare, targets=("onnx",), force=True)
        first = export(replace(trial, out=folder / "int8"), report)
        towers = RoundedTowers(plan, first, report)
        ranking = towers.rank()
        if metric == "cosine":
            return fewest(lambda k: towers.drops(ranking, k), ranking, metric, max_drop, LEVELS)
        tasks = _Tasks(plan, trial, folder, metric, ranking, report)
        return fewest(tasks.drops, ranking, metric, max_drop, 1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Tasks:
    """Retrieval on the calibration set, by directories that are exported for it."""

    def __init__(
        self,
        plan: Plan,
        trial: ExportOptions,
        folder: Path,
        metric: str,
        ranking: Sequence[Sensitivity],
        report: Report,
    ) -> None:
        assert plan.recipe is not None
        self.recipe, self.ranking, self.metric, self.report = plan.recipe, ranking, metric, report
        self.trial = replace(trial, components=EMBEDDERS)
        self.folder, self.samples = folder, load_samples(plan)
        if len(set(self.samples.captions)) < 2:
            raise UsageError(
                f"--metric {metric} compares captions; {self.samples.name} has "
                f"{len(set(self.samples.captions))} different one(s)"
            )
        wide = replace(self.trial, precision="fp32", calibration=None, recipe=None)
        self.reference = self._score(wide, "fp32")

    def drops(self, levels: Sequence[int]) -> list[float]:
        """Measure how much less is right than in float32, by number of first layers in 16 bits."""
        drops = []
        for k in levels:
            layers = tuple(exactly(item.layer) for item in self.ranking[:k])
            recipe = replace(self.recipe, exclude=(*self.recipe.exclude, *layers))
            score = self._score(replace(self.trial, recipe=recipe), "trial")
            drops.append(self.reference - score)
        return drops

    def _score(self, options: ExportOptions, name: str) -> float:
        out = self.folder / name
        export(replace(options, out=out), self.report)
        captions = list(dict.fromkeys(self.samples.captions))
        own = np.array([captions.index(caption) for caption in self.samples.captions])
        with load(out, options=OrtOptions(allow_slow=True)) as model:
            images = [self.samples.image(i) for i in range(len(self.samples))]
            image = model.encode_image(images, normalize=True)
            text = model.encode_text(captions, normalize=True)
        similarity = image @ text.T  # (images, captions)
        if self.metric == "zero-shot":
            return float(np.mean(similarity.argmax(axis=1) == own))
        best = similarity.argmax(axis=0)  # the image of each caption
        return float(np.mean(own[best] == np.arange(len(captions))))
