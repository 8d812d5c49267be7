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
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl_edge.artifact.components import EMBEDDERS, streams_of
from internvl_edge.artifact.open import Artifact
from internvl_edge.artifact.workspace import Workspace
from internvl_edge.compiler.pipeline import export
from internvl_edge.compiler.plan import ExportOptions, Plan, make_plan, require_choice
from internvl_edge.compiler.progress import Progress, Report, silent
from internvl_edge.compiler.report.plots import SEARCH_FILE
from internvl_edge.compiler.steps.calibration.samples import load_samples, samples_for
from internvl_edge.compiler.steps.verify import quantization_of
from internvl_edge.errors import UsageError
from internvl_edge.export.towers.blocks import Block
from internvl_edge.export.towers.streams import Samples, calibration_blocks
from internvl_edge.files.spool import Budget
from internvl_edge.quantize.sensitivity import Search, Sensitivity, exactly, fewest
from internvl_edge.runtime.model import load
from internvl_edge.types import Array

NEEDED = {"cosine": set[str](), "zero-shot": set(EMBEDDERS), "recall@1": set(EMBEDDERS)}
SAMPLES = 4  # that the towers are run on
LEVELS = 8  # sets of layers that one pass tries
SPOOL_NBYTES = 1 << 30


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
        trial = replace(plan.options, targets=("onnx",), verify="none", force=True)
        first = export(replace(trial, out=folder / "int8"), report)
        towers = _Towers(plan, first, report)
        ranking = towers.rank()
        if metric == "cosine":
            return fewest(lambda k: towers.drops(ranking, k), ranking, metric, max_drop, LEVELS)
        tasks = _Tasks(plan, trial, folder, metric, ranking, report)
        return fewest(tasks.drops, ranking, metric, max_drop, 1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    """The inputs that one stream brings to a block, and its outputs in float32."""

    stream: str
    contexts: Sequence[Any]
    inputs: list[Array]  # (B, T, C) each
    outputs: list[Array]


class _Towers:
    """The towers of a model in the form its recipe quantizes, on a few calibration samples."""

    def __init__(self, plan: Plan, artifact: Artifact, report: Report) -> None:
        self.plan, self.report = plan, report
        quantization = quantization_of(artifact, plan.checkpoint)
        assert quantization is not None
        self.quantization = quantization
        self.samples = _few(samples_for(plan, load_samples(plan)))
        self.streams = streams_of(plan.components)

    def rank(self) -> list[Sensitivity]:
        """Rank every quantized layer, the most sensitive first."""
        ranked: dict[str, Sensitivity] = {}
        for block, uses in self._blocks("rank"):
            sizes = {name: layer.weight.numel() for name, layer in block.linears().items()}
            for use in uses:
                for weight in self._scales(block, use.stream):
                    layer = weight.removesuffix(".weight")
                    error = _relative_error(
                        use.outputs, self._run(block, use, use.inputs, {weight})
                    )
                    if layer not in ranked or error > ranked[layer].error:
                        ranked[layer] = Sensitivity(
                            layer=layer, error=error, parameters=sizes[layer]
                        )
        return sorted(ranked.values(), key=lambda item: (-item.error, item.layer))

    def drops(self, ranking: Sequence[Sensitivity], levels: Sequence[int]) -> list[float]:
        """Compute 1 − the towers' worst cosine, by number of first layers in 16 bits."""
        wide = {k: {f"{item.layer}.weight" for item in ranking[:k]} for k in levels}
        drifting: dict[tuple[str, int], list[Array]] = {}
        last: dict[str, _Use] = {}
        for block, uses in self._blocks("try"):
            for use in uses:
                last[use.stream] = use
                for k in levels:
                    given = drifting.get((use.stream, k), use.inputs)
                    narrow = self._scales(block, use.stream).keys() - wide[k]
                    drifting[use.stream, k] = self._run(block, use, given, narrow)
        return [max(_drop(use, drifting[name, k]) for name, use in last.items()) for k in levels]

    def _blocks(self, step: str) -> Iterator[tuple[Block, list[_Use]]]:
        """Load every block, with what flows through it in float32."""
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            work = Workspace(Path(folder), Budget(SPOOL_NBYTES))
            blocks = calibration_blocks(self.plan.source, self.samples, self.streams, work)
            for done, (block, streams) in enumerate(blocks):
                self.report(Progress(step=step, detail=block.name, done=done, total=0))
                uses = []
                for name, stream in streams.items():
                    inputs = [np.array(x) for x in stream.hidden]
                    outputs = _forward(block, stream.contexts, inputs)
                    stream.hidden.close()
                    stream.hidden = work.scratch()
                    for values in outputs:
                        stream.hidden.append(values)
                    contexts = stream.contexts
                    uses.append(
                        _Use(stream=name, contexts=contexts, inputs=inputs, outputs=outputs)
                    )
                yield block, uses
            work.close()

    def _scales(self, block: Block, stream: str) -> dict[str, float]:
        scales = self.quantization.scales.get(stream, {})
        ours = f"{block.name}."
        return {
            n: s
            for n, s in scales.items()
            if n.startswith(ours) and n.endswith(".weight") and s is not None
        }

    def _run(
        self, block: Block, use: _Use, inputs: Sequence[Array], narrow: set[str]
    ) -> list[Array]:
        """Compute the block's outputs with these weights in 8 bits."""
        scales = {n: s for n, s in self._scales(block, use.stream).items() if n in narrow}
        if not scales:
            return _forward(block, use.contexts, inputs)
        quantization = replace(self.quantization, scales={use.stream: scales})
        with quantization.applied_to(block.module, use.stream, lambda n: f"{block.name}.{n}"):
            return _forward(block, use.contexts, inputs)


def _forward(block: Block, contexts: Sequence[Any], inputs: Sequence[Array]) -> list[Array]:
    with torch.inference_mode():
        return [
            block.run(torch.from_numpy(x), context).numpy()
            for x, context in zip(inputs, contexts, strict=True)
        ]


def _few(samples: Samples) -> Samples:
    """Take the first samples of each kind, one batch."""

    def first(batches: Sequence[Tensor]) -> list[Tensor]:
        return [batch[:SAMPLES] for batch in batches[:1]]

    return Samples(
        pixel_values=first(samples.pixel_values),
        input_ids=first(samples.input_ids),
        match_ids=first(samples.match_ids),
        caption_ids=first(samples.caption_ids),
    )


def _relative_error(expected: Sequence[Array], actual: Sequence[Array]) -> float:
    error = sum(
        float(np.square(y - x, dtype=np.float64).sum())
        for x, y in zip(expected, actual, strict=True)
    )
    return error / sum(float(np.square(x, dtype=np.float64).sum()) for x in expected)


def _drop(use: _Use, drifted: Sequence[Array]) -> float:
    """Compute 1 − the cosine of the sample that is worst, padding left out."""
    worst = 1.0
    for expected, actual, context in zip(use.outputs, drifted, use.contexts, strict=True):
        rows = getattr(context, "rows", None)
        for i, (x, y) in enumerate(zip(expected, actual, strict=True)):
            here = slice(None) if rows is None else rows[i].numpy()
            a, b = x[here].astype(np.float64).ravel(), y[here].astype(np.float64).ravel()
            worst = min(worst, float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
    return 1.0 - worst


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
        with load(out) as model:
            images = [self.samples.image(i) for i in range(len(self.samples))]
            image = model.encode_image(images, normalize=True)
            text = model.encode_text(captions, normalize=True)
        similarity = image @ text.T  # (images, captions)
        if self.metric == "zero-shot":
            return float(np.mean(similarity.argmax(axis=1) == own))
        best = similarity.argmax(axis=0)  # the image of each caption
        return float(np.mean(own[best] == np.arange(len(captions))))
