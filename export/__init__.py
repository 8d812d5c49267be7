"""From a checkpoint to verified ONNX components and engines."""
