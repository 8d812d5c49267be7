from __future__ import annotations

import struct
import zlib

import pytest
from support.web.serving import data_url, png

from internvl_edge.serve.http.images import decoded, image_url
from internvl_edge.serve.http.problems import Problem


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of side² pixels that is small as a file."""
    packed = zlib.compressobj(9)
    rows = b"".join(packed.compress(bytes(1 + side // 8)) for _ in range(side)) + packed.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    magic = b"\x89PNG\r\n\x1a\n"
    return magic + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "kind", ["image/png", "image/jpeg", "text/plain", "", "image/svg+xml;charset=utf-8"]
)
def test_the_first_bytes_decide_and_not_the_type(kind: str) -> None:
    url = image_url(data_url(png(), kind), "image")
    assert decoded(url, 10_000) == png()


@pytest.mark.parametrize(
    "value",
    [
        "http://169.254.169.254/latest/meta-data/",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "../a.png",
        "ftp://x/y",
        "",
        "data:",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:" + "x" * 1000 + ";base64,AAAA",
        " data:image/png;base64,AAAA",
        5,
        None,
        {"url": "data:image/png;base64,AAAA"},
        ["data:image/png;base64,AAAA"],
    ],
)
def test_nothing_is_fetched(value: object) -> None:
    with pytest.raises(Problem) as caught:
        image_url(value, "image")
    assert (caught.value.code, caught.value.param) == ("invalid_image_url", "image")


@pytest.mark.parametrize("data", ["A", "AA=A", "AA AA", "ä", "AAA", "_-_-", "AA\nAA"])
def test_base64_that_is_none(data: str) -> None:
    with pytest.raises(Problem) as caught:
        decoded(image_url(f"data:image/png;base64,{data}", "image"), 100)
    assert caught.value.code == "invalid_base64"


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a" + bytes(20), b"<svg/>", png()[:60], b"\xff\xd8\xff"]
)
def test_bytes_that_are_no_picture(data: bytes) -> None:
    with pytest.raises(Problem) as caught:
        decoded(image_url(data_url(data), "images[2]"), 100)
    assert (caught.value.code, caught.value.param) == ("invalid_image", "images[2]")


def test_pixels_are_counted_before_they_are_decompressed() -> None:
    """400 million of them in 50 kB."""
    data = bomb(20_000)
    assert len(data) < 60_000
    with pytest.raises(Problem, match="found 20000x20000"):
        decoded(image_url(data_url(data), "image"), 20_000_000)
    with pytest.raises(Problem, match="expected at most 1279 pixels"):
        decoded(image_url(data_url(png()), "image"), 1279)
    assert decoded(image_url(data_url(png()), "image"), 1280)
