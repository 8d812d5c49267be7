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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from internvl_edge.artifact.components import PREFIXES
from internvl_edge.compiler.weights.layout import WEIGHTS_FILE
from internvl_edge.errors import ArtifactError, VerificationError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint
from internvl_edge.export.checkpoint.shards import read_header
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.towers.blocks import sites_of
from internvl_edge.quantize.calibration.attention import (
    SOFTMAX_SCALE,
    AttentionScales,
    scales_by_attention,
)
from internvl_edge.quantize.calibration.block import SMOOTHING_SUFFIX
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX
from internvl_edge.quantize.numerics import formats
from internvl_edge.quantize.numerics.gptq import MAX_MOVED
from internvl_edge.quantize.numerics.int4 import block_of, unpack
from internvl_edge.quantize.numerics.rotation import rotation
from internvl_edge.quantize.numerics.statistics import LayerStatistics, read_statistics
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array

STORED_SUFFIXES = (".bias", ".shift", ".spread")  # of parameters that calibration sets
SET_BY_CALIBRATION = (SMOOTHING_SUFFIX, f".weight{SCALE_SUFFIX}", *STORED_SUFFIXES)
SCALES_FILE = "quantization.json"  # stream → weight → activation scale; null: not rounded
Scales = Mapping[str, Mapping[str, float | None]]
NOISE = 1e-4  # of a weight's largest scale
MOVED_SLACK = 1.1  # of a squared error, folded and rotated once more
SCALE_TOLERANCE = 1e-2  # of a weight's maximum, folded and rotated once more


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
        scales: Scales = json.loads(path.read_text(encoding="utf-8"))["activation_scales"]
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    def read(cls, directory: Path, recipe: Recipe, source: Checkpoint) -> Quantization:
        """Read the quantization of a directory that is published, or about to be."""
        entries = read_header(directory / WEIGHTS_FILE)
        return cls(
            recipe=recipe,
            scales=read_scales(directory),
            stored={
                name: entry.read()
                for name, entry in entries.items()
                if ".layers." in name and name.endswith(SET_BY_CALIBRATION)
            },
            source=source,
            statistics=read_statistics(directory),
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
                if is_stored or (name.removesuffix(".weight") != name and ".layers." in name):
                    stack.callback(_restore, parameter, parameter.clone())
                if is_stored:
                    parameter.copy_(torch.from_numpy(np.array(stored[name], np.float32)))
            for name, values in stored.items():
                reader = name.removesuffix(SMOOTHING_SUFFIX)
                if reader != name and f"{reader}.weight" in parameters:
                    _fold(parameters, reader, np.array(values, np.float32), recipe, config)
            for name in parameters.keys() & stored.keys():
                if name.endswith(".spread"):
                    for reader in _readers_behind(name, config):
                        parameters[f"{reader}.weight"].div_(parameters[name])
            for name, layer in module.named_modules():
                weight = rename(f"{name}.weight")
                if isinstance(layer, nn.Linear) and weight in scales:
                    _require_scales(weight, layer.weight, recipe.of(weight), stored)
                    layer.weight.copy_(_stored(weight, layer.weight, recipe.of(weight), self.held))
                    scale = scales[weight]
                    if scale is not None:
                        hook = _rounding_hook(scale, recipe.of(weight))
                        stack.callback(layer.register_forward_pre_hook(hook).remove)
            attentions = scales_by_attention(scales)
            for name, core in module.named_modules():
                attention = attentions.get(rename(name))
                if attention is not None:
                    hook = _rounded_attention(attention)
                    stack.callback(core.register_forward_hook(hook).remove)
            yield


def _fold(
    parameters: Mapping[str, Tensor],
    reader: str,
    values: Array,
    recipe: Recipe,
    config: CheckpointConfig,
) -> None:
    """Move a site's factors, and its rotation, into its readers and out of what comes before."""
    block, path = _split(reader)
    site = next(s for s in sites_of(config, block) if s.readers[0] == path)
    factors = torch.from_numpy(values)
    is_turned = recipe.rotate and site.head_dim is not None
    if is_turned:
        assert site.head_dim is not None
        head = torch.from_numpy(rotation(site.head_dim, recipe.rotation_seed).matrix())
        turn = torch.kron(torch.eye(factors.numel() // site.head_dim), head)
    for name in site.readers:
        weight = parameters[f"{block}.{name}.weight"]
        weight.mul_(factors)
        if is_turned:
            weight.copy_(weight @ turn)
    if site.norm is not None:  # the bias, if it has one, is stored
        parameters[f"{block}.{site.norm}.weight"].div_(factors)
        return
    weight = parameters[f"{block}.{site.producer}.weight"]
    rows = weight[site.first_row : site.first_row + factors.numel()]
    rows.div_(factors[:, None])
    if is_turned:
        rows.copy_(turn.T @ rows)


def _readers_behind(spread: str, config: CheckpointConfig) -> list[str]:
    """List the linear layers that read what factors after GELU were applied to."""
    block, path = _split(spread)
    sites = [site for site in sites_of(config, block) if site.spread == path]
    return [f"{block}.{reader}" for site in sites for reader in site.readers]


def _split(layer: str) -> tuple[str, str]:
    """Split a layer's full name into its block's and the rest."""
    prefix = next(p for p in PREFIXES if layer.startswith(f"{p}."))
    index, _, path = layer.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{index}", path


def _stored(
    name: str, weight: Tensor, recipe: Recipe, held: Callable[[str], Array | None] | None
) -> Tensor:
    """Give a weight as a graph multiplies by it: rounded anew, or as it is stored."""
    nearest = _rounded(weight, recipe)
    if recipe.rounding == "nearest":
        return nearest
    assert held is not None
    values = held(name)
    if values is None:
        return nearest
    outputs, inputs = weight.shape
    if recipe.weights == "int4":
        values = unpack(values, (inputs, outputs))
    scale = _scales(weight, recipe)  # (N, 1) or (N, K / block, 1)
    blocks = torch.from_numpy(values.astype(np.float32).T.copy()).reshape(*scale.shape[:-1], -1)
    stored = (blocks * scale).reshape(weight.shape)
    far, near = (float((w - weight).square().sum()) for w in (stored, nearest))
    least = NOISE**2 * float(weight.square().sum())
    if not far <= MOVED_SLACK * MAX_MOVED * near + least:
        raise VerificationError(
            f"{name}: expected values near those of the weight, their squared error at most "
            f"{MAX_MOVED:g} times that of rounding to nearest, {near:.3g}, found {far:.3g}"
        )
    return stored


def _rounded(weight: Tensor, recipe: Recipe) -> Tensor:
    """Round a weight per output channel or block, as a builder sees it; plain torch arithmetic."""
    scale = _scales(weight, recipe)
    if recipe.weights == "int4":
        blocks = weight.reshape(*scale.shape[:2], -1)  # (N, K / block, block)
        return ((blocks / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)
    return _round(weight / scale, recipe.weights) * scale


def _scales(weight: Tensor, recipe: Recipe) -> Tensor:
    """Compute the scales of a weight (N, K): (N, 1), of INT4 (N, K / block, 1)."""
    if recipe.weights == "int4":
        block = block_of(weight.shape[1], recipe.block_size)
        peak = weight.reshape(len(weight), -1, block).abs().amax(dim=2, keepdim=True)
    else:
        peak = weight.abs().amax(dim=1, keepdim=True)
        if recipe.granularity == "per-tensor":
            peak = peak.max().expand_as(peak)
    return (peak / _limit(recipe.weights)).clamp_min(formats.MIN_SCALE)


def _limit(fmt: str) -> float:
    return formats.as_format(fmt).max_value


def _require_scales(name: str, weight: Tensor, recipe: Recipe, stored: Mapping[str, Array]) -> None:
    """Hold a weight's stored scales against those that it should have.

    Raises:
        VerificationError: they differ by more than float32 arithmetic does.
    """
    held = stored.get(f"{name}{SCALE_SUFFIX}")
    if held is None:
        return
    expected = _scales(weight, recipe).squeeze(-1).numpy().T.reshape(held.shape)
    # what should be nothing is what rotations leave of it
    far = (np.abs(held - expected) / (expected + NOISE * expected.max())).max()
    if not far <= SCALE_TOLERANCE:
        raise VerificationError(
            f"{name}: expected scales of max |W| / {_limit(recipe.weights):g}, found some that are "
            f"off by {far:.1%}"
        )


def _rounding_hook(scale: float, recipe: Recipe) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (_round(inputs[0] / scale, recipe.weights) * scale,)

    return hook


def _rounded_attention(scales: AttentionScales) -> Any:
    """Make a hook that computes attention with its operands and probabilities in E4M3."""

    def fp8(x: Tensor, scale: float) -> Tensor:
        return _round(x / scale, "fp8") * scale

    def hook(core: Any, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        heads = core.num_heads
        q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in inputs)
        q = fp8(q / q.shape[-1] ** 0.5, scales.query)
        p = (q @ fp8(k, scales.key).transpose(-1, -2)).softmax(dim=-1)
        out = fp8(p, SOFTMAX_SCALE) @ fp8(v, scales.value)
        return out.transpose(1, 2).flatten(2)

    return hook


def _round(x: Tensor, fmt: str) -> Tensor:
    if fmt == "int8":
        return x.round().clamp(-128, 127)
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def _restore(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)
