"""The file formats of pictures: which are decoded, and how others are told apart.

A file is what its first bytes say, whatever its name ends in.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["FORMATS", "SUFFIXES", "FileFormat", "count_scans", "format_of", "other_format"]

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFormat:
    """A format that is decoded."""

    name: str
    suffixes: tuple[str, ...]
    start: re.Pattern[bytes]


JPEG = FileFormat(
    name="JPEG", suffixes=(".jpg", ".jpeg", ".jpe", ".jfif"), start=re.compile(rb"\xff\xd8\xff")
)
PNG = FileFormat(name="PNG", suffixes=(".png",), start=re.compile(re.escape(PNG_MAGIC)))
WEBP = FileFormat(name="WebP", suffixes=(".webp",), start=re.compile(rb"RIFF....WEBP", re.DOTALL))
FORMATS = (JPEG, PNG, WEBP)
SUFFIXES = tuple(suffix for known in FORMATS for suffix in known.suffixes)

CONVERT = "convert it to JPEG or PNG"
# What a file may be instead → what to say of it.
OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (rb"GIF8", "a GIF", CONVERT),
    (rb"BM.{12}[\x0c\x28\x40\x6c\x7c]\x00\x00\x00", "a BMP", CONVERT),
    (rb"II[*+]\x00|MM\x00[*+]", "a TIFF or a camera's raw file", CONVERT),
    (rb".{4}ftyp(?:hei|hev|mif1|msf1)", "a HEIC picture", CONVERT),
    (rb".{4}ftypavi[fs]", "an AVIF picture", CONVERT),
    (
        rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ",
        "a video",
        "pass its path to encode_video, or with --video",
    ),
    (rb"\x00\x00\x00\x0cJXL |\xff\x0a", "a JPEG XL picture", CONVERT),
    (rb"\x00\x00\x00\x0cjP  |\xffO\xffQ", "a JPEG 2000 picture", CONVERT),
    (rb"\x00\x00\x01\x00", "an icon", CONVERT),
    (rb"8BPS", "a Photoshop document", CONVERT),
    (rb"%PDF", "a PDF", "render its page as a PNG"),
    (
        rb"\x00\x05\x16\x07",
        "what macOS writes beside a file (._NAME)",
        "take the file of that NAME",
    ),
    (rb"version https://git-lfs", "a Git LFS pointer", "run: git lfs pull"),
    (rb"#EXTM3U", "a playlist", "download what it names"),
    (rb"data:image/", "the text of a data: URL", "pass it as a string"),
    (rb"\s*(?:<\?xml|<svg)", "SVG or other XML", "render it as a PNG"),
    (rb"\s*<(?:!DOCTYPE|html|HTML)", "a web page", "download the picture itself"),
)
# After 0xFF in a scan's data comes 0 or a restart mark; anything else ends it.
SCAN_END = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
END_OF_IMAGE, START_OF_SCAN = 0xD9, 0xDA
ALONE = {0x01, *range(0xD0, 0xD9)}  # marks without a length


def format_of(data: bytes) -> FileFormat | None:
    """Tell the format of a file that can be decoded by its first bytes; None: another one."""
    return next((known for known in FORMATS if known.start.match(data)), None)


def other_format(data: bytes) -> str:
    """Say what a file is that cannot be decoded, and what to do."""
    if not data:
        return "an empty file"
    if not any(data[:4096]):
        return "zeros, as a download leaves that did not finish"
    for start, name, remedy in OTHERS:
        if re.match(start, data, re.DOTALL):
            return f"{name}; {remedy}"
    return f"a file that starts with {data[:12]!r}"


def count_scans(data: bytes) -> int:
    """Count the scans of a JPEG: how often its pixels are gone through."""
    scans, at = 0, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        mark = data[at + 1]
        if mark == END_OF_IMAGE:
            break
        if mark == 0xFF or mark in ALONE:
            at += 1 if mark == 0xFF else 2
            continue
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
        if mark == START_OF_SCAN:
            scans += 1
            end = SCAN_END.search(data, at)
            if end is None:
                break
            at = end.start()
    return scans
