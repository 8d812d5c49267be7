"""Calibration: from pictures and captions to scales and quantized weights.

images       the calibration sets
activations  what enters the linear layers of a block
ranges       from what was seen to a scale
block        one block calibrated and quantized; start here
attention    the products inside FP8 attention
"""
