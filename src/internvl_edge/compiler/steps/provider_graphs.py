"""The graphs of a component for ONNX Runtime's providers, where it has such.

For CUDA, where nothing is quantized, towers at fp32 and bf16 have ``vision.cuda.onnx``, in ONNX
Runtime's own operators (``export.graph.providers.tower``). Decoders whose cache is written in place
have one where they are compiled for 16 bits, or of weights alone in 8 or 4 bits
(``export.graph.providers.decoder``).

Decoders of weights alone in 8 or 4 bits have ``decoder.cpu.onnx``, with fewer products
(``export.graph.providers.cpu``).
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.compiler.plan import Plan
from internvl_edge.export.graph.providers.cpu import take_cpu_form
from internvl_edge.export.graph.providers.decoder import cuda_decoder
from internvl_edge.export.graph.providers.tower import take_cuda_form
from internvl_edge.export.precision import WEIGHT_ONLY, precision_of

__all__ = ["make_cpu_graph", "make_cuda_graph"]

DECODER_DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def make_cuda_graph(plan: Plan, component: str, model: ir.Model) -> ir.Model | None:
    """Make the graph of a component, bound to its weights; ``model`` is used up. None: no such."""
    if COMPONENTS[component].takes_cache:
        # of INT4 and INT8, ONNX Runtime has products in float16 alone
        is_narrow = precision_of(plan.options.precision, component) in WEIGHT_ONLY
        narrow = DECODER_DTYPES.get("fp16" if is_narrow else plan.base)
        return None if narrow is None else cuda_decoder(model, narrow)
    is_of_one_type = plan.recipe is None and plan.base in ("fp32", "bf16")
    return model if is_of_one_type and take_cuda_form(model) else None


def make_cpu_graph(component: str, path: Path) -> ir.Model | None:
    """Make the graph of a component for the CPU from the one at ``path``. None: no such."""
    if not COMPONENTS[component].takes_cache:
        return None
    model = ir.load(path)
    return model if take_cpu_form(model) else None
