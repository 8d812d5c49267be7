"""The bytes of a picture: of a file, an open file, a ``data:`` URL. Nothing is fetched."""

from __future__ import annotations

import binascii
import os
import re
import stat
from base64 import b64decode
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from internvl_edge.errors import MediaError, shortened

__all__ = ["MAX_NBYTES", "contents", "open_regular", "path_of"]

MAX_NBYTES = 64 << 20  # of a file
LEAST_NBYTES = 4096  # that are asked for at once; some systems' files do not say their size
# Where a flag does not exist, nothing needs it.
READ_FLAGS = os.O_RDONLY | sum(
    getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
)
SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
DATA_URL = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
BASE64_MARK = ";base64"
OPEN_AS_BYTES = "the file is open as text; open it with mode 'rb'"
UNPADDED = str.maketrans("-_", "+/", " \t\r\n=")  # and the alphabet of URLs


def contents(source: Any, label: str) -> bytes:
    """Read the bytes of a picture.

    Args:
        source: a path, a ``data:`` or ``file:`` URL, or an open file, which is read from its
            beginning where it can be wound back, as Pillow does.
        label: how messages name it.

    Raises:
        MediaError: it cannot be read, is too large, or would have to be fetched.
    """
    if isinstance(source, str) and (url := DATA_URL.match(source)):
        return _limited(_decoded(source[url.end() :], url[1], label), label)
    if isinstance(source, str | os.PathLike):
        return _limited(_read_path(path_of(source, label), label), label)
    return _limited(_read_open(source, label), label)


def path_of(
    source: str | os.PathLike[str],
    label: str,
    then: str = "pass its bytes or the path of the file",
) -> str:
    """Return the path that a string stands for; a ``file:`` URL is one.

    Args:
        source: the string.
        label: how messages name it.
        then: what to do once it is downloaded.

    Raises:
        MediaError: a URL of something that would have to be fetched.
    """
    text = os.fsdecode(source)
    url = SCHEME.match(text) if isinstance(source, str) else None
    if url is None:
        return text
    if url[1].lower() != "file":
        raise MediaError(
            f"{label}: nothing is fetched from {url[1].lower()}: addresses; download it first, and "
            f"{then}"
        )
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{label}: expected a file of this machine, found one of {parts.netloc}")
    return url2pathname(parts.path)


def open_regular(path: str, label: str, expected: str) -> int:
    """Open a regular file and return its descriptor; a FIFO or a device is not waited for."""
    handle = os.open(path, READ_FLAGS)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        what = "a folder" if stat.S_ISDIR(mode) else "something else"
        raise MediaError(f"{label}: expected {expected}, found {what}")
    return handle


def _read_path(path: str, label: str) -> bytes:
    try:
        handle = open_regular(path, label, "an image file")
        try:
            return _read_whole(handle)
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise MediaError(f"{label}: the image cannot be read: {reason}") from error


def _read_whole(handle: int) -> bytes:
    """Read a file to its end, or to the first byte that is too much.

    As many bytes at once as it has: asked for more, Python maps and unmaps memory for them, which
    takes longer than reading a small file, and threads wait for each other in it.
    """
    pieces, left = [], MAX_NBYTES + 1
    at_once = max(os.fstat(handle).st_size + 1, LEAST_NBYTES)
    while left and (piece := os.read(handle, min(at_once, left))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _read_open(file: Any, label: str) -> bytes:
    """Read an open file, or what stands for one, without closing it."""
    try:
        if callable(getattr(file, "read_bytes", None)):  # a resource of a package, an archive's
            data = file.read_bytes()
        else:
            if callable(getattr(file, "seek", None)) and (
                not callable(getattr(file, "seekable", None)) or file.seekable()
            ):
                file.seek(0)
            data = file.read(MAX_NBYTES + 1)
    except UnicodeDecodeError as error:
        raise MediaError(f"{label}: {OPEN_AS_BYTES}") from error
    except Exception as error:  # whatever another library's file raises
        raise MediaError(
            f"{label}: the open file cannot be read: {shortened(str(error), quoted=False)}"
        ) from error
    if isinstance(data, str):
        raise MediaError(f"{label}: {OPEN_AS_BYTES}")
    if not isinstance(data, bytes | bytearray | memoryview):
        if callable(close := getattr(data, "close", None)):  # a coroutine that nobody awaits
            close()
        raise MediaError(
            f"{label}: read() gave {type(data).__name__}; pass bytes, or a file whose read() "
            "gives them"
        )
    return bytes(data)


def _decoded(body: str, head: str, label: str) -> bytes:
    """Decode a ``data:`` URL after its comma."""
    kind = head.split(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise MediaError(f"{label}: expected a data: URL of an image, found one of {kind}")
    if not head.lower().replace(" ", "").endswith(BASE64_MARK):
        return unquote_to_bytes(body)
    text = unquote(body).translate(UNPADDED)
    try:
        return b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{label}: the data: URL is not base64: {error}") from error


def _limited(data: bytes, label: str) -> bytes:
    if len(data) > MAX_NBYTES:
        raise MediaError(f"{label}: at most {MAX_NBYTES} bytes are accepted, found more")
    return data
