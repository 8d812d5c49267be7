"""Videos as frames: which are looked at, and what becomes of their embeddings.

A video is a folder of image files, a video file (read by PyAV, an extra, whose wheels bundle GPL
codecs), or a sequence of images.
Its embedding is the mean of the embeddings of n frames, which are not normalised before
(docs/model.md, section 7.3). The video is cut into pieces of ceil(length / n) frames and the middle
one of each is taken; a length that n does not divide can give fewer than n pieces.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internvl_edge.errors import MediaError, MissingDependency, UsageError
from internvl_edge.types import Array

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


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
    if Path(video).is_dir():
        files = read_frames(video)
        return [files[i] for i in chat_frames(len(files), num_frames, native=native)]
    count = sum(1 for _ in _decoded(video))
    wanted = chat_frames(count, num_frames, native=native)
    frames = {
        i: np.asarray(frame.to_ndarray(format="rgb24"))
        for i, frame in enumerate(_decoded(video))
        if i in set(wanted)
    }
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
            if file.suffix.lower() in FRAME_SUFFIXES and not file.name.startswith(".")
        ]
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise MediaError(f"{path}: the frames cannot be listed: {error}") from error
    if not files:
        raise MediaError(f"{path}: expected image files ({', '.join(FRAME_SUFFIXES)}), found none")
    files.sort(key=lambda file: _natural(file.name.lower()))
    if num_frames is None:
        return files
    return [files[i] for i in sample_frames(len(files), num_frames)]


def decode_frames(
    path: str | os.PathLike[str], num_frames: int | None = None
) -> list[NDArray[np.uint8]]:
    """Decode the frames of a video file as RGB arrays [H, W, 3], in the order they are shown.

    Containers are often wrong about how many frames they hold, so the file is decoded once to
    count them, and once more for those that are wanted.

    Args:
        path: of a file in any format that FFmpeg reads.
        num_frames: how many to sample (`sample_frames`); None: all.

    Raises:
        MissingDependency: PyAV is not installed.
        MediaError: it is not a file, not a video, or holds no frame.
    """
    count = sum(1 for _ in _decoded(path))
    if not count:
        raise MediaError(f"{path}: expected a video, found no frames")
    wanted = range(count) if num_frames is None else sample_frames(count, num_frames)
    chosen = set(wanted)
    return [
        np.asarray(frame.to_ndarray(format="rgb24"))
        for i, frame in enumerate(_decoded(path))
        if i in chosen
    ]


def _decoded(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Yield every frame of the first video stream, not converted yet."""
    try:
        import av
    except ImportError as error:
        raise MissingDependency.of("PyAV, which reads video files,", "video") from error
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: expected a video, found no video stream")
            yield from container.decode(container.streams.video[0])
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MediaError(f"{path}: expected a video file: {error}") from error


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
