"""A source embedded into a file: each row once and in order, whatever happens on the way."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs.bulk import picture, write_folder, write_shard, write_table

from internvl_edge.errors import InputError, MediaError, ResourceError, UsageError
from internvl_edge.files.disk import lock
from internvl_edge.integrations.bulk import parts, run
from internvl_edge.integrations.bulk.job import Done, How, Progress
from internvl_edge.integrations.bulk.rows import Embedder, embedding_type
from internvl_edge.integrations.bulk.sources.opening import open_source
from internvl_edge.integrations.bulk.sources.source import Source
from internvl_edge.integrations.bulk.staging import staging_of
from internvl_edge.runtime.model import Model

HOW = How(batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("run") / "pictures", 30, broken=(7, 8, 29))


@pytest.fixture(scope="module")
def whole(folder: Path, model: Model, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """The result of a run that nothing interrupts."""
    dest = tmp_path_factory.mktemp("whole") / "a.parquet"
    embed(open_source([folder]), model, dest)
    return pq.read_table(dest)


def embed(source: Source, model: Model, dest: Path, **how: Any) -> Done:
    return run.embed(source, model, dest, HOW, threads=2, **how)


def test_rows_are_those_of_the_runtime(folder: Path, whole: pa.Table, model: Model) -> None:
    good = [i for i in range(30) if i not in (7, 8, 29)]
    expected = model.encode_image([picture(i) for i in good])
    assert whole.column("path").to_pylist() == [f"{folder}/{i:05d}.png" for i in range(30)]
    assert whole.schema.field("embedding").type == embedding_type(expected.shape[1])
    rows = whole.column("embedding").to_pylist()
    np.testing.assert_allclose(np.array([rows[i] for i in good]), expected, atol=1e-5)
    errors = whole.column("error").to_pylist()
    assert [i for i in range(30) if rows[i] is None] == [7, 8, 29]
    assert [i for i in range(30) if errors[i] is not None] == [7, 8, 29]
    assert "expected a JPEG, PNG or WebP image" in errors[7]


def test_every_kind_of_source_gives_the_same(tmp_path: Path, model: Model) -> None:
    write_folder(tmp_path / "pictures", 9)
    write_table(tmp_path / "a.parquet", 9)
    write_shard(tmp_path / "a.tar", [{"png": picture(i)} for i in range(9)])
    found = []
    for i, name in enumerate(("pictures", "a.parquet", "a.tar")):
        dest = tmp_path / f"out{i}.parquet"
        assert embed(open_source([tmp_path / name]), model, dest).rows == 9
        found.append(pq.read_table(dest))
    assert found[0].column("embedding").equals(found[1].column("embedding"))
    assert found[0].column("embedding").equals(found[2].column("embedding"))
    assert found[1].column_names == ["path", "id", "caption", "embedding", "error"]


def test_texts(tmp_path: Path, model: Model) -> None:
    captions = ["a red zero", "", None, "a blue one", "nul \0"]
    pq.write_table(pa.table({"caption": captions}), tmp_path / "a.parquet")
    source = open_source([tmp_path / "a.parquet"], column="caption")
    done = run.embed(source, model, tmp_path / "b.parquet", How(normalize=True, batch_size=2))
    assert (done.rows, done.errors) == (5, 3)
    rows = pq.read_table(tmp_path / "b.parquet").column("embedding").to_pylist()
    expected = model.encode_text([captions[0], captions[3]], normalize=True)
    np.testing.assert_allclose(np.array([rows[0], rows[3]]), expected, atol=1e-5)


def not_utf8(*texts: bytes) -> pa.Array:
    """A column of strings as nobody checked it: Parquet's readers do not."""
    return pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())


def test_a_text_that_is_no_utf_8_costs_no_other_row_anything(tmp_path: Path, model: Model) -> None:
    column = not_utf8(b"a red seven", b"caf\xe9", b"a blue three")
    told = "expected text in UTF-8, found byte 0xe9"
    for i, texts in enumerate([column, column.dictionary_encode(), column.cast(pa.large_string())]):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{i}.parquet")
        dest = tmp_path / f"{i}-out.parquet"
        embed(open_source([tmp_path / f"{i}.parquet"], "text", ()), model, dest)
        rows = pq.read_table(dest)
        assert rows.column("error").to_pylist() == [None, told, None]
        found = np.array([row for row in rows.column("embedding").to_pylist() if row is not None])
        expected = model.encode_text(["a red seven", "a blue three"])
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_broken_picture_whose_name_is_no_utf_8(tmp_path: Path, model: Model) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture(0))
    (tmp_path / "pictures" / "b\udcff.png").write_bytes(b"none")
    done = embed(open_source([tmp_path / "pictures"]), model, tmp_path / "a.parquet")
    assert (done.rows, done.errors) == (2, 1)
    assert r"b\xff.png" in pq.read_table(tmp_path / "a.parquet").column("error").to_pylist()[1]


def test_texts_that_are_too_long(tmp_path: Path, model: Model) -> None:
    pq.write_table(pa.table({"caption": ["a red zero", "word " * 100]}), tmp_path / "a.parquet")
    source, dest = open_source([tmp_path / "a.parquet"], column="caption"), tmp_path / "b.parquet"
    done = run.embed(source, model, dest, How(on_long="error"))
    assert (done.rows, done.errors) == (2, 1)
    rows = pq.read_table(dest)
    assert "tokens, at most" in rows.column("error").to_pylist()[1]
    assert rows.column("embedding").is_null().to_pylist() == [False, True]
    with pytest.raises(UsageError, match="another on_long"):
        run.embed(source, model, dest, How(), resume=True)
    with pytest.raises(UsageError, match="on_long"):
        run.embed(source, model, tmp_path / "c.parquet", How(on_long="x"))  # type: ignore[arg-type]


def test_modes_and_transforms(tmp_path: Path, folder: Path, model: Model) -> None:
    source = open_source([folder / "00000.png", folder / "00001.png"])
    for mode, transform in (("g", None), ("c", "clip")):
        dest = tmp_path / f"{mode}.parquet"
        run.embed(source, model, dest, How(mode=mode, transform=transform))
        expected = model.encode_image(
            [picture(0), picture(1)], mode=mode, **({"transform": transform} if transform else {})
        )
        rows = pq.read_table(dest).column("embedding").to_pylist()
        np.testing.assert_allclose(np.array(rows), expected, atol=1e-5)
    with pytest.raises(UsageError, match="mode"):
        run.embed(source, model, tmp_path / "x.parquet", How(mode="x"))
    with pytest.raises(UsageError, match="transform"):
        run.embed(source, model, tmp_path / "x.parquet", How(transform="x"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="batch_size"):
        How(batch_size=0)


def test_batches_are_smaller_where_pictures_are_larger() -> None:
    assert [How().rows_at_once(side) for side in (48, 112, 224, 448, 4096)] == [32, 32, 8, 2, 1]
    assert How().rows_at_once() == 32
    assert How(batch_size=5).rows_at_once(448) == 5


# --- interrupted ---------------------------------------------------------------------------------


@contextmanager
def failing(after: int, error: BaseException) -> Iterator[None]:
    """Let the computation fail after so many batches."""
    computed = Embedder.embedded
    count = 0

    def embedded(self: Embedder, batch: pa.RecordBatch) -> pa.RecordBatch:
        nonlocal count
        count += 1
        if count > after:
            raise error
        return computed(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Embedder, "embedded", embedded)
        yield


@pytest.mark.slow
def test_whatever_is_interrupted_is_taken_up(
    folder: Path, whole: pa.Table, model: Model, tmp_path: Path
) -> None:
    source = open_source([folder])

    @settings(max_examples=8, deadline=None)
    @given(stops=st.lists(st.integers(0, 4), max_size=4), each=st.booleans())
    def check(stops: list[int], each: bool) -> None:
        dest = tmp_path / "a.parquet"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts, "PART_SECONDS", 0.0 if each else 10.0)
            left = 8  # batches
            for i, stop in enumerate(stops):
                left -= stop
                if left <= 0:
                    break
                error = (KeyboardInterrupt(), InputError("no"), ResourceError("full"))[i % 3]
                with failing(stop, error), pytest.raises(type(error)):
                    embed(source, model, dest, resume=True)
                assert not dest.exists()
            done = embed(source, model, dest, resume=True)
        assert (done.rows, done.errors) == (30, 3)
        assert pq.read_table(dest).equals(whole)
        assert not staging_of(dest).exists()
        dest.unlink()

    check()


def test_a_run_that_finished_nothing_leaves_nothing(
    folder: Path, model: Model, tmp_path: Path
) -> None:
    with failing(0, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        embed(open_source([folder]), model, tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []


def interrupted(source: Source, model: Model, dest: Path, **how: Any) -> None:
    with failing(2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        embed(source, model, dest, **how)
    assert staging_of(dest).is_dir()


def test_what_an_interrupted_run_left_is_not_used_unasked(
    folder: Path, whole: pa.Table, model: Model, tmp_path: Path
) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"
    interrupted(source, model, dest)
    with pytest.raises(UsageError, match="--resume goes on"):
        embed(source, model, dest)
    with pytest.raises(UsageError, match="another mode"):
        run.embed(source, model, dest, How(mode="g"), resume=True)
    with pytest.raises(UsageError, match="another source"):
        embed(open_source([folder / "00001.png"]), model, dest, resume=True)
    assert embed(source, model, dest, force=True).kept_rows == 0
    assert pq.read_table(dest).equals(whole)


def test_a_file_that_is_there(folder: Path, whole: pa.Table, model: Model, tmp_path: Path) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"
    embed(source, model, dest)
    with pytest.raises(UsageError, match="exists; pass --force"):
        embed(source, model, dest)
    again = embed(source, model, dest, resume=True)
    assert (again.rows, again.errors, again.kept_rows) == (30, 3, 30)
    with pytest.raises(UsageError, match="another normalize"):
        run.embed(source, model, dest, How(normalize=True), resume=True)
    interrupted(source, model, dest, force=True)
    assert pq.read_table(dest).equals(whole)  # the old one, until the new one is complete
    (tmp_path / "b.parquet").write_bytes(b"whatever")
    with pytest.raises(UsageError, match="none of ours"):
        embed(source, model, tmp_path / "b.parquet", resume=True)


def test_a_run_that_died_after_it_renamed_is_done(
    folder: Path, model: Model, tmp_path: Path
) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.shutil, "rmtree", lambda *_, **__: None)
        embed(source, model, dest)
    assert staging_of(dest).exists()
    assert embed(source, model, dest, resume=True).kept_rows == 30
    assert not staging_of(dest).exists()


def test_one_run_at_a_time(folder: Path, model: Model, tmp_path: Path) -> None:
    dest = tmp_path / "a.parquet"
    staging_of(dest).mkdir()
    held = lock(staging_of(dest))
    try:
        for how in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(UsageError, match="another run is writing"):
                embed(open_source([folder]), model, dest, **how)
    finally:
        os.close(held)
    assert embed(open_source([folder]), model, dest).rows == 30  # nothing was in it


@pytest.mark.parametrize("old", [How(normalize=True), HOW], ids=["another recipe", "the same"])
def test_a_run_that_replaces_is_taken_up(
    folder: Path, whole: pa.Table, model: Model, tmp_path: Path, old: How
) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"
    run.embed(source, model, dest, old)
    before = dest.read_bytes()
    interrupted(source, model, dest, force=True)
    interrupted(source, model, dest, resume=True)
    assert dest.read_bytes() == before
    done = embed(source, model, dest, resume=True)
    assert 0 < done.kept_rows < 30
    assert pq.read_table(dest).equals(whole)
    assert not staging_of(dest).exists()


def test_what_came_meanwhile_is_not_replaced(folder: Path, model: Model, tmp_path: Path) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"
    run.embed(source, model, dest, How(normalize=True))
    interrupted(source, model, dest, force=True)
    run.embed(source, model, tmp_path / "b.parquet", How(mode="g"))
    (tmp_path / "b.parquet").rename(dest)
    with pytest.raises(UsageError, match="another mode"):
        embed(source, model, dest, resume=True)


def test_a_damaged_part_is_an_error(folder: Path, model: Model, tmp_path: Path) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"
    interrupted(source, model, dest)
    (part,) = staging_of(dest).glob("*.parquet")
    part.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="are damaged"):
        embed(source, model, dest, resume=True)
    part.rename(part.with_name("000003.parquet"))
    with pytest.raises(InputError, match="some are missing"):
        embed(source, model, dest, resume=True)


def lost_page(part: Path) -> None:
    """The end of a part's embeddings, as a disk leaves it that never wrote it."""
    data = bytearray(part.read_bytes())
    data[200:216] = bytes(16)
    part.write_bytes(data)


def all_pages_lost(part: Path) -> None:
    part.write_bytes(bytes(part.stat().st_size))


def another_part(part: Path) -> None:
    pq.write_table(pq.read_table(part).slice(1), part)


def a_link(part: Path) -> None:
    part.rename(part.parent.parent / "elsewhere")
    part.symlink_to(part.parent.parent / "elsewhere")


def a_pipe(part: Path) -> None:
    part.unlink()
    os.mkfifo(part)


def a_folder(part: Path) -> None:
    part.unlink()
    part.mkdir()


def no_recipe(part: Path) -> None:
    (part.parent / "recipe.json").write_bytes(b"")


def a_recipe_that_is_a_pipe(part: Path) -> None:
    (part.parent / "recipe.json").unlink()
    os.mkfifo(part.parent / "recipe.json")


@pytest.mark.parametrize(
    "harm",
    [
        lost_page,
        all_pages_lost,
        another_part,
        a_link,
        a_pipe,
        a_folder,
        no_recipe,
        a_recipe_that_is_a_pipe,
    ],
)
def test_what_is_not_as_it_was_left_is_not_taken_up(
    harm: Callable[[Path], None], whole: pa.Table, folder: Path, model: Model, tmp_path: Path
) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"
    interrupted(source, model, dest)
    (part,) = staging_of(dest).glob("*.parquet")
    harm(part)
    with pytest.raises(InputError, match="--force begins anew"):
        embed(source, model, dest, resume=True)
    embed(source, model, dest, force=True)
    assert pq.read_table(dest).equals(whole)


def test_only_this_user_s_own_work_is_taken_up(
    whole: pa.Table,
    folder: Path,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"
    interrupted(source, model, dest)
    assert staging_of(dest).stat().st_mode & 0o777 == 0o700
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(UsageError, match="belongs to another user"):
            embed(source, model, dest, resume=True)
    staging_of(dest).chmod(0o777)
    assert embed(source, model, dest, resume=True).kept_rows == 0
    assert "was open to others" in caplog.text
    assert pq.read_table(dest).equals(whole)


def test_others_may_read_the_result_and_never_change_it(
    folder: Path, model: Model, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        embed(open_source([folder]), model, tmp_path / "a.parquet")
    finally:
        os.umask(before)
    assert (tmp_path / "a.parquet").stat().st_mode & 0o777 == 0o644


def test_a_result_that_is_damaged_is_not_counted(
    folder: Path, model: Model, tmp_path: Path
) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"
    embed(source, model, dest)
    data = bytearray(dest.read_bytes())
    footer = 8 + int.from_bytes(data[-8:-4], "little")
    data[4:-footer] = bytes(len(data) - 4 - footer)
    dest.write_bytes(data)
    with pytest.raises(InputError, match="--force replaces it"):
        embed(source, model, dest, resume=True)


def test_a_full_disk_keeps_what_is_finished(
    folder: Path, whole: pa.Table, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"
    monkeypatch.setattr(parts, "PART_SECONDS", 0.0)
    embed(source, model, tmp_path / "size.parquet")
    small = (tmp_path / "size.parquet").stat().st_size - 1  # and each part is smaller
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (small, before[1]))
    try:
        with pytest.raises(ResourceError, match="free some disk space"):
            embed(source, model, dest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not dest.exists()
    assert embed(source, model, dest, resume=True).kept_rows == 30
    assert pq.read_table(dest).equals(whole)


def test_another_run_may_publish_first(
    folder: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, dest = open_source([folder]), tmp_path / "a.parquet"

    def report(progress: Progress) -> None:
        dest.write_bytes(b"of another")

    with pytest.raises(UsageError, match="by another run"):
        embed(source, model, dest, report=report)
    assert dest.read_bytes() == b"of another"


# --- nothing to do -------------------------------------------------------------------------------


def test_sources_of_which_nothing_comes(tmp_path: Path, model: Model) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(MediaError, match="no rows"):
        embed(open_source([tmp_path / "a.parquet"]), model, tmp_path / "b.parquet")
    write_folder(tmp_path / "broken", 3, broken=(0, 1, 2))
    with pytest.raises(MediaError, match="none of 3 rows"):
        embed(open_source([tmp_path / "broken"]), model, tmp_path / "b.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "broken"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a.npz", r"ends in \.parquet"),
        ("no/a.parquet", "missing"),
        ("d.parquet", "something else"),
        ("a\udcff.parquet", "UTF-8"),
    ],
)
def test_names_that_cannot_be(
    folder: Path, model: Model, tmp_path: Path, name: str, what: str
) -> None:
    (tmp_path / "d.parquet").mkdir()
    with pytest.raises(UsageError, match=what):
        embed(open_source([folder]), model, tmp_path / name)
    with pytest.raises(UsageError, match="leave one of them out"):
        embed(open_source([folder]), model, tmp_path / "a.parquet", resume=True, force=True)


def test_progress_ends_at_all_rows(folder: Path, model: Model, tmp_path: Path) -> None:
    told: list[Progress] = []
    embed(open_source([folder]), model, tmp_path / "a.parquet", report=told.append)
    assert [one.rows for one in told] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert {one.of for one in told} == {30}
    assert (told[-1].share, told[-1].errors) == (1.0, 3)
    assert told[-1].seconds_left == 0
    assert told[0].told().endswith("left")


# --- killed --------------------------------------------------------------------------------------

RUN = """
import sys, time
from internvl_edge.integrations.bulk import parts
from internvl_edge.integrations.bulk.rows import Embedder
from internvl_edge.cli import main
parts.PART_SECONDS = 0.0
computed = Embedder.embedded
def slow(self, batch):
    time.sleep(0.02)
    return computed(self, batch)
Embedder.embedded = slow
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_kill_9_costs_no_row_and_doubles_none(compiled: Path, model: Model, tmp_path: Path) -> None:
    count = 120
    write_folder(tmp_path / "pictures", count, broken=(11,))
    dest = tmp_path / "a.parquet"
    command = [sys.executable, "-c", RUN, "embed", tmp_path / "pictures", compiled, "-o", dest]
    command += ["--batch-size", "2", "--resume", "--skip-errors", "-q", "--threads", "2"]
    kept = []
    for kills in range(3):
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        wanted = 10 * (kills + 1)
        while len(list(staging_of(dest).glob("0*.parquet"))) < wanted:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept.append(len(list(staging_of(dest).glob("0*.parquet"))))
    assert kept == sorted(kept)
    subprocess.run(command, check=True)
    rows = pq.read_table(dest)
    assert rows.column("path").to_pylist() == [
        f"{tmp_path}/pictures/{i:05d}.png" for i in range(count)
    ]
    assert rows.column("embedding").null_count == 1
    run.embed(
        open_source([tmp_path / "pictures"]),
        model,
        tmp_path / "b.parquet",
        How(batch_size=2),
        threads=1,
    )
    assert pq.read_table(tmp_path / "b.parquet").equals(rows)
    assert not staging_of(dest).exists()
