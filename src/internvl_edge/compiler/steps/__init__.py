"""The steps of an export, in the order they run; ``pipeline.steps`` lists them.

step         the protocol: what a step states and does; start here
trace        every component as a graph whose weights have no data yet, of a meta_model
weights      the weights file, written as the checkpoint has them, or
quantize     quantized, by calibration
graphs       one ONNX graph per component, bound to the weights
verify       every component compared with PyTorch, in a directory that is published too
engines      TensorRT engines, for a directory that is published already too
publish      the list of files, the report, the manifest

Engines are built from their engine_graphs, for the shapes of their profiles.
"""
