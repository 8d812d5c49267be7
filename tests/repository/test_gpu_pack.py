"""A compiled directory without its weights: it opens where they were made up, and computes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import TINY, write_internvl
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_pack

import internvl_edge
from internvl_edge import compiler
from internvl_edge.artifact.open import open_artifact
from internvl_edge.compiler import ExportOptions


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4-wo"])
def test_a_copy_of_made_up_weights_opens_and_computes(tmp_path: Path, precision: str) -> None:
    write_internvl(tmp_path / "checkpoint", TINY)
    out, archive, copy = (tmp_path / name for name in ("out", "out.tar.xz", "copy"))
    options = ExportOptions(
        checkpoint=tmp_path / "checkpoint",
        out=out,
        precision=precision,
        components=("image_embed", "decoder"),
        verify="none",
    )
    compiler.export(options)
    gpu_pack.pack(out, archive)
    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert archive.stat().st_size < nbytes
    gpu_pack.fill(archive, copy)
    made, own = open_artifact(copy).manifest, open_artifact(out).manifest
    assert {name: made.files[name].nbytes for name in own.files} == {
        name: record.nbytes for name, record in own.files.items()
    }
    size = own.image_size
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    with internvl_edge.open_session(copy, "image_embed") as session:
        (values,) = session.run({"pixel_values": pixels}).values()
    assert np.isfinite(values).all() and values.any()


@pytest.mark.slow
def test_another_size_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    whole = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "weights.safetensors").write_bytes(whole)
    record = '{"nbytes": 5, "sha256": "0"}'
    (folder / "manifest.json").write_text(f'{{"files": {{"weights.safetensors": {record}}}}}')
    gpu_pack.pack(folder, tmp_path / "pack")
    with pytest.raises(SystemExit, match=f"expected 5 bytes, made {len(whole)}"):
        gpu_pack.fill(tmp_path / "pack", tmp_path / "copy")
