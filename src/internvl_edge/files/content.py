"""What a file is by its first bytes, where it is not what its name says.

Downloads bring Git LFS pointers, pages that ask to log in, and folders under the names of files.
A parser calls all of these malformed; the first bytes tell them apart. ``CONTENTS`` is the table.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CONTENTS", "Content", "content_of", "content_of_bytes"]

HEAD_NBYTES = 1024
READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not block
MAX_SHOWN = 60  # characters of a text
AGAIN = "download it again"
LFS_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)
TITLE = re.compile(r"<title[^>]*>\s*(.*?)\s*</title", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Content:
    """What a file is, and what to do about it where something else was expected."""

    what: str
    remedy: str


# What files of a kind begin with, lower case, after white space, where they are texts.
TEXTS = {
    "version https://git-lfs": Content(
        "a Git LFS pointer", "run 'git lfs pull' in its repository, or download the file itself"
    ),
    "<!doctype html": Content(
        "a web page (HTML)", "log in where it comes from, and download again"
    ),
    "<html": Content("a web page (HTML)", "log in where it comes from, and download again"),
    "<?xml": Content("an XML text, such as a server's error", AGAIN),
    "<error": Content("an XML text, such as a server's error", AGAIN),
    '{"error': Content("a server's error (JSON)", AGAIN),
    "<svg": Content("an SVG drawing", "save it as PNG"),
}
# What binary files begin with, from an offset on.
CONTENTS: tuple[tuple[int, bytes, Content], ...] = (
    (0, b"GGUF", Content("a GGUF file of llama.cpp", "take the model that it was made from")),
    (0, b"\x89HDF\r\n", Content("an HDF5 file, as Keras writes", "take the PyTorch weights")),
    (0, b"\x93NUMPY", Content("a NumPy array", "take the whole checkpoint")),
    (
        0,
        b"PK\x03\x04",
        Content(
            "a zip archive, as torch.save writes",
            "give it a name in .bin, and turn it into safetensors with internvl-edge convert",
        ),
    ),
    (
        0,
        b"\x80\x02",
        Content(
            "a Python pickle",
            "give it a name in .bin, and turn it into safetensors with internvl-edge convert",
        ),
    ),
    (0, b"\x1f\x8b", Content("a gzip archive", "unpack it first")),
    (0, b"\xfd7zXZ", Content("an xz archive", "unpack it first")),
    (0, b"BZh", Content("a bzip2 archive", "unpack it first")),
    (0, b"\x28\xb5\x2f\xfd", Content("a zstd archive", "unpack it first")),
    (0, b"7z\xbc\xaf", Content("a 7-Zip archive", "unpack it first")),
    (257, b"ustar", Content("a tar archive", "unpack it first")),
    (0, b"\xff\xd8\xff", Content("a JPEG picture", "give it a name in .jpg")),
    (0, b"\x89PNG\r\n\x1a\n", Content("a PNG picture", "give it a name in .png")),
    (8, b"WEBP", Content("a WebP picture", "give it a name in .webp")),
    (4, b"ftypheic", Content("a HEIC photo", "save it as JPEG")),
    (4, b"ftypheix", Content("a HEIC photo", "save it as JPEG")),
    (4, b"ftypmif1", Content("a HEIF photo", "save it as JPEG")),
    (4, b"ftypmsf1", Content("a HEIF photo", "save it as JPEG")),
    (4, b"ftyphevc", Content("a HEIC photo", "save it as JPEG")),
    (4, b"ftypavif", Content("an AVIF picture", "save it as JPEG or PNG")),
    (4, b"ftyp", Content("a video", "take frames of it, as JPEG or PNG")),
    (0, b"BM", Content("a BMP picture", "save it as PNG")),
    (0, b"GIF8", Content("a GIF picture", "save it as PNG")),
    (0, b"II*\0", Content("a TIFF picture", "save it as PNG")),
    (0, b"MM\0*", Content("a TIFF picture", "save it as PNG")),
    (0, b"8BPS", Content("a Photoshop file", "save it as PNG")),
    (0, b"\xff\x0a", Content("a JPEG XL picture", "save it as JPEG")),
    (0, b"\0\0\0\x0cJXL ", Content("a JPEG XL picture", "save it as JPEG")),
    (0, b"\0\0\0\x0cjP  ", Content("a JPEG 2000 picture", "save it as JPEG")),
)


def content_of(path: Path) -> Content | None:
    """Tell what is at a path; None where its first bytes say nothing known."""
    try:
        descriptor = os.open(path, READ_FLAGS)
    except OSError:
        return None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            return Content("a folder", "name the folder that holds the files themselves")
        if not stat.S_ISREG(mode):
            return Content("a pipe or a device, not a regular file", AGAIN)
        head = os.read(descriptor, HEAD_NBYTES)
        return content_of_bytes(head, quotes=not os.path.islink(path))
    except OSError:
        return None
    finally:
        os.close(descriptor)


def content_of_bytes(head: bytes, *, quotes: bool = True) -> Content | None:
    """Tell what a file is that begins with these bytes; None where they say nothing known.

    Args:
        head: the first bytes.
        quotes: quote a text that is nothing known; not what a link leads to, which may be private.
    """
    if not head:
        return Content("an empty file, truncated", AGAIN)
    if head.startswith(b"\x80") and 2 <= int.from_bytes(head[1:2], "little") <= 5:
        # safetensors begin with the length of their header, which may look the same
        if head[8:9] != b"{":
            return _of_magic(b"\x80\x02")
        return None
    return _of_magic(head) or _of_text(head, quotes)


def _of_magic(head: bytes) -> Content | None:
    for offset, magic, content in CONTENTS:
        if head[offset : offset + len(magic)] == magic:
            return content
    return None


def _of_text(head: bytes, quotes: bool) -> Content | None:
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    for beginning, content in TEXTS.items():
        if text[: len(beginning)].lower() == beginning:
            return Content(content.what + _detail(head, text), content.remedy)
    shown = text[:MAX_SHOWN].split("\n", 1)[0].strip()
    if not shown or not shown.isprintable() or "\ufffd" in shown or text.startswith(("{", "[")):
        return None
    return Content(f"a text that begins with {shown!r}" if quotes else "a text", AGAIN)


def _detail(head: bytes, text: str) -> str:
    """Add what a pointer points to, or what a page is called."""
    if size := LFS_SIZE.search(head):
        return f" to a file of {int(size[1]):,} bytes"
    title = TITLE.search(text)
    return f" called {title[1][:MAX_SHOWN]!r}" if title and title[1].isprintable() else ""
