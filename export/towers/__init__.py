"""The towers taken apart, for calibration and comparison one block at a time.

blocks   the blocks of a tower, and what may be changed in them; start here
streams  samples on their way through the blocks
"""
