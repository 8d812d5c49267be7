"""Calibration of a whole checkpoint, block by block."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from internvl_edge.artifact.workspace import Workspace
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.towers.streams import Samples, calibration_blocks
from internvl_edge.files.spool import Budget
from internvl_edge.quantize.calibration.block import CalibratedBlock, calibrate_block
from internvl_edge.quantize.recipe import Recipe

STREAMS = {"image", "queries", "text", "match"}


def calibrate(
    checkpoint: Checkpoint,
    samples: Samples,
    recipe: Recipe,
    streams: set[str],
    budget_nbytes: int = 1 << 30,
) -> tuple[list[CalibratedBlock], dict[str, list[torch.Tensor]]]:
    """Every block's result, and the hidden states that each stream ends with."""
    results: list[CalibratedBlock] = []
    states: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(TemporaryDirectory())
        work = Workspace(Path(folder), Budget(budget_nbytes))
        cleanup.callback(work.close)
        for block, current in calibration_blocks(checkpoint, samples, streams, work):
            results.append(calibrate_block(block, current, recipe, work.hidden, work.scratch))
            work.finish(block.name, {}, {name: s.hidden for name, s in current.items()})
            states |= {n: [torch.from_numpy(x) for x in s.hidden] for n, s in current.items()}
    return results, states
