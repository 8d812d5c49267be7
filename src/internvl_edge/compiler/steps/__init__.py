"""The steps of an export, in the order they run; ``pipeline.steps`` lists them.

step         the protocol: what a step states and does; start here
trace        every component as a graph whose weights have no data yet;  meta_model  traced models
weights      the weights file, written as the checkpoint has them, or
quantize     with the towers' weights quantized;  calibration  samples, and the pass over the blocks
graphs       one ONNX graph per component, bound to the weights;  graph_files  their names;
             provider_graphs  for one of ONNX Runtime's providers
verify       every component compared with PyTorch, of a directory that is published too
engines      TensorRT engines, for a directory that is published already too;  profiles  shapes
publish      copied files, the list of all, the report, the manifest; what CLIP's classes open
"""
