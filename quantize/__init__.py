"""Formats, ranges, smoothing, calibration and placement of 8-bit quantization."""

from __future__ import annotations

if __name__ != "internvl_edge.quantize":
    raise ImportError("import internvl_edge.quantize, not the folder quantize of the repository")
