"""Folders, Parquet and tar files as rows: one order in whatever batches; what is refused."""

from __future__ import annotations

import errno
import gzip
import itertools
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs.bulk import add, picture, write_folder, write_shard, write_table

from internvl_edge.errors import InternVLError, MediaError, ResourceError, UsageError
from internvl_edge.integrations.bulk.sources.folder import Files
from internvl_edge.integrations.bulk.sources.opening import open_source
from internvl_edge.integrations.bulk.sources.shards import Bounded, Shard
from internvl_edge.integrations.bulk.sources.source import CONTENT, PATH, PROBLEM, Content, Source


def rows_of(source: Source, size: int = 3) -> list[dict[str, Any]]:
    return list(rows_of_pieces(source, size))


def rows_of_pieces(source: Source, size: int = 3) -> Iterator[dict[str, Any]]:
    for piece in source.pieces:
        for batch, _ in piece.batches(size):
            yield from batch.to_pylist()


def sources(folder: Path) -> dict[str, Source]:
    """Ten pictures of each kind."""
    write_folder(folder / "pictures", 10)
    write_table(folder / "a.parquet", 10)
    samples = [{"png": picture(i), "txt": b"%d" % i, "json": b"{}"} for i in range(10)]
    write_shard(folder / "a.tar", samples)
    return {
        "folder": open_source([folder / "pictures"]),
        "table": open_source([folder / "a.parquet"]),
        "shard": open_source([folder / "a.tar"], keep=["txt"]),
    }


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("kind", ["folder", "table", "shard"])
def test_rows_are_the_same_in_whatever_batches(three: dict[str, Source], kind: str) -> None:
    source = three[kind]
    whole = rows_of(source, 100)
    assert len(whole) == 10
    assert len({row[PATH] for row in whole}) == 10

    @settings(max_examples=20, deadline=None)
    @given(size=st.integers(1, 12), skip=st.integers(0, 10))
    def check(size: int, skip: int) -> None:
        (piece,) = source.pieces if len(source.pieces) == 1 else (source.pieces[0],)
        rest = [row for batch, _ in piece.batches(size, skip) for row in batch.to_pylist()]
        assert rest == whole[skip : len(rest) + skip]
        assert len(rest) == 10 - skip
        shares = [share for _, share in piece.batches(size)]
        assert shares == sorted(shares)
        assert shares[-1] == 1.0
        assert all(len(batch) <= size for batch, _ in piece.batches(size, skip))

    check()


@pytest.mark.parametrize("kind", ["folder", "table", "shard"])
def test_a_piece_is_read_on_another_machine(three: dict[str, Source], kind: str) -> None:
    for piece in three[kind].pieces:
        again = pickle.loads(pickle.dumps(piece))
        assert again == piece
        assert [b for b, _ in again.batches(4)] == [b for b, _ in piece.batches(4)]


@pytest.mark.parametrize("kind", ["folder", "table", "shard"])
def test_the_schema_is_known_before_anything_is_read(three: dict[str, Source], kind: str) -> None:
    source = three[kind]
    for piece in source.pieces:
        for batch, _ in piece.batches(4):
            kept = [n for n in batch.schema.names if n not in (CONTENT, PROBLEM)]
            assert batch.select(kept).schema == source.kept


def test_contents(three: dict[str, Source], tmp_path: Path) -> None:
    pictures = [picture(i) for i in range(10)]
    assert [Path(os.fsdecode(r[CONTENT])).read_bytes() for r in rows_of(three["folder"])] == (
        pictures
    )
    assert [row[CONTENT] for row in rows_of(three["table"])] == pictures
    assert [row[CONTENT] for row in rows_of(three["shard"])] == pictures
    assert [row["txt"] for row in rows_of(three["shard"])] == [str(i) for i in range(10)]
    assert [row["id"] for row in rows_of(three["table"])] == list(range(10))
    assert three["table"].rows == three["folder"].rows == 10
    assert three["shard"].rows is None


def test_a_name_that_is_no_utf_8_is_spelled_out_and_still_opened(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    (tmp_path / name).write_bytes(picture(1))
    (row,) = rows_of(open_source([tmp_path]))
    assert row[PATH] == f"{tmp_path}/\\xff.png"
    assert Path(os.fsdecode(row[CONTENT])).read_bytes() == picture(1)


def test_a_fingerprint_follows_names_sizes_and_times(tmp_path: Path) -> None:
    write_folder(tmp_path / "pictures", 3)
    before = open_source([tmp_path / "pictures"]).fingerprint
    assert open_source([tmp_path / "pictures"]).fingerprint == before
    os.utime(tmp_path / "pictures" / "00001.png", ns=(5, 5))
    assert open_source([tmp_path / "pictures"]).fingerprint != before


# --- Parquet -------------------------------------------------------------------------------------


def test_rows_of_parquet_keep_their_number_across_pieces(tmp_path: Path) -> None:
    write_table(tmp_path / "big.parquet", 600, group=100)
    source = open_source([tmp_path / "big.parquet"], column="caption", keep=["id"])
    assert len(source.pieces) == 2
    assert source.content is Content.TEXTS
    for row in rows_of(source, 64):
        number = int(row[PATH].rpartition("#")[2])
        assert row == {
            PATH: f"{tmp_path}/big.parquet#{number}",
            "id": number,
            CONTENT: f"picture {number}",
        }


def test_a_struct_s_path_is_never_opened(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    given = pa.array([{"bytes": None, "path": str(tmp_path / "x.png")}, None], kind)
    (tmp_path / "x.png").write_bytes(picture(0))
    pq.write_table(pa.table({"image": given}), tmp_path / "t.parquet")
    assert [r[CONTENT] for r in rows_of(open_source([tmp_path / "t.parquet"]))] == [None, None]


def refused(source: Any, **how: Any) -> str:
    with pytest.raises(InternVLError) as error:
        open_source(source, **how)
    return str(error.value)


def test_what_is_refused_of_parquet(tmp_path: Path) -> None:
    table = write_table(tmp_path / "a.parquet", 2)
    assert "did you mean 'caption'" in refused([table], column="captoin")
    assert "found int64" in refused([table], column="id")
    assert "--keep nothing" in refused([table], keep=["nothing"])
    pq.write_table(pa.table({"a": [1]}), tmp_path / "b.parquet")
    assert "expected one column of pictures (bytes), found none" in refused(
        [tmp_path / "b.parquet"]
    )
    pq.write_table(pa.table({"a": [b"1"], "b": [b"2"]}), tmp_path / "c.parquet")
    assert "found 2: a, b" in refused([tmp_path / "c.parquet"])
    assert "the columns of" in refused([table, tmp_path / "b.parquet"])
    pq.write_table(pa.table({"a": [b"1"], "error": [""]}), tmp_path / "d.parquet")
    assert "--keep" in refused([tmp_path / "d.parquet"])
    assert open_source([tmp_path / "d.parquet"], keep=[]).kept.names == [PATH]
    (tmp_path / "e.parquet").write_bytes(b"PAR1" * 10)
    assert "expected a Parquet file" in refused([tmp_path / "e.parquet"])
    (tmp_path / "g.parquet").write_bytes(b"")
    assert "expected a Parquet file" in refused([tmp_path / "g.parquet"])
    os.mkfifo(tmp_path / "f.parquet")
    assert "a pipe" in refused([tmp_path / "f.parquet"])
    assert "one kind" in refused([table, tmp_path])
    assert "--recursive" in refused([table], recursive=True)


def test_a_column_whose_name_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", 2)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"caption", b"capti\xf6n"))
    with pytest.raises(MediaError, match="expected a Parquet file"):
        open_source([tmp_path / "a.parquet"])


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([[b"1"], ["a"], ["b"]], names=["image", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "more than one text" in refused([tmp_path / "a.parquet"])
    assert "more than one text" in refused([tmp_path / "a.parquet"], column="text", keep=[])
    assert rows_of(open_source([tmp_path / "a.parquet"], keep=[]))[0][CONTENT] == b"1"


def test_memory_is_not_that_of_a_row_group(tmp_path: Path) -> None:
    levels = np.random.default_rng(0).bytes(200 << 10)
    data = [levels[i:] + levels[:i] for i in range(160)]
    place = tmp_path / "a.parquet"
    how: dict[str, Any] = {"use_dictionary": False, "compression": "none"}
    pq.write_table(pa.table({"image": data}), place, write_batch_size=4, **how)  # 40 pages
    (piece,) = open_source([place]).pieces
    before, most = pa.total_allocated_bytes(), 0
    tracemalloc.start()  # what Arrow reads of a file in Python is of Python
    try:
        for batch, _ in piece.batches(4):
            most = max(most, pa.total_allocated_bytes() - before)
            del batch
        most += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < place.stat().st_size // 4


def test_a_damaged_page_is_an_error_of_its_file(tmp_path: Path) -> None:
    table = write_table(tmp_path / "a.parquet", 50, group=50)
    data = bytearray(table.read_bytes())
    data[200:20_000] = bytes(19_800)
    table.write_bytes(data)
    source = open_source([table])
    with pytest.raises(MediaError, match=r"a\.parquet"):
        rows_of(source)


# --- tar -----------------------------------------------------------------------------------------


def test_names_links_and_devices_of_an_archive(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(9))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "../../escape.png", picture(0))
        add(archive, "/absolute.png", picture(1))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("link.png")
            member.type, member.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(member)
        add(archive, "noext", b"")
        add(archive, ".hidden.png", picture(2))
        add(archive, "same.png", picture(3))
        add(archive, "same.PNG", picture(4))
        add(archive, "other.jpg", picture(5))
        add(archive, "same.png", picture(6))
        add(archive, "a.b/c.png", picture(7))
    rows = rows_of(open_source([tmp_path / "a.tar"]))
    assert [(r[PATH].removeprefix(f"{tmp_path}/a.tar/"), r[CONTENT], r[PROBLEM]) for r in rows] == [
        ("../../escape", picture(0), None),
        ("/absolute", picture(1), None),
        ("same", picture(3), None),
        ("other", picture(5), None),
        ("same#2", picture(6), None),
        ("a.b/c", picture(7), None),
    ]
    assert not (tmp_path.parent / "escape.png").exists()


def test_a_sample_without_the_field_says_so(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [{"txt": b"a", "png": picture(0)}, {"txt": b"b"}])
    first, second = rows_of(open_source([tmp_path / "a.tar"]))
    assert first[PROBLEM] is None
    assert second[CONTENT] is None
    assert "found txt" in second[PROBLEM]


def test_texts_of_an_archive(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [{"txt": "schön".encode()}, {"txt": b"\xff"}])
    source = open_source([tmp_path / "a.tar"], column="txt")
    assert source.content is Content.TEXTS
    first, second = rows_of(source)
    assert first[CONTENT] == "schön"
    assert "UTF-8" in second[PROBLEM]
    with pytest.raises(UsageError, match="has the columns txt"):
        open_source([tmp_path / "a.tar"], column="caption")


@pytest.mark.parametrize("harm", ["cut", "header", "zip"])
def test_a_damaged_archive_gives_what_is_before_and_says_so(tmp_path: Path, harm: str) -> None:
    place = write_shard(tmp_path / "a.tar", [{"png": picture(i)} for i in range(4)])
    data = place.read_bytes()
    step = 512 + -(-len(picture(0)) // 512) * 512
    if harm == "cut":
        data = data[: 2 * step + 700]
    elif harm == "header":
        data = data[: 2 * step] + b"x" * 512 + data[2 * step + 512 :]
    else:
        data = gzip.compress(data)[:-2000]
    place.write_bytes(data)
    *good, last = rows_of(open_source([place]))
    assert all(row[PROBLEM] is None for row in good)
    assert len(good) < 4
    assert last[PATH] == str(place)
    assert "damaged" in last[PROBLEM]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, rest: bytes = b"") -> bytes:
    """A member's header of any size, as GNU writes large and negative ones."""
    block = bytearray(tarfile.TarInfo(name).tobuf())
    block[124:136] = (size % 2**96).to_bytes(12, "big")
    block[124] = 0xFF if size < 0 else 0x80
    block[156:157] = kind
    block[512 - len(rest) :] = rest
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "crafted",
    [
        header("back.png", -1024),
        header("back", -1024, tarfile.DIRTYPE),
        header("back", -1024, tarfile.SYMTYPE),
        header("far.png", 1 << 62),
        header("far.png", 1 << 64),
        header("far.dat", 1 << 64),
        header("long", -512, tarfile.GNUTYPE_LONGNAME),
        header("long", 1 << 40, tarfile.GNUTYPE_LONGNAME),
        header("long", 1 << 40, tarfile.XHDTYPE),
        header("long", 1 << 64, tarfile.XHDTYPE),
        (header("long", 2, tarfile.GNUTYPE_LONGNAME) + b"a\0".ljust(512, b"\0")) * 2000,
        header("sparse.png", 0, tarfile.GNUTYPE_SPARSE, b"\1".ljust(30, b"\0")),  # goes on
        header("sparse.png", -512, tarfile.GNUTYPE_SPARSE),
    ],
    ids=lambda data: f"{data[:4].decode()}-{len(data)}-{data[124:136].hex()}-{data[156]}",
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_crafted_archive_is_a_row_with_an_error(
    tmp_path: Path, crafted: bytes, zipped: bool
) -> None:
    place = write_shard(tmp_path / "a.tar", [{"png": picture(i)} for i in range(2)])
    whole = place.read_bytes().rstrip(b"\0")
    data = whole + bytes(-len(whole) % 512) + crafted
    place.write_bytes(gzip.compress(data) if zipped else data)
    first, *_, last = itertools.islice(rows_of_pieces(open_source([place])), 5)
    assert first[PROBLEM] is None
    assert "damaged" in last[PROBLEM]


def test_no_header_makes_the_archive_be_read_whole(tmp_path: Path) -> None:
    place = tmp_path / "a.tar.gz"
    size = 64 << 20
    place.write_bytes(gzip.compress(header("long", size, tarfile.XHDTYPE) + bytes(size), 1))
    tracemalloc.start()
    try:
        (row,) = rows_of(open_source([place]))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "damaged" in row[PROBLEM]
    assert most < 16 << 20


def test_a_disk_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source([write_shard(tmp_path / "a.tar", [{"png": picture(0)}])])

    def failing(*_: Any) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Bounded, "read", failing)
    with pytest.raises(ResourceError, match=r"a\.tar.*EIO"):
        rows_of(source)


def test_every_sample_has_a_key_of_its_own(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key in ("a", "b", "a", "a#2", "a", "b"):
            add(archive, f"{key}.png", picture(0))
    rows = rows_of(open_source([tmp_path / "a.tar"]))
    assert [row[PATH].rpartition("/")[2] for row in rows] == [
        "a",
        "b",
        "a#2",
        "a#2#2",
        "a#3",
        "b#2",
    ]


def test_compressed_archives_are_read(tmp_path: Path) -> None:
    samples = [{"png": picture(i)} for i in range(3)]
    write_shard(tmp_path / "a.tar.gz", samples, kind="w:gz")
    assert len(rows_of(open_source([tmp_path / "a.tar.gz"]))) == 3


def test_a_member_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvl_edge.integrations.bulk.sources.shards.MAX_NBYTES", 100)
    write_shard(tmp_path / "a.tar", [{"png": picture(0)}])
    (row,) = rows_of(open_source([tmp_path / "a.tar"]))
    assert "at most 100 bytes" in row[PROBLEM]


# --- names ---------------------------------------------------------------------------------------


def test_a_pattern_stands_for_what_it_matches(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.parquet"):
        write_table(tmp_path / name, 2)
    files = [piece.file for piece in open_source(tmp_path / "*.parquet").pieces]  # type: ignore[attr-defined]
    assert files == [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    assert "no file matches" in refused([tmp_path / "*.tar"])
    assert "found none" in refused([])


def test_a_file_that_is_named_twice_is_there_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", 2)
    (tmp_path / "again").symlink_to(folder)
    rows = rows_of(open_source([folder, folder / "00001.png", tmp_path / "again", folder]))
    assert [row[PATH] for row in rows] == [f"{folder}/00000.png", f"{folder}/00001.png"]
    (folder / "00002.png").symlink_to(folder / "00000.png")
    assert len(rows_of(open_source(folder))) == 3  # a link has a name of its own
    table = write_table(tmp_path / "a.parquet", 2)
    assert open_source([table, folder / ".." / "a.parquet"]).rows == 2
    shard = write_shard(tmp_path / "a.tar", [{"png": picture(0)}])
    assert len(open_source([shard, shard]).pieces) == 1


def test_a_folder_of_tables_is_told_how_to_name_them(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", 2)
    assert f"{tmp_path}/*.parquet" in refused([tmp_path])
    assert "--column" in refused([tmp_path], column="image")
    assert "cannot be read" in refused([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    assert "found none" in refused([tmp_path / "empty"])


def test_pieces_are_small_enough_to_share() -> None:
    assert Files(tuple(b"%d" % i for i in range(5))).weight == 5
    assert Shard(file="a", nbytes=7, columns=(), keep=(), content=Content.TEXTS).weight == 7
