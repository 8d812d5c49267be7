"""FP8 attention: the pairs that let both products of attention run in E4M3.

    p = softmax(q kᵀ / √d)        o = p v

TensorRT's fused FP8 kernel wants four pairs and no factor between the first product and the
softmax, so the graph computes (q / √d) kᵀ with the query scaled before it is rounded:

    q / √d → Q/DQ ─┐
                   MatMul → Softmax → Q/DQ ─┐
    kᵀ ────→ Q/DQ ─┘                        MatMul → o
                                 v → Q/DQ ──┘

q and k are taken behind their norms, which span all heads. The scales of q / √d, k and v come from
calibration; p lies in [0, 1], and its scale is 1/448, the whole range of E4M3. The vendor's rules
ask for just this. INT8 has no such kernel at the head size of InternViT-6B, 128.

Off by default (``Recipe.attention``): what it costs in accuracy is measured, what it gains is not.
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
    """The scales of attention's operands, each of a whole tensor."""

    query: float  # of q / √d
    key: float
    value: float


def scales_by_attention(scales: Mapping[str, float | None]) -> dict[str, AttentionScales]:
    """The scales of every attention among a stream's activation scales, by its module's name."""
    ending = f".{OPERANDS[0]}"
    found = {}
    for name in (key.removesuffix(ending) for key in scales if key.endswith(ending)):
        operands = {operand: scales[f"{name}.{operand}"] for operand in OPERANDS}
        known = {operand: scale for operand, scale in operands.items() if scale is not None}
        if len(known) == len(OPERANDS):
            found[name] = AttentionScales(**known)
    return found


@contextmanager
def watching_attention(
    attentions: Mapping[str, nn.Module],
) -> Iterator[dict[str, RangeObserver]]:
    """Look at the operands of attention while a block runs.

    Args:
        attentions: modules that are called with (query, key, value), each (B, T, heads·d), and
            know their ``num_heads``; by full name.

    Yields:
        An observer for each operand seen, by ``name.query`` and so on.
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
    """Q / √d of (B, T, heads·d)."""
    return query / math.sqrt(query.shape[-1] // module.num_heads)
