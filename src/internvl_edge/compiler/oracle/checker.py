"""A comparison of every component's graphs with PyTorch, and with their simulated quantization."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from internvl_edge.artifact.components import COMPONENTS, QUERIES_PREFIX
from internvl_edge.compiler.oracle.expected import Expected, Part, Reference
from internvl_edge.compiler.oracle.run_graph import graph_capacity, run_part
from internvl_edge.compiler.oracle.scales import require_as_calibrated, require_seen_ranges
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.compiler.steps.graph_files import engine_graph
from internvl_edge.errors import VerificationError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.compare import (
    BOUNDS,
    Agreement,
    agreements,
    component_feeds,
    require_agreement,
    sample_feeds,
    summary,
    with_hidden_state,
    with_noise,
)
from internvl_edge.export.graph.uint8_input import on_levels
from internvl_edge.export.precision import precision_of
from internvl_edge.export.towers.streams import Samples
from internvl_edge.runtime.images.transform import Preprocessing

SAMPLES = 4  # of the calibration set, to compare quantized components on
MAX_LOSS_DB = 3.0  # of a quantized graph, against the simulation of its quantization
SAME_DB = 70.0  # compared with the simulation: the same numbers


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
        self.config = checkpoint.config
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
        self.reference = Reference(checkpoint, quantization, whole=whole)
        if self.reference.model is not None and not checkpoint.is_partial:
            self.feeds = with_hidden_state(self.reference.model, self.feeds, self.config)
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
        for part in self.reference.parts(component):
            expected = self.reference.expected(component, part, feeds)
            for figures, (path, base) in zip(compared, graphs.items(), strict=True):
                figures.append(self._compare(component, part, path, precision, base, expected))
        blocks = self.reference.blocks(component)
        worst = (min(of_one, key=lambda f: float(f["sqnr_db"])) for of_one in compared)
        return [figures | ({"blocks": blocks} if blocks else {}) for figures in worst]

    def _audit(self, component: str, path: Path) -> None:
        """Compare the numbers of a quantized graph with those of its calibration."""
        quantization, stream = self.quantization, COMPONENTS[component].stream
        if quantization is None or stream is None:
            return
        scales = quantization.scales[stream]
        require_as_calibrated(ir.load(path), path.name, scales, quantization.recipe)

    def _compare(
        self,
        component: str,
        part: Part,
        path: Path,
        precision: str,
        base: str,
        expected: Expected,
    ) -> dict[str, Any]:
        feeds, reference, simulated = expected.feeds, expected.reference, expected.simulated
        tower = COMPONENTS[component].tower
        actual = run_part(path, tower, part.block, feeds, self.preprocessing)
        measured = agreements(reference, actual)
        where = component if part.block is None else f"{component}, block {part.block}"
        # After missing blocks activations leave the ranges that they were calibrated for: the
        # simulation shows the same clipping, the reference does not.
        if simulated is None or part.block is None:
            own = precision_of(precision, component)
            own = "fp32" if tower == QUERIES_PREFIX else own
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
