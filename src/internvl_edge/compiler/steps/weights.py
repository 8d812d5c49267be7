"""The step that stores every parameter once, in the weights file of a directory.

A directory has one weights file for all of its components. At fp32, fp16 and bf16 it holds the
parameters in the dtypes the graphs ask for; quantized, the linear layers' weights in 8 bits with
their scales, and the rest as the checkpoint stores it. Where that would be the checkpoint's own
bytes, its shards are brought instead; ``--weights link`` or ``copy`` bring them in any case, and
the graphs cast.

``plan_weights`` decides all of that once, before any work: the forecast and the run follow it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from internvl_edge.artifact.workspace import Workspace
from internvl_edge.compiler.cost import IMPORTS_NBYTES, Cost
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress, Report
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.weights.layout import TOWERS
from internvl_edge.compiler.weights.plan import WeightsPlan
from internvl_edge.compiler.weights.tensors import convert, read_tensor
from internvl_edge.errors import InternVLError
from internvl_edge.export.checkpoint.names import Joined
from internvl_edge.export.graph.bind import weights_without_data
from internvl_edge.export.weights.link import bring_shards, way_of
from internvl_edge.export.weights.writer import Layout, StoredTensor, WeightsWriter
from internvl_edge.quantize.fold import Derived

logger = logging.getLogger(__name__)

PIECE_NBYTES = 1 << 29  # of converted weights, between two points to go on from
CONVERT_NBYTES_PER_SECOND = 250e6


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreWeights:
    """Bring the checkpoint's shards, and write what they do not hold as it is read."""

    weights: WeightsPlan

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        return (cost_of_writing(plan, self.weights),)

    def run(self, plan: Plan, build: Build) -> None:
        require_as_planned(self.weights, build)
        if self.weights.brought:
            build.stored, build.brought = bring_shards(
                plan.checkpoint,
                self.weights.brought,
                build.directory,
                plan.options.weights,
                _copied(build.report),
            )
            _say_joined(plan, self.weights)
        if self.weights.layout:
            build.stored = build.stored | _written(plan, self.weights.layout, build)


def _say_joined(plan: Plan, weights: WeightsPlan) -> None:
    """Say which tensors could not stay in the shards that are brought."""
    tensors = plan.source.tensors
    joined = [name for name in weights.layout if isinstance(tensors[name], Joined)]
    if joined:
        logger.warning(
            "%d tensors of %.0f MB, such as %s, have their rows in several places of the "
            "checkpoint's files and are written anew; all others stay where they are",
            len(joined),
            sum(tensors[name].nbytes for name in joined) / 1e6,
            tensors[joined[0]].name,
        )


def cost_of_writing(plan: Plan, weights: WeightsPlan) -> Cost:
    """State memory, disk and time of the weights file, but for calibration."""
    written = sum(math.prod(shape) * int(d.itemsize) for d, shape in weights.layout.values())
    tensors = plan.source.tensors
    sizes = {name: math.prod(entry.shape) for name, entry in tensors.items()}
    if plan.recipe is not None:  # the rest is calibration's
        sizes = {n: size for n, size in sizes.items() if not n.startswith(TOWERS)}
    if weights.brought:  # of the rest, that is computed; tables are read as they are
        sizes = {n: size for n, size in sizes.items() if isinstance(tensors[n], Derived)}
        sizes = {n: size for n, size in sizes.items() if n in weights.layout}
    largest = max(sizes.values(), default=0)
    if weights.brought:
        shards = sorted({tensors[name].file for name in weights.brought})
        if way_of(shards, plan.options.out, plan.options.weights) == "copy":
            written += sum(shard.stat().st_size for shard in shards)
    return Cost(
        name="weights",
        memory_nbytes=IMPORTS_NBYTES + 10 * largest,  # stored, float32 and converted, at once
        disk_nbytes=written,
        seconds=written / CONVERT_NBYTES_PER_SECOND,
    )


def require_as_planned(weights: WeightsPlan, build: Build) -> None:
    """Make sure that graphs read what was planned: what is written was decided before the trace.

    Raises:
        InternVLError: a mistake of ours; names a parameter.
    """
    read = set(weights_without_data(build.models.values()))
    planned = set[str]().union(*weights.reads.values())
    if read != planned:
        raise InternVLError(
            f"the graphs were expected to read {len(planned)} parameters, they read {len(read)}: "
            f"{', '.join(sorted(read ^ planned)[:3])}"
        )


# --- writing it ----------------------------------------------------------------------------------


def _copied(report: Report) -> Callable[[str, int, int], None]:
    """Turn the progress of a copy into ours."""

    def copied(shard: str, done: int, total: int) -> None:
        done, total = done // 10**6, -(-total // 10**6)
        report(Progress(step="copy", detail=f"{shard} (MB)", done=done, total=total))

    return copied


def _written(plan: Plan, layout: Layout, build: Build) -> dict[str, StoredTensor]:
    """Write a weights file in the workspace, and hand it over: where each tensor lies.

    Another run goes on after the last piece of it that is durable.
    """
    work = build.work
    done = {name for entry in work.entries for name in entry["weights"]}
    if done:
        logger.warning(
            "%d of %d tensors that an earlier run wrote are taken up from %s",
            len(done),
            len(layout),
            work.path,
        )
    path = work.weights
    with WeightsWriter(path, layout, align=plan.options.align, done=done) as writer:
        dtypes = {name: dtype for name, (dtype, _) in layout.items()}
        copy_rest(plan, writer, dtypes, build.report, work)
    work.hand_over(path.name, build.directory)
    return writer.stored


def copy_rest(
    plan: Plan,
    writer: WeightsWriter,
    dtypes: Mapping[str, np.dtype[Any]],
    report: Report,
    work: Workspace | None = None,
) -> None:
    """Stream the parameters that are not written yet into the file, each converted to its dtype.

    Pieces that are durable are noted in ``work``, if there is one.
    """
    written: list[str] = []
    nbytes, pending = 0, writer.pending
    for done, name in enumerate(pending, len(dtypes) - len(pending)):
        report(Progress(step="weights", detail=name, done=done, total=len(dtypes)))
        writer.write(name, convert(read_tensor(plan, name), dtypes[name]))
        written.append(name)
        nbytes += writer.stored[name].nbytes
        if work is not None and nbytes >= PIECE_NBYTES:
            writer.sync()
            plan.checkpoint.require_unchanged()  # or another's weights would be taken up as these
            work.finish(f"weights.{work.num_done}", {"weights": writer.sha256_of(written)}, {})
            written, nbytes = [], 0
