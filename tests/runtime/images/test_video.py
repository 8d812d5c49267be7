"""Frames: which are sampled, in which order they are read, what becomes of their embeddings."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.golden import CHAT_PICTURES

from internvl_edge.errors import MediaError, MissingDependency, UsageError
from internvl_edge.runtime.images import video
from internvl_edge.runtime.images.video import (
    CONTAINERS,
    START,
    chat_frames,
    decode_frames,
    dual_softmax,
    load_chat_frames,
    pool_frames,
    read_frames,
    sample_frames,
    stream_frames,
    turned,
)


@given(st.integers(1, 10_000), st.integers(1, 200))
def test_sampling_follows_the_originals_formula(length: int, num_frames: int) -> None:
    interval = -(-length // num_frames)
    expected = np.arange(0, length, interval) + interval // 2
    assert sample_frames(length, num_frames) == np.minimum(expected, length - 1).tolist()


@given(st.integers(1, 10_000), st.integers(1, 200))
def test_samples_are_distinct_frames_of_the_video(length: int, num_frames: int) -> None:
    indices = sample_frames(length, num_frames)
    assert 1 <= len(indices) <= num_frames
    assert indices == sorted(set(indices)) and indices[0] >= 0 and indices[-1] < length
    if num_frames >= length:
        assert indices == list(range(length))


@pytest.mark.parametrize(
    ("length", "num_frames", "expected"),
    [(8, 4, [1, 3, 5, 7]), (100, 1, [50]), (10, 4, [1, 4, 7, 9]), (10, 6, [1, 3, 5, 7, 9])],
)
def test_samples_of_known_videos(length: int, num_frames: int, expected: list[int]) -> None:
    assert sample_frames(length, num_frames) == expected


def test_an_empty_video_is_refused() -> None:
    with pytest.raises(MediaError, match="no frames"):
        sample_frames(0, 8)


def test_no_frames_wanted_is_refused() -> None:
    with pytest.raises(UsageError, match="num_frames must be 1 or more, found 0"):
        sample_frames(10, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = ["10.png", "2.png", "1.PNG", "01.png", "b2c.webp", "b10a.jpeg", "a.jpg", "٣.jpg"]
    for name in [*names, ".hidden.png", "notes.txt", "Thumbs.db"]:
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_frames_are_read_in_natural_order(folder: Path) -> None:
    found = [path.name for path in read_frames(folder)]
    expected = ["01.png", "1.PNG", "2.png", "10.png", "a.jpg", "b2c.webp", "b10a.jpeg", "٣.jpg"]
    assert found == expected


def test_frames_are_sampled(folder: Path) -> None:
    every = read_frames(folder)
    assert read_frames(str(folder), 4) == [every[i] for i in (1, 3, 5, 7)]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="found none"):
        read_frames(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    for name in ("film.mp4", "pipe", "absent"):
        with pytest.raises(MediaError, match=f"{name}: expected a folder of frames"):
            read_frames(tmp_path / name)
    with pytest.raises(MediaError):
        read_frames(f"{tmp_path}/a\0b")


def test_embeddings_are_averaged_unnormalised() -> None:
    features = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    pooled = pool_frames(features)
    assert pooled.shape == (7,) and pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, sum(features.astype(np.float64)) / 5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (0, 7), (2, 3, 4), (3, 0)])
def test_embeddings_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MediaError, match="expected frame embeddings"):
        pool_frames(np.zeros(shape, np.float32))


def test_dual_softmax_equals_its_formula() -> None:
    similarity = np.random.default_rng(0).normal(size=(6, 4)) * 30
    expected = np.empty_like(similarity)
    for column in range(4):
        total = sum(np.exp(similarity[row, column]) for row in range(6))
        for row in range(6):
            value = similarity[row, column]
            expected[row, column] = value * np.exp(value) / total
    np.testing.assert_allclose(dual_softmax(similarity), expected, rtol=1e-12)


def test_dual_softmax_does_not_overflow() -> None:
    similarity = np.array([[1000.0, -1000.0], [999.0, -1000.0]], np.float32)
    found = dual_softmax(similarity)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 1], -500.0)


@pytest.mark.parametrize(
    "similarity",
    [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2), np.int64)],
    ids=["1-D", "0", "int"],
)
def test_other_similarities_are_refused(similarity: np.ndarray) -> None:
    with pytest.raises(MediaError, match="floating-point array"):
        dual_softmax(similarity)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve grey frames, each twenty levels lighter than the one before."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path: Path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(12):
            image = np.full((48, 64, 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_a_video_file_gives_its_frames_in_order(film: Path) -> None:
    frames = decode_frames(film)
    assert {frame.shape for frame in frames} == {(48, 64, 3)}
    assert {frame.dtype.name for frame in frames} == {"uint8"}
    levels = [frame.mean() for frame in frames]
    np.testing.assert_allclose(levels, 20.0 * np.arange(12), atol=6.0)


CODECS = {"mp4": "mpeg4", "matroska": "ffv1", "avi": "mjpeg", "mpegts": "mpeg2video"}
CODECS |= {"mpeg": "mpeg2video"}


def write_noise(path: Path, demuxer: str) -> list[np.ndarray]:
    """A film of many times what is read of a file to tell its container; its frames."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    noise = np.random.default_rng(0).integers(0, 256, (16, 96, 128, 3), np.uint8)
    with av.open(str(path), "w", format={"mpeg": "vob"}.get(demuxer, demuxer)) as container:
        stream = container.add_stream(CODECS[demuxer], rate=25)
        stream.width, stream.height = 128, 96
        stream.pix_fmt = "yuvj420p" if demuxer == "avi" else "yuv420p"
        for image in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    assert path.stat().st_size > 8 * START
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("demuxer", [container.demuxer for container in CONTAINERS])
def test_every_container_is_read_from_its_beginning(demuxer: str, tmp_path: Path) -> None:
    expected = write_noise(tmp_path / "film", demuxer)
    found = decode_frames(tmp_path / "film")
    assert len(found) == len(expected) == 16
    np.testing.assert_array_equal(found, expected)


def test_a_codec_that_nobody_knows_is_told(tmp_path: Path) -> None:
    path = tmp_path / "film"
    write_noise(path, "matroska")
    path.write_bytes(path.read_bytes().replace(b"V_FFV1", b"V_ZZZZ"))
    for read in (decode_frames, load_chat_frames):
        with pytest.raises(MediaError, match="expected a video of a known codec"):
            read(path)


@pytest.mark.parametrize("read", [decode_frames, load_chat_frames])
def test_pixels_that_cannot_be_converted_are_a_broken_video(
    read: Callable[[Path], Any], film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No small file has such pixels, so a frame says so in place of FFmpeg's."""
    av = pytest.importorskip("av")

    def to_ndarray(format: str) -> None:
        raise ValueError(f"Conversion to {format} is not supported")

    size = {"width": 64, "height": 48}
    stream = SimpleNamespace(codec_context=SimpleNamespace(**size))
    container = SimpleNamespace(
        streams=SimpleNamespace(video=[stream]),
        decode=lambda stream: [SimpleNamespace(**size, to_ndarray=to_ndarray)],
    )
    monkeypatch.setattr(av, "open", lambda file, format: nullcontext(container))
    with pytest.raises(MediaError, match="expected a video file: Conversion to rgb24"):
        read(film)


@pytest.mark.parametrize("url", ["http://a.org/a.mp4", "rtsp://a.org/1"])
def test_no_video_is_fetched_for_a_conversation(url: str) -> None:
    with pytest.raises(MediaError, match="nothing is fetched from"):
        load_chat_frames(url)


def test_a_video_file_is_sampled_as_a_folder_is(film: Path) -> None:
    levels = [frame.mean() for frame in decode_frames(film, 4)]
    np.testing.assert_allclose(levels, 20.0 * np.array(sample_frames(12, 4)), atol=6.0)


TURNS = {  # of a display matrix → what a player shows
    (1, 0, 0, 1): lambda p: p,
    (0, 1, -1, 0): lambda p: np.rot90(p, -1),  # as phones write it: clockwise
    (0, -1, 1, 0): lambda p: np.rot90(p, 1),
    (-1, 0, 0, -1): lambda p: np.rot90(p, 2),
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda p: p.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda p: np.rot90(p, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize(
    ("matrix", "shown"), TURNS.items(), ids=lambda x: str(x) if isinstance(x, tuple) else ""
)
def test_frames_are_turned_as_the_display_matrix_says(matrix: Any, shown: Any) -> None:
    a, b, c, d = (value * 65536 for value in matrix)
    picture = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3)
    found = turned(picture, (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    np.testing.assert_array_equal(found, shown(picture))


def test_a_phones_video_is_seen_upright(film: Path, tmp_path: Path) -> None:
    """The matrix as it stands in an MP4's track header."""
    data = film.read_bytes()
    upright = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    at = data.index(upright, data.index(b"tkhd"))
    quarter = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 << 16, 0, 1 << 30)
    (tmp_path / "phone.mp4").write_bytes(data[:at] + quarter + data[at + 36 :])
    turned_frames, frames = decode_frames(tmp_path / "phone.mp4"), decode_frames(film)
    assert turned_frames[0].shape == (64, 48, 3)
    np.testing.assert_array_equal(turned_frames[3], np.rot90(frames[3], -1))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "a playlist; download what it names"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "a file that starts with"),
        (b"just some text\n" * 99, "a file that starts with"),
        (b"GIF89a", "a GIF"),
        (b"\x89PNG\r\n\x1a\n", "a file that starts with"),
        (b"\0\0\0\x1cftypavif", "an AVIF picture"),
        (b"<?xml version='1.0'?><MPD/>", "SVG or other XML"),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1\n", "a file that starts with"),
    ],
)
@pytest.mark.parametrize("name", ["film.mp4", "film.m3u8"])
def test_only_containers_are_parsed(tmp_path: Path, name: str, data: bytes, found: str) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MediaError, match=f"{name}: expected a video file .*MP4.*, found {found}"):
        decode_frames(tmp_path / name)


def test_a_container_is_told_by_its_contents(film: Path, tmp_path: Path) -> None:
    (tmp_path / "film.txt").write_bytes(film.read_bytes())
    assert len(decode_frames(tmp_path / "film.txt")) == 12


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FRAME_PIXELS", 3000, "frames of at most 3000 pixels, found 64x48"),
        ("FREE_PIXELS", -(10**12), "bytes decode to more than 20000 pixels each"),
    ],
)
def test_a_video_that_decodes_to_too_much_is_refused(
    film: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    monkeypatch.setattr(video, limit, value)
    with pytest.raises(MediaError, match=message):
        decode_frames(film)


def test_frames_are_decoded_as_they_are_taken(film: Path) -> None:
    frames = stream_frames(film)
    assert next(frames).shape == (48, 64, 3)
    frames.close()  # type: ignore[attr-defined]


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "film.mp4"
    with pytest.raises(MediaError, match=r"film.mp4: expected a video file"):
        decode_frames(path)
    path.write_bytes(b"not a film" * 100)
    with pytest.raises(MediaError, match=r"film.mp4: expected a video file"):
        decode_frames(path)


def test_without_pyav_the_extra_is_named(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependency, match=r"internvl-edge\[video\]"):
        decode_frames(film)


# --- of conversations ----------------------------------------------------------------------------


@given(length=st.integers(1, 400), count=st.integers(1, 40), native=st.booleans())
def test_a_conversations_frames_are_of_the_video(length: int, count: int, native: bool) -> None:
    frames = chat_frames(length, count, native=native)
    assert len(frames) == count
    assert frames == sorted(frames)
    assert frames[0] >= 0
    assert frames[-1] < length


def test_a_conversations_frames_equal_the_originals() -> None:
    cases = json.loads(CHAT_PICTURES.read_text(encoding="utf-8"))["frames"]
    assert len(cases) > 10
    for length, count, original, native in cases:
        assert chat_frames(length, count) == original, (length, count)
        if native is not None:
            assert chat_frames(length, count, native=True) == native, (length, count)


def test_frames_of_no_video_or_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="found no frames"):
        chat_frames(0, 8)
    with pytest.raises(UsageError, match="num_frames must be 1 or more, found 0"):
        chat_frames(8, 0)


def test_a_folder_of_frames_for_a_conversation(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").touch()
    names = [Path(str(path)).name for path in load_chat_frames(tmp_path, 8)]
    assert names == [f"{i}.png" for i in chat_frames(4, 8)]
