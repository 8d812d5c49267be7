"""InternViT, the vision tower: a plain pre-norm transformer without a final norm.

Notable features:
- patch embedding by a strided convolution, a class token first, learned positions on both
- RMSNorm (6B) or LayerNorm (300M) before attention and MLP
- RMSNorm of queries and keys over the full width, all heads together
- LayerScale on every branch, exact (erf) GELU, biases on proj, fc1 and fc2

Parameter names are the published checkpoints'. One tower may use two dtypes: the linear layers
compute in that of their weights, the residual stream has that of the position embedding, norms
and LayerScale (see ``graph.dtypes``). See docs/model.md, section 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvl_edge.export.config.checkpoint import VisionConfig
from internvl_edge.export.models.attention import attention

NARROWER = 2.0**-6  # float16 then holds streams up to 4 million, and 0.004 at full precision


class RMSNorm(nn.Module):
    """The norm y = weight · x / √(mean(x²) + eps), with statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def _norm(config: VisionConfig) -> nn.Module:
    if config.norm_type == "rms_norm":
        return RMSNorm(config.hidden_size, config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def resize_position_embedding(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample learned positions (1, 1 + g², C) to a grid of (h, w): (1, 1 + h·w, C).

    The resampling is bicubic in float32 without antialiasing; the class token's row is unchanged
    (docs/model.md, section 1.5).
    """
    side = round((table.shape[1] - 1) ** 0.5)
    if (side, side) == grid:
        return table
    cls, patches = table[:, :1], table[:, 1:]
    square = patches.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, C, g, g)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat((cls, resized.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_tokens(), width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        grid = patches.shape[-2:]  # (B, C, h, w)
        x = patches.flatten(2).transpose(1, 2).to(self.class_embedding.dtype)  # (B, h·w, C)
        x = torch.cat((self.class_embedding.expand(x.shape[0], -1, -1), x), dim=1)
        return x + resize_position_embedding(self.position_embedding, (grid[0], grid[1]))


class AttentionCore(nn.Module):
    """The attention softmax(q kᵀ / √d) v, (B, N, C) each; a module so that hooks see operands."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, self.num_heads)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.core = AttentionCore(config.num_attention_heads)
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        if config.qk_normalization:
            self.q_norm: nn.Module = RMSNorm(width, config.layer_norm_eps)
            self.k_norm: nn.Module = RMSNorm(width, config.layer_norm_eps)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        qkv = self.qkv(x)  # (B, N, 3C)
        # Slices, because a split is exported as a sequence, which TensorRT refuses.
        q, k, v = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
        return self.proj(self.core(self.q_norm(q), self.k_norm(k), v))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        width = config.intermediate_size
        self.spread = nn.Parameter(torch.ones(width)) if config.has_shift else None
        self.shift = nn.Parameter(torch.zeros(())) if config.has_shift else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        if self.spread is not None and self.shift is not None:
            x = x * self.spread - self.shift
        return self.fc2(x)


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn, self.mlp = Attention(config), MLP(config)
        self.ls1, self.ls2 = _layer_scale(config), _layer_scale(config)

    def forward(self, x: Tensor) -> Tensor:
        compute = self.mlp.fc1.weight.dtype
        x = x + _scaled(self.ls1, self.attn(self.norm1(x).to(compute)).to(x.dtype))
        return x + _scaled(self.ls2, self.mlp(self.norm2(x).to(compute)).to(x.dtype))


def _layer_scale(config: VisionConfig) -> nn.Parameter | None:
    if not config.has_layer_scale:
        return None
    return nn.Parameter(torch.full((config.hidden_size,), config.initializer_factor))


def _scaled(gain: Tensor | None, branch: Tensor) -> Tensor:
    return branch if gain is None else gain * branch


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))


class InternViT(nn.Module):
    """The tower from pixel_values (B, 3, H, W) to hidden states (B, N, C), N = 1 + (H/p)(W/p)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.unrotation = unrotation(config.hidden_size, config.is_rotated)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x: Tensor = self.embeddings(pixel_values)
        for block in self.encoder.layers:
            x = block(x)
        return unrotated(x, self.unrotation)

    def hidden_states(self, pixel_values: Tensor) -> list[Tensor]:
        """Return the embeddings and every block's output: num_hidden_layers + 1 of (B, N, C)."""
        states: list[Tensor] = [self.embeddings(pixel_values)]
        for block in self.encoder.layers:
            states.append(block(states[-1]))
        return states


def unrotation(width: int, is_rotated: bool) -> nn.Parameter | None:
    """Make the matrix (C, C) that takes a tower's output back to the checkpoint's basis."""
    return nn.Parameter(torch.empty(width, width)) if is_rotated else None


def unrotated(x: Tensor, matrix: Tensor | None) -> Tensor:
    """Return the residual stream (B, T, C) in the checkpoint's basis.

    A stream of a wider type than the matrix is made smaller for the product, by a power of two: its
    massive activations, which the rotation spread, are one number again after it.
    """
    if matrix is None or matrix.dtype == x.dtype:
        return x if matrix is None else x @ matrix
    turned: Tensor = (x * NARROWER).to(matrix.dtype) @ matrix
    return turned.to(x.dtype) * (1 / NARROWER)
