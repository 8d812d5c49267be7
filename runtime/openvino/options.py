"""How OpenVINO computes; can be written down where OpenVINO is not installed."""

from __future__ import annotations

from dataclasses import dataclass

from internvl_edge.errors import UsageError, shortened
from internvl_edge.runtime.ort.options import OrtOptions, require_threads

__all__ = ["BFLOAT16", "FLOAT32", "OpenVinoOptions"]

FLOAT32, BFLOAT16 = "float32", "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenVinoOptions:
    """How OpenVINO computes what sees images, and ONNX Runtime the rest.

    Raises:
        UsageError: a value that is not valid.
    """

    # None: OMP_NUM_THREADS, else every core this process may use
    num_threads: int | None = None
    # Of what is not INT8. None: bfloat16 for directories at bf16 and for graphs that round
    # activations to 8 bits, where the CPU multiplies it; else float32.
    dtype: str | None = None
    language: OrtOptions | None = None  # of language models; None: the defaults, and num_threads

    def __post_init__(self) -> None:
        require_threads(self.num_threads)
        if not isinstance(self.language, OrtOptions | None):
            raise UsageError(
                f"language: expected OrtOptions(...) or None, found {type(self.language).__name__}"
            )
        if self.dtype not in (None, FLOAT32, BFLOAT16):
            raise UsageError(
                f"dtype {shortened(self.dtype)}: expected {FLOAT32}, {BFLOAT16} or None"
            )
