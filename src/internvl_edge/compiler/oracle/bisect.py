"""Where a compiled component leaves PyTorch: block by block, and the first bad tensor by name.

A component that is wrong is wrong somewhere. Each block of its tower is cut out of the graph and
compared with the same block in PyTorch, one in memory at a time, in four ways:

    isolated      fed what PyTorch's blocks before it gave: the block's own error
    accumulated   fed what the graph's own blocks before it gave: what has added up so far
    unrounded     isolated, its activations not quantized: what its stored weights cost
    tensors       isolated, the output of every norm, linear layer and attention in it, and
                  what it should be: PyTorch, or of a quantized graph the simulation of its
                  quantization (``simulate``), which has the same rounding errors

The first three are SQNR, against PyTorch in float32. They tell where quantization costs, which is
no fault. The last one tells faults: a tensor below the bound is not what the graph should compute
by a wrong weight, scale, axis or operator (or one of its channels is: a channel has a bound of
its own). The first one in the order of the graph is where to look, since what comes after it
in the block reads it.

PyTorch is the checkpoint in the form that the graph computes (``quantize.fold``): the same
function, LayerScale perhaps part of other layers, its residual stream perhaps in another basis.

The inputs are seeded noise, of which a component needs no sample. The files' hashes are not
checked: a directory that is broken is what this is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from internvl_edge.artifact import Artifact, open_artifact
from internvl_edge.artifact.components import engine_graph, find_component
from internvl_edge.compiler.oracle.graph_blocks import GraphBlocks
from internvl_edge.compiler.oracle.readings import GraphReading
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.compiler.plan import Hardware
from internvl_edge.compiler.progress import Report, silent
from internvl_edge.compiler.source import open_source, quantization_of
from internvl_edge.errors import UsageError, did_you_mean
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.compare import BOUNDS
from internvl_edge.quantize.fold import without_layer_scale

NARROW_DB = 15.0  # the same in 16 bits, where such roundings are many
TENSOR_DB = 30.0  # of a quantized graph: one rounding to the other side shows in a small tensor


def bisect(
    out: Path,
    checkpoint: Path,
    component: str | None = None,
    min_sqnr_db: float | None = None,
    report: Report = silent,
    hardware: Hardware = Hardware(),
) -> list[GraphReading]:
    """Compare every block of every graph of a directory with PyTorch.

    Args:
        out: the directory; its structure is checked, its hashes are not.
        checkpoint: what it was made from.
        component: one that runs through a tower; None: all of these.
        min_sqnr_db: what a tensor must reach; None: the bound of the graph's precision.
        report: told before each block.
        hardware: what runs the graphs.

    Raises:
        ArtifactError: the directory is not what its manifest says.
        UsageError: another checkpoint than the one it was made from, no such component, or a bound
            that is no number of dB from 0 up.
    """
    if min_sqnr_db is not None and not 0 <= min_sqnr_db < np.inf:
        raise UsageError(f"--min-sqnr {min_sqnr_db:g}: expected a number of dB from 0 up")
    artifact = open_artifact(out, hash_files=False)
    opened = open_source(artifact, checkpoint)
    quantization = quantization_of(artifact, opened)
    readings = []
    for name in _components(artifact, component):
        for file, base in _graphs(artifact, name, quantization):
            bound = _bound(base, quantization) if min_sqnr_db is None else min_sqnr_db
            source = _form_of(artifact.file(file), opened, quantization)
            graph = GraphBlocks(
                artifact,
                source,
                quantization,
                name,
                file,
                is_wide=base == "fp32",
                device=hardware.device,
                num_threads=hardware.num_threads,
            )
            with hardware.threads_of_torch():
                readings.append(graph.read(bound, report))
    return readings


def _form_of(graph: Path, opened: Checkpoint, quantization: Quantization | None) -> Checkpoint:
    """Give a checkpoint the form that a graph computes: with its LayerScale, or with it folded."""
    if quantization is not None:
        return quantization.source
    names = ir.load(graph).graph.initializers
    is_kept = any(name.endswith((".ls1", ".ls2")) for name in names)
    return opened if is_kept else without_layer_scale(opened)


def _components(artifact: Artifact, chosen: str | None) -> list[str]:
    names = artifact.manifest.components
    known = [name for name in names if find_component(name).tower is not None]
    if chosen is not None and chosen not in known:
        raise UsageError(
            f"component {chosen!r}: expected one that runs through a tower of blocks, "
            f"{', '.join(known)}{did_you_mean(chosen, known)}"
        )
    return known if chosen is None else [chosen]


def _graphs(
    artifact: Artifact, component: str, quantization: Quantization | None
) -> Iterator[tuple[str, str]]:
    """Yield a component's graphs, each with its precision around the 8-bit products."""
    precision = artifact.manifest.precision
    base = precision if quantization is None else quantization.recipe.base or "fp32"
    yield artifact.manifest.components[component].file, base
    if quantization is not None:
        file = engine_graph(component, quantization.recipe.engine_base)
        if file in artifact.manifest.files:
            yield file, quantization.recipe.engine_base


def _bound(base: str, quantization: Quantization | None) -> float:
    if quantization is None:
        return BOUNDS[base][1]
    return TENSOR_DB if base == "fp32" else NARROW_DB
