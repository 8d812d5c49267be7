"""The reference with its linear layers fake-quantized: what a quantized graph should compute.

Comparing a quantized component with the float32 reference shows how much quantization costs, but
that cost varies from checkpoint to checkpoint and can hide a mistake: a scale off by two in one
layer of forty may cost less than honest rounding. So the component is also compared with this
simulation, made independently of what was written: from the checkpoint's own weights, folded and
rounded anew, and the activation scales. Where the two differ by more than a few roundings, an
axis, a scale or a pair of Q/DQ is wrong.

What GPTQ rounded cannot be rounded anew without all of calibration. The simulation then takes the
values as they were stored, with scales of its own, once they have been held against the weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from internvl_edge.artifact.components import WEIGHTS_FILE
from internvl_edge.compiler.oracle.rounding import (
    require_scales,
    rounded_attention,
    rounded_weight,
    rounding_hook,
)
from internvl_edge.compiler.oracle.site_factors import move_factors, readers_after
from internvl_edge.errors import ArtifactError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.shards import read_header
from internvl_edge.files.reading import read_json
from internvl_edge.quantize.calibration.attention import scales_by_attention
from internvl_edge.quantize.calibration.folding import SMOOTHING_SUFFIX
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.numerics.statistics import LayerStatistics, read_statistics
from internvl_edge.quantize.recipe import Recipe, is_head
from internvl_edge.types import Array

STORED_SUFFIXES = (".bias", ".shift", ".spread")  # of parameters that calibration sets
SET_BY_CALIBRATION = (SMOOTHING_SUFFIX, f".weight{SCALE_SUFFIX}", *STORED_SUFFIXES)
MAX_SCALES_NBYTES = 64 << 20
SCALES_FILE = "quantization.json"  # stream → weight → activation scale; null: not rounded
Scales = Mapping[str, Mapping[str, float | None]]


def write_scales(directory: Path, scales: Scales) -> None:
    """Write the activation scales next to the graphs that hold them as constants."""
    text = json.dumps({"activation_scales": scales}, indent=1, sort_keys=True)
    (directory / SCALES_FILE).write_text(text + "\n", encoding="utf-8")


def read_scales(directory: Path) -> Scales:
    """Read what :func:`write_scales` wrote.

    Raises:
        ArtifactError: not such a file.
    """
    path = directory / SCALES_FILE
    try:
        scales: Scales = read_json(path, MAX_SCALES_NBYTES, ArtifactError)["activation_scales"]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: expected the activation scales: {error!r}") from error
    return scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a directory is quantized, as far as the simulation needs it."""

    recipe: Recipe
    scales: Scales
    stored: Mapping[str, Array]  # scales, factors, biases and shifts, by checkpoint name
    source: Checkpoint  # in the form that the recipe quantizes
    statistics: tuple[LayerStatistics, ...] = ()  # of what calibration saw
    # Reads the stored values of a weight, for recipes that round by GPTQ; None of a weight that is
    # not stored, and then read by nothing.
    held: Callable[[str], Array | None] | None = None

    @classmethod
    def read(
        cls,
        directory: Path,
        recipe: Recipe,
        source: Checkpoint,
        listed: Collection[str] | None = None,
    ) -> Quantization:
        """Read the quantization of a directory that is published, or about to be.

        Of a published one, ``listed`` are its files; what is not among them does not exist.
        """
        if listed is not None and not {SCALES_FILE, WEIGHTS_FILE} <= set(listed):
            raise ArtifactError(
                f"{directory}: lists no {SCALES_FILE}, {WEIGHTS_FILE}; export again"
            )
        entries = read_header(directory / WEIGHTS_FILE)
        return cls(
            recipe=recipe,
            scales=read_scales(directory),
            stored={
                name: entry.read()
                for name, entry in entries.items()
                if _may_be_quantized(name.removesuffix(SCALE_SUFFIX))
                and name.endswith(SET_BY_CALIBRATION)
            },
            source=source,
            statistics=read_statistics(directory, listed),
            held=lambda name: entries[name].read() if name in entries else None,
        )

    @contextmanager
    def applied_to(
        self, module: nn.Module, stream: str, rename: Callable[[str], str] = str
    ) -> Iterator[None]:
        """Make ``module`` compute what the quantized component should, while the context lasts.

        Args:
            module: in float32, in the form that the recipe quantizes; restored at the end.
            stream: the component's, whose activation scales apply.
            rename: the checkpoint's name of a parameter of the module.

        Raises:
            VerificationError: scales or values that are not those of a weight; names it.
        """
        recipe, stored, config = self.recipe, self.stored, self.source.config
        scales = self.scales[stream]
        parameters = {rename(name): p for name, p in module.named_parameters()}
        with ExitStack() as stack, torch.no_grad():
            for name, parameter in parameters.items():
                is_stored = name in stored and name.endswith(STORED_SUFFIXES)
                if is_stored or (name.endswith(".weight") and _may_be_quantized(name)):
                    stack.callback(_restore, parameter, parameter.clone())
                if is_stored:
                    parameter.copy_(torch.from_numpy(np.array(stored[name], np.float32)))
            for name, values in stored.items():
                reader = name.removesuffix(SMOOTHING_SUFFIX)
                if reader != name and f"{reader}.weight" in parameters:
                    move_factors(parameters, reader, np.array(values, np.float32), recipe, config)
            for name in parameters.keys() & stored.keys():
                if name.endswith(".spread"):
                    for reader in readers_after(name, config):
                        parameters[f"{reader}.weight"].div_(parameters[name])
            for name, layer in module.named_modules():
                weight = rename(f"{name}.weight")
                if isinstance(layer, nn.Linear) and weight in scales:
                    require_scales(weight, layer.weight, recipe.of(weight), stored)
                    layer.weight.copy_(
                        rounded_weight(weight, layer.weight, recipe.of(weight), self.held, stored)
                    )
                    scale = scales[weight]
                    if scale is not None:
                        hook = rounding_hook(scale, recipe.of(weight))
                        stack.callback(layer.register_forward_pre_hook(hook).remove)
            attentions = scales_by_attention(scales)
            for name, core in module.named_modules():
                attention = attentions.get(rename(name))
                if attention is not None:
                    hook = rounded_attention(attention)
                    stack.callback(core.register_forward_hook(hook).remove)
            yield


def _may_be_quantized(name: str) -> bool:
    return ".layers." in name or is_head(name)


def _restore(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)
