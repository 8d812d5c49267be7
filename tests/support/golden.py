"""Golden data: what other implementations computed, in the repository and outside it."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from support.paths import ROOT, TESTS

PACKED = TESTS / "golden" / "tiny.tar.xz"
PACKED_FAMILY = TESTS / "golden" / "family.tar.xz"
CHAT_PICTURES = TESTS / "golden" / "chat_pictures.json"
SHARED = Path(os.environ.get("INTERNVL_EDGE_SHARED", ROOT.parent / "shared"))
WHOLE = SHARED / "golden"  # larger; an extra for who has it
WHOLE_FAMILY = SHARED / "golden_family"  # the same
REAL_TOKENIZERS = SHARED / "data" / "real_tokenizers"
SETS = ["small", *(["whole"] if WHOLE.is_dir() else [])]
FAMILY_SETS = ["small", *(["whole"] if WHOLE_FAMILY.is_dir() else [])]
SHAPE = ".shape"  # in a file of arrays: NAME.shape is the shape of what NAME has some numbers of
FAMILY = ("llama", "llama3", "internlm2", "qwen2", "qwen3", "phi3")


def unpack(folder: Path) -> Path:
    """Unpack the repository's set; README.md in its folder says what it is."""
    with tarfile.open(PACKED) as archive:
        archive.extractall(folder, filter="data")
    return folder


def unpack_family(folder: Path, *, is_new: bool = False) -> Path:
    """Unpack the repository's family, and write its weights, which are drawn; see write_weights."""
    from support.checkpoints.drawn import write_weights

    with tarfile.open(PACKED_FAMILY) as archive:
        archive.extractall(folder, filter="data")
    for kind in FAMILY:
        write_weights(folder / kind, is_new=is_new)
    return folder


def some(array: Any) -> Any:
    """Choose numbers of a large array at equal distances that no width divides; a small one whole.

    Every row, column and head of the array has some of them.
    """
    flat = array.reshape(-1)
    if len(flat) <= 1000:
        return array
    return flat[:: 101 if len(flat) > 50_000 else 7]


def thinned(name: str, array: Any) -> dict[str, Any]:
    """Give the form in which an array of results is stored: some of it, and the shape of all."""
    kept = some(array)
    if kept.shape == array.shape:
        return {name: array}
    return {name: kept, name + SHAPE: np.array(array.shape)}


def read_golden(path: Path) -> dict[str, Any]:
    """Read golden arrays in their own shapes; numbers that are not stored are NaN."""
    with np.load(path) as file:
        arrays = dict(file)
    shapes = {name: arrays.pop(name + SHAPE) for name in file.files if name + SHAPE in arrays}
    for name, shape in shapes.items():
        whole = np.full(shape, np.nan, arrays[name].dtype)
        some(whole)[:] = arrays[name]
        arrays[name] = whole
    return arrays


def assert_golden(actual: Any, expected: Any, atol: float, name: str = "") -> None:
    """Compare dtype, shape, and those numbers that a golden array has."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
    known = ~np.isnan(expected)
    np.testing.assert_allclose(actual[known], expected[known], atol=atol, rtol=0, err_msg=name)
