"""Headers of weights files that cost much: bounded before anything is multiplied or listed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.artifact.safetensors import MalformedFile, read_places


def write(path: Path, header: Any, data: bytes = b"", *, raw: bytes | None = None) -> Path:
    text = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


CASES: dict[str, tuple[bytes, str]] = {
    "dimensions": (
        b'{"t":{"dtype":"F32","shape":['
        + b"4611686018427387904," * 50_000
        + b'1],"data_offsets":[0,4]}}',
        "50001 dimensions, at most 64",
    ),
    "digits": (
        b'{"t":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,4]}}',
        "a number of 4000 digits",
    ),
    "depth": (b'{"t":' + b"[" * 50_000, "nested deeper"),
    "half a character": (
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "half a character",
    ),
    "names twice": (
        b"{" + b",".join(b'"t%d":1' % i for i in range(50_000)) + b',"t0":1}',
        r"1 name\(s\) stand twice",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_costly_header_is_refused_soon(tmp_path: Path, case: str) -> None:
    raw, says = CASES[case]
    path = write(tmp_path / "x.safetensors", None, b"1234", raw=raw)
    started = time.perf_counter()
    with path.open("rb") as file, pytest.raises(MalformedFile, match=says):
        read_places(file)
    assert time.perf_counter() - started < 5


def test_a_plain_one_is_read(tmp_path: Path) -> None:
    header = {"t": {"dtype": "F32", "shape": [1] * 8, "data_offsets": [0, 4]}}
    with write(tmp_path / "x.safetensors", header, b"1234").open("rb") as file:
        assert read_places(file)["t"].shape == (1,) * 8
