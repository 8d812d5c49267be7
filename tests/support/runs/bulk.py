"""Sources of every kind with the same pictures, for the tests of embedding in bulk."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

BROKEN = b"no picture"
# Ray waits 30 s for its own processes, and cannot be told to wait longer: on a busy machine a start
# that fails by this alone is made again.
LATE, STARTS = "timed out during startup", 4


def picture(seed: int) -> bytes:
    """A small PNG."""
    levels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """Pictures 00000.png and so on, of which some are none."""
    folder.mkdir()
    for i in range(count):
        data = BROKEN if i in broken else picture(i)
        (folder / f"{i:05d}.png").write_bytes(data)
    return folder


def write_table(path: Path, count: int, *, group: int = 4, structs: bool = True) -> Path:
    """The same pictures as Hugging Face's datasets hold them, with an id and a caption."""
    data = [picture(i) for i in range(count)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    given = [{"bytes": one, "path": f"/etc/{i}"} for i, one in enumerate(data)]
    images = pa.array(given, kind) if structs else pa.array(data, pa.large_binary())
    table = pa.table(
        {
            "id": pa.array(range(count), pa.int64()),
            "image": images,
            "caption": [f"picture {i}" for i in range(count)],
        }
    )
    pq.write_table(table, path, row_group_size=group)
    return path


def write_shard(path: Path, samples: list[dict[str, bytes]], *, kind: str = "w") -> Path:
    """A tar file of samples: suffix → contents, under the keys 0000 and so on."""
    with tarfile.open(path, kind) as archive:
        for i, sample in enumerate(samples):
            for suffix, data in sample.items():
                add(archive, f"{i:04d}.{suffix}", data)
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
