"""Captions of a calibration folder, in the spellings that people have, paired with its images.

``FILES`` are the names that are looked for, in this order; what is in one decides how it is read:

    texts              a list, or a caption a line
    pairs              objects {image, caption} in a list or a line each; {image: caption};
                       columns with a header, or an image's name at the start of every line
    COCO               {images: [{id, file_name}], annotations: [{image_id, caption}]}
    Karpathy's splits  {images: [{filename, sentences: [{raw}]}]}
    next to the images photo.txt or photo.caption for photo.jpg

A name finds its image as it stands, then by ever shorter ends of its path, then whatever its case,
then without its suffix; composed and decomposed letters (NFC, NFD) are the same. Of several
captions of an image the first is taken. What finds no image, and images without a caption, are
counted and named.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from internvl_edge.errors import CalibrationError, shortened
from internvl_edge.files.reading import parse_json, read_file
from internvl_edge.files.terminal import printable
from internvl_edge.runtime.text.requests import text_problem

__all__ = ["FILES", "Captions", "find_captions", "paired"]

FILES = (
    "captions.json",
    "captions.jsonl",
    "captions.csv",
    "captions.tsv",
    "captions.txt",
    "metadata.jsonl",
    "metadata.csv",
    "captions.token",
    "results.csv",
    "captions*.json",
    "captions*.jsonl",
    "captions*.csv",
    "captions*.tsv",
    "captions*.txt",
    "results*.token",
    "flickr*.token*",
    "dataset_*.json",
)
FOLDERS = (".", "annotations")  # where they are looked for
BESIDE = (".txt", ".caption")  # a caption of the image of that name
IMAGE_KEYS = (
    "image",
    "file_name",
    "filename",
    "image_name",
    "image_path",
    "image_file",
    "img",
    "img_path",
    "filepath",
    "path",
    "file",
    "image_id",
    "id",
)
CAPTION_KEYS = (
    "caption",
    "captions",
    "text",
    "sentence",
    "sentences",
    "raw",
    "comment",
    "description",
    "title",
    "prompt",
    "alt_text",
)
DELIMITERS = (",", "\t", "|", ";")
PICTURE = r"\.(?:jpe?g|jfif|jpe|png|webp|bmp|gif|tiff?|heic|avif)"
NAMED = re.compile(  # of Flickr: NAME.jpg#0 ⇥ caption; of others with another sign between
    rf'^"?(?P<image>[^\t,|;"]*?{PICTURE})"?(?:#\d+)?'
    r"(?:\s*[\t,|;]\s*\d+)?\s*[\t,|; ]\s*(?P<text>.+)$",
    re.IGNORECASE,
)
MAX_NBYTES = 256 << 20  # captions_train2017.json has 92 MB
MAX_SHOWN = 5  # names in a message
ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Captions:
    """What a folder has for captions: texts for any image, or texts by image."""

    file: str = ""  # where they were read
    texts: tuple[str, ...] = ()
    by_image: Mapping[str, str] = field(default_factory=dict)  # as it is written there → the first
    notes: tuple[str, ...] = ()


def find_captions(folder: Path, images: Sequence[Path]) -> Captions | None:
    """Read the captions of a folder; None where it has none.

    Args:
        folder: of the images.
        images: relative to it.

    Raises:
        CalibrationError: a file of captions is none.
    """
    found = _candidates(folder)
    if not found:
        return _beside(folder, images)
    path, *others = found
    try:
        captions = _parsed(path, read_file(path, MAX_NBYTES, CalibrationError))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: cannot be read as captions: {error}") from error
    if not others:
        return captions
    names = ", ".join(printable(other.name) for other in others[:MAX_SHOWN])
    note = f"captions are read from {printable(path.name)}, and not from {names}"
    return Captions(
        file=captions.file,
        texts=captions.texts,
        by_image=captions.by_image,
        notes=(*captions.notes, note),
    )


def paired(captions: Captions, images: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """Give images their captions.

    Returns:
        Image → caption, and notes on what found no partner.

    Raises:
        CalibrationError: no image has a caption.
    """
    index, result = _Index(images), dict[Path, str]()
    unknown: list[str] = []
    ambiguous: list[str] = []
    for name, text in captions.by_image.items():
        matches = index.find(name)
        if len(matches) == 1:
            result.setdefault(matches[0], text)
        else:
            (ambiguous if matches else unknown).append(name)
    where, count = printable(captions.file), len(captions.by_image)
    if not result:
        raise CalibrationError(
            f"{where} names none of the images: it names {_some([*unknown, *ambiguous])}; the "
            f"images are {_some([image.as_posix() for image in images])}"
        )
    notes: list[str] = []
    if left := [image.as_posix() for image in images if image not in result]:
        notes.append(
            f"{len(left)} of {len(images)} image(s) have no caption in {where}, and are left out: "
            f"{_some(left)}"
        )
    if unknown:
        notes.append(
            f"{len(unknown)} of {count} name(s) in {where} are of no image here: {_some(unknown)}"
        )
    if ambiguous:
        notes.append(
            f"{len(ambiguous)} of {count} name(s) in {where} are of several images, and are left "
            f"out: {_some(ambiguous)}"
        )
    return result, notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(printable(name) for name in names[:MAX_SHOWN]) + more


def _candidates(folder: Path) -> list[Path]:
    found: dict[Path, None] = {}
    for place in FOLDERS:
        if not (folder / place).is_dir():
            continue
        files = sorted(path for path in (folder / place).iterdir() if path.name[0] != ".")
        for pattern in FILES:
            names = (path for path in files if fnmatchcase(path.name.lower(), pattern))
            found |= dict.fromkeys(path for path in names if path.exists() and not path.is_dir())
    return list(found)


def _beside(folder: Path, images: Sequence[Path]) -> Captions | None:
    """Read captions that lie next to their images, a file each."""
    by_image: dict[str, str] = {}
    for image in images:
        for suffix in BESIDE:
            path = (folder / image).with_suffix(suffix)
            if not path.is_file():
                continue
            try:
                text = _decoded(read_file(path, MAX_NBYTES, CalibrationError)).strip()
            except ValueError as error:
                raise CalibrationError(f"{path}: cannot be read as a caption: {error}") from error
            if text:
                by_image[image.as_posix()] = text.splitlines()[0]
    return Captions(file="the files beside the images", by_image=by_image) if by_image else None


# --- reading -------------------------------------------------------------------------------------


def _parsed(path: Path, data: bytes) -> Captions:
    text = _decoded(data)
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    suffix, collected = path.suffix.lower(), _Collected(path.name)
    is_table = suffix in (".csv", ".tsv")
    if suffix in (".json", ".jsonl"):
        collected.take_json(_values(text, lines, by_line=suffix == ".jsonl"))
        return collected.captions()
    if not is_table and text.lstrip()[:1] in ("{", "["):  # under the wrong suffix
        try:
            values = _values(text, lines, by_line=True)
        except ValueError:
            values = None
        if values is not None:
            collected.take_json(values)
            return collected.captions()
    collected.take_lines(text, lines, is_table=is_table)
    return collected.captions()


def _values(text: str, lines: Sequence[str], *, by_line: bool) -> Any:
    """Parse a JSON text, or one a line; a list over several lines is one text in both."""
    if by_line and not text.lstrip().startswith("["):
        return _each(lines)
    try:
        return parse_json(text.encode())
    except ValueError as error:
        if len(lines) < 2 or "Extra data" not in str(error):
            raise
        return _each(lines)


def _each(lines: Sequence[str]) -> list[Any]:
    values = []
    for line in lines:
        try:
            values.append(parse_json(line.encode()))
        except ValueError as error:
            raise ValueError(f"the line {shortened(line)}: {error}") from error
    return values


def _decoded(data: bytes) -> str:
    """Decode a text in UTF-8 or, where it begins so, in UTF-16."""
    try:
        return data.decode(ENCODINGS.get(data[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8, found byte {data[error.start]:#04x}; save it so") from (
            error
        )


class _Collected:
    """Captions as they are read from a file."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._texts: list[str] = []
        self._by_image: dict[str, str] = {}
        self._notes: list[str] = []
        self._num_more = 0

    def captions(self) -> Captions:
        if not self._texts and not self._by_image:
            raise ValueError("expected a list of captions, or of {image, caption} objects")
        if self._texts and self._by_image:
            raise ValueError("expected captions alone, or each with its image, found both")
        if self._num_more:
            self._notes.append(
                f"{printable(self._file)} has {self._num_more} more caption(s) of the same images; "
                "the first of each is taken"
            )
        return Captions(
            file=self._file,
            texts=tuple(self._texts),
            by_image=self._by_image,
            notes=tuple(self._notes),
        )

    def add(self, image: object, text: object, where: str) -> None:
        """Add the captions of an image, or without one a caption for any."""
        given = text if isinstance(text, list) and text else [text]
        for each in given:
            inner = _field(each, CAPTION_KEYS) if isinstance(each, dict) else each
            if not isinstance(inner, str) or not inner.strip():
                raise ValueError(f"{where}: expected {{image, caption}}, found {each!r:.80}")
            if problem := text_problem(inner):
                raise ValueError(f"{where}: {problem}")
            if image is None:
                self._texts.append(inner.strip())
                continue
            name = _name_of(image)
            if not name:
                raise ValueError(f"{where}: expected {{image, caption}}, found {image!r:.80}")
            self._num_more += name in self._by_image
            self._by_image.setdefault(name, inner.strip())

    def take_json(self, value: Any) -> None:
        """Take captions in any of the shapes of JSON."""
        if isinstance(value, dict):
            self._take_object(value)
            return
        if not isinstance(value, list):
            raise ValueError(  # noqa: TRY004 - of a file, not of an argument
                f"expected a list of captions, found {type(value).__name__}"
            )
        for i, entry in enumerate(value):
            where = f"entry {i + 1}"
            if isinstance(entry, str):
                self.add(None, entry, where)
                continue
            if not isinstance(entry, dict):
                raise ValueError(  # noqa: TRY004
                    f"{where}: expected {{image, caption}}, found {entry!r:.80}"
                )
            image, text = _field(entry, IMAGE_KEYS), _caption_of(entry)
            if text is None or (image is None and len(entry) > 1):
                raise ValueError(f"{where}: expected {{image, caption}}, found {entry!r:.80}")
            self.add(image, text, where)

    def _take_object(self, value: dict[str, Any]) -> None:
        if _field(value, IMAGE_KEYS) is not None and _caption_of(value) is not None:
            self.take_json([value])
            return
        images, notes = value.get("images"), value.get("annotations")
        if isinstance(images, list) and isinstance(notes, list):
            self._take_coco(images, notes)
        elif isinstance(images, list) or isinstance(notes, list):
            self.take_json(images if isinstance(images, list) else notes)
        elif len(value) == 1 and isinstance(next(iter(value.values())), list | dict):
            key, inner = next(iter(value.items()))
            if re.search(PICTURE, key, re.IGNORECASE):
                self.add(key, inner, repr(key))
            else:
                self.take_json(inner)
        else:
            for name, text in value.items():
                self.add(name, _caption_of(text) if isinstance(text, dict) else text, f"{name!r}")

    def _take_coco(self, images: list[Any], notes: list[Any]) -> None:
        names = {
            image.get("id"): _field(image, IMAGE_KEYS[:-2])
            for image in images
            if isinstance(image, dict) and not isinstance(image.get("id"), list | dict)
        }
        orphans = 0
        for i, note in enumerate(notes):
            where = f"annotation {i + 1}"
            if not isinstance(note, dict) or "caption" not in note:
                raise ValueError(f"{where}: expected {{image_id, caption}}, found {note!r:.80}")
            key = note.get("image_id")
            name = None if isinstance(key, list | dict) else names.get(key)
            if name is None:
                orphans += 1
                continue
            self.add(name, note["caption"], where)
        if orphans:
            self._notes.append(
                f"{printable(self._file)}: {orphans} annotation(s) are of no image that it lists"
            )

    def take_lines(self, text: str, lines: Sequence[str], *, is_table: bool) -> None:
        """Take a table with or without a header, or a caption a line."""
        if not lines:
            raise ValueError("expected captions, found none")
        for delimiter in DELIMITERS:
            header = [_plain(cell) for cell in lines[0].split(delimiter)]
            image, caption = _column(header, IMAGE_KEYS), _column(header, CAPTION_KEYS)
            if image is not None and caption is not None:
                self._take_table(text, delimiter, len(header), image, caption)
                return
        named = [NAMED.match(line) for line in lines]
        if sum(match is not None for match in named) * 2 > len(lines):
            self._take_named(lines, named)
            return
        if is_table and any(delimiter in lines[0] for delimiter in DELIMITERS[:2]):
            raise ValueError(f"expected columns called image and caption, found {lines[0]!r:.80}")
        if _plain(lines[0]) in CAPTION_KEYS and len(lines) > 1:
            lines = lines[1:]
        for i, line in enumerate(lines):
            self.add(None, line, f"line {i + 1}")

    def _take_table(self, text: str, delimiter: str, width: int, image: int, caption: int) -> None:
        """Take rows after a header; a caption in the last column may hold the delimiter."""
        bad: list[int] = []
        for i, row in enumerate(_rows(text, delimiter)[1:], 2):
            if len(row) > width and caption == width - 1:
                row = [*row[: width - 1], delimiter.join(row[width - 1 :])]
            cells = [cell.strip() for cell in row]
            if len(cells) <= max(image, caption) or not cells[image] or not cells[caption]:
                bad.append(i)
                continue
            self.add(re.sub(r"#\d+$", "", cells[image]), cells[caption], f"row {i}")
        self._say_left_out(bad, "row")

    def _take_named(self, lines: Sequence[str], named: Sequence[re.Match[str] | None]) -> None:
        """Take lines that begin with an image's name."""
        for i, match in enumerate(named):
            if match is not None:
                text = match["text"].strip()
                if len(text) > 1 and text[0] == text[-1] == '"':
                    text = text[1:-1].replace('""', '"')
                self.add(match["image"].strip(), text, f"line {i + 1}")
        self._say_left_out([i + 1 for i, match in enumerate(named) if match is None], "line")

    def _say_left_out(self, numbers: Sequence[int], what: str) -> None:
        if numbers:
            shown = ", ".join(map(str, numbers[:MAX_SHOWN]))
            self._notes.append(
                f"{printable(self._file)}: {len(numbers)} {what}(s) without an image or a caption "
                f"are left out: {what} {shown}"
            )


def _rows(text: str, delimiter: str) -> list[list[str]]:
    """Split a table; where a stray quote swallowed lines, quotes mean nothing in it."""
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(row)]
    stray = re.compile(rf"\n[^\n]*{PICTURE}", re.IGNORECASE)
    if any(stray.search(cell) for row in rows for cell in row):
        lines = [line for line in text.splitlines() if line.strip()]
        return [line.split(delimiter) for line in lines]
    return rows


def _plain(cell: str) -> str:
    return cell.strip().strip('"').lower().replace(" ", "_")


def _column(header: Sequence[str], keys: Sequence[str]) -> int | None:
    """Find the column of the first key that a header has."""
    return next((header.index(key) for key in keys if key in header), None)


def _field(entry: Mapping[str, Any], keys: Sequence[str]) -> Any:
    lowered = {str(key).lower(): value for key, value in entry.items()}
    return next((lowered[key] for key in keys if lowered.get(key) is not None), None)


def _caption_of(entry: Mapping[str, Any]) -> Any:
    """Find an object's caption; of a conversation about an image, its first answer."""
    turns = entry.get("conversations")
    if isinstance(turns, list):
        answers = [turn for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"]
        return answers[0].get("value") if answers else None
    return _field(entry, CAPTION_KEYS)


def _name_of(image: object) -> str:
    """Read the name of an image: a text, a number, or an object with its path."""
    if isinstance(image, dict):
        image = _field(image, ("path", "file_name", "filename"))
    if isinstance(image, bool) or not isinstance(image, str | int):
        return ""
    return str(image).strip()


# --- pairing -------------------------------------------------------------------------------------


class _Index:
    """Images by their paths and every end of these, in ever laxer spellings.

    A name means an image where one path is the end of the other: folders of another machine may
    stand before the name, folders of this one before the image.
    """

    def __init__(self, images: Iterable[Path]) -> None:
        self._levels: list[tuple[dict[str, list[Path]], dict[str, list[Path]]]] = []
        for level in range(3):
            whole: dict[str, list[Path]] = {}
            ends: dict[str, list[Path]] = {}
            for image in images:
                parts = _spellings(_parts(image.as_posix()))[level]
                whole.setdefault("/".join(parts), []).append(image)
                for i in range(1, len(parts)):
                    ends.setdefault("/".join(parts[i:]), []).append(image)
            self._levels.append((whole, ends))

    def find(self, name: str) -> list[Path]:
        """Find the images that a name may mean: one if all is well."""
        for written in dict.fromkeys((name, unquote(name))):
            for (whole, ends), parts in zip(self._levels, _spellings(_parts(written)), strict=True):
                for i in range(len(parts)):
                    if found := whole.get("/".join(parts[i:])):
                        return found
                if found := ends.get("/".join(parts)):
                    return found
        return []


def _parts(name: str) -> list[str]:
    plain = unicodedata.normalize("NFC", name.replace("\\", "/").removeprefix("file://"))
    return [part for part in plain.split("/") if part not in ("", ".")]


def _spellings(parts: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Spell a path as it is, whatever its case, and without its suffix."""
    lower = [part.casefold() for part in parts]
    stems = [*lower[:-1], *(re.sub(rf"{PICTURE}$", "", part) for part in lower[-1:])]
    return [*parts], lower, stems
