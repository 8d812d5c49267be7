"""Outputs that components should have: PyTorch's, and those of the simulated quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from torch import nn

from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.compiler.oracle.simulate import Quantization
from internvl_edge.compiler.weights.layout import towers_of
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.load import load_model
from internvl_edge.export.compare import reference_outputs
from internvl_edge.export.components import build_component
from internvl_edge.export.config.checkpoint import with_depth
from internvl_edge.export.towers.blocks import component_of_one_block
from internvl_edge.types import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that is compared at once: a component, or one with a single block of its tower."""

    module: nn.Module
    rename: Callable[[str], str] = str  # the checkpoint's name of a parameter
    block: int | None = None  # None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The outputs that graphs of a component, or of one block of it, should have."""

    feeds: dict[str, Array]
    reference: dict[str, Array]  # of PyTorch
    simulated: dict[str, Array] | None  # with its quantization; None: nothing is quantized
    unrounded: Callable[[], dict[str, Array]]  # with rounded weights, and activations as they are


class Reference:
    """The reference model of a checkpoint, and its twin in the form that a recipe quantizes.

    Args:
        checkpoint: what the components were made from.
        quantization: of the components; None: none.
        whole: hold both in memory; otherwise one block of a tower at a time.
    """

    def __init__(
        self, checkpoint: Checkpoint, quantization: Quantization | None, *, whole: bool
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.quantization = quantization
        self.model = self.simulated = None
        if whole:
            self.model = load_model(checkpoint)
            if quantization is not None:
                self.simulated = load_model(quantization.source)

    def blocks(self, component: str) -> list[int]:
        """List the blocks to compare one after the other; none where all are compared at once."""
        tower = COMPONENTS[component].tower
        if self.model is not None or tower is None:
            return []
        _, depth = towers_of(self.config)[tower]
        return sorted({0, depth // 2, depth - 1})

    def parts(self, component: str) -> Iterator[Part]:
        """Build the parts of a component that are compared at once, one after the other."""
        if self.model is not None:
            yield Part(module=build_component(COMPONENTS[component], self.model))
            return
        for block in self.blocks(component) or [0]:
            module, rename = component_of_one_block(self.checkpoint, component, block)
            has_tower = COMPONENTS[component].tower is not None
            yield Part(module=module, rename=rename, block=block if has_tower else None)

    def expected(self, component: str, part: Part, feeds: dict[str, Array]) -> Expected:
        """Compute the outputs that a part's graphs should have."""
        reference, simulated = self._outputs(component, part, feeds), None
        stream = COMPONENTS[component].stream
        if self.quantization is not None and stream is not None:
            simulated = self._rounded(component, part, feeds, self.quantization)

        def unrounded() -> dict[str, Array]:
            if self.quantization is None or stream is None:
                return reference
            bare = {stream: dict.fromkeys(self.quantization.scales[stream])}
            return self._rounded(component, part, feeds, replace(self.quantization, scales=bare))

        return Expected(
            feeds=feeds, reference=reference, simulated=simulated, unrounded=cache(unrounded)
        )

    def _rounded(
        self, component: str, part: Part, feeds: Mapping[str, Array], quantization: Quantization
    ) -> dict[str, Array]:
        """Compute the outputs of a part with a quantization."""
        stream = COMPONENTS[component].stream
        assert stream is not None
        twin = self._simulated(component, part)
        with quantization.applied_to(twin.module, stream, twin.rename):
            return self._outputs(component, twin, feeds)

    def _simulated(self, component: str, part: Part) -> Part:
        """Build the same part of the model in the form that the recipe quantizes."""
        if self.simulated is not None:
            return Part(module=build_component(COMPONENTS[component], self.simulated))
        assert self.quantization is not None and part.block is not None
        module, rename = component_of_one_block(self.quantization.source, component, part.block)
        return Part(module=module, rename=rename, block=part.block)

    def _outputs(self, component: str, part: Part, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the module's outputs, under the graph's names."""
        if part.block is None:
            return reference_outputs(part.module, component, feeds, self.config)
        outputs = reference_outputs(part.module, component, feeds, with_depth(self.config, 1, 1))
        return {name.replace(".0.", f".{part.block}."): values for name, values in outputs.items()}
