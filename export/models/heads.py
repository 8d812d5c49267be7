"""The attention pool that turns a sequence of tokens into one embedding.

    query = mean of all tokens;  q, k, v = three LayerNorms of (query, x, x);  one attention;
    projection to the embedding width.  No residual, no MLP.

InternVL has two: ``clip_projector`` on the vision tokens, ``clip_projector2`` on the query
tokens. The q, k, v biases are bare parameters in the checkpoints. See docs/model.md, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvl_edge.export.models.attention import attention

POOL_NORM_EPS = 1e-5


class PoolAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, out_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.proj = nn.Linear(width, out_width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q = F.linear(query, self.q.weight, self.q_bias)
        k = F.linear(key, self.k.weight, self.k_bias)
        v = F.linear(value, self.v.weight, self.v_bias)
        out: Tensor = self.proj(attention(q, k, v, self.num_heads))
        return out


class AttentionPool(nn.Module):
    """The pool of x (B, T, C) → (B, E)."""

    def __init__(self, width: int, num_heads: int, out_width: int) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (
            nn.LayerNorm(width, eps=POOL_NORM_EPS) for _ in range(3)
        )
        self.cross_attn = PoolAttention(width, num_heads, out_width)

    def forward(self, x: Tensor) -> Tensor:
        compute = self.cross_attn.q.weight.dtype
        query = self.norm1_q(x.mean(dim=1, keepdim=True)).to(compute)  # (B, 1, C)
        key, value = self.norm1_k(x).to(compute), self.norm1_v(x).to(compute)
        pooled: Tensor = self.cross_attn(query, key, value)
        return pooled.squeeze(1)
