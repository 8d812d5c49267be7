"""Graphs in operators of ONNX Runtime's own, for its CUDA provider: fewer, longer kernels.

tower    rewrites the graph of a tower, node by node; start here
decoder  writes the graph of a decoder with its cache in place, from what is read
pattern  reads a published decoder's graph; what is not exactly known is refused
"""
