"""Quantization in an ONNX graph.

qdq       inserts QuantizeLinear and DequantizeLinear where builders fuse them; start here
unsigned  stores weights unsigned, for exact products on CPUs without VNNI
"""
