"""FP8 attention: the Q/DQ pairs that let both products of attention run in E4M3.

    p = softmax(q kᵀ / √d)        o = p v

TensorRT's fused FP8 kernel wants four pairs and no factor between the first product and the
softmax, so the graph computes (q / √d) kᵀ with the query scaled before it is rounded:

    q / √d → Q/DQ ─┐
                   MatMul → Softmax → Q/DQ ─┐
    kᵀ ────→ Q/DQ ─┘                        MatMul → o
                                 v → Q/DQ ──┘

q and k are observed after their norms, which span all heads. The scales of q / √d, k and v come
from calibration; p lies in [0, 1], and its scale is 1/448, which uses the whole range of E4M3. The
vendor's rules ask for exactly this. INT8 has no such kernel at the head size of InternViT-6B, 128.

Off by default (``Recipe.attention``): its cost in accuracy is measured, its gain in speed is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from internvl_edge.quantize.numerics.observers import RangeObserver

OPERANDS = ("query", "key", "value")
SOFTMAX_SCALE = float(np.float32(1.0 / 448.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionScales:
    """The scales of attention's operands, one per tensor."""

    query: float  # of q / √d
    key: float
    value: float


def scales_by_attention(scales: Mapping[str, float | None]) -> dict[str, AttentionScales]:
    """Collect the scales of each attention from a stream's activation scales, by module name."""
    ending = f".{OPERANDS[0]}"
    attentions = {}
    for name in (key.removesuffix(ending) for key in scales if key.endswith(ending)):
        operands = {operand: scales[f"{name}.{operand}"] for operand in OPERANDS}
        known = {operand: scale for operand, scale in operands.items() if scale is not None}
        if len(known) == len(OPERANDS):
            attentions[name] = AttentionScales(**known)
    return attentions


@contextmanager
def watching_attention(
    attentions: Mapping[str, nn.Module],
) -> Iterator[dict[str, RangeObserver]]:
    """Observe the operands of attention while a block runs.

    Args:
        attentions: modules that are called with (query, key, value), each (B, T, heads·d), and
            have ``num_heads``; by full name.

    Yields:
        An observer for each operand seen, under ``name.query`` and so on.
    """
    observers: dict[str, RangeObserver] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            query, key, value = inputs
            for operand, x in zip(OPERANDS, (scaled(query, module), key, value), strict=True):
                full = f"{name}.{operand}"
                observers.setdefault(full, RangeObserver(full)).update(x.float().numpy())

        return hook

    with ExitStack() as stack:
        for name, module in attentions.items():
            stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        yield observers


def scaled(query: Tensor, module: Any) -> Tensor:
    """Divide q (B, T, heads·d) by √d."""
    return query / math.sqrt(query.shape[-1] // module.num_heads)
