"""Captions in the spellings that people have: the formats of the documents, and every pairing."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.paths import ROOT

from internvl_edge.errors import CalibrationError
from internvl_edge.quantize.calibration.images import (
    CalibrationSet,
    ImageFile,
    list_images,
    load_calibration,
)

PAGE = ROOT / "docs/reference/checkpoints.md"
EXAMPLE = re.compile(r"`([\w.]+)`:\n\n```\w+\n(.*?)\n```\n", re.DOTALL)
DOG, BOATS = "a dog on sand", "two boats, one red"


def examples() -> list[Any]:
    found = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
    assert len(found) >= 13
    return [pytest.param(file, text, id=f"{i} {file}") for i, (file, text) in enumerate(found)]


def write_images(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (40 * i, 90, 10)).save(folder / name, "PNG")


def by_name(folder: Path) -> dict[str, str]:
    sample = load_calibration(folder, 100)
    return captions_of(sample)


def captions_of(sample: CalibrationSet) -> dict[str, str]:
    files = [source for source in sample.sources if isinstance(source, ImageFile)]
    return {f.path.name: c for f, c in zip(files, sample.captions, strict=True)}


@pytest.mark.parametrize(("file", "text"), examples())
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_every_format_of_the_documents(
    tmp_path: Path, file: str, text: str, encoding: str, ends: str
) -> None:
    write_images(tmp_path, "dog.jpg", "boats.jpg")
    (tmp_path / file).write_bytes(text.replace("\n", ends).encode(encoding))
    assert by_name(tmp_path) == {"dog.jpg": DOG, "boats.jpg": BOATS}


@pytest.mark.parametrize(("file", "text"), examples())
def test_in_a_folder_of_annotations(tmp_path: Path, file: str, text: str) -> None:
    write_images(tmp_path, "val/dog.jpg", "val/boats.jpg")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / file).write_text(text)
    assert by_name(tmp_path) == {"dog.jpg": DOG, "boats.jpg": BOATS}


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_captions_next_to_their_images(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path, "pets/dog.jpg", "boats.jpg")
    (tmp_path / f"pets/dog{suffix}").write_text(f"{DOG}\nmore\n")
    (tmp_path / f"boats{suffix}").write_text(BOATS)
    assert by_name(tmp_path) == {"dog.jpg": DOG, "boats.jpg": BOATS}


DOG_NAMES = (
    "pets/dog.jpg",
    "./pets/dog.jpg",
    "dog.jpg",
    "pets\\dog.jpg",
    "/data/photos/pets/dog.jpg",
    "C:\\data\\pets\\dog.jpg",
    "file:///data/pets/dog.jpg",
    "Dog.JPG",
    "PETS/DOG.JPG",
    "dog",
    "pets/dog.png",
    "pets//dog.jpg",
    " pets/dog.jpg ",
)


@pytest.mark.parametrize("name", DOG_NAMES)
def test_a_name_finds_its_image(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, "pets/dog.jpg", "ships/boats.jpg")
    (tmp_path / "captions.json").write_text(json.dumps([{"image": name, "caption": DOG}]))
    assert by_name(tmp_path) == {"dog.jpg": DOG}


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_letters_composed_or_not(tmp_path: Path, on_disk: Any, written: Any) -> None:
    write_images(tmp_path, unicodedata.normalize(on_disk, "Café é.jpg"))
    name = unicodedata.normalize(written, "Café é.jpg")
    (tmp_path / "captions.json").write_text(json.dumps({name: DOG}))
    assert list(by_name(tmp_path).values()) == [DOG]


def test_percent_signs(tmp_path: Path) -> None:
    write_images(tmp_path, "a dog.jpg", "100%25.jpg")
    (tmp_path / "captions.json").write_text(json.dumps({"a%20dog.jpg": DOG, "100%25.jpg": BOATS}))
    assert by_name(tmp_path) == {"a dog.jpg": DOG, "100%25.jpg": BOATS}


def test_folders_that_differ_are_not_mixed_up(tmp_path: Path) -> None:
    write_images(tmp_path, "train/1.jpg", "val/2.jpg")
    (tmp_path / "captions.json").write_text(json.dumps({"val/1.jpg": DOG, "val/2.jpg": BOATS}))
    sample = load_calibration(tmp_path, 10)
    assert captions_of(sample) == {"2.jpg": BOATS}
    assert any("1 of 2 name(s)" in note and "val/1.jpg" in note for note in sample.notes)


def test_what_finds_no_partner_is_counted_and_named(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.jpg", "b/1.jpg", "2.jpg", "3.jpg")
    entries = {"1.jpg": "one", "2.jpg": "two", "gone.jpg": "gone"}
    (tmp_path / "captions.json").write_text(json.dumps(entries))
    sample = load_calibration(tmp_path, 10)
    assert captions_of(sample) == {"2.jpg": "two"}
    assert sample.notes == (
        "3 of 4 image(s) have no caption in captions.json, and are left out: 3.jpg, a/1.jpg, "
        "b/1.jpg",
        "1 of 3 name(s) in captions.json are of no image here: gone.jpg",
        "1 of 3 name(s) in captions.json are of several images, and are left out: 1.jpg",
    )


def test_when_none_is_paired_both_sides_are_shown(tmp_path: Path) -> None:
    write_images(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "captions.json").write_text(json.dumps({"x.jpg": "x", "y.jpg": "y"}))
    with pytest.raises(CalibrationError, match=r"it names x\.jpg, y\.jpg; the images are"):
        load_calibration(tmp_path, 4)


def test_more_captions_of_an_image_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, "1.jpg")
    (tmp_path / "captions.txt").write_text("1.jpg#0\tone\n1.jpg#1\ttwo\n1.jpg#2\tthree\n")
    sample = load_calibration(tmp_path, 4)
    assert sample.captions == ("one",)
    assert "captions.txt has 2 more caption(s)" in sample.notes[0]


def test_rows_that_lack_a_caption_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, "1.jpg", "2.jpg")
    text = (
        "image_name| comment_number| comment\n1.jpg| 0| one\n2.jpg| 4   A dog runs\n2.jpg|0|two\n"
    )
    (tmp_path / "results.csv").write_text(text)
    sample = load_calibration(tmp_path, 4)
    assert captions_of(sample) == {"1.jpg": "one", "2.jpg": "two"}
    assert "1 row(s) without an image or a caption are left out: row 3" in sample.notes[0]


def test_a_stray_quote_swallows_no_lines(tmp_path: Path) -> None:
    write_images(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "captions.csv").write_text('image,caption\n1.jpg,"Stop sign\n2.jpg,two\n')
    assert by_name(tmp_path) == {"1.jpg": '"Stop sign', "2.jpg": "two"}


def test_another_file_of_captions_is_said(tmp_path: Path) -> None:
    write_images(tmp_path, "1.jpg")
    (tmp_path / "captions.json").write_text('["one"]')
    (tmp_path / "captions.txt").write_text("two\n")
    sample = load_calibration(tmp_path, 4)
    assert sample.captions == ("one",)
    assert "captions are read from captions.json, and not from captions.txt" in sample.notes


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("captions.csv", b"a,b\nc,d\n"),
        ("captions.txt", b"caf\xe9 on a table\n"),
        ("captions.json", rb'["half \ud800 a character"]'),
        ("captions.json", b'["with \\u0000 NUL"]'),
        ("captions.json", b'{"images": [], "annotations": [3]}'),
        ("captions.json", b"3"),
        ("captions.jsonl", b"[1]\n"),
    ],
)
def test_files_that_are_not_understood(tmp_path: Path, file: str, content: bytes) -> None:
    write_images(tmp_path, "1.jpg")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"{file}: cannot be read as captions") as caught:
        load_calibration(tmp_path, 4)
    str(caught.value).encode()


def test_the_line_that_is_not_understood_is_shown(tmp_path: Path) -> None:
    write_images(tmp_path, "1.jpg")
    (tmp_path / "captions.jsonl").write_text('{"image": "1.jpg", "caption": "a"}\n\n{"image":\n')
    with pytest.raises(CalibrationError, match=r"the line '\{\"image\":': Expecting value"):
        load_calibration(tmp_path, 4)


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.bmp", "a.heic", "a.tif", "photo", "a.jpg~"])
def test_a_picture_under_any_suffix(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (6, 5)).save(tmp_path / name, "JPEG")
    assert len(load_calibration(tmp_path, 4)) == 1


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"BM", "a BMP picture"),
        (b"GIF89a", "a GIF picture"),
        (b"II*\0", "a TIFF picture"),
        (b"\0\0\0\x18ftypheic", "a HEIC photo"),
        (b"\0\0\0\x18ftypavif", "an AVIF picture"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"", "an empty file"),
    ],
)
def test_what_does_not_decode_is_named(tmp_path: Path, head: bytes, says: str) -> None:
    (tmp_path / "IMG_1.JPG").write_bytes(head + bytes(50) * bool(head))
    with pytest.raises(CalibrationError, match=f"IMG_1.JPG \\({says}"):
        load_calibration(tmp_path, 4)


def test_other_pictures_are_counted(tmp_path: Path) -> None:
    write_images(tmp_path, "1.png")
    Image.new("RGB", (6, 5)).save(tmp_path / "2.bmp")
    Image.new("RGB", (6, 5)).save(tmp_path / "3.bmp")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "notes.docx").write_text("no picture")
    sample = load_calibration(tmp_path, 4)
    assert len(sample) == 1
    assert "2 file(s) are left out, a BMP picture: save it as PNG: 2.bmp, 3.bmp" in sample.notes
    assert any("lead nowhere" in note and "gone.jpg" in note for note in sample.notes)
    assert not any("docx" in note for note in sample.notes)
    (tmp_path / "1.png").unlink()
    with pytest.raises(CalibrationError, match="found none; 2 file"):
        load_calibration(tmp_path, 4)


def test_folders_that_links_lead_to_are_searched_once(tmp_path: Path) -> None:
    write_images(tmp_path / "far", "1.png", "2.png")
    (tmp_path / "near").mkdir()
    (tmp_path / "near/cats").symlink_to(tmp_path / "far")
    (tmp_path / "near/cats/again").symlink_to(tmp_path / "near")
    write_images(tmp_path / "near", "__MACOSX/3.png", ".hidden/4.png")
    assert [path.name for path in list_images(tmp_path / "near").images] == ["1.png", "2.png"]


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{i}.png" for i in range(25)))
    write_images(tmp_path, "good\udcff.png")
    (tmp_path / "bad\udcfe.jpg").write_bytes(b"?")
    sample = load_calibration(tmp_path, 100)
    assert len(sample) == 26
    assert sample.skipped == (r"bad\xfe.jpg",)
    json.dumps([sample.skipped, sample.notes], ensure_ascii=False).encode()


def test_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{i}.png" for i in range(25)))
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(3_000_000_000)
    sample = load_calibration(tmp_path, 100)
    assert sample.skipped == ("huge.jpg",)
    assert any("huge.jpg" in note and "3,000,000,000" in note for note in sample.notes)
