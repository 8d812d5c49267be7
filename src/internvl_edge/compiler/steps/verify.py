"""Every component of a directory beside the PyTorch reference, before anyone may use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from internvl_edge.artifact.components import COMPONENTS, QUERIES_PREFIX
from internvl_edge.compiler.oracle.scales import require_as_calibrated, require_seen_ranges
from internvl_edge.compiler.oracle.simulate import STORED_SUFFIXES, Scales, fake_quantized
from internvl_edge.compiler.plan import Verify
from internvl_edge.compiler.steps.graphs import tensor_specs
from internvl_edge.compiler.steps.weights import towers_of
from internvl_edge.errors import VerificationError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.load import load_model
from internvl_edge.export.checkpoint.shards import read_header
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
from internvl_edge.export.components import build_component
from internvl_edge.export.config.checkpoint import with_depth
from internvl_edge.export.graph.bf16_twin import widen
from internvl_edge.export.graph.repeat import keep_block
from internvl_edge.export.graph.uint8_input import graph_feeds, on_levels
from internvl_edge.export.precision import precision_of
from internvl_edge.export.towers.blocks import component_of_one_block
from internvl_edge.export.towers.streams import Samples
from internvl_edge.quantize.calibration.block import SMOOTHING_SUFFIX
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.graph.unsigned import take_unsigned_weights
from internvl_edge.quantize.numerics.statistics import LayerStatistics
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.runtime.generation.fixed_cache import MASK, capacity_of, grown, in_place
from internvl_edge.runtime.images.transform import Preprocessing
from internvl_edge.runtime.ort.cpu import products_saturate
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.ort.session import OrtSession
from internvl_edge.types import Array

SAMPLES = 4  # of the calibration set, to compare quantized components on
FLOAT32_NBYTES = 4
MAX_WHOLE_NBYTES = 4_000_000_000  # of a float32 reference that --verify auto holds: 1 B parameters
MAX_LOSS_DB = 3.0  # of a quantized graph, against the simulation of its quantization
SAME_DB = 70.0  # beside the simulation: the same numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What the simulation of a quantized directory needs."""

    recipe: Recipe
    scales: Scales
    stored: Mapping[str, Array]  # scales, factors, biases and shifts, from the weights file
    source: Checkpoint  # in the form that the recipe quantizes
    statistics: tuple[LayerStatistics, ...] = ()  # what calibration saw
    held: Callable[[str], Array | None] | None = None  # a weight's stored values; for GPTQ


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is compared at once: a component, or a component with one block of its tower."""

    module: nn.Module
    rename: Callable[[str], str] = str  # the checkpoint's name of a parameter
    block: int | None = None  # None: all


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
        """Compare the graph at ``path``; the figures for the manifest.

        Args:
            component: its name.
            path: its graph.
            precision: decides the bound beside the reference.
            base: what the graph computes in around its 8-bit products.

        Raises:
            VerificationError: it disagrees with the reference, or with the simulation of what
                its quantization should do.
        """
        self._audit(component, path)
        found = [
            self._compare(component, part, path, precision, base) for part in self._parts(component)
        ]
        worst = min(found, key=lambda figures: float(figures["sqnr_db"]))
        blocks = self._blocks(component)
        return worst | ({"blocks": blocks} if blocks else {})

    def _audit(self, component: str, path: Path) -> None:
        """Hold the numbers of a quantized graph against those of its calibration."""
        quantization, stream = self.quantization, COMPONENTS[component].stream
        if quantization is None or stream is None:
            return
        scales = quantization.scales[stream]
        require_as_calibrated(ir.load(path), path.name, scales, quantization.recipe)

    def _blocks(self, component: str) -> list[int]:
        """The blocks to compare one after the other; none where all are compared at once."""
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

    def _compare(
        self, component: str, part: _Part, path: Path, precision: str, base: str
    ) -> dict[str, Any]:
        chosen, capacity = COMPONENTS[component], graph_capacity(ir.load(path))
        feeds = component_feeds(component, self.feeds, self.config, capacity)
        actual = self._run(component, part, path, feeds)
        reference = self._reference(component, part, feeds)
        found = agreements(reference, actual)
        where = component if part.block is None else f"{component}, block {part.block}"
        # Behind missing blocks activations leave the ranges that they were calibrated for: the
        # simulation shows the same clipping, the reference does not.
        quantization = None if chosen.stream is None else self.quantization
        if quantization is None or part.block is None:
            own = precision_of(precision, component)
            own = "fp32" if chosen.tower == QUERIES_PREFIX else own
            require_agreement(found, where, base if own == "fp32" else own)
        figures = summary(found, len(next(iter(feeds.values()))))
        if quantization is None or chosen.stream is None:
            return figures
        scales = quantization.scales[chosen.stream]
        twin = self._simulated(component, part)
        config = quantization.source.config
        with fake_quantized(
            twin.module,
            scales,
            quantization.recipe,
            quantization.stored,
            config,
            twin.rename,
            quantization.held,
        ):
            simulated = self._reference(component, twin, feeds)
        beside = agreements(simulated, actual)
        bound = "simulated" if base == "fp32" else "simulated, 16-bit"
        require_agreement(beside, where, bound if part.block is None else f"{bound}, one block")
        ceiling = math.inf if base == "fp32" else BOUNDS[base][1]
        _require_no_loss(where, found, agreements(reference, simulated), beside, ceiling)
        if part.block is not None:
            return summary(beside, figures["samples"]) | {"against": "simulated quantization"}
        figures["simulated_sqnr_db"] = min(f.sqnr_db for f in beside.values())
        return figures

    def _simulated(self, component: str, part: _Part) -> _Part:
        """The same part of the model in the form that the recipe quantizes."""
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
        """The module's outputs under the graph's names."""
        if part.block is None:
            return reference_outputs(part.module, component, feeds, self.config)
        found = reference_outputs(part.module, component, feeds, with_depth(self.config, 1, 1))
        return {name.replace(".0.", f".{part.block}."): values for name, values in found.items()}


def graph_capacity(model: ir.Model) -> int | None:
    """How many positions a decoder's cache has that is written in place; None: it grows."""
    return capacity_of({spec.name: spec for spec in tensor_specs(model.graph.inputs)})


def run_as_reference(
    session: OrtSession, feeds: Mapping[str, Array], preprocessing: Preprocessing | None
) -> dict[str, Array]:
    """Outputs for the feeds of a component's reference, in the shapes that the reference gives."""
    given = in_place(feeds, session.inputs)
    found = session.run(graph_feeds(session.inputs, given, preprocessing))
    if capacity_of(session.inputs) is None:
        return found
    return grown(found, feeds[MASK].shape[1])


def runnable(model: ir.Model) -> bytes:
    """A graph, changed in place, as ONNX Runtime computes it on this CPU to what it stands for."""
    widen(model)
    if products_saturate():
        take_unsigned_weights(model)
    graph: bytes = ir.to_proto(model).SerializeToString()
    return graph


def _require_no_loss(
    where: str,
    found: Mapping[str, Agreement],
    possible: Mapping[str, Agreement],
    beside: Mapping[str, Agreement],
    ceiling_db: float,
) -> None:
    """A graph may not be further from the reference than its quantization has to be.

    Roundings that fall to the other side make graph and simulation drift apart in deep models
    without making either worse; a scale that is too coarse makes the graph worse. Of a graph in 16
    bits no more than ``ceiling_db`` is asked.
    """
    for name, figure in found.items():
        wanted = min(possible[name].sqnr_db, ceiling_db) - MAX_LOSS_DB
        if figure.sqnr_db < wanted and beside[name].sqnr_db < SAME_DB:
            raise VerificationError(
                f"{where}, output {name!r}: expected at least {wanted:.1f} dB beside PyTorch, as "
                f"its recipe allows, found {figure.sqnr_db:.1f} dB"
            )


def stored_changes(weights: Path) -> dict[str, Array]:
    """What calibration left in the towers beside weights: scales, factors, biases and shifts."""
    suffixes = (SMOOTHING_SUFFIX, f".weight{SCALE_SUFFIX}", *STORED_SUFFIXES)
    return {
        name: entry.read()
        for name, entry in read_header(weights).items()
        if ".layers." in name and name.endswith(suffixes)
    }


def values_in(weights: Path) -> Callable[[str], Array | None]:
    """Reads the values of a tensor when asked; None of what no component of a directory reads."""
    entries = read_header(weights)
    return lambda name: entries[name].read() if name in entries else None


def reference_nbytes(checkpoint: Checkpoint) -> int:
    """Memory of the float32 reference."""
    parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    return parameters * FLOAT32_NBYTES


def reason_not_to_verify(verify: Verify) -> str | None:
    """Why components are not compared with PyTorch, or None when they are."""
    return "not verified: --verify none" if verify == "none" else None


def is_compared_whole(checkpoint: Checkpoint, verify: Verify) -> bool:
    """Whether the whole reference is held in memory, rather than one block of it at a time."""
    return verify == "full" or reference_nbytes(checkpoint) <= MAX_WHOLE_NBYTES
