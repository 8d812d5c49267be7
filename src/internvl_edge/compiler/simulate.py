"""The reference with its linear layers fake-quantized: what a quantized graph should compute.

Comparing a quantized component with the float32 reference shows how much quantization costs, but
that cost varies from checkpoint to checkpoint and can hide a mistake: a scale off by two in one
layer of forty may cost less than honest rounding. So the component is also compared with this
simulation, made independently of what was written: from the checkpoint's own weights, folded and
rounded anew, and the activation scales. Where the two differ by more than a few roundings, an
axis, a scale or a pair of Q/DQ is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from internvl_edge.errors import ArtifactError
from internvl_edge.export.blocks import LLAMA_NORMS, VISION_NORMS
from internvl_edge.quantize import formats
from internvl_edge.quantize.recipe import Recipe

SCALES_FILE = "quantization.json"  # stream → weight → activation scale
Scales = Mapping[str, Mapping[str, float]]


def write_scales(directory: Path, scales: Scales) -> None:
    """Keep the activation scales beside the graphs that hold them as constants."""
    text = json.dumps({"activation_scales": scales}, indent=1, sort_keys=True)
    (directory / SCALES_FILE).write_text(text + "\n", encoding="utf-8")


def read_scales(directory: Path) -> Scales:
    """The inverse of :func:`write_scales`.

    Raises:
        ArtifactError: not such a file.
    """
    path = directory / SCALES_FILE
    try:
        scales: Scales = json.loads(path.read_text(encoding="utf-8"))["activation_scales"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: expected the activation scales: {error!r}") from error
    return scales


@contextmanager
def fake_quantized(
    module: nn.Module,
    scales: Mapping[str, float],
    recipe: Recipe,
    folded: Mapping[str, np.ndarray[Any, Any]],
    rename: Callable[[str], str] = str,
) -> Iterator[None]:
    """Make ``module`` compute what the quantized component should, while the context lasts.

    Args:
        module: the float32 reference; restored at the end.
        scales: weight → activation scale, of the component's stream.
        recipe: the formats.
        folded: norm gains and biases as they were stored, by checkpoint name.
        rename: the checkpoint's name of a parameter of the module.
    """
    parameters = {rename(name): p for name, p in module.named_parameters()}
    factors = _factors(parameters, folded)
    with ExitStack() as stack, torch.no_grad():
        for name, layer in module.named_modules():
            weight = rename(f"{name}.weight")
            if isinstance(layer, nn.Linear) and weight in scales:
                stack.callback(_restore, layer.weight, layer.weight.clone())
                layer.weight.copy_(_rounded(layer.weight * factors.get(weight, 1.0), recipe))
                hook = _rounding_hook(scales[weight], recipe)
                stack.callback(layer.register_forward_pre_hook(hook).remove)
        for name, values in folded.items():
            if name in parameters:
                stack.callback(_restore, parameters[name], parameters[name].clone())
                parameters[name].copy_(torch.from_numpy(np.array(values, np.float32)))
        yield


def _factors(
    parameters: Mapping[str, Tensor], folded: Mapping[str, np.ndarray[Any, Any]]
) -> dict[str, Tensor]:
    """What each folded norm moved into the columns of its readers: the old gain over the new."""
    factors: dict[str, Tensor] = {}
    readers = {**VISION_NORMS, **LLAMA_NORMS}
    for name, values in folded.items():
        if not name.endswith(".weight") or name not in parameters:
            continue
        path = name.removesuffix(".weight")
        norm = max((n for n in readers if path.endswith(f".{n}")), key=len)
        stored = torch.from_numpy(np.array(values, np.float32))
        gain = parameters[name].detach()
        moved = torch.where(stored == 0, 1.0, gain / stored)  # a channel that is switched off
        block = path.removesuffix(f".{norm}")
        factors |= {f"{block}.{reader}.weight": moved for reader in readers[norm]}
    return factors


def _rounded(weight: Tensor, recipe: Recipe) -> Tensor:
    """Per output channel, as a builder would see it; plain torch arithmetic."""
    limit = formats.as_format(recipe.weights).max_value
    peak = weight.abs().amax(dim=1, keepdim=True)
    if recipe.granularity == "per-tensor":
        peak = peak.max()
    scale = (peak / limit).clamp_min(formats.MIN_SCALE)
    return _round(weight / scale, recipe.weights) * scale


def _rounding_hook(scale: float, recipe: Recipe) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (_round(inputs[0] / scale, recipe.activations) * scale,)

    return hook


def _round(x: Tensor, fmt: str) -> Tensor:
    if fmt == "int8":
        return x.round().clamp(-128, 127)
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def _restore(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)
