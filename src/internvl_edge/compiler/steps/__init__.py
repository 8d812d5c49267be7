"""The steps of an export, in the order they run; ``pipeline.steps`` lists them.

step       the protocol: what a step states and does; start here
trace      every component as a graph whose weights have no data yet
weights    what the weights file holds; written as it is, or
samples    what a plan is calibrated on
calibrate  through the towers, block by block: quantized weights
graphs     one ONNX graph per component, bound to the weights
verify     every component compared with PyTorch
engines    TensorRT engines, for a directory that is published already too
publish    the list of files, the report, the manifest
"""
