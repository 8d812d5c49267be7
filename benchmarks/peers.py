"""What others do with the same tower: each function is one peer's way, run as a process of its own.

All read ``work/checkpoint``; the quantizers read the graph that ``torch_export`` wrote.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

IMAGES = 16  # of the calibration, as the recipe takes


def torch_export(work: str) -> None:
    """A loaded model through PyTorch's exporter, weights into external data."""
    import torch

    from internvl_edge.export.checkpoint import load_reference

    model = load_reference(Path(work) / "checkpoint")
    (Path(work) / "torch").mkdir()
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, 224, 224),),
        str(Path(work) / "torch" / "vision.onnx"),
        dynamo=True,
        opset_version=23,
        external_data=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["pixel_values"],
        output_names=["last_hidden_state"],
    )


def ort_quantize_static(work: str) -> None:
    """ONNX Runtime's static quantization of PyTorch's float32 graph, on as many images."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(_images())

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    quantize_static(
        str(Path(work) / "torch" / "vision.onnx"),
        str(Path(work) / "ort.onnx"),
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
        use_external_data_format=True,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )


def modelopt_quantize(work: str) -> None:
    """ModelOpt's ONNX quantization of the same graph, on as many images."""
    import numpy as np
    from modelopt.onnx.quantization import quantize

    quantize(
        str(Path(work) / "torch" / "vision.onnx"),
        quantize_mode="int8",
        calibration_data={
            "pixel_values": np.concatenate([feed["pixel_values"] for feed in _images()])
        },
        calibration_eps=["cpu"],
        use_external_data_format=True,
        output_path=str(Path(work) / "modelopt.onnx"),
    )


def _images() -> list[dict[str, Any]]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [
        {"pixel_values": rng.standard_normal((1, 3, 224, 224), np.float32)} for _ in range(IMAGES)
    ]
