"""Every component of a directory is compared with PyTorch, before anyone may use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from internvl_edge.artifact.components import COMPONENTS, QUERIES_PREFIX
from internvl_edge.artifact.open import Artifact
from internvl_edge.compiler.cost import FLOAT32_NBYTES, IMPORTS_NBYTES, Cost, require_within_budget
from internvl_edge.compiler.oracle.scales import require_as_calibrated, require_seen_ranges
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.plan import Verify as Which
from internvl_edge.compiler.progress import Progress
from internvl_edge.compiler.steps.graph_files import engine_graph, tensor_specs
from internvl_edge.compiler.steps.publish import source_files
from internvl_edge.compiler.steps.step import Build
from internvl_edge.compiler.weights.layout import LLAMA_HEAD, block_sizes, towers_of
from internvl_edge.errors import UsageError, VerificationError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.checkpoint.load import load_model
from internvl_edge.export.compare import (
    BOUNDS,
    Agreement,
    agreements,
    component_feeds,
    reference_outputs,
    require_agreement,
    sample_feeds,
    summary,
    with_hidden_state,
    with_noise,
)
from internvl_edge.export.components import build_component, language_config
from internvl_edge.export.config.checkpoint import with_depth
from internvl_edge.export.graph.bf16_twin import widen
from internvl_edge.export.graph.repeat import keep_block
from internvl_edge.export.graph.uint8_input import graph_feeds, on_levels
from internvl_edge.export.precision import precision_of
from internvl_edge.export.towers.blocks import component_of_one_block
from internvl_edge.export.towers.streams import Samples
from internvl_edge.quantize.fold import source_of
from internvl_edge.quantize.graph.unsigned import take_unsigned_weights
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.runtime.generation.fixed_cache import MASK, capacity_of, grown, in_place
from internvl_edge.runtime.images.transform import Preprocessing
from internvl_edge.runtime.ort.cpu import products_saturate
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.types import Array

MAX_LISTED = 3  # shards, in an error
VERIFY_NBYTES_PER_SECOND = 200e6
# What is compared, in float32: reference and graph, constants that are widened, and the simulation.
VERIFY_COPIES = {"fp32": 2.5, "fp16": 4.7, "bf16": 4.7, "quantized": 5.2}
VERIFIED_TEXTS = 2
CACHE_COPIES = 3  # of a cache in place that is compared: as it is given, read and written
SAMPLES = 4  # of the calibration set, to compare quantized components on
MAX_WHOLE_NBYTES = 4_000_000_000  # of a float32 reference that --verify auto holds: 1 B parameters
MAX_LOSS_DB = 3.0  # of a quantized graph, against the simulation of its quantization
SAME_DB = 70.0  # compared with the simulation: the same numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Compare every component with PyTorch."""

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        return (_cost(plan),)

    def run(self, plan: Plan, build: Build) -> None:
        quantization = None
        if plan.recipe is not None:
            quantization = Quantization.read(build.directory, plan.recipe, plan.source)
        checker = Checker(
            plan.checkpoint,
            plan.image_size,
            build.samples,
            quantization,
            whole=is_compared_whole(plan.checkpoint, plan.options.verify),
            preprocessing=plan.preprocessing if plan.options.input == "uint8" else None,
        )
        precision, budget = plan.options.precision, plan.options.memory_budget
        remedy = "raise the budget, or choose --verify none"
        for done, (name, graph) in enumerate(build.graphs.items()):
            total = len(build.graphs)
            build.report(Progress(step="verify", detail=name, done=done, total=total))
            build.figures[name] = checker.check_both(
                name, build.directory / graph.file, precision, plan.base, plan.engine_base
            )
            require_within_budget(budget, done + 1, total, "components verified", remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A part that is compared at once: a component, or one with a single block of its tower."""

    module: nn.Module
    rename: Callable[[str], str] = str  # the checkpoint's name of a parameter
    block: int | None = None  # None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expected:
    """The outputs that graphs of a component, or of one block of it, should have."""

    feeds: dict[str, Array]
    reference: dict[str, Array]  # of PyTorch
    simulated: dict[str, Array] | None  # with its quantization; None: nothing is quantized


class Checker:
    """The reference model and the inputs that all components are compared on.

    Args:
        checkpoint: what the components were made from.
        image_size: what they were made for.
        samples: of the calibration, to compare on; None: noise.
        quantization: of the components; None: none.
        whole: hold the whole reference in memory. Otherwise each component is compared with a
            first, a middle and a last block of its tower, one after the other: graph and
            reference are both run with the others left out, so that one block is in memory.
        preprocessing: of graphs that take levels; None: they take normalised values.

    Raises:
        VerificationError: a range is wider than what calibration saw.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        image_size: int,
        samples: Samples | None = None,
        quantization: Quantization | None = None,
        *,
        whole: bool = True,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.quantization = quantization
        if quantization is not None:
            require_seen_ranges(quantization.statistics, quantization.scales, quantization.recipe)
        self.feeds = sample_feeds(self.config, image_size)
        if samples is not None:
            self.feeds = sample_feeds(
                self.config,
                image_size,
                pixel_values=samples.pixel_values[-1][-SAMPLES:].numpy(),
                input_ids=samples.input_ids[-1][-SAMPLES:].numpy() if samples.input_ids else None,
            )
            if samples.caption_ids:
                self.feeds["caption_ids"] = samples.caption_ids[-1][-SAMPLES:].numpy()
        self.preprocessing = preprocessing
        self.feeds = on_levels(self.feeds, preprocessing)
        self.model = self.simulated = None
        if whole:
            self.model = load_model(checkpoint)
            if quantization is not None:
                self.simulated = load_model(quantization.source)
            self.feeds = with_hidden_state(self.model, self.feeds, self.config)
        else:
            self.feeds = with_noise(self.feeds, self.config, image_size)

    def check(
        self, component: str, path: Path, precision: str, *, base: str = "fp32"
    ) -> dict[str, Any]:
        """Compare the graph at ``path``, and return the figures for the manifest.

        Args:
            component: its name.
            path: its graph.
            precision: decides the bound against the reference.
            base: what the graph computes in around its 8-bit products.

        Raises:
            VerificationError: it disagrees with the reference, or with the simulation of what
                its quantization should do.
        """
        (figures,) = self._check(component, {path: base}, precision)
        return figures

    def check_both(
        self, component: str, path: Path, precision: str, base: str, engine_base: str
    ) -> dict[str, Any]:
        """Compare a component's graph, and the one for engines where it has one of its own."""
        other = path.with_name(engine_graph(component, engine_base))
        graphs = {path: base} | ({other: engine_base} if other.exists() else {})
        figures, *others = self._check(component, graphs, precision)
        return figures | ({"engine_graph": others[0]} if others else {})

    def _check(
        self, component: str, graphs: Mapping[Path, str], precision: str
    ) -> list[dict[str, Any]]:
        """Compare graphs of a component, given with their bases, with one run of the reference."""
        for path in graphs:
            self._audit(component, path)
        compared: list[list[dict[str, Any]]] = [[] for _ in graphs]
        capacity = graph_capacity(ir.load(next(iter(graphs))))
        feeds = component_feeds(component, self.feeds, self.config, capacity)
        for part in self._parts(component):
            expected = self._expected(component, part, feeds)
            for figures, (path, base) in zip(compared, graphs.items(), strict=True):
                figures.append(self._compare(component, part, path, precision, base, expected))
        blocks = self._blocks(component)
        worst = (min(of_one, key=lambda f: float(f["sqnr_db"])) for of_one in compared)
        return [figures | ({"blocks": blocks} if blocks else {}) for figures in worst]

    def _audit(self, component: str, path: Path) -> None:
        """Compare the numbers of a quantized graph with those of its calibration."""
        quantization, stream = self.quantization, COMPONENTS[component].stream
        if quantization is None or stream is None:
            return
        scales = quantization.scales[stream]
        require_as_calibrated(ir.load(path), path.name, scales, quantization.recipe)

    def _blocks(self, component: str) -> list[int]:
        """List the blocks to compare one after the other; none where all are compared at once."""
        tower = COMPONENTS[component].tower
        if self.model is not None or tower is None:
            return []
        _, depth = towers_of(self.config)[tower]
        return sorted({0, depth // 2, depth - 1})

    def _parts(self, component: str) -> Iterator[_Part]:
        if self.model is not None:
            yield _Part(module=build_component(COMPONENTS[component], self.model))
            return
        for block in self._blocks(component) or [0]:
            module, rename = component_of_one_block(self.checkpoint, component, block)
            has_tower = COMPONENTS[component].tower is not None
            yield _Part(module=module, rename=rename, block=block if has_tower else None)

    def _expected(self, component: str, part: _Part, feeds: dict[str, Array]) -> _Expected:
        reference, simulated = self._reference(component, part, feeds), None
        stream = COMPONENTS[component].stream
        if self.quantization is not None and stream is not None:
            twin = self._simulated(component, part)
            with self.quantization.applied_to(twin.module, stream, twin.rename):
                simulated = self._reference(component, twin, feeds)
        return _Expected(feeds=feeds, reference=reference, simulated=simulated)

    def _compare(
        self,
        component: str,
        part: _Part,
        path: Path,
        precision: str,
        base: str,
        expected: _Expected,
    ) -> dict[str, Any]:
        feeds, reference, simulated = expected.feeds, expected.reference, expected.simulated
        actual = self._run(component, part, path, feeds)
        measured = agreements(reference, actual)
        where = component if part.block is None else f"{component}, block {part.block}"
        # After missing blocks activations leave the ranges that they were calibrated for: the
        # simulation shows the same clipping, the reference does not.
        if simulated is None or part.block is None:
            own = precision_of(precision, component)
            own = "fp32" if COMPONENTS[component].tower == QUERIES_PREFIX else own
            require_agreement(measured, where, base if own == "fp32" else own)
        figures = summary(measured, len(next(iter(feeds.values()))))
        if simulated is None:
            return figures
        rounded = agreements(simulated, actual)
        bound = "simulated" if base == "fp32" else "simulated, 16-bit"
        require_agreement(rounded, where, bound if part.block is None else f"{bound}, one block")
        ceiling = math.inf if base == "fp32" else BOUNDS[base][1]
        _require_no_loss(where, measured, agreements(reference, simulated), rounded, ceiling)
        if part.block is not None:
            return summary(rounded, figures["samples"]) | {"against": "simulated quantization"}
        figures["simulated_sqnr_db"] = min(f.sqnr_db for f in rounded.values())
        return figures

    def _simulated(self, component: str, part: _Part) -> _Part:
        """Build the same part of the model in the form that the recipe quantizes."""
        if self.simulated is not None:
            return _Part(module=build_component(COMPONENTS[component], self.simulated))
        assert self.quantization is not None and part.block is not None
        module, rename = component_of_one_block(self.quantization.source, component, part.block)
        return _Part(module=module, rename=rename, block=part.block)

    def _run(
        self, component: str, part: _Part, path: Path, feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        model = ir.load(path)
        tower = COMPONENTS[component].tower
        if part.block is not None and tower is not None:
            keep_block(model, tower, part.block)
        graph, options = runnable(model), OrtOptions(exact=True)
        with OrtSession(path, graph=graph, options=options) as session:
            # a cache has the graph's dtype, and one block's is one layer's
            return run_as_reference(session, feeds, self.preprocessing)

    def _reference(
        self, component: str, part: _Part, feeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        """Compute the module's outputs, under the graph's names."""
        if part.block is None:
            return reference_outputs(part.module, component, feeds, self.config)
        outputs = reference_outputs(part.module, component, feeds, with_depth(self.config, 1, 1))
        return {name.replace(".0.", f".{part.block}."): values for name, values in outputs.items()}


def graph_capacity(model: ir.Model) -> int | None:
    """Count the positions of a decoder's cache that is written in place; None: it grows."""
    return capacity_of({spec.name: spec for spec in tensor_specs(model.graph.inputs)})


def run_as_reference(
    session: OrtSession, feeds: Mapping[str, Array], preprocessing: Preprocessing | None
) -> dict[str, Array]:
    """Run a graph on the feeds of its reference: outputs in the shapes that the reference gives."""
    given = in_place(feeds, session.inputs)
    outputs = session.run(graph_feeds(session.inputs, given, preprocessing))
    if capacity_of(session.inputs) is None:
        return outputs
    return grown(outputs, feeds[MASK].shape[1])


def runnable(model: ir.Model) -> bytes:
    """Change a graph, in place, to one that ONNX Runtime computes correctly on this CPU."""
    widen(model)
    if products_saturate():
        take_unsigned_weights(model)
    graph: bytes = ir.to_proto(model).SerializeToString()
    return graph


def _require_no_loss(
    where: str,
    measured: Mapping[str, Agreement],
    possible: Mapping[str, Agreement],
    rounded: Mapping[str, Agreement],
    ceiling_db: float,
) -> None:
    """Refuse a graph that is further from the reference than its quantization has to be.

    Roundings that fall to the other side make graph and simulation drift apart in deep models
    without making either worse; a scale that is too coarse makes the graph worse. Of a graph in 16
    bits no more than ``ceiling_db`` is asked.
    """
    for name, figure in measured.items():
        wanted = min(possible[name].sqnr_db, ceiling_db) - MAX_LOSS_DB
        if figure.sqnr_db < wanted and rounded[name].sqnr_db < SAME_DB:
            raise VerificationError(
                f"{where}, output {name!r}: expected at least {wanted:.1f} dB against PyTorch, as "
                f"its recipe allows, found {figure.sqnr_db:.1f} dB"
            )


def reference_nbytes(checkpoint: Checkpoint) -> int:
    """Compute the memory of the float32 reference."""
    parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    return parameters * FLOAT32_NBYTES


def is_compared_whole(checkpoint: Checkpoint, verify: Which) -> bool:
    """Tell whether the whole reference is held in memory, rather than one block at a time."""
    return verify == "full" or reference_nbytes(checkpoint) <= MAX_WHOLE_NBYTES


def _cost(plan: Plan) -> Cost:
    whole = is_compared_whole(plan.checkpoint, plan.options.verify)
    compared, seconds = reference_nbytes(plan.checkpoint), 1.0
    if not whole:
        # one block, and what comes before and after its tower
        blocks = block_sizes(plan)
        other = compared // FLOAT32_NBYTES - sum(blocks.values())
        head = plan.source.tensors.get(LLAMA_HEAD)
        other -= 0 if head is None else math.prod(head.shape)
        compared = FLOAT32_NBYTES * (max(blocks.values()) + other)
        seconds = 3.0
    graphs = 1 if plan.base == plan.engine_base else 2
    is_by_choice = plan.options.verify == "full" and not is_compared_whole(plan.checkpoint, "auto")
    remedy = "--verify auto compares one block at a time, " if is_by_choice else ""
    copies = VERIFY_COPIES["quantized" if plan.recipe is not None else plan.base]
    return Cost(
        name="verify",
        memory_nbytes=IMPORTS_NBYTES + int(copies * compared) + _cache_nbytes(plan, whole=whole),
        disk_nbytes=0,
        remedy=f"{remedy}--verify none leaves the comparison out",
        seconds=graphs
        * len(plan.components)
        * seconds
        * (1.0 + compared / VERIFY_NBYTES_PER_SECOND),
    )


def _cache_nbytes(plan: Plan, *, whole: bool) -> int:
    """Compute the bytes of a decoder's cache of fixed capacity while it is compared."""
    llama, capacity = language_config(plan.checkpoint.config), plan.options.cache_capacity
    if llama is None or capacity is None:
        return 0
    layers = llama.num_hidden_layers if whole else 1
    position = 2 * llama.num_key_value_heads * llama.head_dim  # a key and a value
    return FLOAT32_NBYTES * CACHE_COPIES * VERIFIED_TEXTS * layers * position * capacity


# --- a directory and its checkpoint --------------------------------------------------------------


def open_source(artifact: Artifact, checkpoint: Path) -> Checkpoint:
    """Open the checkpoint that a directory was made from.

    Raises:
        UsageError: it is another one.
    """
    opened = open_checkpoint(checkpoint)
    expected = artifact.manifest.source["files"]
    files = source_files(opened.shards)
    if files != expected:
        of_old = {name: shard["nbytes"] for name, shard in expected.items()}
        of_this = {name: shard["nbytes"] for name, shard in files.items()}
        difference = (
            "its shards have the same names and sizes, and other tensors"
            if of_old == of_this
            else f"expected {_listed(of_old)}, found {_listed(of_this)}"
        )
        raise UsageError(
            f"{artifact.path} was not made from {checkpoint}: {difference}; name its checkpoint "
            f"with --checkpoint, a folder that was called {artifact.manifest.source['checkpoint']}"
        )
    return opened


def _listed(shards: Mapping[str, int]) -> str:
    """List the first shards with their sizes."""
    some = [f"{name} of {nbytes} bytes" for name, nbytes in [*shards.items()][:MAX_LISTED]]
    return ", ".join([*some, *[f"{len(shards) - MAX_LISTED} more"] * (len(shards) > MAX_LISTED)])


def quantization_of(artifact: Artifact, checkpoint: Checkpoint) -> Quantization | None:
    """Read how a published directory is quantized; None where it is not."""
    if artifact.manifest.recipe is None:
        return None
    recipe = Recipe.from_json(artifact.manifest.recipe)
    return Quantization.read(artifact.path, recipe, source_of(checkpoint, recipe))
