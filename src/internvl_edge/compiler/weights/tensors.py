"""Parameters of a checkpoint as graphs need them: for a resolution, in a dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.weights.layout import FLOAT32, POSITIONS
from internvl_edge.export.checkpoint.load import torch_from_numpy
from internvl_edge.export.models.vit import resize_position_embedding
from internvl_edge.quantize.calibration.folding import SMOOTHING_SUFFIX
from internvl_edge.types import Array


def read_tensor(plan: Plan, name: str) -> Array:
    """Read a parameter as graphs of this resolution need it; resampled positions in float32."""
    if name.endswith(SMOOTHING_SUFFIX):  # of a site that nothing was folded at
        shape = plan.source.tensors[name.replace(SMOOTHING_SUFFIX, ".weight")].shape[1:]
        return np.ones(shape, np.float32)
    values = plan.source.read(name)
    if name != POSITIONS:
        return values
    side = plan.image_size // plan.source.config.vision.patch_size
    resized: Array = resize_position_embedding(
        torch_from_numpy(values).float(), (side, side)
    ).numpy()
    return resized


def convert(values: Array, dtype: np.dtype[Any]) -> Array:
    """Convert to another float type; values beyond float16's range saturate, none is infinite."""
    if values.dtype == dtype:
        return values
    wide = values.astype(FLOAT32)
    if dtype == np.float16:
        limit = float(np.finfo(np.float16).max)
        np.clip(wide, -limit, limit, out=wide)
    return wide.astype(dtype)
