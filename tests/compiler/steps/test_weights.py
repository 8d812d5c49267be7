"""Exports whose weights are the checkpoint's own shards, and those that write their own."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from support.checkpoints import TINY, Written, as_snapshot, write_internvl
from support.disk import no_hard_links, no_reflinks, reflinks

import internvl_edge
from internvl_edge import compiler
from internvl_edge.artifact.open import Artifact, open_artifact
from internvl_edge.artifact.publish import verify_whole
from internvl_edge.cli import run
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.steps import graph_files, graphs
from internvl_edge.errors import ArtifactError, CheckpointError, UsageError
from internvl_edge.export.checkpoint.parameters import expected_shapes
from internvl_edge.export.checkpoint.shards import read_header
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.export.weights import link

FAST = ("image_pool",)  # the component that traces fastest; it reads both shards
SHARDS = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture(autouse=True)
def _no_reflinks(monkeypatch: pytest.MonkeyPatch) -> None:
    no_reflinks(monkeypatch)  # wherever these tests run


@pytest.fixture
def half(tmp_path: Path) -> Written:
    return write_internvl(tmp_path / "checkpoint", dtype=torch.bfloat16, shards=2)


def exported(checkpoint: Path, **chosen: Any) -> Artifact:
    defaults = {"components": FAST, "precision": "bf16", "out": checkpoint.parent / "out"}
    options: dict[str, Any] = defaults | chosen
    return compiler.export(ExportOptions(checkpoint=checkpoint, **options))


def weights_of(artifact: Artifact) -> list[str]:
    return sorted(name for name in artifact.manifest.files if name.endswith(".safetensors"))


def snapshot_of(directory: Path) -> dict[str, Any]:
    """Everything that writing into a directory would change."""
    return {
        str(path): (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
        for path in (directory, *directory.rglob("*"))
        for status in (path.lstat(),)
    }


# --- which way -----------------------------------------------------------------------------------


def test_auto_brings_what_is_stored_as_it_is_needed(half: Written) -> None:
    artifact = exported(half.path)
    assert weights_of(artifact) == SHARDS
    assert artifact.manifest.source["weights"] == dict.fromkeys(SHARDS, "copy")
    assert all(artifact.manifest.files[name].sha256 for name in SHARDS)
    onnx.checker.check_model(str(artifact.onnx_path("image_pool")))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_auto_converts_what_is_not(half: Written, precision: str) -> None:
    artifact = exported(half.path, precision=precision)
    assert weights_of(artifact) == ["weights.safetensors"]
    assert artifact.manifest.source["weights"] == {}


def test_auto_links_what_is_large(half: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "AUTO_COPY_NBYTES", 0)
    artifact = exported(half.path)
    assert artifact.manifest.hard_links == tuple(SHARDS)


def test_auto_reflinks_where_it_can(half: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    reflinks(monkeypatch)
    artifact = exported(half.path)
    assert artifact.manifest.source["weights"] == dict.fromkeys(SHARDS, "reflink")
    assert artifact.manifest.files[SHARDS[0]].header_sha256
    onnx.checker.check_model(str(artifact.onnx_path("image_pool")))


@pytest.mark.slow
def test_another_resolution_writes_its_positions(half: Written) -> None:
    artifact = exported(half.path, components=("vision",), image_size=42, weights="link")
    assert weights_of(artifact) == [*SHARDS, "weights.safetensors"]
    (name,) = read_header(artifact.file("weights.safetensors"))
    assert name.endswith("position_embedding")


@pytest.mark.parametrize("weights", ["link", "copy"])
def test_a_shard_with_the_name_of_our_own_file(tmp_path: Path, weights: str) -> None:
    path = write_internvl(tmp_path / "checkpoint").path
    (path / "model.safetensors").rename(path / "weights.safetensors")
    with pytest.raises(UsageError, match="is written to a file of that name"):
        exported(path, components=("vision",), image_size=42, weights=weights)


def test_a_link_that_cannot_be(half: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    no_hard_links(monkeypatch)
    with pytest.raises(UsageError, match=r"cross-device.*--weights copy"):
        exported(half.path, weights="link")
    assert not (half.path.parent / "out").exists()


# --- hard links, and what is said of them --------------------------------------------------------


def test_who_reads_hard_links(half: Written) -> None:
    artifact = exported(half.path, weights="link", precision="fp16")
    path = artifact.onnx_path("image_pool")
    for shard in SHARDS:
        assert artifact.file(shard).samefile(half.path / shard)
    with internvl_edge.open_session(artifact.path, "image_pool"):
        pass
    with pytest.raises(onnx.checker.ValidationError, match=r"hard ?link"):
        onnx.checker.check_model(str(path))
    with pytest.raises(ValueError, match="multiple hard links"):
        [value.const_value.numpy() for value in ir.load(path).graph.initializers.values()]
    text = artifact.file("README.md").read_text()
    assert "hard links" in text and SHARDS[0] in text and "edits the other" in text


def test_the_command_line_says_what_hard_links_are(
    half: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    out = half.path.parent / "out"
    arguments = ["export", half.path, "-o", out, "-p", "bf16", "--components", "image_pool"]
    assert run([*map(str, arguments), "--weights", "link", "--verify", "none", "--json"]) == 0
    said = capsys.readouterr()
    err = " ".join(said.err.split())
    assert "hard links" in err and "edits the other" in err and "onnx.checker" in err
    assert json.loads(said.out)["source"]["weights"] == dict.fromkeys(SHARDS, "hard link")
    assert run(["verify", str(out)]) == 0
    assert "by size and header only" in capsys.readouterr().out
    for recorded in (SHARDS, []):
        assert run(["verify", str(out), "--full", "--json"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["recorded"] == recorded
    raw = bytearray((half.path / SHARDS[1]).read_bytes())
    raw[-1] ^= 1
    (half.path / SHARDS[1]).write_bytes(raw)
    assert run(["verify", str(out)]) == 0
    assert "every other file matches its sha256" in " ".join(capsys.readouterr().out.split())
    assert run(["verify", str(out), "--full"]) == 3
    assert "the file was changed" in " ".join(capsys.readouterr().err.split())


def test_an_engine_is_known_by_the_header_before_and_after(half: Written) -> None:
    artifact = exported(half.path, weights="link", verify="none")
    fingerprint = graph_files.fingerprint(artifact.manifest, "image_pool.onnx")
    proved, _ = verify_whole(artifact.path)
    assert proved.manifest != artifact.manifest
    assert graph_files.fingerprint(proved.manifest, "image_pool.onnx") == fingerprint
    shard = artifact.manifest.files[SHARDS[0]]
    files = {**artifact.manifest.files, SHARDS[0]: replace(shard, header_sha256="0" * 64)}
    other = replace(artifact.manifest, files=files)
    assert graph_files.fingerprint(other, "image_pool.onnx") != fingerprint


# --- Hugging Face caches and read-only checkpoints -----------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "how"),
    [
        ({"weights": "link"}, "hard link"),
        ({"weights": "copy"}, "copy"),
        ({"precision": "fp32"}, None),
    ],
)
def test_a_cache_snapshot(half: Written, tmp_path: Path, chosen: Any, how: str | None) -> None:
    snapshot = as_snapshot(half.path, tmp_path / "cache")
    before = snapshot_of(tmp_path / "cache")
    artifact = exported(snapshot, out=tmp_path / "out", **chosen)
    files = artifact.manifest.files
    expected = {name: hashlib.sha256((snapshot / name).read_bytes()).hexdigest() for name in SHARDS}
    assert artifact.manifest.source["weights"] == (dict.fromkeys(SHARDS, how) if how else {})
    if how:
        assert {name: files[name].sha256 for name in SHARDS} == expected
        assert all(not artifact.file(name).is_symlink() for name in SHARDS)
    assert snapshot_of(tmp_path / "cache") == before
    assert verify_whole(artifact.path) == (artifact, ())  # all is known, nothing to record


def test_a_flipped_byte_deep_in_a_linked_blob(half: Written, tmp_path: Path) -> None:
    snapshot = as_snapshot(half.path, tmp_path / "cache")
    artifact = exported(snapshot, out=tmp_path / "out", weights="link", verify="none")
    with artifact.file(SHARDS[0]).open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    open_artifact(artifact.path)
    with pytest.raises(ArtifactError, match=f"{SHARDS[0]}.*the file was changed"):
        verify_whole(artifact.path)


@pytest.mark.parametrize(
    "chosen", [{"weights": "link"}, {"weights": "copy"}, {"precision": "fp32"}]
)
def test_a_read_only_checkpoint(half: Written, chosen: Any) -> None:
    for file in half.path.iterdir():
        file.chmod(0o444)
    half.path.chmod(0o555)
    before = snapshot_of(half.path)
    exported(half.path, **chosen)
    assert snapshot_of(half.path) == before
    half.path.chmod(0o755)


# --- nothing is read -----------------------------------------------------------------------------


def write_sparse(path: Path) -> int:
    """A checkpoint of more than 2 GB that takes no room: all zeros. Its size."""
    qllama = replace(TINY.qllama, hidden_size=1024, num_attention_heads=4, vocab_size=1 << 19)
    config = CheckpointConfig(
        kind="internvl", vision=TINY.vision, internvl=replace(TINY, qllama=qllama)
    )
    header, end = {}, 0
    for name, shape in expected_shapes(config).items():
        begin, end = end, end + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw = raw.ljust(-(-len(raw) // 8) * 8)
    path.mkdir()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    fields = asdict(replace(TINY, qllama=qllama))
    config_json = {
        "model_type": "internvl",
        "vision_config": fields.pop("vision"),
        "qllama_config": fields.pop("qllama"),
    }
    (path / "config.json").write_text(json.dumps(config_json | fields))
    return end


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def test_linking_reads_nothing(tmp_path: Path) -> None:
    nbytes = write_sparse(tmp_path / "checkpoint")
    assert nbytes > 2e9
    before = bytes_read()
    artifact = exported(tmp_path / "checkpoint", weights="link", verify="none")
    open_artifact(artifact.path)
    read = bytes_read() - before
    assert artifact.manifest.hard_links == ("model.safetensors",)
    assert read < 50e6, f"{read / 1e6:.0f} MB were read"


# --- alignment -----------------------------------------------------------------------------------


def crooked(written: Written) -> Written:
    """Move every tensor of a checkpoint to an odd offset, as the format allows."""
    for file in written.path.glob("*.safetensors"):
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        file.write_bytes(
            struct.pack("<Q", length + 1) + raw[8 : 8 + length] + b" " + raw[8 + length :]
        )
    return written


def test_auto_aligns_what_is_not(half: Written) -> None:
    artifact = exported(crooked(half).path)
    assert weights_of(artifact) == ["weights.safetensors"]


def test_copy_aligns_what_is_not(half: Written) -> None:
    artifact = exported(crooked(half).path, precision="fp32", weights="copy")
    entries = read_header(artifact.file("weights.safetensors"))
    assert {entry.dtype for entry in entries.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert all(entry.offset % 2 == 0 for entry in entries.values())


def test_what_is_not_aligned_cannot_be_linked(half: Written) -> None:
    with pytest.raises(UsageError, match=r"multiples of the item size.*--weights copy.*--align"):
        exported(crooked(half).path, weights="link")
    assert not (half.path.parent / "out").exists()


@pytest.mark.parametrize("align", [1, 64, 8192])
def test_align(half: Written, align: int) -> None:
    artifact = exported(half.path, align=align)
    assert weights_of(artifact) == ["weights.safetensors"]
    entries = read_header(artifact.file("weights.safetensors"))
    assert all(e.offset % align == 0 for n, e in entries.items() if not n.startswith("__padding__"))
    onnx.checker.check_model(str(artifact.onnx_path("image_pool")))


@pytest.mark.slow
def test_align_quantized(half: Written, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (30, 30), (60 * i, 40, 200)).save(tmp_path / "pictures" / f"{i}.png")
    artifact = exported(
        half.path,
        precision="int8",
        components=("vision",),
        calibration=tmp_path / "pictures",
        align=256,
    )
    entries = read_header(artifact.file("weights.safetensors"))
    assert any(name.startswith("__padding__") for name in entries)
    assert all(e.offset % 256 == 0 for n, e in entries.items() if not n.startswith("__padding__"))
    assert compiler.verify(artifact.path, half.path)["vision"]["cosine"] > 0.9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align": 0}, "power of two from 1 to 65536, found 0"),
        ({"align": -2}, "found -2"),
        ({"align": 96}, "found 96"),
        ({"align": 131072}, "found 131072"),
        ({"align": 256, "weights": "link"}, "--weights link keeps .* --align 256 moves"),
        ({"align": 256, "weights": "copy"}, "--weights copy keeps .* --align 256 moves"),
        ({"precision": "int8", "weights": "copy"}, "leave --weights out"),
    ],
)
def test_refusals(half: Written, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        exported(half.path, **changes)
    assert not (half.path.parent / "out").exists()


# --- a checkpoint that changes -------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [{"weights": "link"}, {"precision": "fp32"}])
def test_changed_while_compiling(
    half: Written, monkeypatch: pytest.MonkeyPatch, chosen: Any
) -> None:
    original = graphs.write_graph

    def change(*arguments: Any) -> Any:
        os.utime(half.path / SHARDS[0], ns=(0, 0))
        return original(*arguments)

    monkeypatch.setattr(graphs, "write_graph", change)
    with pytest.raises(CheckpointError, match=f"changed while it was read: {SHARDS[0]}"):
        exported(half.path, **chosen)
    assert not (half.path.parent / "out").exists()
