"""The steps of an export, in the order they run.

trace      every component as a graph whose weights have no data yet
calibrate  samples through the towers, block by block; quantized weights
weights    what the weights file holds, and what is not quantized of it
graphs     one ONNX graph per component, bound to the weights
verify     every component compared with PyTorch
engines    TensorRT engines, into a directory that is published already
"""
