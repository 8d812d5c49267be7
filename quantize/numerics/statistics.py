"""The quantization error of each linear layer in figures, for the report and for the search.

Per stream and linear layer: the range of its input, where the input was clipped, and the SQNR of
input and weight after rounding, 10 log₁₀(E x² / E (x − x̂)²). That of an input comes from its
observer's histogram (``observers.squared_error``), over all calibration samples; that of a weight
from the weight itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.errors import ArtifactError
from internvl_edge.files.reading import is_there, read_json
from internvl_edge.quantize.numerics.formats import as_format
from internvl_edge.quantize.numerics.observers import RangeObserver, squared_error
from internvl_edge.types import Array

MAX_NBYTES = 64 << 20
STATISTICS_FILE = "statistics.json"
BEST_DB = 200.0  # stands for no error at all


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStatistics:
    """The figures of one linear layer in one stream."""

    stream: str
    weight: str  # the parameter's name
    absmax: float  # of its input, over all samples, as it is quantized: after any smoothing
    clip: float  # distance from the shift at which the input saturates
    scale: float
    input_sqnr_db: float
    weight_sqnr_db: float

    @property
    def noise(self) -> float:
        """The squared error of a product by its rounding, relative: the errors of both add up."""
        return float(10 ** (-self.input_sqnr_db / 10) + 10 ** (-self.weight_sqnr_db / 10))


def input_sqnr_db(observer: RangeObserver, scale: float, fmt: str) -> float:
    """Return the SQNR in dB of everything that an observer saw, rounded at a scale."""
    histogram = observer.histogram()
    low, high, counts = histogram.edges[:-1], histogram.edges[1:], histogram.counts
    power = float((counts * (low * low + low * high + high * high) / 3.0).sum() / counts.sum())
    clip = scale * as_format(fmt).max_value
    return decibels(power, float(squared_error(histogram, clip, fmt)))


def weight_squares(weight: Array, values: Array, scales: Array) -> tuple[float, float]:
    """Return Σ w² and Σ (w − ŵ)² of rows (N, K) of a weight, stored as ``values`` with N scales.

    Squares are summed in float32 within a row, in float64 over the rows.
    """
    error = values.astype(np.float32)
    error *= scales[:, None]
    error -= weight
    return _square_sum(weight), _square_sum(error)


def _square_sum(rows: Array) -> float:
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))


def decibels(signal: float, noise: float) -> float:
    """Return the ratio of two sums of squares in dB, at most ``BEST_DB``."""
    if signal <= 0 or noise <= signal * 10 ** (-BEST_DB / 10):
        return BEST_DB
    return 10 * math.log10(signal / noise)


def write_statistics(directory: Path, layers: Iterable[Mapping[str, Any]]) -> None:
    """Write the figures, each a dict from :func:`dataclasses.asdict`, next to the graphs."""
    text = json.dumps({"layers": list(layers)}, indent=1, allow_nan=False)
    (directory / STATISTICS_FILE).write_text(text + "\n", encoding="utf-8")


def read_statistics(
    directory: Path, listed: Container[str] | None = None
) -> tuple[LayerStatistics, ...]:
    """Read what :func:`write_statistics` wrote; an empty tuple where there is no such file.

    Args:
        directory: where.
        listed: the files of a published directory; what is not among them does not exist.

    Raises:
        ArtifactError: the file holds something else.
    """
    path = directory / STATISTICS_FILE
    if (listed is not None and STATISTICS_FILE not in listed) or not is_there(path):
        return ()
    names = {field.name for field in fields(LayerStatistics)}
    try:
        layers = read_json(path, MAX_NBYTES, ArtifactError)["layers"]
        return tuple(LayerStatistics(**{n: layer[n] for n in names}) for layer in layers)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: expected figures of linear layers: {error!r}") from error


def layers_to_json(layers: Iterable[LayerStatistics]) -> list[dict[str, Any]]:
    """Return the figures as JSON types."""
    return [asdict(layer) for layer in layers]
