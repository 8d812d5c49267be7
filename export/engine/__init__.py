"""Engines: an ONNX component through the builder of TensorRT-RTX or TensorRT.

build    one engine; start here
targets  the builders, and the GPUs their engines run on
decomposed  attention that may be, marked in a graph;  unaliased  caches that are written apart
layers   what the builder made of a graph
monitor  what a builder calls back while it works
memory   what a builder takes
"""
