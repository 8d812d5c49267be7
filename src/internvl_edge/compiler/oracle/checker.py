"""A comparison of every component's graphs with PyTorch, and with their simulated quantization.

Whether a graph is the model is a matter of equality, and held without regard to the checkpoint:

    its numbers   every pair, type, scale and axis is what calibration gave (``scales``)
    its outputs   equal those of the simulation of its quantization within float arithmetic; or,
                  where roundings fell to the other side on the way and made both drift apart,
                  those of the graph without roundings, in float32, equal the simulation's without

One rounding that falls to the other side moves what comes after it by a step of its format, and
more roundings with it. In deep towers or in FP8 graph and simulation are then as far from each
other as from PyTorch, and neither is wrong; so the second comparison leaves the roundings out,
which the first line has held one by one.

What the precision costs is the distance from PyTorch. It is measured and said. It refuses a
component where it is beyond a bound that the user set, or where no signal is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from internvl_edge.artifact.components import COMPONENTS, cpu_graph, cuda_graph, engine_graph
from internvl_edge.compiler.oracle.expected import Expected, Part, Reference
from internvl_edge.compiler.oracle.joined import require_joined
from internvl_edge.compiler.oracle.run_graph import (
    Form,
    rewrite_for_cpu,
    rewrite_for_cuda,
    run_part,
)
from internvl_edge.compiler.oracle.scales import require_as_calibrated, require_seen_ranges
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.compiler.plan import Hardware
from internvl_edge.export.advice import advice, advice_of
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.compare import (
    Agreement,
    CostBounds,
    agreements,
    agrees,
    component_feeds,
    floor_db,
    one_row,
    require_agreement,
    require_cost,
    sample_feeds,
    summary,
    with_hidden_state,
    with_noise,
)
from internvl_edge.export.graph.signature import graph_capacity
from internvl_edge.export.graph.uint8_input import on_levels
from internvl_edge.export.towers.streams import Samples, last_samples
from internvl_edge.runtime.images.transform import Preprocessing

SAMPLES = 4  # of the calibration set, to compare quantized components on
SAME_DB = 70.0  # compared with the simulation: the same numbers
COSTLY = 3  # layers that are named
# Further graphs of a component, by the function that names them → how they are made.
FORMS: Mapping[Callable[[str], str], Form] = {
    cuda_graph: rewrite_for_cuda,
    cpu_graph: rewrite_for_cpu,
}


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
        bounds: on what a precision may cost. With a quantization and without samples they are held
            on noise, which is wider than what ranges were measured on.
        hardware: what runs the graphs.

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
        bounds: CostBounds | None = None,
        hardware: Hardware = Hardware(),
    ) -> None:
        self.bounds = bounds or CostBounds()
        self._run_part = partial(
            run_part,
            preprocessing=preprocessing,
            device=hardware.device,
            num_threads=hardware.num_threads,
        )
        # Noise leaves the ranges that were calibrated, so that it has no say on what is left
        self.has_floor = quantization is None or samples is not None
        self.inputs = "noise" if samples is None else "calibration"
        self.config = checkpoint.config
        self.quantization = quantization
        if quantization is not None:
            require_seen_ranges(quantization.statistics, quantization.scales, quantization.recipe)
        self.feeds = sample_feeds(self.config, image_size)
        if samples is not None:
            last = last_samples(samples, SAMPLES)
            self.feeds = sample_feeds(
                self.config,
                image_size,
                pixel_values=last.pixel_values[0].numpy(),
                input_ids=last.input_ids[0].numpy() if last.input_ids else None,
            )
            if last.caption_ids:
                self.feeds["caption_ids"] = last.caption_ids[0].numpy()
            if last.chat_ids:
                self.feeds["chat_ids"] = last.chat_ids[0].numpy()
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
        (figures,) = self._check(component, {path: base}, precision, {})
        return figures

    def check_both(
        self,
        component: str,
        path: Path,
        precision: str,
        base: str,
        engine_base: str,
        listed: Container[str] | None = None,
    ) -> dict[str, Any]:
        """Compare a component's graph, and the one for engines where it has one of its own.

        Of a published directory, ``listed`` are its files; what is not among them does not exist.
        """
        other = path.with_name(engine_graph(component, engine_base))
        has_other = other.exists() if listed is None else other.name in listed
        graphs = {path: base} | ({other: engine_base} if has_other else {})
        forms = {path.with_name(name(component)): form for name, form in FORMS.items()}
        fused = {
            one: form
            for one, form in forms.items()
            if (one.exists() if listed is None else one.name in listed)
        }
        figures, *others = self._check(component, graphs, precision, fused)
        return figures | ({"engine_graph": others[0]} if others else {})

    def check_joined(self, directory: Path, listed: Container[str]) -> None:
        """Compare the graph that joins two components with them; see ``require_joined``."""
        require_joined(directory, self.feeds, listed)

    def _check(
        self,
        component: str,
        graphs: Mapping[Path, str],
        precision: str,
        fused: Mapping[Path, Form],
    ) -> list[dict[str, Any]]:
        """Compare graphs of a component, given with their bases, with one run of the reference.

        Those for ONNX Runtime's providers, ``fused``, are compared with the first of them.
        """
        for path in graphs:
            self._audit(component, path)
        compared: list[list[dict[str, Any]]] = [[] for _ in graphs]
        capacity = graph_capacity(ir.load(next(iter(graphs))))
        feeds = component_feeds(component, self.feeds, self.config, capacity)
        for part in self.reference.parts(component):
            expected = self.reference.expected(component, part, feeds)
            for figures, (path, base) in zip(compared, graphs.items(), strict=True):
                figures.append(self._compare(component, part, path, precision, base, expected))
            for other, form in fused.items():
                self._require_form(component, part, next(iter(graphs)), other, form, expected)
        blocks = self.reference.blocks(component)
        worst = (min(of_one, key=lambda f: float(f["sqnr_db"])) for of_one in compared)
        more: dict[str, Any] = {"blocks": blocks} if blocks else {}
        if costly := self._costly(component):
            more["costly_layers"] = costly
        if self.bounds and not blocks:
            more["bounds"] = self.bounds.to_json()
        return [figures | more | {"inputs": self.inputs} for figures in worst]

    def _costly(self, component: str) -> list[dict[str, Any]]:
        """Name the component's layers that lose most to rounding, the worst first."""
        stream = COMPONENTS[component].stream
        if self.quantization is None:
            return []
        rows = [row for row in self.quantization.statistics if row.stream == stream]
        rows.sort(key=lambda row: (-row.noise, row.weight))
        return [
            {
                "layer": row.weight.removesuffix(".weight"),
                "input_sqnr_db": row.input_sqnr_db,
                "weight_sqnr_db": row.weight_sqnr_db,
            }
            for row in rows[:COSTLY]
        ]

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
        actual = self._run_part(path, tower, part.block, feeds)
        measured = agreements(reference, actual)
        where = component if part.block is None else f"{component}, block {part.block}"
        rounded = measured if simulated is None else agreements(simulated, actual)
        if not agrees(rounded, base):
            self._require_same(component, part, path, base, expected, rounded)
        if part.block is None:
            floor, costly = floor_db(precision, component), self._costly(component)
            is_rounded = simulated is not None
            words = advice_of(precision, component, costly) if is_rounded else advice(base, costly)
            require_cost(
                measured, where, self.bounds, floor if self.has_floor else -math.inf, words
            )
        figures = summary(measured, len(next(iter(feeds.values()))))
        if simulated is None:
            return figures
        if part.block is not None:
            return summary(rounded, figures["samples"]) | {"against": "simulated quantization"}
        figures["simulated_sqnr_db"] = min(f.sqnr_db for f in rounded.values())
        return figures

    def _require_form(
        self, component: str, part: Part, path: Path, fused: Path, form: Form, expected: Expected
    ) -> None:
        """Compare a provider's graph with the published one, or a block of both, in float32.

        A decoder's for CUDA is for rows without padding.

        Raises:
            VerificationError: they differ.
        """
        tower, feeds, block = COMPONENTS[component].tower, expected.feeds, part.block
        if COMPONENTS[component].takes_cache and form is rewrite_for_cuda:
            feeds = one_row(feeds)
        published = self._run_part(path, tower, block, feeds, unrounded=True)
        if block is None:
            actual = self._run_part(fused, tower, None, feeds, unrounded=True)
        else:
            actual = self._run_part(path, tower, block, feeds, unrounded=True, form=form)
        where = fused.name if block is None else f"{fused.name}, block {block}"
        require_agreement(agreements(published, actual), where, "fp32", path.name)

    def _require_same(
        self,
        component: str,
        part: Part,
        path: Path,
        base: str,
        expected: Expected,
        found: Mapping[str, Agreement],
    ) -> None:
        """Compare a graph with its reference, both in float32 and without rounding activations.

        Raises:
            VerificationError: they differ; says how far apart they were.
        """
        where = component if part.block is None else f"{component}, block {part.block}"
        has_twin = expected.simulated is not None or base != "fp32"
        if has_twin:
            tower = COMPONENTS[component].tower
            actual = self._run_part(path, tower, part.block, expected.feeds, unrounded=True)
            found = agreements(expected.unrounded(), actual)
        is_rounded = expected.simulated is not None
        reference = "the simulation of its quantization" if is_rounded else "PyTorch"
        require_agreement(found, where, base, reference)
