"""Other ways to the same tower: each function is one peer's, run as a process of its own.

All read ``work/checkpoint``; the quantizers read the graph that ``torch_export`` wrote, and
calibrate on ``work/images.npy`` or on noise. ``outputs`` runs what they wrote on
``work/held-out.npy``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

IMAGES = 16  # of the calibration, as the recipe takes


def torch_export(work: str) -> None:
    """Export a loaded model by PyTorch's exporter, weights into external data."""
    import torch

    from internvl_edge.export.checkpoint.load import load_reference

    checkpoint = Path(work) / "checkpoint"
    model = load_reference(checkpoint)
    side = json.loads((checkpoint / "config.json").read_text())["image_size"]
    (Path(work) / "torch").mkdir()
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, side, side),),
        str(Path(work) / "torch" / "vision.onnx"),
        dynamo=True,
        opset_version=23,
        external_data=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["pixel_values"],
        output_names=["last_hidden_state"],
    )


def ort_quantize_static(work: str, method: str = "MinMax") -> None:
    """Quantize PyTorch's float32 graph by ONNX Runtime, statically, on as many images.

    Activations are unsigned, as its documentation advises; signed ones, it cannot open again.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(_images(work))

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    quantize_static(
        str(Path(work) / "torch" / "vision.onnx"),
        str(Path(work) / "peer.onnx"),
        Images(),
        calibrate_method=CalibrationMethod[method],
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
        use_external_data_format=True,
        extra_options={"WeightSymmetric": True},
    )


def ort_percentile(work: str) -> None:
    """Do the same with percentiles in place of largest values."""
    ort_quantize_static(work, "Percentile")


def modelopt_quantize(work: str) -> None:
    """Quantize the same graph by ModelOpt, on as many images."""
    import numpy as np
    from modelopt.onnx.quantization import quantize

    quantize(
        str(Path(work) / "torch" / "vision.onnx"),
        quantize_mode="int8",
        calibration_data={
            "pixel_values": np.concatenate([feed["pixel_values"] for feed in _images(work)])
        },
        calibration_eps=["cpu"],
        use_external_data_format=True,
        output_path=str(Path(work) / "peer.onnx"),
    )


def outputs(work: str) -> None:
    """Run a peer's graph on the held-out images, into ``work/outputs.npy``."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(Path(work) / "peer.onnx"))
    images = np.load(Path(work) / "held-out.npy")
    rows = [session.run(None, {"pixel_values": image[None]})[0] for image in images]
    np.save(Path(work) / "outputs.npy", np.concatenate(rows))


def _images(work: str) -> list[dict[str, Any]]:
    import numpy as np

    path = Path(work) / "images.npy"
    if path.exists():
        return [{"pixel_values": image[None]} for image in np.load(path)]
    rng = np.random.default_rng(0)
    return [
        {"pixel_values": rng.standard_normal((1, 3, 224, 224), np.float32)} for _ in range(IMAGES)
    ]
