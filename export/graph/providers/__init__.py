"""Graphs for one of ONNX Runtime's providers: fewer, longer kernels.

tower    rewrites the graph of a tower for CUDA, node by node, in operators of ONNX Runtime's own;
         start here
decoder  writes the graph of a decoder with its cache in place for CUDA, from what is read
pattern  reads a published decoder's graph; what is not exactly known is refused
cpu      joins products of a decoder for the CPU
"""
