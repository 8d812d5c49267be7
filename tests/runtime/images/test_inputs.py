"""What is taken for a picture: every row of the tables of docs/reference/inputs.md, by values."""

from __future__ import annotations

import base64
import io
import struct
import tempfile
import zipfile
import zlib
from collections import UserDict, deque
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.paths import ROOT

from internvl_edge.cli.inputs import ENCODINGS
from internvl_edge.errors import MediaError, UsageError
from internvl_edge.runtime.images import decode, reading
from internvl_edge.runtime.images.arrays import ARRAYS, LAYOUTS, ArrayKind
from internvl_edge.runtime.images.decode import load_image
from internvl_edge.runtime.images.formats import FORMATS, PNG_MAGIC, FileFormat, count_scans
from internvl_edge.runtime.images.options import ImageOptions
from internvl_edge.runtime.images.resize import cropped, resized_part
from internvl_edge.runtime.images.sources import (
    batches_of_images,
    check_normalised,
    image_label,
    image_list,
    image_stream,
)
from internvl_edge.runtime.images.transform import Preprocessing, pixel_levels, pixel_values
from internvl_edge.runtime.images.video import CONTAINERS
from internvl_edge.types import Array

PAGE = ROOT / "docs" / "reference" / "inputs.md"
PLAIN = Preprocessing(size=28)
BICUBIC = Image.Resampling.BICUBIC
KINDS = [
    (kind, dtype, layout) for kind in ARRAYS for dtype in kind.dtypes for layout in kind.layouts
]


def levels(height: int = 9, width: int = 12, channels: int = 3, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source: Any, **options: Any) -> Array:
    return np.asarray(load_image(source, options=ImageOptions(**options)))


# --- the page ------------------------------------------------------------------------------------


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def code(words: tuple[str, ...]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def test_the_page_has_the_tables_of_the_product() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [
        *(row(code(k.dtypes), code(k.layouts), f"{k.white:g}", k.note) for k in ARRAYS),
        *(row(known.name, code(known.suffixes)) for known in FORMATS),
        *(row(container.name, f"`{container.demuxer}`") for container in CONTAINERS),
        *(
            row(name.removesuffix("-SIG"), code(tuple(m.hex(" ") for m in marks)))
            for marks, name in ENCODINGS
        ),
    ]
    assert [one for one in rows if one not in text] == []
    before, _, _ = text.partition("## Names of arguments")
    tables = [line for line in before.splitlines() if line.startswith("| ")]
    headers = 4  # one of each table
    assert len(tables) - headers == len(rows)


# --- arrays and tensors --------------------------------------------------------------------------


def arranged(values: Array, layout: str) -> Array:
    """Channels-last levels [H, W, C] in a layout of the table."""
    if layout == "[H, W]":
        return values[:, :, 0]
    return values.transpose(2, 0, 1) if layout.endswith("H, W]") else values


def channels_of(layout: str) -> int:
    digits = [int(c) for c in layout if c.isdigit()]
    return digits[0] if digits else 1


def composited(values: Array) -> Array:
    """RGB on white of uint8 [H, W, 1 to 4], spelled out in floats."""
    colours = values[:, :, :1].repeat(3, axis=2) if values.shape[2] < 3 else values[:, :, :3]
    if values.shape[2] in (1, 3):
        return colours
    alpha = values[:, :, -1:] / 255
    return np.rint(colours * alpha + 255 * (1 - alpha))


@pytest.mark.parametrize(("kind", "dtype", "layout"), KINDS, ids=lambda x: getattr(x, "note", x))
def test_arrays_of_the_table_give_their_levels(kind: ArrayKind, dtype: str, layout: str) -> None:
    base = levels(channels=channels_of(layout))
    if dtype == "bool":
        base = (base > 127).astype(np.uint8) * np.uint8(255)
    scale = kind.white / 255
    array = arranged((base * scale).astype(dtype), layout)
    expected = composited(base)
    tolerance = 1 if base.shape[2] in (2, 4) else 0
    assert np.abs(pixels(array).astype(int) - expected).max() <= tolerance
    if dtype not in ("uint16", "uint32", "uint64"):
        np.testing.assert_array_equal(pixels(torch.from_numpy(array.copy())), pixels(array))
    stacked = pixel_values([array, array], PLAIN)
    is_pixel_values = np.dtype(dtype).kind == "f" and layout == "[3, H, W]"
    if not is_pixel_values:  # which a float batch [B, 3, H, W] is
        batch = array[None].repeat(2, axis=0)
        given = batch if array.ndim == 3 else list(batch)
        np.testing.assert_array_equal(pixel_values(given, PLAIN), stacked)


@given(st.integers(0, 65535))
def test_16_bits_are_rounded_to_the_nearest_level(value: int) -> None:
    grey = np.full((2, 2), value, np.uint16)
    expected = int(np.rint(value / 257))
    if value == 0 or value > 255:  # else nobody can tell the bits of an array
        assert np.unique(pixels(grey)).tolist() == [expected]
    assert np.unique(pixels(Image.fromarray(grey))).tolist() == [expected]
    assert np.unique(pixels(encoded(Image.fromarray(grey)))).tolist() == [expected]


def test_deep_pillow_images_are_scaled() -> None:
    scan = (np.arange(4096).reshape(64, 64) * 16).astype(np.uint16)
    expected = np.rint(scan / 257).astype(np.uint8)
    for image in (
        Image.fromarray(scan),
        Image.fromarray(scan.astype(np.int32)),
        Image.fromarray((scan / 65535).astype(np.float32)),
        Image.frombytes("I;16B", scan.shape, scan.astype(">u2").tobytes()),
    ):
        np.testing.assert_array_equal(pixels(image)[:, :, 0], expected)
    assert {Image.fromarray(scan).mode, Image.fromarray(scan.astype(np.int32)).mode} == {
        "I;16",
        "I",
    }


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4), 200, np.int32), r"levels 200 to 200; pass .astype\(np.uint8\) if they"),
        (np.full((4, 4, 3), 200, np.int64), r"pass .astype\(np.uint8\)"),
        (np.full((4, 4), 255, np.uint16), "white is 65535 in uint16, found levels up to 255"),
        (np.full((4, 4), 70_000, np.uint32), r"\.astype\(np.uint16\) if 0 to 65535"),
        (np.full((4, 4), -1, np.int32), "levels -1 to -1"),
        (np.full((4, 4), 5, np.int8), "int8 does not say what white is"),
        (np.full((4, 4, 3), 200.0), r"from 0 to 1, found 200 to 200; pass .astype\(np.uint8\)"),
        (np.linspace(-2, 2, 48, dtype=np.float32).reshape(3, 4, 4), r"pass array\[None\]"),
        (np.full((4, 4, 3), np.nan), "finite"),
        (np.zeros((6, 6, 5), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((5, 6, 7), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((4, 4, 2), np.float32), "1, 3 or 4 channels"),
        (np.zeros((4, 4, 3), bool), "one channel of bool"),
        (np.zeros((4, 4, 3), complex), "expected integers or floats"),
        (np.zeros((4, 4), "M8[s]"), "expected integers or floats"),
        (np.zeros(4, np.uint8), r"expected one picture, \[H, W\] or \[H, W, C\]"),
        (np.ma.masked_array(np.zeros((4, 4, 3), np.uint8)), "masked array"),
        (torch.zeros(3, 4, 4, dtype=torch.bfloat16), r"Tensor .*NumPy cannot read it.*float\(\)"),
        ([np.zeros((2, 4, 4, 3), np.uint8)], r"pass it as it is, or list\(batch\)"),
    ],
    ids=str,
)
def test_arrays_of_no_certain_meaning_are_refused(array: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        pixel_values(array if isinstance(array, list) else [array], PLAIN)


@pytest.mark.parametrize("dtype", ["u2", "f2", "f4", "f8"])
def test_the_order_of_bytes_changes_nothing(dtype: str) -> None:
    array = levels(4, 5).astype(dtype) * (257 if dtype == "u2" else np.dtype(dtype).type(1 / 255))
    for order in "<>":
        np.testing.assert_array_equal(pixels(array.astype(order + dtype)), levels(4, 5))


def test_a_tensor_that_is_trained_is_read_too() -> None:
    tensor = torch.rand(3, 8, 9, requires_grad=True)
    expected = np.rint(tensor.detach().numpy() * 255).transpose(1, 2, 0)
    np.testing.assert_array_equal(pixels(tensor), expected)


def test_pixel_values_may_be_a_tensor() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32)
    np.testing.assert_array_equal(pixel_values(torch.from_numpy(values), PLAIN), values)


def test_pixel_values_out_of_range_are_refused() -> None:
    white = np.full((1, 3, 28, 28), 2.64, np.float32)
    check_normalised(white, PLAIN.mean, PLAIN.std)
    for wrong in (white * 100, -white * 100):
        with pytest.raises(MediaError, match=r"expected values within ±5\.28, found .* normalised"):
            pixel_values(wrong, PLAIN)
    half = Preprocessing(size=28, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(MediaError, match="within ±2, "):
        pixel_values(white, half)


def test_levels_in_place_of_pixel_values_are_warned_of() -> None:
    array = levels(28, 28).transpose(2, 0, 1)[None] / np.float32(255)
    with pytest.warns(UserWarning, match=r"taken as normalised.*pass list\(array\)"):
        pixel_values(array, PLAIN)
    np.testing.assert_array_equal(
        pixel_values(list(array), PLAIN), pixel_values(levels(28, 28), PLAIN)
    )


# --- files, bytes, addresses ---------------------------------------------------------------------


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_files_of_the_table_are_read_whatever_they_are_called(
    tmp_path: Path, known: FileFormat
) -> None:
    data = encoded(Image.fromarray(levels()), known.name)
    expected = pixels(data)
    for suffix in (*known.suffixes, ".bin"):
        path = tmp_path / f"photo{suffix}"
        path.write_bytes(data)
        np.testing.assert_array_equal(pixels(path), expected)
        np.testing.assert_array_equal(pixels(path.as_uri()), expected)


def test_open_files_are_read_from_their_beginning(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(levels()), "WEBP", lossless=True)
    (tmp_path / "photo").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("photo", data)
    with (
        (tmp_path / "photo").open("rb") as opened,
        (tmp_path / "photo").open("rb", buffering=0) as unbuffered,
        tempfile.SpooledTemporaryFile() as spooled,
        zipfile.ZipFile(tmp_path / "photos.zip") as archive,
        archive.open("photo") as member,
    ):
        spooled.write(data)  # and is at its end
        written = io.BytesIO()
        written.write(data)
        sources = [opened, unbuffered, spooled, member, written, zipfile.Path(archive, "photo")]
        for source in [*sources, *sources]:
            np.testing.assert_array_equal(pixels(source), levels())
        found = pixel_levels([written] * 20, PLAIN)  # in threads, which share it
        np.testing.assert_array_equal(found, pixel_levels([levels()] * 20, PLAIN))
        assert image_list(written) == [written]
        assert not opened.closed


class Half:
    async def read(self, count: int = -1) -> bytes:
        return b""


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    with (tmp_path / "text").open() as text, pytest.raises(MediaError, match="mode 'rb'"):
        pixels(text)
    (tmp_path / "photo").write_bytes(encoded(Image.fromarray(levels())))
    with (
        (tmp_path / "photo").open(encoding="utf-8") as text,
        pytest.raises(MediaError, match="mode 'rb'"),
    ):
        pixels(text)
    closed = io.BytesIO(b"")
    closed.close()
    with pytest.raises(MediaError, match="closed file"):
        pixels(closed)
    with pytest.raises(MediaError, match=r"read\(\) gave coroutine; pass bytes"):
        pixels(Half())
    with pytest.raises(MediaError, match="found an empty file"):
        pixels(io.BytesIO())


def test_data_urls_are_decoded() -> None:
    data = encoded(Image.fromarray(levels()))
    text = base64.b64encode(data).decode()
    urls = [
        f"data:image/png;base64,{text}",
        f"data:;base64,{text}",
        f"DATA:image/png;charset=utf-8;BASE64,{text.rstrip('=')}",
        f"data:image/png;base64,{text[:40]}\n {text[40:]}",
        "data:image/png;base64," + base64.urlsafe_b64encode(data).decode(),
        "data:image/png;base64," + text.replace("+", "%2B").replace("/", "%2F"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
    ]
    for url in urls:
        np.testing.assert_array_equal(pixels(url), levels())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:text/html;base64,AAAA", "expected a data: URL of an image, found one of text/html"),
        ("data:image/png;base64,@@@@", "the data: URL is not base64"),
        ("https://example.com/cat.jpg", "nothing is fetched from https: addresses; download it"),
        ("http://example.com/cat.jpg", "nothing is fetched from http:"),
        ("s3://bucket/cat.jpg", "nothing is fetched from s3:"),
        ("file://elsewhere/cat.jpg", "expected a file of this machine, found one of elsewhere"),
    ],
)
def test_addresses_are_not_fetched(url: str, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        pixels(url)


def test_messages_do_not_hold_what_was_handed_over() -> None:
    long = "x" * 3_000_000
    for source in (f"data:image/jpeg;base64,{long}", long, Path(long), f"https://{long}"):
        with pytest.raises(MediaError) as caught:
            pixels(source)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"\0\5\x16\7", "what macOS writes beside a file"),
        (b"\0\0\0\x18ftypheic", "a HEIC picture"),
        (b"\0\0\0\x1cftypavif", "an AVIF picture"),
        (b"\0\0\0\x20ftypisom", "a video; pass its path to encode_video"),
        (b"GIF89a", "a GIF"),
        (b"MM\0*", "a TIFF"),
        (b"%PDF-1.7", "a PDF"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer; run: git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (bytes(100), "zeros"),
        (b"data:image/png;base64,", "the text of a data: URL"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_other_files_are_told_apart(start: bytes, found: str) -> None:
    with pytest.raises(MediaError, match=f"expected a JPEG, PNG or WebP image, found {found}"):
        pixels(start)


# --- collections ---------------------------------------------------------------------------------


class Dataset:
    """As PyTorch's: it has items and a length, and cannot be iterated over."""

    def __getitem__(self, at: int) -> Array:
        return levels(seed=at)

    def __len__(self) -> int:
        return 3


class Lazy(Dataset):
    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(3))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"input_ids": [[1]], "attention_mask": [[1]]}, r"a mapping \(dict\) of input_ids, atten"),
        (UserDict(pixel_values=1), r"a mapping \(UserDict\) of pixel_values; pass its 'pixel_valu"),
        ({"bytes": b"x", "path": None}, "a mapping .* of bytes, path; pass its 'bytes'"),
        ([{"bytes": None, "path": "a.png"}], "image .*found a mapping .*pass its 'path'"),
        ({}, r"an empty mapping \(dict\)"),
        ({"a.png", "b.png"}, "a set, which has no order; pass a list"),
        (frozenset(), "a frozenset, which has no order"),
        (Dataset(), r"Dataset, which cannot be iterated over; pass \[data\[i\] for"),
        (None, "found NoneType"),
        (3.5, "found float"),
        (object, "found type"),
        (lambda: 3, "found function"),
        ([None], "found NoneType"),
        ([[levels()]], "found list"),
        ([("a.png", 1)], "found tuple"),
        (iter(()), "expected at least one image, found none"),
        (deque(), "expected at least one image, found none"),
        (np.array([], object), "expected at least one image, found none"),
        (np.array([b"a.png"]), r"array, \|S5 \[1\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "expected at least one image, found none"),
    ],
    ids=lambda x: x[:30] if isinstance(x, str) else type(x).__name__,
)
def test_what_is_no_collection_of_images_is_refused_by_name(images: Any, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        pixel_values(images, PLAIN)


def test_collections_of_every_kind_are_read(tmp_path: Path) -> None:
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        paths[-1].write_bytes(encoded(Image.fromarray(levels(seed=i))))
    expected = pixel_values([levels(seed=i) for i in range(3)], PLAIN)
    collections = [
        tuple(paths),
        deque(paths),
        map(str, paths),
        dict.fromkeys(paths).keys(),
        np.array([str(path) for path in paths]),
        np.array(paths, object),
        Lazy(),
    ]
    for given_images in collections:
        np.testing.assert_array_equal(pixel_values(given_images, PLAIN), expected)
    np.testing.assert_array_equal(pixel_values(np.array(str(paths[1])), PLAIN), expected[1:2])


def test_streams_are_read_a_batch_at_a_time() -> None:
    taken = count()
    stream = image_stream(levels(seed=next(taken)) for _ in range(10**9))
    batches = list(islice(batches_of_images(stream, 4), 2))
    assert [(len(some), before, total) for some, before, total in batches] == [
        (4, 0, None),
        (4, 4, None),
    ]
    assert next(taken) == 8
    assert [total for _, _, total in batches_of_images(image_stream(Lazy()), 2)] == [3, 3]


def test_the_place_in_a_stream_is_told() -> None:
    assert image_label(b"abc", 4, None) == "image 5 (bytes, 3 bytes)"
    assert image_label("a.png", 0, 1) == "image (a.png)"


# --- transparency --------------------------------------------------------------------------------


def logo() -> Array:
    """Black on nothing: every colour is black."""
    array = np.zeros((64, 64, 4), np.uint8)
    array[20:40, 10:50, 3] = 255
    array[40:44, 10:50, 3] = 51  # a fifth
    return array


@pytest.mark.parametrize(
    ("background", "shown"),
    [
        ("white", (255, 255, 255)),
        ("#102030", (16, 32, 48)),
        ((1, 2, 3), (1, 2, 3)),
        ("BLACK", (0, 0, 0)),
        (None, (0, 0, 0)),
    ],
)
def test_a_colour_stands_under_transparency(background: Any, shown: tuple[int, ...]) -> None:
    expected = np.rint(np.array(shown) * (1 - logo()[:, :, 3:] / 255))
    sources = [
        logo(),
        encoded(Image.fromarray(logo())),
        encoded(Image.fromarray(logo()), "WEBP", lossless=True, exact=True),
        Image.fromarray(logo()),
        Image.fromarray(logo()).convert("RGBa"),
        Image.fromarray(logo()[:, :, [0, 3]]),
        Image.fromarray(logo()[:, :, [0, 3]]).convert("La"),
        encoded(Image.fromarray(logo()[:, :, [0, 3]])),
    ]
    for source in sources:
        found = pixels(source, background=background)
        assert np.abs(found - expected).max() <= 1


def test_a_transparent_level_is_transparent() -> None:
    """PNG's tRNS of one grey level, one colour, and of a palette."""
    grey = np.array([[0, 9], [200, 9]], np.uint8)
    assert pixels(encoded(Image.fromarray(grey), transparency=9))[:, :, 1].tolist() == [
        [0, 255],
        [200, 255],
    ]
    colour = np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8)
    found = pixels(encoded(Image.fromarray(colour), transparency=(1, 2, 3)))
    assert found.tolist() == [[[255, 255, 255], [1, 2, 4]]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    found = pixels(encoded(palette, transparency=bytes([255, 0])))
    assert found[0, 1].tolist() == [255] * 3


def test_an_opaque_alpha_changes_nothing() -> None:
    array = np.dstack([levels(), np.full((9, 12), 255, np.uint8)])
    np.testing.assert_array_equal(pixels(array), levels())


@pytest.mark.parametrize("background", ["red-ish", "#12345", (1, 2), (1, 2, 300), (1.0, 2, 3), 7])
def test_other_backgrounds_are_refused(background: Any) -> None:
    with pytest.raises(UsageError, match=r"background .*expected white, black, #rrggbb"):
        ImageOptions(background=background)


# --- sizes and costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, -1, float("nan"), float("inf"), "50", True, 10**6])
def test_other_limits_are_refused(most: Any) -> None:
    with pytest.raises(UsageError, match=r"max_megapixels .*expected a number above 0"):
        ImageOptions(max_megapixels=most)


def test_a_limit_can_be_set() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(Image.new("RGB", (200, 100), "red"), kind)
        assert load_image(data, options=ImageOptions(max_megapixels=0.02)).size == (200, 100)
        with pytest.raises(
            MediaError, match=r"expected 1 to 19999 pixels.*200x100.*max_megapixels"
        ):
            load_image(data, options=ImageOptions(max_megapixels=0.019999))
    with pytest.raises(MediaError, match="max_megapixels"):
        load_image(levels(200, 200), options=ImageOptions(max_megapixels=0.01))


@pytest.mark.parametrize(
    ("whole", "scale"), [(400, 1), (399, 2), (100, 2), (99, 4), (24, 8), (3, 8)]
)
def test_large_jpegs_are_decoded_at_a_fraction(
    monkeypatch: pytest.MonkeyPatch, whole: int, scale: int
) -> None:
    gradient = Image.linear_gradient("L").resize((40, 1000)).resize((20, 20))
    picture = gradient.resize((200, 200)).convert("RGB")
    monkeypatch.setattr("internvl_edge.runtime.images.options.WHOLE_PIXELS", whole * 100)
    monkeypatch.setattr("internvl_edge.runtime.images.options.LARGEST_PIXELS", 40_000)
    data = encoded(picture, "JPEG", quality=95)
    found = load_image(data)
    assert found.size == (200 // scale, 200 // scale)
    shrunk = np.asarray(picture.resize(found.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(found) - shrunk).max() <= 6
    if scale > 1:  # what is not scaled down as it is decoded is refused
        for other in (encoded(picture, "PNG"), encoded(picture, "JPEG", progressive=True)):
            with pytest.raises(MediaError, match="expected 1 to"):
                load_image(other)
    assert load_image(data, options=ImageOptions(max_megapixels=1)).size == (200, 200)


@pytest.mark.parametrize("size", [(8160, 6144), (8192, 6144), (16384, 12288)])
def test_photographs_of_phones_are_accepted(size: tuple[int, int]) -> None:
    """By their headers alone: at least 2,048 pixels a side are left, and at most 50 million."""
    data = bytearray(encoded(Image.new("L", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", size[1], size[0])
    width, height = decode._open(bytes(data), "photo", ImageOptions()).size
    assert 2048 <= height <= width and width * height <= 50_000_000


def scans(jpeg: bytes, more: int) -> bytes:
    """A progressive JPEG whose last scan stands there again and again."""
    start = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[start:-2] * more + jpeg[-2:]


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    jpeg = encoded(Image.fromarray(levels(40, 40)), "JPEG", progressive=True)
    own = count_scans(jpeg)
    assert 2 <= own <= 12
    assert count_scans(scans(jpeg, 5)) == own + 5
    assert load_image(jpeg).size == (40, 40)
    with pytest.raises(MediaError, match=f"at most 64 scans, found {own + 100}"):
        load_image(scans(jpeg, 100))
    thumbnail = Image.Exif()
    thumbnail[0x010F] = "\xff\xda" * 200  # scans in a segment are no scans
    whole = encoded(Image.fromarray(levels(40, 40)), "JPEG", exif=thumbnail)
    assert count_scans(whole) == 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_scans_of_anything_are_counted(rest: bytes) -> None:
    assert 0 <= count_scans(b"\xff\xd8\xff" + rest) <= 100


def test_a_picture_of_one_endless_row_is_refused() -> None:
    header = struct.pack(">IIBBBBB", 50_000_000, 1, 8, 0, 0, 0, 0)
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    with pytest.raises(MediaError, match="sides of at most 65535 pixels, found 50000000x1"):
        load_image(PNG_MAGIC + body)


def test_a_file_is_read_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_NBYTES", 100)
    for source in (io.BytesIO(bytes(101)), "data:;base64," + "A" * 200):
        with pytest.raises(MediaError, match="at most 100 bytes are accepted"):
            pixels(source)


# --- resizing in part ----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_part_is_what_resizing_and_cropping_gives(data: st.DataObject) -> None:
    width, height, new_width = (data.draw(st.integers(1, 60)) for _ in range(3))
    new_height = data.draw(st.integers(height, 2 * height + 9))
    left, top = data.draw(st.integers(0, new_width - 1)), data.draw(st.integers(0, new_height - 1))
    right = data.draw(st.integers(left + 1, new_width))
    bottom = data.draw(st.integers(top + 1, new_height))
    image, box = Image.fromarray(levels(height, width, seed=width)), (left, top, right, bottom)
    whole = image.resize((new_width, new_height), BICUBIC).crop(box)
    part = resized_part(image, (new_width, new_height), box)
    np.testing.assert_array_equal(np.asarray(part), np.asarray(whole))


@pytest.mark.parametrize("transform", ["classification", "clip"])
@pytest.mark.parametrize("shape", [(5000, 1), (1, 5000), (20_001, 2), (3, 9001)])
def test_an_extreme_aspect_is_cropped_without_the_rest(
    shape: tuple[int, int], transform: Any
) -> None:
    image = Image.fromarray(levels(*shape))
    (found,) = pixel_levels(image, Preprocessing(size=224), transform)
    assert found.shape == (3, 224, 224)
    # torchvision's numbers, of which the middle part alone is made: the kernel reaches 2 pixels
    long, short, at = max(shape), min(shape), int(np.argmax(shape))
    longer = int(224 * long / short)
    offset = (round if transform == "classification" else int)((longer - 224) / 2)
    first = max(int(offset * long / longer) - 4, 0)
    inside = levels(*shape).take(range(first, min(first + 240 * short // 224 + 12, long)), axis=at)
    exact = reference_columns(inside, first, long, longer, offset, at)
    np.testing.assert_array_equal(found.transpose(1, 2, 0), exact)


def reference_columns(
    inside: Array, first: int, long: int, longer: int, offset: int, axis: int
) -> Array:
    """Resample 224 pixels along one axis, pixel by pixel in integers, and the other by Pillow."""
    if axis == 0:  # columns come first
        inside = np.asarray(Image.fromarray(inside).resize((224, len(inside)), BICUBIC))
    lines = np.moveaxis(inside, axis, 0).astype(int)
    scale, made = long / longer, []
    for i in range(224):
        centre = (offset + i + 0.5) * scale
        low, high = max(int(centre - 2 + 0.5), 0), min(int(centre + 2 + 0.5), long)
        weights = []
        for x in range(low, high):
            d = abs(x - centre + 0.5)
            weights.append(
                (1.5 * d - 2.5) * d * d + 1
                if d < 1
                else (((d - 5) * d + 8) * d - 4) * -0.5
                if d < 2
                else 0
            )
        fixed = [int(w / sum(weights) * 2**22 + (0.5 if w >= 0 else -0.5)) for w in weights]
        total = sum(w * lines[x - first] for w, x in zip(fixed, range(low, high), strict=True))
        made.append(np.clip((total + 2**21) >> 22, 0, 255))
    part = np.moveaxis(np.stack(made), 0, axis).astype(np.uint8)
    return part if axis == 0 else np.asarray(Image.fromarray(part).resize((224, 224), BICUBIC))


def test_ordinary_pictures_are_resized_by_pillow() -> None:
    image = Image.fromarray(levels(40, 50))
    whole = image.resize((60, 48), Image.Resampling.BICUBIC).crop((6, 0, 54, 48))
    assert cropped(image, (60, 48), (6, 0, 54, 48)).tobytes() == whole.tobytes()


def test_the_layouts_of_the_table_are_told_apart() -> None:
    assert len(set(LAYOUTS)) == len(LAYOUTS) == 8
