"""Factors that calibration found for sites, moved into the weights before and after them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from internvl_edge.artifact.components import PREFIXES
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.towers.blocks import sites_of
from internvl_edge.quantize.numerics.rotation import rotation
from internvl_edge.quantize.recipe import Recipe
from internvl_edge.types import Array


def move_factors(
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


def readers_after(spread: str, config: CheckpointConfig) -> list[str]:
    """List the linear layers that read what factors after GELU were applied to."""
    block, path = _split(spread)
    sites = [site for site in sites_of(config, block) if site.spread == path]
    return [f"{block}.{reader}" for site in sites for reader in site.readers]


def _split(layer: str) -> tuple[str, str]:
    """Split a layer's full name into its block's and the rest."""
    prefix = next(p for p in PREFIXES if layer.startswith(f"{p}."))
    index, _, path = layer.removeprefix(f"{prefix}.").partition(".")
    return f"{prefix}.{index}", path
