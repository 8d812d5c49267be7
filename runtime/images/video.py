"""Videos as frames: which are looked at, and what becomes of their embeddings.

A video is a folder of image files, a video file (read by PyAV, an extra, whose wheels bundle GPL
codecs), or a sequence of images. Files are what their first bytes say, and only containers of an
allow-list are parsed: FFmpeg knows hundreds, among them playlists that name other files and
addresses. Frames are turned as a player shows them, and decoding ends where a small file gives more
than any camera's.
Its embedding is the mean of the embeddings of n frames, which are not normalised before
(docs/model.md, section 7.3). The video is cut into pieces of ceil(length / n) frames and the middle
one of each is taken; a length that n does not divide can give fewer than n pieces.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.errors import MediaError, MissingDependency, UsageError
from internvl_edge.runtime.images.formats import SUFFIXES, other_format
from internvl_edge.runtime.images.reading import open_regular, path_of
from internvl_edge.types import Array

START = 4096  # bytes of a file that tell its container
MAX_FRAME_PIXELS = 50_000_000
# What may be decoded: of a still scene the best encoders reach 10,000 pixels a byte.
FREE_PIXELS, PIXELS_PER_BYTE = 5_000_000_000, 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container of videos that is parsed."""

    name: str
    demuxer: str  # FFmpeg's name
    start: re.Pattern[bytes]


CONTAINERS = (
    # but for the pictures that use it too: HEIC and AVIF
    Container(
        name="MP4, MOV, 3GP",
        demuxer="mp4",
        start=re.compile(
            rb".{4}(?:ftyp(?!hei|hev|mif1|msf1|avi[fs])|moov|mdat|wide|free|skip)", re.S
        ),
    ),
    Container(name="Matroska, WebM", demuxer="matroska", start=re.compile(rb"\x1aE\xdf\xa3")),
    Container(name="AVI", demuxer="avi", start=re.compile(rb"RIFF.{4}AVI[ \x19X]", re.S)),
    Container(name="MPEG-TS", demuxer="mpegts", start=re.compile(rb"(?:G.{187}){3}G", re.S)),
    Container(name="MPEG-PS", demuxer="mpeg", start=re.compile(rb"\x00\x00\x01\xba")),
)


def sample_frames(length: int, num_frames: int) -> list[int]:
    """Choose at most ``num_frames`` frames of a video: their indices, ascending.

    The original asks for a frame after the end where the last piece is short (10 frames, 4
    wanted: 1, 4, 7, 10); here that is the last frame.

    Raises:
        MediaError: the video has no frames.
        UsageError: no frame is wanted.
    """
    if num_frames < 1:
        raise UsageError(f"num_frames must be 1 or more, found {num_frames}")
    if length < 1:
        raise MediaError("expected a video, found no frames")
    interval = math.ceil(length / num_frames)
    return [min(start + interval // 2, length - 1) for start in range(0, length, interval)]


def chat_frames(length: int, num_frames: int, *, native: bool = False) -> list[int]:
    """Choose ``num_frames`` frames of a video for a conversation; of a short one, some twice.

    Args:
        length: frames of the video.
        num_frames: how many are wanted.
        native: as transformers' own classes choose (``*-hf``), and not the original.

    Raises:
        MediaError: the video has no frames.
        UsageError: no frame is wanted.
    """
    if num_frames < 1:
        raise UsageError(f"num_frames must be 1 or more, found {num_frames}")
    if length < 1:
        raise MediaError("expected a video, found no frames")
    if native:
        step = length / num_frames
        chosen = [int(step / 2 + i * step) for i in range(num_frames)]
    else:
        segment = (length - 1) / num_frames
        chosen = [int(segment / 2 + round(segment * i)) for i in range(num_frames)]
    return [min(i, length - 1) for i in chosen]


def load_chat_frames(
    video: Any, num_frames: int = 8, *, native: bool = False
) -> list[NDArray[np.uint8] | Path]:
    """Read the frames of a video that a conversation looks at, in the order they are shown.

    Args:
        video: a folder of frames, or a video file.
        num_frames: how many; see ``chat_frames``.
        native: as for ``chat_frames``.

    Raises:
        MissingDependency: PyAV is not installed, and it is a video file.
        MediaError: it is no video.
        UsageError: no frame is wanted.
    """
    if not isinstance(video, str | os.PathLike):
        raise MediaError(
            f"expected a video as the path of a file or a folder, found {type(video).__name__}; "
            "pass frames as images, with <video> in the question"
        )
    video = path_of(video, "video", "pass its path")
    if Path(video).is_dir():
        files = read_frames(video)
        return [files[i] for i in chat_frames(len(files), num_frames, native=native)]
    count = sum(1 for _ in _decoded(video))
    wanted = chat_frames(count, num_frames, native=native)
    chosen = set(wanted)
    frames = {i: _upright(frame, video) for i, frame in enumerate(_decoded(video)) if i in chosen}
    return [frames[i] for i in wanted]


def read_frames(folder: str | os.PathLike[str], num_frames: int | None = None) -> list[Path]:
    """List a folder's image files in natural order (frame 2 before frame 10), but hidden ones.

    Args:
        folder: of JPEG, PNG and WebP files, told by their suffix. They are not opened.
        num_frames: how many to sample (`sample_frames`); None: all.

    Raises:
        MediaError: it is not a folder, or holds no images.
    """
    path = Path(folder)
    try:
        if not path.is_dir():
            raise MediaError(f"{path}: expected a folder of frames, or a video file")
        files = [
            file
            for file in path.iterdir()
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        ]
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise MediaError(f"{path}: the frames cannot be listed: {error}") from error
    if not files:
        raise MediaError(f"{path}: expected image files ({', '.join(SUFFIXES)}), found none")
    files.sort(key=lambda file: _natural(file.name.lower()))
    if num_frames is None:
        return files
    return [files[i] for i in sample_frames(len(files), num_frames)]


def decode_frames(
    path: str | os.PathLike[str], num_frames: int | None = None
) -> list[NDArray[np.uint8]]:
    """Decode the frames of a video file as RGB arrays [H, W, 3], in the order they are shown.

    Args:
        path: of a file in one of ``CONTAINERS``.
        num_frames: how many to sample (`sample_frames`); None: all, as many as fit into memory.

    Raises:
        MissingDependency: PyAV is not installed.
        MediaError: it is not a file, not a video, or holds no frame.
    """
    return list(stream_frames(path, num_frames))


def stream_frames(
    path: str | os.PathLike[str], num_frames: int | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Decode frames as ``decode_frames``, one at a time, as they are taken.

    Containers are often wrong about how many frames they hold, so that a file of which some are
    wanted is decoded once to count them, and once more for these.
    """
    chosen: set[int] | None = None
    if num_frames is not None:
        count = sum(1 for _ in _decoded(path))
        chosen = set(sample_frames(count, num_frames))
    is_empty = True
    for i, frame in enumerate(_decoded(path)):
        is_empty = False
        if chosen is None or i in chosen:
            yield _upright(frame, path)
    if is_empty:
        raise MediaError(f"{path}: expected a video, found no frames")


def _upright(frame: Any, path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Return a frame as a player shows it: RGB, turned as its display matrix says."""
    with _reading(path):
        picture = np.asarray(frame.to_ndarray(format="rgb24"))
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return np.ascontiguousarray(turned(picture, struct.unpack("=9i", bytes(data))))
    return picture


def turned(picture: Array, matrix: Sequence[int]) -> Array:
    """Turn and mirror a picture [H, W, 3] as a display matrix says, to the nearest right angle.

    The matrix (a b u, c d v, x y w) puts what is at (p, q) to (a p + c q, b p + d q), both
    from the upper left corner; the translation that follows brings it back into view.
    """
    a, b, _, c, d = matrix[:5]
    if abs(b) + abs(c) > abs(a) + abs(d):  # rows become columns
        picture = picture.transpose(1, 0, 2)
        across, down = c, b
    else:
        across, down = a, d
    if across < 0:
        picture = picture[:, ::-1]
    return picture[::-1] if down < 0 else picture


def _decoded(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield every frame of the first video stream, not converted yet.

    FFmpeg gets an open file and the format that its first bytes say, so that no playlist, address
    or other file is ever opened, and nothing but a container of ``CONTAINERS`` is parsed.
    """
    with _reading(path) as av:
        handle = open_regular(os.fspath(path), str(path), "a video file")
        with open(handle, "rb") as file:
            demuxer = _container_of(file.read(START), path)
            file.seek(0)
            with av.open(file, format=demuxer) as container:
                yield from _budgeted(container, os.fstat(handle).st_size, path)


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Give PyAV, whose errors in the block become those of a file that is no video.

    Raises:
        MissingDependency: it is not installed.
        MediaError: a file that is none, or damaged.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependency.of("PyAV, which reads video files,", "video") from error
    try:
        yield av
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: expected a video file: {reason}") from error


def _container_of(start: bytes, path: str | os.PathLike[str]) -> str:
    """Return FFmpeg's name of a video file's container, by its first bytes."""
    for container in CONTAINERS:
        if container.start.match(start):
            return container.demuxer
    names = ", ".join(container.name for container in CONTAINERS)
    raise MediaError(f"{path}: expected a video file ({names}), found {other_format(start)}")


def _budgeted(container: Any, nbytes: int, path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield the frames of a container, of sizes that a camera has, as long as they fit its file."""
    if not container.streams.video:
        raise MediaError(f"{path}: expected a video, found no video stream")
    stream = container.streams.video[0]
    budget = FREE_PIXELS + nbytes * PIXELS_PER_BYTE
    if stream.codec_context is None:
        raise MediaError(f"{path}: expected a video of a known codec, found none")
    _require_frame(stream.codec_context.width, stream.codec_context.height, path)
    for frame in container.decode(stream):
        _require_frame(frame.width, frame.height, path)
        budget -= frame.width * frame.height
        if budget < 0:
            raise MediaError(
                f"{path}: {nbytes} bytes decode to more than {PIXELS_PER_BYTE} pixels each, as no "
                "camera's do; cut the video, or encode it anew"
            )
        yield frame


def _require_frame(width: int, height: int, path: str | os.PathLike[str]) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise MediaError(
            f"{path}: expected frames of at most {MAX_FRAME_PIXELS} pixels, found "
            f"{width}x{height}; scale the video down"
        )


def pool_frames(features: Array) -> Array:
    """Average frames' embeddings [F, E] to that of their video, [E], of the same dtype.

    Neither side is normalised.

    Raises:
        MediaError: the array is not [F, E] with at least one frame.
    """
    if features.ndim != 2 or not features.size:
        raise MediaError(f"expected frame embeddings [F, E], found {list(features.shape)}")
    return np.asarray(features.mean(axis=0))


def dual_softmax(similarity: Array) -> Array:
    """Weight similarities [N, M] by their softmax over the N rows: sim ⊙ softmax(sim, 0).

    The re-ranking of MSR-VTT's evaluation: a column that is near to everything counts less.

    Raises:
        MediaError: the array is not floating point [N, M], or empty.
    """
    if similarity.ndim != 2 or not similarity.size or similarity.dtype.kind != "f":
        raise MediaError(
            "expected similarities as a floating-point array [N, M], found "
            f"{similarity.dtype} {list(similarity.shape)}"
        )
    weights = np.exp(similarity - similarity.max(axis=0))  # the maximum against overflow
    return np.asarray(similarity * weights / weights.sum(axis=0))


def _natural(name: str) -> tuple[list[tuple[str, int]], str]:
    """Make a sort key in which digits are numbers; the name decides between 1.png and 01.png."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", name)
    return [(text, int(digits or -1)) for text, digits in parts], name
