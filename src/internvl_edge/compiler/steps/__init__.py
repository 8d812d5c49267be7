"""The steps of an export, in the order they run.

calibrate  samples through the towers, block by block; quantized weights
weights    what the weights file holds
graphs     one ONNX graph per component, bound to the weights
verify     every component compared with PyTorch
engines    TensorRT engines, into a directory that is published already
"""
