"""Parameters of a checkpoint as graphs need them: for a resolution, in a dtype."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress, Report, silent
from internvl_edge.compiler.weights.layout import CHAT_TOKENS, FLOAT32, POSITIONS, TOWERS
from internvl_edge.export.checkpoint.load import torch_from_numpy
from internvl_edge.export.checkpoint.scope import parameters_read
from internvl_edge.export.checkpoint.shards import DTYPES, header_fingerprint
from internvl_edge.export.graph.dtypes import POLICIES
from internvl_edge.export.models.vit import resize_position_embedding
from internvl_edge.quantize.calibration.folding import SMOOTHING_SUFFIX
from internvl_edge.types import Array

MB = 10**6
QUICK_NBYTES = 500 * MB  # are read before anybody wonders
STORED_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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


def narrowed(plan: Plan) -> dict[str, np.dtype[Any]]:
    """List the parameters that are converted to a type of a smaller range, and that type.

    Of a quantized directory those outside the towers' blocks, whose scales are found anew.
    """
    bases = {plan.base} | ({plan.engine_base} if plan.engine_targets else set())
    tensors, chat = plan.checkpoint.tensors, plan.checkpoint.config.chat
    targets: dict[str, np.dtype[Any]] = {}
    is_tied = chat is not None and chat.llama is not None and chat.llama.tie_word_embeddings
    for name in parameters_read(tensors, plan.components):
        is_block = plan.recipe is not None and name.startswith(TOWERS)
        if is_block or (name == CHAT_TOKENS and not is_tied):  # the table is read as it is stored
            continue
        held = _largest(tensors[name].dtype)
        for base in bases:
            target = DTYPES[STORED_TYPES[POLICIES[base].dtype_of(name)]]
            if _largest(target) < held:
                targets[name] = target
    return targets


def _largest(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def read_content(plan: Plan, report: Report = silent) -> str:
    """Identify a checkpoint's contents, and refuse values that cannot be compiled.

    Linked shards are not read, the point of linking, but for what graphs turn into another type.

    Raises:
        CheckpointError: names every tensor with NaN, infinities, or values beyond the range of the
            type that it is compiled in.
    """
    targets, entries = narrowed(plan), plan.checkpoint.tensors
    is_linked = plan.options.weights == "link" and plan.options.verify == "none"
    total = sum(e.nbytes for n, e in entries.items() if n in targets or not is_linked)
    done = 0

    def read(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if total > QUICK_NBYTES:
            report(
                Progress(step="check", detail="MB of weights", done=done // MB, total=total // MB)
            )

    if not is_linked:
        return plan.checkpoint.content_sha256(read, targets)
    plan.checkpoint.content_sha256(read, targets, only=targets)
    return repr([header_fingerprint(p) for p in plan.checkpoint.shards] + [*plan.checkpoint.states])


def convert(values: Array, dtype: np.dtype[Any]) -> Array:
    """Convert to another float type; values beyond float16's range saturate, none is infinite."""
    if values.dtype == dtype:
        return values
    wide = values.astype(FLOAT32)
    if dtype == np.float16:
        limit = float(np.finfo(np.float16).max)
        np.clip(wide, -limit, limit, out=wide)
    return wide.astype(dtype)
