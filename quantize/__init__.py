"""Quantization to 8 and 4 bits, from the recipe to the nodes in the graph.

recipe       everything that decides how a model is quantized; start here
fold         rewrites a checkpoint into an equivalent one that quantizes well
calibration  runs samples through the blocks and chooses scales
numerics     formats, rounding and ranges, in NumPy
graph        inserts QuantizeLinear and DequantizeLinear
lint         checks a graph against the rules of the builders
sensitivity  searches for the fewest layers to leave in 16 bits
"""

from __future__ import annotations

if __name__ != "internvl_edge.quantize":
    raise ImportError("import internvl_edge.quantize, not the folder quantize of the repository")
