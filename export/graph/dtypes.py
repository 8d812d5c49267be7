"""The dtype of each parameter at each precision, before anything is quantized.

    precision   linear layers   residual stream, norms, LayerScale
    fp32        float32         float32
    fp16        float16         float32
    bf16        bfloat16        bfloat16

InternViT's residual stream runs un-normalised through 48 pre-norm blocks, and vision transformers
of this size have a few massive activations in it. In float16 they overflow to infinity: published
float16 engines of such towers fail in this way. The stream, and parameters applied to it directly,
therefore stay float32 at fp16; that is a thousandth of the arithmetic, and the casts fuse into the
neighbouring operations. The product that takes a rotated stream back to the checkpoint's basis is a
linear layer like others (``models.vit.unrotated``). bfloat16 has float32's range, and published
weights are stored in it, so there the stream is bfloat16 as in the original.

Norm statistics are float32 at every precision (``stash_type`` of ``RMSNormalization``). The
runtime chooses a softmax's precision: fused kernels accumulate in float32, and TensorRT's parser
refuses the attribute that would require it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Base = Literal["fp32", "fp16", "bf16"]

# Parameters applied to the residual stream itself, before or after a linear layer's branch.
ON_THE_STREAM = re.compile(
    r"(?:(?:^|\.)(?:"
    r"class_embedding|position_embedding|query_tokens|ls1|ls2|"
    r"norm1|norm2|norm|norm1_q|norm1_k|norm1_v|input_layernorm|post_attention_layernorm"
    r")|^mlp1\.0)(\.weight|\.bias)?$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypePolicy:
    """The dtype of the linear layers, and that of the residual stream."""

    compute: torch.dtype
    residual: torch.dtype

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of the parameter called ``name``."""
        return self.residual if ON_THE_STREAM.search(name) else self.compute


POLICIES: dict[str, DtypePolicy] = {
    "fp32": DtypePolicy(compute=torch.float32, residual=torch.float32),
    "fp16": DtypePolicy(compute=torch.float16, residual=torch.float32),
    "bf16": DtypePolicy(compute=torch.bfloat16, residual=torch.bfloat16),
}


def apply_policy(model: nn.Module, policy: DtypePolicy) -> None:
    """Give every parameter of ``model`` its dtype, in place."""
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(policy.dtype_of(name))
