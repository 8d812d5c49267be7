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

PyTorch is the checkpoint in the form that the recipe quantizes (``quantize.fold``): the same
function, its residual stream perhaps in another basis, which is the graph's.

The inputs are seeded noise, of which a component needs no sample. The files' hashes are not
checked: a directory that is broken is what this is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

from internvl_edge.artifact.components import COMPONENTS, find_component
from internvl_edge.artifact.open import Artifact, open_artifact
from internvl_edge.compiler.oracle.reference_block import watching
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.compiler.progress import Progress, Report, silent
from internvl_edge.compiler.steps.graph_files import engine_graph
from internvl_edge.compiler.steps.verify import (
    SAME_DB,
    graph_capacity,
    open_source,
    quantization_of,
    run_as_reference,
    runnable,
)
from internvl_edge.errors import UsageError, did_you_mean
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.compare import (
    BOUNDS,
    agreement,
    component_feeds,
    reference_outputs,
    sample_feeds,
    with_noise,
)
from internvl_edge.export.config.checkpoint import with_depth
from internvl_edge.export.graph.one_block import (
    BLOCK_INPUT,
    BLOCK_OUTPUT,
    isolate_block,
    isolate_front,
)
from internvl_edge.export.graph.repeat import blocks_of
from internvl_edge.export.graph.uint8_input import on_levels, preprocessing_inside
from internvl_edge.export.towers.blocks import component_of_one_block
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX, bypass_activations
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.types import Array

Arrays = dict[str, Array]
TENSOR_DB = 30.0  # of a quantized graph: one rounding to the other side shows in a small tensor
MARGIN_DB = 3.0  # that a graph is nearer to its simulation than that is to PyTorch
CHANNEL_SLACK_DB = 20.0  # a channel may be this much worse than a tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReading:
    """A tensor compared with what it should be."""

    name: str  # the module that gives it, by its name in our reference
    sqnr_db: float
    channel_db: float  # SQNR of the worst channel, the last axis
    is_bad: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReading:
    """A block of a graph; SQNR in dB of its output compared with PyTorch in float32."""

    index: int
    isolated_db: float
    accumulated_db: float
    unrounded_db: float | None  # None: nothing in the graph is quantized
    tensors: tuple[TensorReading, ...]  # in the order of the graph


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphReading:
    """All blocks of one graph of a component."""

    component: str
    file: str
    against: str  # the name of what its tensors were compared with
    bound_db: float
    blocks: tuple[BlockReading, ...]

    @property
    def first_bad(self) -> TensorReading | None:
        tensors = (tensor for block in self.blocks for tensor in block.tensors)
        return next((tensor for tensor in tensors if tensor.is_bad), None)

    def to_json(self) -> dict[str, Any]:
        bad = self.first_bad
        return asdict(self) | {"first_bad": None if bad is None else bad.name}


def bisect(
    out: Path,
    checkpoint: Path,
    component: str | None = None,
    min_sqnr_db: float | None = None,
    report: Report = silent,
) -> list[GraphReading]:
    """Compare every block of every graph of a directory with PyTorch.

    Args:
        out: the directory; its structure is checked, its hashes are not.
        checkpoint: what it was made from.
        component: one that runs through a tower; None: all of these.
        min_sqnr_db: what a tensor must reach; None: the bound of the graph's precision.
        report: told before each block.

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
    source = opened if quantization is None else quantization.source
    readings = []
    for name in _components(artifact, component):
        for file, base in _graphs(artifact, name, quantization):
            bound = _bound(base, quantization) if min_sqnr_db is None else min_sqnr_db
            graph = _Graph(artifact, source, quantization, name, file, is_wide=base == "fp32")
            readings.append(graph.read(bound, report))
    return readings


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
    return TENSOR_DB if base == "fp32" else BOUNDS["simulated, 16-bit, one block"][1]


class _Graph:
    """One graph of a component, and the inputs that it is run on."""

    def __init__(
        self,
        artifact: Artifact,
        checkpoint: Checkpoint,
        quantization: Quantization | None,
        component: str,
        file: str,
        *,
        is_wide: bool,
    ) -> None:
        self.checkpoint, self.component = checkpoint, component
        self.is_wide = is_wide  # in 16 bits, roundings to the other side are many
        self.quantization, self.path = quantization, artifact.path / file
        tower = COMPONENTS[component].tower
        assert tower is not None
        model = ir.load(self.path)
        self.tower, self.depth = tower, len(blocks_of(model, tower))
        self.preprocessing = preprocessing_inside(artifact.manifest)
        feeds = _feeds(checkpoint, artifact.manifest.image_size, component, graph_capacity(model))
        self.feeds = on_levels(feeds, self.preprocessing)

    def read(self, bound_db: float, report: Report) -> GraphReading:
        """Run every block, each on what the one before it left."""
        blocks: list[BlockReading] = []
        hidden: Array | None = None  # PyTorch's, (B, T, C)
        drifting = self._front()  # the graph's own
        for index in range(self.depth):
            report(
                Progress(
                    step="bisect",
                    detail=f"{self.path.name}, block {index}",
                    done=index,
                    total=self.depth,
                )
            )
            given, reference, expected = self._reference(index, hidden)
            actual, unrounded, drifted = self._run(index, given, drifting, list(expected))
            tensors = self._tensors(index, reference, expected, actual, bound_db)
            if index == 0:
                tensors.insert(0, _reading("embeddings", given, given, drifting, bound_db))
            output = reference[BLOCK_OUTPUT]
            blocks.append(
                BlockReading(
                    index=index,
                    isolated_db=agreement(output, actual[BLOCK_OUTPUT]).sqnr_db,
                    accumulated_db=agreement(output, drifted).sqnr_db,
                    unrounded_db=None
                    if unrounded is None
                    else agreement(output, unrounded).sqnr_db,
                    tensors=tuple(tensors),
                )
            )
            hidden, drifting = output, drifted
        return GraphReading(
            component=self.component,
            file=self.path.name,
            against="PyTorch" if self.quantization is None else "simulated quantization",
            bound_db=bound_db,
            blocks=tuple(blocks),
        )

    def _front(self) -> Array:
        model = ir.load(self.path)
        isolate_front(model, self.tower)
        return self._session_outputs(model, self.feeds)[BLOCK_INPUT]

    def _reference(self, index: int, hidden: Array | None) -> tuple[Array, Arrays, Arrays]:
        """Compute the block's input, its outputs in PyTorch, and those the graph should have."""
        module, rename = component_of_one_block(self.checkpoint, self.component, index)
        reference = self._watched(module, hidden)
        given = reference.pop(BLOCK_INPUT)
        expected = reference
        if self.quantization is not None:
            with self._simulated(module, rename):
                expected = self._watched(module, hidden)
            del expected[BLOCK_INPUT]
        return given, reference, expected

    def _simulated(self, module: nn.Module, rename: Callable[[str], str]) -> Any:
        if self.quantization is None:
            return nullcontext()
        stream, stored = COMPONENTS[self.component].stream, self.quantization.stored
        assert stream is not None
        # a wrong scale of a weight is to be found, not refused
        stored = {n: v for n, v in stored.items() if not n.endswith(SCALE_SUFFIX)}
        return replace(self.quantization, stored=stored).applied_to(module, stream, rename)

    def _watched(self, module: nn.Module, hidden: Array | None) -> Arrays:
        """Run the reference, and keep its block's input and the output of every module inside."""
        config = with_depth(self.checkpoint.config, 1, 1)
        with watching(module.get_submodule(f"{self.tower}.0"), hidden) as seen:
            outputs = reference_outputs(module, self.component, self.feeds, config)
        tail = {name: outputs[name] for name in COMPONENTS[self.component].outputs}
        return {name: tensor.detach().float().numpy() for name, tensor in seen.items()} | tail

    def _run(
        self, index: int, given: Array, drifting: Array, names: Sequence[str]
    ) -> tuple[Arrays, Array | None, Array]:
        """Run the graph's block on two inputs, and without rounding on the first."""
        is_last = index == self.depth - 1
        model = ir.load(self.path)
        isolate_block(model, self.tower, index, names, with_tail=is_last)
        feeds = {**self.feeds, BLOCK_INPUT: given}
        with self._session(model) as session:
            actual = self._outputs(session, feeds)
            feeds[BLOCK_INPUT] = drifting
            drifted = self._outputs(session, feeds)[BLOCK_OUTPUT]
        if self.quantization is None:
            return actual, None, drifted
        model = ir.load(self.path)
        isolate_block(model, self.tower, index, ())
        bypass_activations(model)
        unrounded = self._session_outputs(model, {**self.feeds, BLOCK_INPUT: given})
        return actual, unrounded[BLOCK_OUTPUT], drifted

    def _session(self, model: ir.Model) -> OrtSession:
        return OrtSession(self.path, graph=runnable(model))

    def _outputs(self, session: OrtSession, feeds: Mapping[str, Array]) -> Arrays:
        return run_as_reference(session, feeds, self.preprocessing)

    def _session_outputs(self, model: ir.Model, feeds: Mapping[str, Array]) -> Arrays:
        with self._session(model) as session:
            return self._outputs(session, feeds)

    def _tensors(
        self, index: int, reference: Arrays, expected: Arrays, actual: Arrays, bound_db: float
    ) -> list[TensorReading]:
        """Read tensors in the order of the graph's outputs, which is that of the modules' ends."""
        inner = [name for name in actual if name in expected and name not in self._tail_names]
        tail = [name for name in actual if name in self._tail_names]
        prefix = f"{self.tower}.{index}"
        names = {name: f"{prefix}.{name}" for name in inner} | {name: name for name in tail}
        names[BLOCK_OUTPUT] = prefix
        wanted = reference if self.is_wide else expected
        return [
            _reading(names[n], wanted[n], expected[n], actual[n], bound_db) for n in (*inner, *tail)
        ]

    @property
    def _tail_names(self) -> tuple[str, ...]:
        return COMPONENTS[self.component].outputs


def _sqnr(expected: Array, actual: Array) -> float:
    return agreement(expected, actual).sqnr_db


def _reading(
    name: str, reference: Array, expected: Array, actual: Array, bound_db: float
) -> TensorReading:
    """Compare a tensor with what it should be, and that with what it would be without rounding.

    A scale that is twice too coarse may leave a tensor above any fixed bound, but it moves it
    further than its quantization does; a few roundings to the other side do not.
    """
    whole, worst = _sqnr(expected, actual), worst_channel_db(expected, actual)
    is_good = whole >= bound_db and worst >= bound_db - CHANNEL_SLACK_DB
    if reference is not expected and whole < SAME_DB:
        is_good &= whole >= _sqnr(reference, expected) + MARGIN_DB
    return TensorReading(name=name, sqnr_db=whole, channel_db=worst, is_bad=not is_good)


def worst_channel_db(expected: Array, actual: Array) -> float:
    """Compute the SQNR of the channel that is worst; (…, C) → dB.

    One wrong scale of thousands vanishes in a tensor's figure, and is all there is in its
    channel's. A channel that is almost silent is measured against a hundredth of the mean.
    """
    if not np.isfinite(actual).all():
        return -np.inf
    flat = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
    noise = ((flat - actual.reshape(flat.shape)) ** 2).sum(axis=0)
    signal = (flat**2).sum(axis=0)
    signal = np.maximum(signal, 0.01 * signal.mean())
    ratio = np.divide(signal, noise, out=np.full_like(signal, 1e20), where=noise > 0)
    return float(10 * np.log10(max(ratio.min(), 1e-20)))


def _feeds(checkpoint: Checkpoint, image_size: int, component: str, capacity: int | None) -> Arrays:
    """Make seeded inputs of a component; vision tokens are noise too: no tower is run for them."""
    config = checkpoint.config
    feeds = with_noise(sample_feeds(config, image_size), config, image_size)
    return component_feeds(component, feeds, config, capacity)
