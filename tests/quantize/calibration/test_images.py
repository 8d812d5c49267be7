"""Calibration sets: the same sample everywhere, nothing unreadable, nothing changed unnoticed."""

from __future__ import annotations

import importlib.resources
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_edge.errors import CalibrationError, MissingDependency, UsageError
from internvl_edge.quantize.calibration import captions
from internvl_edge.quantize.calibration import images as data
from internvl_edge.quantize.calibration.images import (
    SAMPLE_SETS,
    CalibrationSet,
    ImageFile,
    bundled_captions,
    load_calibration,
    pinned_files,
    sample_set,
)


def write_images(folder: Path, names: list[str]) -> None:
    """Images that differ by the hash of their names, written in another order every time."""
    for name in random.Random(len(names)).sample(names, len(names)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(np.frombuffer(name.encode().ljust(3)[-7:-4].ljust(3), np.uint8))
        Image.new("RGB", (5, 4), colour).save(path)


def numbered(count: int) -> list[str]:
    return [f"{i:03}.png" for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "images", numbered(30))
    return tmp_path / "images"


def names_of(sample: CalibrationSet) -> list[str]:
    return [source.path.name for source in sample.sources if isinstance(source, ImageFile)]


def test_a_folder_is_sampled_by_names_and_seed_alone(folder: Path, tmp_path: Path) -> None:
    first = load_calibration(folder, 8, seed=3)
    assert len(first) == len(set(names_of(first))) == 8
    write_images(tmp_path / "elsewhere" / "again", numbered(30)[::-1])
    second = load_calibration(tmp_path / "elsewhere" / "again", 8, seed=3)
    assert names_of(first) == names_of(second)
    assert first.digest == second.digest
    other = load_calibration(folder, 8, seed=4)
    assert names_of(other) != names_of(first)
    assert other.digest != first.digest


def test_the_sample_is_pinned(folder: Path) -> None:
    # A change here changes what every published recipe calibrates on.
    pinned = ["008.png", "015.png", "012.png", "000.png"]
    assert names_of(load_calibration(folder, 4, seed=0)) == pinned


def test_one_more_image_changes_one_sample_at_most(folder: Path) -> None:
    before = set(names_of(load_calibration(folder, 8)))
    write_images(folder, ["a new one.png"])
    assert len(before - set(names_of(load_calibration(folder, 8)))) <= 1


def test_images_are_decoded_as_written(folder: Path) -> None:
    sample = load_calibration(folder, 3)
    for source, image in zip(sample.sources, sample.images(), strict=True):
        assert isinstance(source, ImageFile)
        expected = np.asarray(Image.open(source.path))
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, expected)


def test_fewer_images_than_asked_for_are_all_used(folder: Path) -> None:
    assert sorted(names_of(load_calibration(folder, 1000))) == numbered(30)


def test_sub_folders_count_and_other_files_do_not(folder: Path) -> None:
    write_images(folder, ["deep/er/one.JPG", "deep/.hidden.png"])
    (folder / "notes.txt").write_text("not an image")
    (folder / "folder.png").mkdir()
    assert len(load_calibration(folder, 1000)) == 31


@pytest.mark.parametrize("content", [b"", b"no image at all", None], ids=["empty", "text", "cut"])
def test_a_corrupt_image_is_skipped_and_counted(folder: Path, content: bytes | None) -> None:
    whole = (folder / "000.png").read_bytes()
    (folder / "bad.png").write_bytes(whole[:-30] if content is None else content)
    for num_samples in (4, 30, 1000):  # whether or not the sample meets it
        sample = load_calibration(folder, num_samples)
        assert sample.skipped == ("bad.png",)
        assert "bad.png" not in names_of(sample)
        assert len(sample) == min(num_samples, 30)


def test_more_than_five_percent_corrupt_is_refused(folder: Path) -> None:
    for i in range(2):
        (folder / f"bad{i}.png").write_bytes(b"?")
    with pytest.raises(CalibrationError, match=r"2 of 32 .* more than 5%: bad0\.png, bad1\.png"):
        load_calibration(folder, 4)


def test_exactly_five_percent_passes(tmp_path: Path) -> None:
    write_images(tmp_path, numbered(19))
    (tmp_path / "bad.png").write_bytes(b"?")
    assert len(load_calibration(tmp_path, 32)) == 19


def test_a_large_folder_is_not_decoded_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "NUM_CHECKED", 5)
    reads: list[bytes] = []
    decode = data._decode

    def counted(content: bytes) -> data.Image:
        reads.append(content)
        return decode(content)

    monkeypatch.setattr(data, "_decode", counted)
    assert len(load_calibration(folder, 3)) == 3
    assert len(reads) == 5
    assert len(load_calibration(folder, 9)) == 9
    assert len(reads) == 5 + 9


def test_no_folder_and_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="expected a folder"):
        load_calibration(tmp_path / "nowhere", 4)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(CalibrationError, match="expected a folder"):
        load_calibration(tmp_path / "notes.txt", 4)
    with pytest.raises(CalibrationError, match=r"expected images .* found none"):
        load_calibration(tmp_path, 4)


def test_a_file_that_changes_or_goes_is_noticed(folder: Path) -> None:
    sample = load_calibration(folder, 2)
    first, second = (source.path for source in sample.sources if isinstance(source, ImageFile))
    Image.new("RGB", (5, 4)).save(first)
    with pytest.raises(CalibrationError, match="changed during calibration"):
        sample.image(0)
    second.unlink()
    with pytest.raises(CalibrationError, match="no longer readable"):
        sample.image(1)


def test_the_digest_covers_images_and_captions(folder: Path) -> None:
    before = load_calibration(folder, 30).digest
    (folder / "captions.txt").write_text("a single caption\n")
    captioned = load_calibration(folder, 30).digest
    Image.new("RGB", (5, 4), (1, 2, 3)).save(folder / "000.png")
    assert len({before, captioned, load_calibration(folder, 30).digest}) == 3


def test_captions_of_a_text_file_are_repeated(folder: Path) -> None:
    (folder / "captions.txt").write_text("one\n\n  two \r\nthree, é\n", "utf-8")
    found = load_calibration(folder, 7).captions
    assert len(found) == 7
    assert set(found) == {"one", "two", "three, é"}


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_paired_captions_stay_with_their_images(folder: Path, kind: str) -> None:
    entries = [{"image": name, "caption": f"number {name}"} for name in numbered(20)]
    text = json.dumps(entries) if kind == "json" else "\n".join(map(json.dumps, entries)) + "\n"
    (folder / f"captions.{kind}").write_text(text)
    sample = load_calibration(folder, 1000)
    assert sorted(names_of(sample)) == numbered(20)  # those with a caption
    assert list(sample.captions) == [f"number {name}" for name in names_of(sample)]


def test_captions_of_a_list(folder: Path) -> None:
    (folder / "captions.json").write_text('["one", "two"]')
    assert set(load_calibration(folder, 5).captions) == {"one", "two"}


def test_without_captions_the_bundled_ones_serve(folder: Path) -> None:
    assert set(load_calibration(folder, 30).captions) <= set(bundled_captions())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("captions.txt", b"\n\n"),
        ("captions.txt", b"\xff\xfe"),
        ("captions.json", b"{}"),
        ("captions.json", b"[]"),
        ("captions.json", b"[1]"),
        ("captions.json", b'["one", " "]'),
        ("captions.json", b'[{"image": "000.png"}]'),
        ("captions.json", b'[{"image": "000.png", "caption": 3}]'),
        ("captions.json", b'[{"image": "000.png", "caption": ""}]'),
        ("captions.json", b'["one", {"image": "000.png", "caption": "two"}]'),
        ("captions.json", b"["),
        ("captions.json", b"[" * 100_000),
        ("captions.jsonl", b'{"image": "000.png"\n'),
    ],
)
def test_captions_that_are_not_understood_are_refused(
    folder: Path, file: str, content: bytes
) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(CalibrationError, match=rf"{file}: cannot be read as captions"):
        load_calibration(folder, 4)


def test_captions_of_other_images_are_refused(folder: Path) -> None:
    (folder / "captions.json").write_text('[{"image": "other.png", "caption": "text"}]')
    with pytest.raises(CalibrationError, match=r"it names other\.png; the images are 000\.png"):
        load_calibration(folder, 4)


def test_captions_file_has_a_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "MAX_NBYTES", 10)
    (folder / "captions.txt").write_text("a caption of some length")
    with pytest.raises(CalibrationError, match="at most 10 bytes, found 24"):
        load_calibration(folder, 4)


def test_from_arrays() -> None:
    images = [np.full((4, 5, 3), i, np.uint8) for i in range(3)]
    sample = CalibrationSet.from_arrays(images, ["a", "b"], name="mine")
    assert sample.captions == ("a", "b", "a")
    np.testing.assert_array_equal(sample.image(2), images[2])
    again = CalibrationSet.from_arrays(images[::-1], ["a", "b"], name="mine")
    assert again.digest != sample.digest
    reshaped = [image.reshape(5, 4, 3) for image in images]
    assert CalibrationSet.from_arrays(reshaped, ["a", "b"], name="mine").digest != sample.digest


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_images_are_refused(image: Any) -> None:
    with pytest.raises(CalibrationError, match=r"'mine', image 1: expected uint8"):
        CalibrationSet.from_arrays([np.zeros((1, 1, 3), np.uint8), image], ["a"], name="mine")


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(CalibrationError, match="0 images"):
        CalibrationSet.from_arrays([], ["a"], name="mine")
    with pytest.raises(CalibrationError, match="0 captions"):
        CalibrationSet.from_arrays([np.zeros((1, 1, 3), np.uint8)], [], name="mine")


@pytest.mark.parametrize("question", ["what is it?", "<image> and <image>?"])
def test_conversations_have_a_place_for_every_image(question: str) -> None:
    image = np.zeros((1, 1, 3), np.uint8)
    with pytest.raises(CalibrationError, match=r"for each of 1 images, found [02]"):
        CalibrationSet.from_arrays(
            [image], ["a"], name="mine", conversations=[((question, "a cat"),)]
        )


def test_photographs() -> None:
    pytest.importorskip("skimage")
    sample = sample_set("photographs")
    assert len(sample) == len(sample.captions) == 16
    for image in sample.images():
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert min(image.shape[:2]) >= 224
    some = sample_set("photographs", 5, seed=1)
    assert len(some) == 5
    assert some.digest == sample_set("photographs", 5, seed=1).digest
    assert some.digest != sample_set("photographs", 5, seed=2).digest


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    sample = sample_set("digits")
    assert len(sample) == 1797
    words = dict(enumerate(data.DIGITS))
    expected = sorted(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), f"a handwritten {words[digit]}")
        for image, digit in zip(bunch.images, bunch.target.tolist(), strict=True)
    )
    found = sorted(
        (image[..., 1].tobytes(), caption)
        for image, caption in zip(sample.images(), sample.captions, strict=True)
    )
    assert found == expected
    assert len(sample_set("digits", 10)) == 10


def test_unknown_sample_set_is_refused() -> None:
    with pytest.raises(UsageError, match="photographs, digits, found 'imagenet'"):
        sample_set("imagenet")


def manifest(name: str) -> dict[str, Any]:
    file = importlib.resources.files("internvl_edge.calib_data") / f"{name}.json"
    return dict(json.loads(file.read_text("utf-8")))


@pytest.mark.parametrize("name", SAMPLE_SETS)
def test_a_changed_or_missing_file_of_a_package_is_named(name: str) -> None:
    pinned = manifest(name)
    pytest.importorskip(pinned["module"])
    assert all(entry["licence"] for entry in pinned["files"])
    first = pinned["files"][0]
    first["sha256"] = "0" * 64
    with pytest.raises(CalibrationError, match=rf"{first['path']}: expected SHA-256 0000"):
        pinned_files(pinned)
    first["path"] = "data/absent.png"
    with pytest.raises(CalibrationError, match=r"absent\.png: .* found no file; reinstall"):
        pinned_files(pinned)


def test_a_missing_package_says_what_to_install() -> None:
    pinned = manifest("photographs") | {"module": "a_module_that_is_not_there"}
    with pytest.raises(MissingDependency, match=r'pip install "internvl-edge\[quantize\]"'):
        pinned_files(pinned)


def test_bundled_captions_are_varied() -> None:
    captions = bundled_captions()
    assert len(set(captions)) == len(captions) == 64
    assert all(caption == caption.strip() and len(caption.split()) >= 4 for caption in captions)
    assert len({word for caption in captions for word in caption.split()}) > 250
