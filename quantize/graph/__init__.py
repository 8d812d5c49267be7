"""Quantization in an ONNX graph.

qdq       QuantizeLinear and DequantizeLinear, placed where builders fuse them; start here
unsigned  the same products for CPUs without VNNI
"""
