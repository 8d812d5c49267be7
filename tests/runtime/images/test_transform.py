"""Preprocessing: equal to the original bit for bit, and one test per rule that refuses."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from support.golden import CHAT_PICTURES

from internvl_edge.errors import ArtifactError, InputError, MediaError, UsageError
from internvl_edge.runtime.images import decode, formats, reading
from internvl_edge.runtime.images.options import ImageOptions
from internvl_edge.runtime.images.transform import (
    Preprocessing,
    load_image,
    pixel_levels,
    pixel_values,
    tile,
    tile_grid,
)
from internvl_edge.types import Array

TRANSFORMS = ("retrieval", "classification", "clip")
FORMATS = ("JPEG", "PNG", "WEBP")
PLAIN = Preprocessing(size=28)


def noise(height: int, width: int, seed: int = 0) -> Array:
    """Smooth colours with some noise: compresses, and no two pixels are alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1)
    return (base + rng.normal(0, 20, base.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(noise(height, width))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10_000))
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return formats.PNG_MAGIC + chunks


# --- the original's numbers ----------------------------------------------------------------------


def assert_equal(found: Array, arrays: Any, key: str) -> None:
    """To the bit: with the array, or, where a set keeps no more, with the hash of its bytes."""
    if key in arrays:
        np.testing.assert_array_equal(found, arrays[key])
    else:
        assert hashlib.sha256(found.tobytes()).hexdigest() == arrays[f"{key}.sha256"]


@pytest.mark.parametrize(
    ("transform", "key"),
    [
        ("retrieval", "retrieval224"),
        ("classification", "classification224"),
        ("clip", "clip_processor224"),
    ],
)
def test_transforms_equal_the_original(golden: Path, transform: Any, key: str) -> None:
    with np.load(golden / "preproc.npz") as arrays:
        names = [n for n in ("land", "port", "small") if f"{n}.image" in arrays]
        assert "small" in names
        for name in names:
            image = arrays[f"{name}.image"]
            (found,) = pixel_values(image, Preprocessing(size=224, transform=transform))
            assert_equal(found, arrays, f"{name}.{key}")


def test_tiles_equal_the_original(golden: Path) -> None:
    with np.load(golden / "preproc.npz") as arrays:
        size = int(arrays["tiles.size"]) if "tiles.size" in arrays else 112
        tiles = tile(arrays["tiles.image"], size=size, max_num=6)
        assert_equal(np.stack([np.asarray(t) for t in tiles]), arrays, "tiles.out")


def test_tile_counts_equal_the_original(golden: Path) -> None:
    counts = json.loads((golden / "preproc_meta.json").read_text())
    cases = [key.split() for key in counts if key.startswith("tiles ")]
    assert len(cases) > 20
    for _, shape, most in cases:
        width, height = map(int, shape.split("x"))
        columns, rows = tile_grid((width, height), 448, 1, int(most.removeprefix("max")))
        count = columns * rows + (columns * rows > 1)
        assert count == counts[f"tiles {shape} {most}"], shape


# --- a second implementation ---------------------------------------------------------------------


def reference(array: Array, size: int, transform: str) -> Array:
    """torchvision's and the processor's steps spelled out, normalising through a table."""
    image = Image.fromarray(array)
    width, height = image.size
    if transform == "retrieval":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    else:
        if width <= height:
            width, height = size, int(size * height / width)
        else:
            width, height = int(size * width / height), size
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        if transform == "classification":  # half to even, in integers: up when floor is odd
            left += (width - size) % 2 and left % 2
            top += (height - size) % 2 and top % 2
        image = image.crop((left, top, left + size, top + size))
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)  # CLIPImageProcessor's order
    pixels = np.asarray(image)
    out = np.empty((3, size, size), np.float32)
    for c, (mean, std) in enumerate(zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)):
        out[c] = ((levels - np.float32(mean)) / np.float32(std))[pixels[:, :, c]]
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 40),
    st.sampled_from(TRANSFORMS),
)
def test_transforms_equal_a_second_implementation(
    height: int, width: int, size: int, transform: Any
) -> None:
    array = noise(height, width, seed=height * 100 + width)
    found = pixel_values(array, Preprocessing(size=size, transform=transform))
    assert found.shape == (1, 3, size, size) and found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found[0], reference(array, size, transform))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_picture_of_the_models_size_is_left_as_it_is(transform: Any) -> None:
    image = picture(28, 28)
    (found,) = pixel_levels(encoded(image, "PNG"), PLAIN, transform)
    np.testing.assert_array_equal(found.transpose(1, 2, 0), np.asarray(image))
    np.testing.assert_array_equal(np.asarray(image.resize((28, 28), 3)), np.asarray(image))


def test_a_transform_overrides_the_models_own() -> None:
    array = noise(30, 61)
    found = pixel_values(array, PLAIN, "clip")
    np.testing.assert_array_equal(found[0], reference(array, 28, "clip"))


def brute_force_grid(shape: tuple[int, int], size: int, least: int, most: int) -> tuple[int, int]:
    """Every grid compared at once, instead of one after the other."""
    width, height = shape
    grids = sorted(
        (c * r, c, r)
        for c in range(1, most + 1)
        for r in range(1, most + 1)
        if least <= c * r <= most
    )
    nearest = min(abs(width / height - c / r) for _, c, r in grids)
    ties = [(c, r) for _, c, r in grids if abs(width / height - c / r) == nearest]
    roomy = [(c, r) for c, r in ties[1:] if width * height > 0.5 * size * size * c * r]
    return (ties[:1] + roomy)[-1]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([6, 12, 24]), st.integers(1, 4))
def test_tile_grid_equals_brute_force(width: int, height: int, most: int, least: int) -> None:
    shape = width, height
    assert tile_grid(shape, 448, least, most) == brute_force_grid(shape, 448, least, most)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 8), st.booleans())
def test_tiles_cut_up_the_stretched_image(
    height: int, width: int, most: int, use_thumbnail: bool
) -> None:
    image, size = Image.fromarray(noise(height, width)), 16
    columns, rows = tile_grid(image.size, size, 1, most)
    tiles = [np.asarray(t) for t in tile(image, size, 1, most, use_thumbnail)]
    assert len(tiles) == columns * rows + (use_thumbnail and columns * rows > 1)
    assert {t.shape for t in tiles} == {(size, size, 3)}
    whole = np.concatenate(
        [np.concatenate(tiles[r * columns : (r + 1) * columns], axis=1) for r in range(rows)]
    )
    stretched = image.resize((size * columns, size * rows), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(whole, np.asarray(stretched))


# --- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_source_gives_the_same_pixels(tmp_path: Path, kind: str) -> None:
    data = encoded(picture(), kind)
    path = tmp_path / "photo.wrong-extension"
    path.write_bytes(data)
    link = tmp_path / "link"
    link.symlink_to(path)
    pil = Image.open(io.BytesIO(data))
    array = np.asarray(pil.convert("RGB"))
    sources = [path, str(path), link, data, bytearray(data), memoryview(data), pil, array]
    strided = np.asfortranarray(np.concatenate([array, array], axis=1))[:, : array.shape[1]]
    batch = pixel_values([*sources, strided], PLAIN)
    for one, source in zip(batch, sources, strict=False):
        np.testing.assert_array_equal(one, batch[0])
        np.testing.assert_array_equal(pixel_values(source, PLAIN)[0], one)
    np.testing.assert_array_equal(batch[-1], batch[0])
    np.testing.assert_array_equal(pixel_values(np.stack([array] * 2), PLAIN), batch[:2])


def test_images_may_come_from_a_generator() -> None:
    found = pixel_values((noise(9, 9, seed) for seed in range(3)), PLAIN)
    assert found.shape == (3, 3, 28, 28)


def test_normalised_pixels_pass_through() -> None:
    pixels = np.random.default_rng(0).normal(size=(2, 3, 28, 28)).astype(np.float32)
    np.testing.assert_array_equal(pixel_values(pixels, PLAIN), pixels)
    strided = pixel_values(pixels[:, ::-1], PLAIN)
    assert strided.flags.c_contiguous
    np.testing.assert_array_equal(strided, pixels[:, ::-1])


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes_become_rgb_as_the_original_does(mode: str) -> None:
    image = picture().convert(mode)
    found = load_image(encoded(image, "PNG"))
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert("RGB")))


def test_cmyk_becomes_rgb() -> None:
    data = encoded(picture().convert("CMYK"), "JPEG")
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(expected))


def test_a_transparent_palette_does_not_warn() -> None:
    image = picture().quantize(16)
    data = encoded(image, "PNG", transparency=bytes(range(16)))
    given_image = Image.open(io.BytesIO(data))  # which warns when converted straight to RGB
    dropped = ImageOptions(background=None)
    for source in (data, given_image):
        np.testing.assert_array_equal(
            np.asarray(load_image(source, options=dropped)), np.asarray(image.convert("RGB"))
        )


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_of_an_animation_the_first_frame_counts(kind: str, options: dict[str, Any]) -> None:
    frames = [Image.fromarray(noise(20, 30, seed)) for seed in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(np.asarray(load_image(data)), np.asarray(frames[0]))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker, so that the tag is not alone"
    data = encoded(picture(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(expected))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([b"II*\0", b"MM\0*", b"", b"II"]), st.binary(max_size=60))
def test_a_broken_exif_block_is_ignored(magic: bytes, rest: bytes) -> None:
    for kind in FORMATS:
        data = encoded(picture(8, 8), kind, exif=b"Exif\0\0" + magic + rest)
        assert load_image(data).size == (8, 8)


def test_a_broken_animation_does_not_warn() -> None:
    data = encoded(picture(), "PNG")
    control = png_chunk(b"acTL", struct.pack(">II", 0, 0))
    broken = data[:33] + control + data[33:]
    with pytest.warns(UserWarning, match="APNG"):
        Image.open(io.BytesIO(broken)).load()
    np.testing.assert_array_equal(np.asarray(load_image(broken)), np.asarray(picture()))


def test_threads_agree_and_leave_the_warning_filters_alone() -> None:
    data = [encoded(picture(), kind) for kind in FORMATS] * 8
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda one: pixel_values(one, PLAIN), data))
    np.testing.assert_array_equal(np.concatenate(parallel), pixel_values(data, PLAIN))
    assert list(warnings.filters) == before


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_files_are_refused(kind: str, progressive: bool) -> None:
    options = {"progressive": True} if kind == "JPEG" and progressive else {}
    image = picture(60, 90)
    data = encoded(image, kind, **options)
    whole = np.asarray(load_image(data))
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            found = load_image(data[:length])
        except MediaError as error:
            refused += 1
            assert f"bytes, {length} bytes" in str(error)
        else:  # what is missing came after the last pixel
            assert length > 0.98 * len(data)
            np.testing.assert_array_equal(np.asarray(found), whole)
    assert refused > 100


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_decode_or_are_refused(kind: str) -> None:
    data = encoded(picture(), kind)
    rng = np.random.default_rng(1)
    for _ in range(200):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            damaged[at] ^= int(rng.integers(1, 256))
        with contextlib.suppress(MediaError):
            assert load_image(damaged).mode == "RGB"


@pytest.mark.parametrize("shape", [(10_000, 10_000), (2**31 - 1, 2**31 - 1), (50_000_001, 1)])
def test_a_decompression_bomb_is_refused_by_its_header(shape: tuple[int, int]) -> None:
    with pytest.raises(MediaError, match="expected 1 to 50000000 pixels of a PNG"):
        load_image(png_bomb(*shape))


def test_a_webp_bomb_is_refused() -> None:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2
    with pytest.raises(MediaError, match="bytes, 30 bytes"):
        load_image(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body)


def test_a_jpeg_bomb_is_refused() -> None:
    data = bytearray(encoded(picture(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    with pytest.raises(MediaError, match="65000x65000"):
        load_image(data)


def test_a_flood_of_chunks_is_refused_within_the_limits() -> None:
    chunks = png_chunk(b"tEXt", b"") * 100_000 + png_chunk(b"IDAT", b"") * 100_000
    with pytest.raises(MediaError, match="truncated or corrupt"):
        load_image(formats.PNG_MAGIC + chunks + png_chunk(b"IEND", b""))


def test_a_file_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system gives at once, and however long it says that the file is."""
    data = bytes(range(256)) * 40
    (tmp_path / "a").write_bytes(data)
    read, asked = os.read, list[int]()

    def some(handle: int, count: int) -> bytes:
        asked.append(count)
        return read(handle, min(count, 1000))

    monkeypatch.setattr(os, "read", some)
    assert reading.contents(tmp_path / "a", "a") == data
    assert max(asked) == len(data) + 1  # no memory is taken for what is not there
    monkeypatch.setattr(reading, "MAX_NBYTES", len(data))
    assert reading.contents(tmp_path / "a", "a") == data
    monkeypatch.setattr(reading, "MAX_NBYTES", len(data) - 1)
    with pytest.raises(MediaError, match="bytes are accepted, found more"):
        reading.contents(tmp_path / "a", "a")


def test_a_file_above_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(reading.MAX_NBYTES + 1)  # sparse
    with pytest.raises(MediaError, match=r"large\.png.*at most 67108864 bytes"):
        load_image(path)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "EPS", "PDF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(MediaError, match="expected a JPEG, PNG or WebP"):
        load_image(encoded(picture(), kind))


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"\xff", b"RIFF\0\0\0\0WAVE", b"\x80\x04K\x01."])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(MediaError, match="expected a JPEG, PNG or WebP"):
        load_image(data)


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match=r"pipe.*expected an image file"):
        load_image(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("absent.png", "No such file"),
        (".", "expected an image file"),
        ("/dev/zero", "expected an image file"),
        ("nul\0.png", "null"),
        ("x" * 300, "too long"),
    ],
)
def test_unreadable_paths_are_refused(tmp_path: Path, path: str, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        load_image(f"{tmp_path}/{path}" if path[0] != "/" else path)


def test_no_file_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(picture(), "PNG"))
    before = os.listdir("/proc/self/fd")
    kept = [load_image(path) for _ in range(5)]
    assert len(kept) == 5 and os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((), np.uint8),
        np.zeros((1, 3, 28, 28), np.float64),
        np.zeros((1, 3, 28, 28), ">f4"),
        np.zeros((1, 3, 28, 27), np.float32),
        np.zeros((0, 3, 28, 28), np.float32),
        np.zeros((0, 4, 4, 3), np.uint8),
        np.full((1, 3, 28, 28), np.nan, np.float32),
        np.full((1, 3, 28, 28), np.inf, np.float32),
        np.array(None),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_other_arrays_are_refused(array: Array) -> None:
    with pytest.raises(MediaError, match=r"expected|finite"):
        pixel_values(array, PLAIN)


@pytest.mark.parametrize("images", [None, 3, [], [None], [[noise(4, 4)]], object()])
def test_what_is_no_image_at_all_is_refused(images: Any) -> None:
    with pytest.raises(MediaError, match="expected"):
        pixel_values(images, PLAIN)


def test_the_message_says_which_of_several() -> None:
    data = encoded(picture(), "JPEG")
    with pytest.raises(MediaError, match=r"image 3 of 4 \(bytes, 5 bytes\)"):
        pixel_values([data, data, b"hello", data], PLAIN)


def test_an_unknown_transform_is_refused() -> None:
    with pytest.raises(UsageError, match="retrieval, classification, clip, found 'crop'"):
        pixel_values(noise(4, 4), PLAIN, "crop")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "least", "most"), [(0, 1, 2), (4097, 1, 2), (16, 0, 2), (16, 3, 2), (16, 1, 41)]
)
def test_tiles_that_cannot_be_are_refused(size: int, least: int, most: int) -> None:
    with pytest.raises(UsageError, match="min_num <= max_num"):
        tile(noise(4, 4), size, least, most)


def test_grids_equal_the_originals() -> None:
    cases = json.loads(CHAT_PICTURES.read_text(encoding="utf-8"))["grids"]
    assert len(cases) > 400
    for width, height, most, columns, rows in cases:
        assert tile_grid((width, height), 448, 1, most) == (columns, rows), (width, height, most)


def test_tiles_too_large_are_refused() -> None:
    with pytest.raises(MediaError, match="would be resized"):
        tile(noise(4, 4), 4096, 4, 4)


# --- Preprocessing -------------------------------------------------------------------------------

numbers = st.floats(-1000, 1000)
positive = st.floats(1e-6, 1000)


@given(
    st.integers(1, 4096),
    st.tuples(numbers, numbers, numbers),
    st.tuples(positive, positive, positive),
    st.sampled_from(TRANSFORMS),
)
def test_json_round_trip(size: int, mean: Any, std: Any, transform: Any) -> None:
    given_one = Preprocessing(size=size, mean=mean, std=std, transform=transform)
    assert Preprocessing.from_json(json.loads(json.dumps(given_one.to_json()))) == given_one


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 5000},
        {"size": True},
        {"size": "224"},
        {"mean": (0.5, 0.5)},
        {"mean": (0.5, 0.5, float("nan"))},
        {"mean": (0.5, 0.5, 10**400)},
        {"mean": (0.5, 0.5, "0.5")},
        {"std": (0.5, 0.5, 0.0)},
        {"std": (0.5, 0.5, -1.0)},
        {"std": 0.5},
        {"transform": "crop"},
    ],
)
def test_preprocessing_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be"):
        Preprocessing(**{"size": 224} | wrong)
    with pytest.raises(ArtifactError, match="must be"):
        Preprocessing.from_json({"size": 224} | wrong)


@pytest.mark.parametrize("raw", [None, [], "x", {}, {"mean": [0, 0, 0]}, {"size": 4, "crop": 1}])
def test_json_of_another_shape_is_refused(raw: object) -> None:
    with pytest.raises(ArtifactError, match="preprocessing must be an object"):
        Preprocessing.from_json(raw)


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP"])
def test_the_size_of_a_file(suffix: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, suffix)
    assert decode.image_size(buffer.getvalue()) == (30, 20)


def test_the_size_of_no_picture_is_refused() -> None:
    with pytest.raises(MediaError, match=r"the one: expected a JPEG, PNG or WebP image"):
        decode.image_size(b"GIF89a", "the one")
