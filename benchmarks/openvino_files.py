"""A compiled float32 directory as OpenVINO's files: its weights compressed, its tower in INT8.

The decoder's graph is ours, with the logits of the last position alone, and a cache that OpenVINO
keeps between calls, as its own pipelines have it; NNCF compresses the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from internvl_edge.types import Array

LOGITS_FROM = "logits_from"
BLOCK = 128  # inputs that share a scale in INT4, as ours


def write_decoder(graph: Path, out: Path, kind: str) -> None:
    """Write a decoder with weights of ``int8`` or ``int4``; in both the last layer has 8 bits."""
    import nncf
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    model: Any = openvino.convert_model(str(_of_last_logits(graph)))
    model.reshape({value: _one_row(value.get_partial_shape()) for value in model.inputs})
    held = {
        name: name.replace("past_key_values.", "present.", 1)
        for value in model.inputs
        for name in value.get_names()
        if name.startswith("past_key_values.")
    }
    modes = nncf.CompressWeightsMode
    if kind == "int4":
        model = nncf.compress_weights(model, mode=modes.INT4_SYM, group_size=BLOCK, ratio=1.0)
    else:
        model = nncf.compress_weights(model, mode=modes.INT8_SYM)
    apply_make_stateful_transformation(model, held)
    openvino.save_model(model, str(out), compress_to_fp16=False)


def write_vision(graph: Path, out: Path, images: list[Array]) -> None:
    """Write a tower whose products are INT8, calibrated on images [1,3,S,S]."""
    import nncf
    import openvino

    data = nncf.Dataset([{"pixel_values": image} for image in images])
    # A model that was only read has a Transpose between each weight and its product: NNCF rounds
    # before it, and the product stays in 16 bits
    model = openvino.convert_model(str(graph))
    kind = nncf.ModelType.TRANSFORMER
    model = nncf.quantize(model, data, subset_size=len(images), model_type=kind)
    openvino.save_model(model, str(out), compress_to_fp16=False)


def _one_row(shape: Any) -> Any:
    shape[0] = 1
    return shape


def _of_last_logits(graph: Path) -> Path:
    """Write the graph again, next to its weights, with the logits of the last position alone."""
    proto = onnx.load(graph, load_external_data=False)
    for tensor in proto.graph.initializer:
        if tensor.name == LOGITS_FROM:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(1, -1), LOGITS_FROM))
    out = graph.with_suffix(".last.onnx")
    onnx.save(proto, out)
    return out
