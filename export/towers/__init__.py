"""Towers as single blocks, so that calibration and comparison hold one block in memory at a time.

blocks   the blocks of a tower, and the places where a factor may be folded; start here
streams  the samples, carried from block to block
"""
