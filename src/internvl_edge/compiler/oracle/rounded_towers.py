"""Towers run with some of their layers fake-quantized: what each costs, and several together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl_edge.artifact import Artifact
from internvl_edge.artifact.components import streams_of
from internvl_edge.artifact.workspace import Workspace
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress, Report
from internvl_edge.compiler.source import quantization_of
from internvl_edge.compiler.steps.calibration.samples import load_samples, samples_for
from internvl_edge.export.towers.blocks import Block
from internvl_edge.export.towers.streams import Samples, calibration_blocks
from internvl_edge.files.spool import Budget
from internvl_edge.quantize.sensitivity import Sensitivity
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.types import Array

SAMPLES = 4  # that the towers are run on
SPOOL_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class _Use:
    """The inputs that one stream brings to a block, and its outputs in float32."""

    stream: str
    contexts: Sequence[Any]
    inputs: list[Array]  # (B, T, C) each
    outputs: list[Array]


class RoundedTowers:
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
    """Take the first samples of each kind, one batch; of images as many as chats are about."""
    chats = [batch[:SAMPLES] for batch in samples.chat_ids[:1]]
    pictures = max([SAMPLES, *(int((chat == PLACE).sum()) for chat in chats)])

    def first(batches: Sequence[Tensor]) -> list[Tensor]:
        return [batch[:SAMPLES] for batch in batches[:1]]

    return Samples(
        pixel_values=[torch.cat([*samples.pixel_values[:pictures]])[:pictures].clone()],
        input_ids=first(samples.input_ids),
        match_ids=first(samples.match_ids),
        caption_ids=first(samples.caption_ids),
        chat_ids=chats,
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
