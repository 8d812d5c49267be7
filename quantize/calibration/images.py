"""Calibration sets: images and texts whose activations decide the ranges.

A set comes from a folder of images (``load_calibration``), from installed packages that contain
images (``sample_set``), or from arrays. Nothing is fetched from a network.

The choice of samples depends on names and seed alone: candidates are ordered by the hash of
(seed, path relative to the folder), so the order in which a file system lists them, the platform
and the version of numpy play no part, and one more file in the folder changes one sample at most.

Images are decoded when they are needed. Every file's hash is computed when the set is made and
compared when the file is read again, so that ``digest`` identifies what the model was calibrated
on.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from internvl_edge.errors import CalibrationError, MediaError, MissingDependency, UsageError
from internvl_edge.files.content import content_of
from internvl_edge.files.reading import read_file, require_unicode
from internvl_edge.files.terminal import printable
from internvl_edge.quantize.calibration.captions import find_captions, paired
from internvl_edge.runtime.images.decode import MAX_NBYTES, load_image
from internvl_edge.runtime.text.chat_tokenizer import IMAGE

Image = NDArray[np.uint8]  # (height, width, 3)
Turns = tuple[tuple[str, str], ...]  # questions and their answers
T = TypeVar("T")

# Of the files that load_image can decode, and of pictures that it cannot.
SUFFIXES = frozenset({".jpeg", ".jpg", ".jpe", ".jfif", ".pjpeg", ".png", ".webp"})
OTHER_SUFFIXES = frozenset(
    (".bmp", ".dib", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg")
    + (".ico", ".psd", ".tga", ".pgm", ".ppm", ".dcm")
    + (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2")
)
READ_HERE = ("a JPEG picture", "a PNG picture", "a WebP picture")
TEXT_SUFFIXES = frozenset({".txt", ".json", ".jsonl", ".csv", ".tsv", ".caption", ".xml", ".md"})
NO_PICTURES = ("__MACOSX",)  # folders of copies of resource forks
LABEL = "image"  # of what is decoded, in the decoder's messages
MAX_SHOWN = 5  # names in a message
MAX_CORRUPT = 0.05  # fraction of the images decoded; with more, the folder is refused
NUM_CHECKED = 256  # images decoded at least to find corrupt ones, where the folder has as many
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAMPLE_SETS = ("photographs", "digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """An image on disk, as it was when the set was made."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationSet:
    """Images, a caption for each, and a digest that identifies them.

    Chat models are calibrated on conversations. A set has its own, or each caption answers
    ``DESCRIBE`` (of ``compiler.steps.calibration``).
    """

    name: str
    sources: tuple[ImageFile | Image, ...]
    captions: tuple[str, ...]  # as many as images
    # each ``<image>`` in a question is the place of the next image
    conversations: tuple[Turns, ...] = ()
    skipped: tuple[str, ...] = ()  # files that did not decode, relative to the folder
    notes: tuple[str, ...] = ()  # on what was left out, and why
    digest: str  # SHA-256 over images and captions, in order

    @classmethod
    def of(
        cls,
        sources: Sequence[ImageFile | Image],
        captions: Sequence[str],
        *,
        name: str,
        conversations: Sequence[Turns] = (),
        skipped: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> CalibrationSet:
        """Make a set whose captions are repeated until every image has one."""
        if not sources or not captions:
            raise CalibrationError(
                f"calibration set {name!r}: expected images and captions, found {len(sources)} "
                f"images and {len(captions)} captions"
            )
        places = sum(question.count(IMAGE) for turns in conversations for question, _ in turns)
        if conversations and places != len(sources):
            raise CalibrationError(
                f"calibration set {name!r}: expected a place ({IMAGE}) in the conversations for "
                f"each of {len(sources)} images, found {places}"
            )
        captions = tuple(captions[i % len(captions)] for i in range(len(sources)))
        contents: list[Any] = [[_sha256(s) for s in sources], captions]
        contents += [conversations] if conversations else []
        digest = hashlib.sha256(json.dumps(contents).encode())
        return cls(
            name=name,
            sources=tuple(sources),
            captions=captions,
            conversations=tuple(conversations),
            skipped=tuple(skipped),
            notes=tuple(notes),
            digest=digest.hexdigest(),
        )

    @classmethod
    def from_arrays(
        cls,
        images: Sequence[Image],
        captions: Sequence[str],
        *,
        name: str,
        conversations: Sequence[Turns] = (),
    ) -> CalibrationSet:
        """Make a set of images in memory.

        Raises:
            CalibrationError: there are no images, or one is not HWC uint8 with three channels.
        """
        for i, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise CalibrationError(
                    f"calibration set {name!r}, image {i}: expected uint8 (height, width, 3), "
                    f"found {image.dtype} {image.shape}"
                )
        return cls.of(images, captions, name=name, conversations=conversations)

    def __len__(self) -> int:
        return len(self.sources)

    def image(self, index: int) -> Image:
        """Decode image ``index`` to (height, width, 3) uint8.

        Raises:
            CalibrationError: the file is gone, or changed since the set was made.
        """
        source = self.sources[index]
        if not isinstance(source, ImageFile):
            return source
        try:
            data = read_file(source.path, MAX_NBYTES, MediaError)
            if hashlib.sha256(data).hexdigest() != source.sha256:
                raise CalibrationError(f"{source.path}: changed during calibration")
            return _decode(data)
        except (OSError, MediaError) as error:
            raise CalibrationError(f"{source.path}: no longer readable: {error}") from error

    def images(self) -> Iterator[Image]:
        """Iterate over the images, decoding one at a time."""
        return (self.image(i) for i in range(len(self)))


def load_calibration(folder: Path, num_samples: int, seed: int = 0) -> CalibrationSet:
    """Sample a folder of images, searched with its sub-folders, through links too.

    Captions come from a file of the folder (``captions``); without one, from the captions that come
    with the package. Where they are of images, images without one are left out, and said.

    Args:
        folder: the folder of images.
        num_samples: how many to take; all of them if there are fewer.
        seed: seed of the choice.

    Raises:
        CalibrationError: there is no such folder, no images in it, more than 5 % of them are
            corrupt, or the captions file is malformed.
    """
    require_unicode(folder)
    if not folder.is_dir():
        raise CalibrationError(f"{folder}: expected a folder of calibration images")
    listed = list_images(folder)
    if not listed.images:
        others = "".join(f"; {note}" for note in listed.notes)
        raise CalibrationError(
            f"{folder}: expected images ({', '.join(sorted(SUFFIXES))}), found none{others}"
        )
    paths, notes = list(listed.images), list(listed.notes)
    captions = find_captions(folder, paths)
    by_path: dict[Path, str] = {}
    if captions is not None:
        notes += captions.notes
    if captions is not None and captions.by_image:
        try:
            by_path, more = paired(captions, paths)
        except CalibrationError as error:
            raise CalibrationError(f"{folder}: {error}") from error
        notes += more
        paths = [path for path in paths if path in by_path]
    chosen, skipped, reasons = _readable(folder, _ordered(paths, seed, Path.as_posix), num_samples)
    texts = bundled_captions() if captions is None else captions.texts
    spoken = [by_path[path] for path, _ in chosen] if by_path else _ordered(texts, seed)
    sources = [ImageFile(path=folder / path, sha256=sha256) for path, sha256 in chosen]
    return CalibrationSet.of(
        sources,
        spoken,
        name=printable(folder.name),
        skipped=skipped,
        notes=[*notes, *reasons],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """The images of a folder, relative to it, and notes on what else looks like one."""

    images: tuple[Path, ...]
    notes: tuple[str, ...]


def list_images(folder: Path) -> Listed:
    """List the images of a folder and its sub-folders, links followed, each folder once.

    A file of another suffix is an image if it begins like one.
    """
    images: list[Path] = []
    others: dict[str, list[str]] = {}
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in NO_PICTURES)
        for name in sorted(names):
            path = Path(place, name)
            if name.startswith(".") or path.suffix.lower() in TEXT_SUFFIXES:
                continue
            kind = _kind_of(path)
            if kind is None:
                images.append(path.relative_to(folder))
            elif kind:
                others.setdefault(kind, []).append(printable(path.relative_to(folder).as_posix()))
    notes = [
        f"{len(names)} file(s) are left out, {kind}: {', '.join(names[:MAX_SHOWN])}"
        for kind, names in others.items()
    ]
    return Listed(images=tuple(images), notes=tuple(notes))


def _kind_of(path: Path) -> str | None:
    """Say why a file is no image that is read here; None: it is one, "": nothing is said."""
    suffix = path.suffix.lower()
    if not path.is_file():
        is_meant = suffix in SUFFIXES | OTHER_SUFFIXES and not path.is_dir()
        return "links that lead nowhere, or no regular files" * is_meant
    if suffix in SUFFIXES:
        return None
    content = content_of(path)
    if content is None:
        return f"{suffix} files, which are not read here" if suffix in OTHER_SUFFIXES else ""
    if content.what in READ_HERE:
        return None
    is_picture = content.what.endswith(("picture", "photo", "drawing"))
    return f"{content.what}: {content.remedy}" if is_picture or suffix in OTHER_SUFFIXES else ""


def sample_set(name: str, num_samples: int | None = None, seed: int = 0) -> CalibrationSet:
    """Make a set of images that come with installed packages: ``photographs`` or ``digits``.

    Args:
        name: ``photographs`` (scikit-image) or ``digits`` (scikit-learn's 8 × 8 scans).
        num_samples: how many to take; None for all.
        seed: seed of the choice.

    Raises:
        UsageError: there is no set of this name.
        MissingDependency: the package is not installed.
        CalibrationError: a file differs from the one that the manifest pins.
    """
    if name not in SAMPLE_SETS:
        raise UsageError(f"sample set: expected one of {', '.join(SAMPLE_SETS)}, found {name!r}")
    files = pinned_files(json.loads(_resource(f"{name}.json")))
    if name == "digits":
        images, captions = _digits(files[0].path)
        chosen = _ordered(range(len(images)), seed)[:num_samples]
        return CalibrationSet.from_arrays(
            [images[i] for i in chosen], [captions[i] for i in chosen], name=name
        )
    sources = _ordered(files, seed, lambda file: file.path.name)[:num_samples]
    return CalibrationSet.of(sources, _ordered(bundled_captions(), seed), name=name)


def bundled_captions() -> tuple[str, ...]:
    """Return the captions of everyday scenes that come with the package."""
    return tuple(_resource("captions.txt").splitlines())


def pinned_files(manifest: dict[str, Any]) -> list[ImageFile]:
    """Locate the files that a manifest of ``calib_data`` names, and check them by hash.

    Raises:
        MissingDependency: their package is not installed.
        CalibrationError: a file is absent or differs from the manifest's.
    """
    spec = importlib.util.find_spec(manifest["module"])
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency.of(manifest["package"], manifest["extra"])
    root = Path(next(iter(spec.submodule_search_locations)))
    files = []
    for entry in manifest["files"]:
        path = root / entry["path"]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        if sha256 != entry["sha256"]:
            raise CalibrationError(
                f"{path}: expected SHA-256 {entry['sha256']}, found {sha256}; reinstall "
                f"{manifest['package']}, or calibrate on your own folder of images"
            )
        files.append(ImageFile(path=path, sha256=sha256))
    return files


def _ordered(items: Iterable[T], seed: int, key: Callable[[T], object] = str) -> list[T]:
    """Shuffle ``items`` by a hash of the seed and each one's key."""

    def place(item: T) -> tuple[bytes, str]:
        text = str(key(item))
        return hashlib.sha256(f"{seed}\0{text}".encode("utf-8", "surrogateescape")).digest(), text

    return sorted(items, key=place)


def _readable(
    folder: Path, candidates: Sequence[Path], num_samples: int
) -> tuple[list[tuple[Path, str]], list[str], list[str]]:
    """Return the first candidates that decode, with hashes; who does not, and why."""
    chosen: list[tuple[Path, str]] = []
    skipped: dict[str, str] = {}
    for examined, path in enumerate(candidates):
        if len(chosen) >= num_samples and examined >= NUM_CHECKED:
            break
        try:
            data = read_file(folder / path, MAX_NBYTES, MediaError)
            _decode(data)
        except MediaError as error:
            skipped[printable(path.as_posix())] = _reason(folder / path, error)
        else:
            chosen.append((path, hashlib.sha256(data).hexdigest()))
    examined = len(chosen) + len(skipped)
    names = sorted(skipped)
    reasons = _by_reason({name: skipped[name] for name in names})
    if not chosen or len(skipped) > MAX_CORRUPT * examined:
        raise CalibrationError(
            f"{folder}: {len(skipped)} of {examined} images cannot be decoded, more than "
            f"{MAX_CORRUPT:.0%}: {'; '.join(reasons[:MAX_SHOWN])}; remove or replace them"
        )
    notes = [f"skipped {len(skipped)} image(s): {'; '.join(reasons)}"] if skipped else []
    return chosen[:num_samples], names, notes


def _reason(path: Path, error: MediaError) -> str:
    """Say why an image does not decode, without its path."""
    content = content_of(path)
    if content is not None and content.what not in READ_HERE:
        return f"{content.what}; {content.remedy}"
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{LABEL}: ")


def _by_reason(skipped: Mapping[str, str]) -> list[str]:
    """Gather the files that do not decode for the same reason."""
    groups: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        groups.setdefault(reason, []).append(name)
    return [
        f"{', '.join(names[:MAX_SHOWN])}{', ...' if len(names) > MAX_SHOWN else ''} ({reason})"
        for reason, names in groups.items()
    ]


def _decode(data: bytes) -> Image:
    return np.asarray(load_image(data, LABEL), np.uint8)


def _digits(path: Path) -> tuple[list[Image], list[str]]:
    """Read scikit-learn's handwritten digits: a row holds 64 grey levels (0 … 16) and the digit."""
    with gzip.open(path) as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.float64)
    grey = np.rint(rows[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    captions = [f"a handwritten {DIGITS[int(digit)]}" for digit in rows[:, 64]]
    return list(np.repeat(grey, 3, axis=3)), captions


def _resource(file: str) -> str:
    return (importlib.resources.files("internvl_edge.calib_data") / file).read_text("utf-8")


def _sha256(source: ImageFile | Image) -> str:
    if isinstance(source, ImageFile):
        return source.sha256
    return hashlib.sha256(f"{source.shape}".encode() + source.tobytes()).hexdigest()
