"""The launch census: what ONNX Runtime's CUDA provider launches, counted without a GPU."""
