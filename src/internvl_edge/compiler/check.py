"""Every component of a directory beside the PyTorch reference, before anyone may use it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.compiler.options import Verify
from internvl_edge.compiler.simulate import Scales, fake_quantized
from internvl_edge.errors import VerificationError
from internvl_edge.export.blocks import COMPONENT_STREAM, LLAMA_NORMS, VISION_NORMS, Samples
from internvl_edge.export.checkpoint import Checkpoint, load_reference, read_header
from internvl_edge.export.components import COMPONENTS
from internvl_edge.export.verify import (
    Agreement,
    agreements,
    reference_outputs,
    require_agreement,
    sample_feeds,
    summary,
    with_hidden_state,
)
from internvl_edge.export.widen import widen
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.runtime.ort import OrtSession

Array = np.ndarray[Any, Any]
SAMPLES = 4  # of the calibration set, to compare quantized components on
FLOAT32_NBYTES = 4
MAX_LOSS_DB = 3.0  # of a quantized graph, against the simulation of its quantization
SAME_DB = 45.0  # beside the simulation: the same numbers, but for a few roundings


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What the simulation of a quantized directory needs."""

    recipe: Recipe
    scales: Scales
    folded: Mapping[str, Array]  # norm gains and biases as stored


class Checker:
    """The reference model and the inputs that all components are compared on."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        image_size: int,
        samples: Samples | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        self.config = checkpoint.config
        self.model = load_reference(checkpoint.path)
        self.quantization = quantization
        feeds = sample_feeds(self.config, image_size)
        if samples is not None:
            feeds = sample_feeds(
                self.config,
                image_size,
                pixel_values=samples.pixel_values[-1][-SAMPLES:].numpy(),
                input_ids=samples.input_ids[-1][-SAMPLES:].numpy() if samples.input_ids else None,
            )
        self.feeds = with_hidden_state(self.model, feeds, self.config)

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
        feeds = {name: self.feeds[name] for name in COMPONENTS[component].inputs}
        with OrtSession(path, graph=widen(path)) as session:
            actual = session.run(feeds)
        reference = reference_outputs(self.model, component, feeds, self.config)
        found = agreements(reference, actual)
        require_agreement(found, component, precision)
        figures = summary(found, len(next(iter(feeds.values()))))
        if self.quantization is not None and component in COMPONENT_STREAM:
            simulated = self._simulated(component, feeds, self.quantization)
            beside = agreements(simulated, actual)
            require_agreement(
                beside, component, "simulated" if base == "fp32" else "simulated, 16-bit"
            )
            figures["simulated_sqnr_db"] = min(f.sqnr_db for f in beside.values())
            if base == "fp32":
                _require_no_loss(component, found, agreements(reference, simulated), beside)
        return figures

    def _simulated(
        self, component: str, feeds: Mapping[str, Array], quantization: Quantization
    ) -> dict[str, Array]:
        with fake_quantized(
            self.model,
            component,
            quantization.recipe,
            quantization.scales,
            quantization.folded,
        ):
            return reference_outputs(self.model, component, feeds, self.config)


def _require_no_loss(
    component: str,
    found: Mapping[str, Agreement],
    possible: Mapping[str, Agreement],
    beside: Mapping[str, Agreement],
) -> None:
    """A graph may not be further from the reference than its quantization has to be.

    Roundings that fall to the other side make graph and simulation drift apart in deep models
    without making either worse; a scale that is too coarse makes the graph worse.
    """
    for name, figure in found.items():
        loss = possible[name].sqnr_db - figure.sqnr_db
        if loss > MAX_LOSS_DB and beside[name].sqnr_db < SAME_DB:
            raise VerificationError(
                f"{component}, output {name!r}: expected at least "
                f"{possible[name].sqnr_db - MAX_LOSS_DB:.1f} dB beside PyTorch, as its recipe "
                f"allows, found {figure.sqnr_db:.1f} dB"
            )


def stored_norms(weights: Path) -> dict[str, Array]:
    """Every norm gain and bias that a weights file holds, folded or not."""
    suffixes = tuple(
        f".{norm}.{part}" for norm in (*VISION_NORMS, *LLAMA_NORMS) for part in ("weight", "bias")
    )
    entries = read_header(weights)
    return {name: entry.read() for name, entry in entries.items() if name.endswith(suffixes)}


def reference_nbytes(checkpoint: Checkpoint) -> int:
    """Memory of the float32 reference."""
    parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    return parameters * FLOAT32_NBYTES


def available_memory() -> int:
    """Memory that can be had without swapping, page cache included, in bytes."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reason_not_to_verify(checkpoint: Checkpoint, verify: Verify) -> str | None:
    """Why components are not compared with PyTorch, or None when they are."""
    if verify == "none":
        return "not verified: --verify none"
    needed = reference_nbytes(checkpoint)
    available = available_memory()
    if verify == "auto" and 2 * needed > available:
        return (
            f"not verified: the float32 reference needs {needed / 1e9:.1f} GB twice over, "
            f"{available / 1e9:.1f} GB are free; --verify full insists"
        )
    return None
