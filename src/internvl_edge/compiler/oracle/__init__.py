"""Second opinions: what a compiled component should compute, found without its graph.

simulate         the PyTorch reference with its linear layers fake-quantized; start here
scales           the numbers of a quantized graph, compared with the calibration
bisect           block by block, the first tensor that is wrong
reference_block  what a block of the reference computes inside
"""
