"""Second opinions: what a compiled component should compute, found without its graph.

simulate         the PyTorch reference with its linear layers fake-quantized; start here
rounding         its rounding;  site_factors  what calibration moved between its weights
rounded_towers   whole towers with some layers fake-quantized, block by block
expected         outputs that a component should have, or one block of it
run_graph        a graph run as its reference is
checker          a component's graphs compared with all of that
scales           the numbers of a quantized graph, compared with the calibration
bisect           block by block, the first tensor that is wrong
joined           the graph of both towers, compared with them
graph_blocks     a graph's blocks, one after the other;  readings  of their tensors
reference_block  what a block of the reference computes inside
"""
