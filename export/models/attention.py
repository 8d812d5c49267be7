"""Attention and rotary embedding, written once for PyTorch and for the ONNX exporter.

    attention(q, k, v) = softmax(q kᵀ / √d + mask) v        per head, d the head size

Both functions take activations in the linear layers' layout, (B, T, heads·d): ONNX's ``Attention``
and ``RotaryEmbedding`` (opset 23) split the heads themselves, so an exported block needs no Reshape
or Transpose, and TensorRT maps the op to its fused kernel. While the model is exported, the
functions emit those ops; in eager mode they use PyTorch's own, which makes PyTorch an independent
check of the exported graph.

The softmax runs in float32 in PyTorch and in fused kernels. The exported op leaves its precision
to the runtime: ``softmax_precision`` could ask for float32, but TensorRT's parser refuses it.

A boolean mask is True where a query may attend, which avoids the half-precision overflow of summed
additive masks.

Rotary positions follow LLaMA: the two halves of a head are the two parts of the rotated pair,
    (x₁, x₂) → (x₁ cos φ − x₂ sin φ,  x₂ cos φ + x₁ sin φ),   φ = position · base^(−2i/d).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ROPE_BASE = 10000.0


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
    num_kv_heads: int | None = None,
) -> Tensor:
    """Attend from (B, T, heads·d) to (B, S, kv heads·d); ``mask`` is (B|1, 1, T, S).

    With fewer key heads than query heads, neighbouring query heads share a key head.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if torch.onnx.is_in_onnx_export():
        if mask is not None:  # runtimes require a row for every query, not a broadcast
            mask = mask.expand(-1, -1, query.shape[1], -1)
        out, *_ = torch.onnx.ops.attention(
            query, key, value, mask, q_num_heads=num_heads, kv_num_heads=kv_heads
        )
        return out
    q, k, v = (
        split_heads(query, num_heads),
        split_heads(key, kv_heads),
        split_heads(value, kv_heads),
    )
    is_grouped = kv_heads != num_heads
    return merge_heads(
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=is_grouped)
    )


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor
) -> Tensor:
    """Attend from (B, T, heads·d) to a cache (B, kv heads, S, d); ``mask`` is (B|1, 1, T, S).

    The cache keeps its layout: only the new tokens' heads are split and merged.
    """
    q = split_heads(query, num_heads)
    if torch.onnx.is_in_onnx_export():
        out, *_ = torch.onnx.ops.attention(q, key, value, mask)
        return merge_heads(out)
    out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, enable_gqa=True)
    return merge_heads(out)


def write_positions(cache: Tensor, new: Tensor, first: Tensor) -> Tensor:
    """Write ``new`` (B, heads, T, d) into a cache (B, heads, C, d) from position ``first`` (B,) on.

    It is exported as ``TensorScatter`` (opset 24), which a runtime may do in place.
    """
    if torch.onnx.is_in_onnx_export():
        out: Tensor = torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache, new, first),
            {"axis": 2},
            dtype=cache.dtype,
            shape=cache.shape,
            version=23,  # like the other nodes: PyTorch converts no later ones (``trace.OPSETS``)
        )
        return out
    place = first[:, None] + torch.arange(new.shape[2], device=new.device)  # (B, T)
    return cache.scatter(2, place[:, None, :, None].expand_as(new), new)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Split heads: (B, T, heads·d) → (B, heads, T, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Merge heads: (B, heads, T, d) → (B, T, heads·d)."""
    return x.transpose(1, 2).flatten(2)


def rotary_tables(length: int, head_dim: int, base: float = ROPE_BASE) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of every position and frequency, float32, (length, head_dim / 2) each."""
    return tables_of(rotary_frequencies(head_dim, base), length)


def rotary_frequencies(head_dim: int, base: float) -> Tensor:
    """Compute the angle per position of each pair of a head, float32 (d/2)."""
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def tables_of(frequency: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of every position (length, d/2) from frequencies (d/2)."""
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Apply rotary positions to x (B, T, heads·d); ``cos`` and ``sin`` are (B|1, T, d/2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if torch.onnx.is_in_onnx_export():
        if cos.shape[0] != x.shape[0]:
            cos, sin = (t.expand(x.shape[0], -1, -1) for t in (cos, sin))
        return torch.onnx.ops.rotary_embedding(x, cos, sin, num_heads=num_heads)
    first, second = x.unflatten(-1, (num_heads, 2, -1)).unbind(-2)  # (B, T, heads, d/2) each
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
    return rotated.flatten(2)
