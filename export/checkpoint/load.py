"""Our PyTorch model of a checkpoint: built on the meta device, then given weights one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.checkpoint.shards import DTYPES
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.models import Chat, InternViT, InternVL
from internvl_edge.types import Array

__all__ = [
    "build_model",
    "load_into",
    "load_model",
    "load_reference",
    "read_torch",
    "torch_from_numpy",
]


def load_reference(
    checkpoint: Path | str, dtype: torch.dtype = torch.float32
) -> InternVL | Chat | InternViT:
    """Load our PyTorch model of a checkpoint, in evaluation mode.

    Args:
        checkpoint: the directory.
        dtype: every parameter's dtype.
    """
    return load_model(open_checkpoint(checkpoint), dtype)


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32
) -> InternVL | Chat | InternViT:
    """Load the model of a checkpoint that is open (see :func:`load_reference`)."""
    with torch.device("meta"):
        model = build_model(checkpoint.config)
    prefix = "vision_model." if checkpoint.config.kind == "vit" else ""
    load_into(model, checkpoint, prefix, dtype)
    return model.eval()


def build_model(config: CheckpointConfig) -> InternVL | Chat | InternViT:
    """Build the PyTorch model of a configuration, on the current default device."""
    if config.kind == "internvl":
        assert config.internvl is not None
        return InternVL(config.internvl)
    if config.kind == "chat":
        return Chat(config)
    return InternViT(config.vision)


def load_into(
    module: nn.Module,
    source: Checkpoint,
    prefix: str,
    dtype: torch.dtype,
    rename: Callable[[str], str] = str,
) -> None:
    """Give a module built on the meta device its weights, read one tensor at a time.

    Args:
        module: a part of the model.
        source: where the weights are.
        prefix: of the part's parameters in the checkpoint.
        dtype: every parameter's dtype.
        rename: what a parameter is called there, where it is another block's.
    """
    names = {n: rename(prefix + n) for n in module.state_dict()}
    if source.is_partial:  # the rest stays on the meta device, and is not run
        names = {n: stored for n, stored in names.items() if stored in source.tensors}
    state = {n: read_torch(source, stored, dtype) for n, stored in names.items()}
    module.load_state_dict(state, assign=True, strict=not source.is_partial)
    for owner in module.modules():  # tables that are computed, not stored
        restore = getattr(owner, "reset_tables", None)
        if restore is not None:
            restore()


def read_torch(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Read one tensor by its canonical name, as a torch tensor of ``dtype``."""
    values = torch_from_numpy(checkpoint.read(name))
    if dtype != torch.float32 or values.dtype == dtype:
        return values.to(dtype)
    # into NumPy's memory: it asks the system for large pages, PyTorch does not
    return torch.from_numpy(np.empty(values.shape, np.float32)).copy_(values)


def torch_from_numpy(values: Array) -> torch.Tensor:
    """Do as ``torch.from_numpy``, which does not know bfloat16."""
    if values.dtype == DTYPES["BF16"]:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)
