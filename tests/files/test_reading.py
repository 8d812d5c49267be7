"""Files that others wrote: regular, bounded, and where their links lead."""

from __future__ import annotations

import errno
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.errors import ArtifactError, CheckpointError, InputError, ResourceError
from internvl_edge.files import reading
from internvl_edge.files.reading import (
    cache_hint,
    foreign_target,
    parse_json,
    read_file,
    read_json,
)


@pytest.fixture
def alarm() -> Iterator[None]:
    """End a test that waits for ever."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def nothing(path: Path) -> None:
    pass


def a_dead_link(path: Path) -> None:
    path.symlink_to("gone")


def a_circle(path: Path) -> None:
    path.symlink_to(path)


def too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)  # sparse: takes no disk, and would take 3 GiB of memory


NO_FILES = {
    "found a pipe": a_pipe,
    "found a folder": a_folder,
    "found a device (it is a link to /dev/zero)": a_device,
    "found a pipe (it is a link to pipe)": a_link_to_a_pipe,
    "found a socket": a_socket,
    "not found": nothing,
    "the link leads nowhere (it is a link to gone)": a_dead_link,
    "cannot be read: Too many levels of symbolic links": a_circle,
    "expected at most 10 bytes, found 3,221,225,472": too_large,
}


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("says", NO_FILES)
def test_what_is_no_bounded_file_is_refused_at_once(tmp_path: Path, says: str) -> None:
    NO_FILES[says](path := tmp_path / "x")
    with pytest.raises(CheckpointError) as caught:
        read_file(path, 10, CheckpointError)
    assert says in str(caught.value) and str(path) in str(caught.value)


def test_a_file_of_exactly_the_limit_is_read_through_links(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "c").symlink_to("b")
    assert read_file(tmp_path / "c", 10) == b"0123456789"
    with pytest.raises(ArtifactError, match="at most 9 bytes, found 10"):
        read_file(tmp_path / "c", 9, ArtifactError)


def test_running_out_of_descriptors_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"1")

    def exhausted(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(reading.os, "open", exhausted)
    with pytest.raises(ResourceError, match="Too many open files"):
        read_file(tmp_path / "a", 10)


def cache(tmp_path: Path) -> tuple[Path, Path]:
    repository = tmp_path / "hub" / "models--A--B"
    (blob := repository / "blobs" / "abc").parent.mkdir(parents=True)
    blob.write_bytes(b"{}")
    (snapshot := repository / "snapshots" / "0123").mkdir(parents=True)
    return snapshot, blob


def test_links_of_a_cache_are_the_checkpoints_own(tmp_path: Path) -> None:
    snapshot, blob = cache(tmp_path)
    (snapshot / "relative").symlink_to("../../blobs/abc")
    (snapshot / "absolute").symlink_to(blob)
    (snapshot / "twice").symlink_to("relative")
    (tmp_path / "detour").symlink_to(blob)
    (snapshot / "around").symlink_to(tmp_path / "detour")
    (tmp_path / "short").symlink_to(snapshot)
    for name in ("relative", "absolute", "twice", "around"):
        assert foreign_target(snapshot / name) is None
        assert foreign_target(tmp_path / "short" / name) is None
        assert read_json(snapshot / name, 10) == {}


def test_a_cache_whose_blobs_are_on_another_disk_is_one_too(tmp_path: Path) -> None:
    snapshot, blob = cache(tmp_path)
    blob.parent.rename(tmp_path / "disk")
    (tmp_path / "hub/models--A--B/blobs").symlink_to(tmp_path / "disk")
    (snapshot / "file").symlink_to("../../blobs/abc")
    assert foreign_target(snapshot / "file") is None


def test_a_link_out_of_the_checkpoint_is_foreign(tmp_path: Path) -> None:
    snapshot, _ = cache(tmp_path)
    (secret := tmp_path / "secret").write_text("mine")
    (snapshot / "file").symlink_to("../../../../secret")
    (snapshot / "inside").symlink_to("file")
    assert foreign_target(snapshot / "file") == secret.resolve()
    assert foreign_target(snapshot / "inside") == secret.resolve()
    (snapshot / "plain").write_text("")
    assert foreign_target(snapshot / "plain") is None


def test_a_repository_of_the_cache_names_its_newest_snapshot(tmp_path: Path) -> None:
    snapshot, _ = cache(tmp_path)
    (older := snapshot.parent / "ffff").mkdir()
    os.utime(older, (0, 0))
    for named in (snapshot.parent.parent, snapshot.parent):
        assert f"name its snapshot {snapshot}, the newest of 2" in cache_hint(named)
    assert cache_hint(snapshot) == ""
    assert cache_hint(tmp_path / "gone") == ""


MALFORMED: dict[str, tuple[bytes, str]] = {
    "deep list": (b"[" * 100 + b"]" * 100, "nested deeper than 64"),
    "very deep": (b"[" * 100_000, "nested deeper than 64"),
    "deep object": (b'{"a":' * 70 + b"1" + b"}" * 70, "nested deeper than 64"),
    "digits": (b"1" * 400, "a number of 400 digits"),
    "negative digits": (b'{"a": -' + b"1" * 4000 + b"}", "a number of 4001 digits"),
    "surrogate": (b'{"a": "\\ud800"}', r"half a character, \\ud800"),
    "surrogate in a name": (b'[{"\\udfff": 1}]', r"half a character, \\udfff"),
    "not UTF-8": (b'"\xff"', "utf-8"),
    "truncated": (b'{"a"', "delimiter"),
    "empty": (b"", "Expecting value"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_json_is_bounded(case: str, tmp_path: Path) -> None:
    data, says = MALFORMED[case]
    with pytest.raises(ValueError, match=says):
        parse_json(data)
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=says):
        read_json(tmp_path / "x.json", 1 << 20, CheckpointError)


def test_json_that_is_only_large_passes() -> None:
    assert parse_json(b"[" + b"[]," * 1000 + b"1e400]")[-1] == float("inf")
    assert parse_json(b"1000000000000000019884624838656") == int(1e30)
    assert parse_json('"\\ud83d\\ude00 😀"'.encode()) == "😀 😀"


def test_a_name_that_stands_twice_is_refused_where_names_must_be_unique() -> None:
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="1 name\\(s\\) stand twice: 'a'"):
        parse_json(b'{"a": 1, "b": 1, "a": 2}', unique=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**60), 10**60) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(json_values)
def test_what_json_wrote_is_read(value: Any) -> None:
    import json

    assert parse_json(json.dumps(value).encode()) == value


def test_what_a_link_leads_to_is_not_quoted(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("the key is 42")
    (tmp_path / "config.json").symlink_to("private")
    with pytest.raises(InputError, match=r"not readable as JSON.*it is a text;"):
        read_json(tmp_path / "config.json", 99)
    with pytest.raises(InputError, match="a text that begins with 'the key is 42'"):
        read_json(tmp_path / "private", 99)
