"""The checkpoint's own shards in a directory: every way they come, and every way they do not."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from support.checkpoints import as_snapshot, write_internvl
from support.disk import no_hard_links, no_reflinks, reflinks

from internvl_edge.errors import CheckpointError, ResourceError, UsageError
from internvl_edge.export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from internvl_edge.export.weights import link
from internvl_edge.export.weights.link import Transfer, bring_shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write_internvl(tmp_path / "checkpoint", shards=2).path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def brought(checkpoint: Checkpoint, out: Path, transfer: Transfer) -> dict[str, link.Brought]:
    """Bring all shards, as is foretold, with their tensors where they are said to be."""
    foretold = link.way_of(checkpoint.shards, out / "not" / "yet", transfer)
    assert list(out.iterdir()) == []  # nothing of the trial is left
    stored, found = bring_shards(checkpoint, checkpoint.tensors, out, transfer, lambda *_: None)
    assert sorted(os.listdir(out)) == sorted(found)
    assert hows(found) == {foretold}
    for name, place in stored.items():
        with open(out / place.location, "rb") as file:
            file.seek(place.offset)
            assert file.read(place.nbytes) == checkpoint.read(name).tobytes()
    return found


def hows(found: dict[str, link.Brought]) -> set[str]:
    return {shard.how for shard in found.values()}


# --- the ways ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transfer", ["auto", "link"])
def test_reflinks_come_first(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch, transfer: Transfer
) -> None:
    reflinks(monkeypatch)
    found = brought(checkpoint, out, transfer)
    assert hows(found) == {"reflink"}
    for name, shard in found.items():
        assert (out / name).stat().st_nlink == 1
        assert shard.record.nbytes == (out / name).stat().st_size
        assert shard.record.sha256 is None and shard.record.header_sha256 is not None


def test_hard_links(checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_reflinks(monkeypatch)
    found = brought(checkpoint, out, "link")
    assert hows(found) == {"hard link"}
    for shard in checkpoint.shards:
        assert (out / shard.name).samefile(shard)
        raw = shard.read_bytes()
        header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
        record = found[shard.name].record
        assert record.header_sha256 == hashlib.sha256(header).hexdigest()
        assert (record.nbytes, record.sha256) == (len(raw), None)


@pytest.mark.parametrize("reflinks_work", [True, False])
def test_copy_is_a_copy(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch, reflinks_work: bool
) -> None:
    (reflinks if reflinks_work else no_reflinks)(monkeypatch)
    found = brought(checkpoint, out, "copy")
    assert hows(found) == {"copy"}
    for shard in checkpoint.shards:
        assert (out / shard.name).stat().st_nlink == 1
        record = found[shard.name].record
        assert record.sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
        assert record.header_sha256 is None


@pytest.mark.parametrize(("limit", "expected"), [(10**9, "copy"), (10**5, "hard link")])
def test_auto_copies_what_is_small(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch, limit: int, expected: str
) -> None:
    no_reflinks(monkeypatch)
    monkeypatch.setattr(link, "AUTO_COPY_NBYTES", limit)
    assert hows(brought(checkpoint, out, "auto")) == {expected}


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_where_hard_links_cannot_be(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    no_reflinks(monkeypatch)
    no_hard_links(monkeypatch, code)
    monkeypatch.setattr(link, "AUTO_COPY_NBYTES", 0)
    assert hows(brought(checkpoint, out, "auto")) == {"copy"}
    for path in out.iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=f"{os.strerror(code)}.*--weights copy"):
        brought(checkpoint, out, "link")
    assert list(out.iterdir()) == []


def test_no_link_is_foretold_where_none_can_be(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_reflinks(monkeypatch)
    no_hard_links(monkeypatch)
    with pytest.raises(UsageError, match="--weights copy"):
        link.way_of(checkpoint.shards, out, "link")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_bad_disk_is_no_reason_to_try_another_way(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    no_reflinks(monkeypatch, code)
    with pytest.raises(OSError) as caught:
        bring_shards(checkpoint, checkpoint.tensors, out, "auto", lambda *_: None)
    assert caught.value.errno == code
    with pytest.raises(ResourceError, match=errno.errorcode[code]):
        link.way_of(checkpoint.shards, out / "new", "auto")
    assert list(out.iterdir()) == []


def test_only_shards_that_are_needed(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_reflinks(monkeypatch)
    name = next(n for n, entry in checkpoint.tensors.items() if entry.file.name == SECOND)
    stored, found = bring_shards(checkpoint, [name], out, "link", lambda *_: None)
    assert (set(stored), set(found)) == ({name}, {SECOND})


def test_progress_of_copies(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "CHUNK_NBYTES", 100_000)
    told: dict[str, list[int]] = {}
    totals: dict[str, int] = {}

    def copied(shard: str, done: int, total: int) -> None:
        told.setdefault(shard, []).append(done)
        totals[shard] = total

    bring_shards(checkpoint, checkpoint.tensors, out, "copy", copied)
    assert totals == {shard.name: shard.stat().st_size for shard in checkpoint.shards}
    for shard, done in told.items():
        assert done == sorted(done) and len(done) > 2
        assert (done[0], done[-1]) == (0, totals[shard])


# --- a Hugging Face cache ------------------------------------------------------------------------


def test_blobs_are_linked_and_their_hash_is_known(
    checkpoint: Checkpoint, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_reflinks(monkeypatch)
    snapshot = open_checkpoint(as_snapshot(checkpoint.path, tmp_path / "cache"))
    expected = {s.name: hashlib.sha256(s.read_bytes()).hexdigest() for s in snapshot.shards}
    found = brought(snapshot, out, "link")
    assert {name: shard.record.sha256 for name, shard in found.items()} == expected
    assert all(shard.record.header_sha256 for shard in found.values())
    for name in found:
        assert not (out / name).is_symlink()
        assert (out / name).samefile(snapshot.path / name)


def test_a_damaged_blob_is_not_copied(checkpoint: Checkpoint, out: Path, tmp_path: Path) -> None:
    path = as_snapshot(checkpoint.path, tmp_path / "cache")
    blob = (path / FIRST).resolve()
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{blob.name}.*download it again"):
        brought(open_checkpoint(path), out, "copy")


# --- changed meanwhile ---------------------------------------------------------------------------


def _replace(shard: Path) -> None:
    """Another file of the same size and time."""
    status, raw = shard.stat(), shard.read_bytes()
    other = shard.with_name("other")
    other.write_bytes(raw)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(shard)


CHANGES = {
    "truncated": lambda shard: os.truncate(shard, 20_000),
    "written": lambda shard: os.utime(shard, ns=(0, 1)),
    "replaced": _replace,
    "removed": os.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("transfer", ["link", "copy"])
def test_changed_after_opening(
    checkpoint: Checkpoint, out: Path, transfer: Transfer, change: str
) -> None:
    CHANGES[change](checkpoint.path / SECOND)
    with pytest.raises(CheckpointError, match=rf"changed while it was read: {SECOND}: \d+ bytes"):
        brought(checkpoint, out, transfer)


@pytest.mark.parametrize("nbytes", [-1000, 1000])
def test_changed_while_copying(
    checkpoint: Checkpoint, out: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    monkeypatch.setattr(link, "CHUNK_NBYTES", 100_000)

    def change(shard: str, done: int, total: int) -> None:
        if shard == SECOND and done == 100_000:
            os.truncate(checkpoint.path / SECOND, total + nbytes)

    with pytest.raises(CheckpointError, match="changed while it was read"):
        bring_shards(checkpoint, checkpoint.tensors, out, "copy", change)
