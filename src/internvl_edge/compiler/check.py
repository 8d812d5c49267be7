"""Every component of a directory beside the PyTorch reference, before anyone may use it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from internvl_edge.compiler.options import Verify
from internvl_edge.export.blocks import Samples
from internvl_edge.export.checkpoint import Checkpoint, load_reference
from internvl_edge.export.verify import sample_feeds, verify_component, with_hidden_state
from internvl_edge.export.widen import infer_dtypes, widen
from internvl_edge.runtime.ort import OrtSession

Array = np.ndarray[Any, Any]
SAMPLES = 4  # of the calibration set, to compare quantized components on
FLOAT32_NBYTES = 4


class Checker:
    """The reference model and the inputs that all components are compared on."""

    def __init__(self, checkpoint: Checkpoint, image_size: int, samples: Samples | None) -> None:
        self.config = checkpoint.config
        self.model = load_reference(checkpoint.path)
        feeds = sample_feeds(self.config, image_size)
        if samples is not None:
            feeds = sample_feeds(
                self.config,
                image_size,
                pixel_values=samples.pixel_values[-1][-SAMPLES:].numpy(),
                input_ids=samples.input_ids[-1][-SAMPLES:].numpy() if samples.input_ids else None,
            )
        self.feeds = with_hidden_state(self.model, feeds, self.config)

    def check(self, component: str, path: Path, precision: str) -> dict[str, Any]:
        """Compare the graph at ``path``; the figures for the manifest.

        Raises:
            VerificationError: it disagrees with the reference.
        """
        runnable = _runnable(path)
        try:
            with OrtSession(runnable) as session:
                return verify_component(
                    session.run, self.model, component, precision, self.config, self.feeds
                )
        finally:
            if runnable != path:
                runnable.unlink()


def _runnable(path: Path) -> Path:
    """``path``, or its float32 twin where it computes in bfloat16."""
    graph = ir.load(path).graph
    infer_dtypes(graph)
    values = (output for node in graph for output in node.outputs)
    if not any(value.dtype == ir.DataType.BFLOAT16 for value in values):
        return path
    twin = path.with_name(f".{path.name}.widened")
    widen(path, twin)
    return twin


def reference_nbytes(checkpoint: Checkpoint) -> int:
    """Memory of the float32 reference."""
    parameters = sum(math.prod(entry.shape) for entry in checkpoint.tensors.values())
    return parameters * FLOAT32_NBYTES


def reason_not_to_verify(checkpoint: Checkpoint, verify: Verify) -> str | None:
    """Why components are not compared with PyTorch, or None when they are."""
    if verify == "none":
        return "not verified: --verify none"
    needed = reference_nbytes(checkpoint)
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if verify == "auto" and 2 * needed > available:
        return (
            f"not verified: the float32 reference needs {needed / 1e9:.1f} GB twice over, "
            f"{available / 1e9:.1f} GB are free; --verify full insists"
        )
    return None
