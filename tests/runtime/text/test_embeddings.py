"""The token table of a chat model: mapped where its header says, or refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvl_edge.artifact.pins import Watch
from internvl_edge.errors import ArtifactError
from internvl_edge.runtime.text.embeddings import open_table

NAME = "language_model.model.embed_tokens.weight"


class Directory:
    """As much of an artifact as a table is read from: one weights file."""

    def __init__(self, path: Path, header: dict[str, Any], data: bytes) -> None:
        raw = json.dumps(header).encode()
        (path / "w.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
        self.path, self.manifest = path, self
        self.files = ("w.safetensors",)

    def file(self, name: str) -> Path:
        return self.path / name

    def watched(self, name: str) -> Watch:
        return Watch(self.path, {name: (self.path / name).open("rb")})


def place(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def table_of(path: Path, header: dict[str, Any], data: bytes) -> Any:
    return open_table(Directory(path, header, data))  # type: ignore[arg-type]


def test_rows_are_looked_up_where_they_lie(tmp_path: Path) -> None:
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    header = {"before": place("U8", [4], 0, 4), NAME: place("F32", [3, 2], 4, 28)}
    table = table_of(tmp_path, header, bytes(4) + rows.tobytes())
    assert table.shape == (3, 2)
    np.testing.assert_array_equal(table.look_up(np.array([[2, 0]])), rows[None, [2, 0]])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({NAME: place("F32", [2, 1], 0, 4)}, "malformed safetensors header"),
        ({NAME: place("F32", [1, 1], 4, 8)}, "overlaps or leaves a hole"),
        ({NAME: place("I32", [2, 1], 0, 8)}, "expected a table of F32, F16, BF16, found I32"),
        ({NAME: place("F32", [2], 0, 8)}, "expected a table of"),
        ({NAME: place("F32", [0, 2], 0, 0), "a": place("U8", [8], 0, 8)}, "expected a table of"),
        ({"other": place("F32", [2, 1], 0, 8)}, "expected a tensor"),
    ],
)
def test_what_is_no_table(tmp_path: Path, header: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        table_of(tmp_path, header, bytes(8))


def test_a_table_that_was_written_to_since_says_so(tmp_path: Path) -> None:
    table = table_of(tmp_path, {NAME: place("F32", [1, 2], 0, 8)}, bytes(8))
    with (tmp_path / "w.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ArtifactError, match=r"changed since it was opened: w\.safetensors"):
        table.look_up(np.array([[0]]))
