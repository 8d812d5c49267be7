"""Calibration, by which a recipe's weights are quantized.

samples  what a plan is calibrated on
blocks   the pass through the towers, block by block; start here
cost     memory, disk and time that it takes
heads    quantizes vocabulary heads, whose inputs stay as they are
"""
