"""Calibration: from pictures and captions to scales and quantized weights.

block        calibrates and quantizes one block; start here
activations  observes the inputs of a block's linear layers
folding      factors moved between an activation's producer and its readers
ranges       chooses the scale of an activation from these observations
attention    observes the operands of FP8 attention
images       the calibration sets
captions     their captions, in the spellings that people have
"""
