"""WebDataset's shards as rows: files of a tar archive that share a key make a sample.

    0001.jpg 0001.txt 0001.json      one sample, 0001: members that follow each other
    a/0001.seg.png                   key a/0001, field seg.png: the key ends at the first dot

Members are read where they lie: nothing is unpacked, so that a name with ``..`` is a name, and a
link, a device or a folder is no member. What is damaged gives a row that says so, and the other
shards go on; a disk that fails is an error, after which ``--resume`` reads the shard again.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from internvl_edge.errors import MediaError
from internvl_edge.files.disk import os_errors
from internvl_edge.files.reading import open_file
from internvl_edge.integrations.bulk.sources.source import (
    CONTENT,
    PATH,
    PROBLEM,
    Content,
    Source,
    fingerprint,
    path_text,
    require_column,
    require_free_names,
    text_of,
)
from internvl_edge.runtime.images.formats import SUFFIXES
from internvl_edge.runtime.images.reading import MAX_NBYTES

__all__ = ["SHARD_SUFFIXES", "shards_source"]

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
NAME = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]+)", re.DOTALL)  # key, field
BLOCK = 512  # bytes, of which archives are made; one of zeros ends it
HEADER_NBYTES = 1 << 20  # of all headers of a member: those with long names precede its own
LAST_BYTE = 1 << 43  # of an archive; some file systems end at twice that
DAMAGE = (
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    ValueError,
    IndexError,  # as tarfile raises, of a sparse member that is cut off
    OverflowError,
    RecursionError,  # headers that precede each other without an end
)


class Bounded:
    """An open archive of which no header makes ``tarfile`` read or seek more than is sensible."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left = HEADER_NBYTES  # that may be read until this is set again

    def read(self, size: int = -1) -> bytes:
        """Read bytes.

        Raises:
            tarfile.ReadError: more than may be read, or all.
        """
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a header asks for {size} bytes, at most {self.left} are left")
        self.left -= size
        return self._file.read(size)

    def seek(self, place: int) -> int:
        """Go to a byte of the archive.

        Raises:
            tarfile.ReadError: no archive has it.
        """
        if not 0 <= place <= LAST_BYTE:
            raise tarfile.ReadError(f"a member ends at byte {place}")
        return self._file.seek(place)

    def tell(self) -> int:
        """Return the byte that is next."""
        return self._file.tell()


@dataclass(slots=True)
class Sample:
    """The fields of a key: those that are wanted are read, the others counted by name."""

    key: str
    read: dict[str, bytes] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """An archive."""

    file: str
    nbytes: int
    columns: tuple[str, ...]  # fields, the first of which that is there is embedded
    keep: tuple[str, ...]
    content: Content

    @property
    def weight(self) -> int:
        return self.nbytes

    @property
    def rows(self) -> None:
        return None

    def batches(self, size: int, skip: int = 0) -> Iterator[tuple[pa.RecordBatch, float]]:
        """Read samples in batches; see ``Piece``."""
        some: list[Sample] = []
        share = 0.0
        for number, (sample, share) in enumerate(self.samples()):
            if number < skip:
                continue
            some.append(sample)
            if len(some) == size:
                yield self._batch(some), share
                some = []
        if some:
            yield self._batch(some), 1.0

    def samples(self) -> Iterator[tuple[Sample, float]]:
        """Read samples one by one; what is damaged ends them with one that has the problem."""
        spelled, seen = path_text(self.file), Counter[str]()
        wanted = {*self.columns, *self.keep}
        sample: Sample | None = None
        try:
            with ExitStack() as closing:
                closing.enter_context(os_errors(Path(self.file)))
                raw = closing.enter_context(open_file(Path(self.file), MediaError))
                opened = Bounded(closing.enter_context(_unzipped(raw)))
                readable = cast(IO[bytes], opened)
                archive = closing.enter_context(tarfile.open(fileobj=readable, mode="r:"))
                for member in _members(archive, opened):
                    split = NAME.fullmatch(member.name) if member.isreg() else None
                    if split is None:
                        continue
                    key, name = split[1], split[2].lower()
                    if sample is None or sample.key != key:
                        if sample is not None:
                            yield _placed(sample, spelled, seen), raw.tell() / self.nbytes
                        sample = Sample(key)
                    if name not in wanted or name in sample.read:
                        sample.others.append(name)
                    elif member.size > MAX_NBYTES:
                        sample.problem = (
                            f"{path_text(member.name)}: at most {MAX_NBYTES} bytes are accepted, "
                            f"found {member.size}"
                        )
                    else:
                        sample.read[name] = _contents(archive, opened, member)
            if sample is not None:
                yield _placed(sample, spelled, seen), 1.0
        except DAMAGE as error:
            problem = f"the archive is damaged after {len(seen)} samples: {error}"
            yield Sample(spelled, problem=problem), 1.0

    def _batch(self, some: Sequence[Sample]) -> pa.RecordBatch:
        contents: list[bytes | str | None] = []
        problems: list[str | None] = []
        for sample in some:
            content, problem = self._content(sample)
            contents.append(content)
            problems.append(problem)
        kind = pa.string() if self.content is Content.TEXTS else pa.binary()
        kept = {
            name: pa.array([_text(sample.read.get(name)) for sample in some], pa.string())
            for name in self.keep
        }
        paths = pa.array([sample.key for sample in some], pa.string())
        last = {CONTENT: pa.array(contents, kind), PROBLEM: pa.array(problems, pa.string())}
        return pa.record_batch({PATH: paths, **kept, **last})

    def _content(self, sample: Sample) -> tuple[bytes | str | None, str | None]:
        """Return what is embedded of a sample, or why there is nothing."""
        data = next((sample.read[name] for name in self.columns if name in sample.read), None)
        if sample.problem is not None:
            return None, sample.problem
        if data is None:
            has = ", ".join([*sample.read, *sample.others]) or "none"
            wanted = " or ".join(self.columns)
            return None, f"expected a field {wanted} of the sample, found {has}"
        if self.content is Content.PICTURES:
            return data, None
        return text_of(data)


def shards_source(
    files: Sequence[Path], column: str | None = None, keep: Sequence[str] | None = None
) -> Source:
    """Make a source of the samples of tar archives, in the order given.

    Args:
        files: archives, as they are or compressed by gzip.
        column: the field that is embedded; None: a picture, whichever format it has.
        keep: fields that go along as texts; None: none.

    Raises:
        MediaError: a file is not there.
        UsageError: the first sample has no such field.
    """
    names = tuple(dict.fromkeys(name.lower() for name in keep or ()))
    require_free_names(files[0], names)
    hashed = fingerprint(files)
    is_picture = column is None or f".{column.rpartition('.')[2].lower()}" in SUFFIXES
    content = Content.PICTURES if is_picture else Content.TEXTS
    shards = tuple(
        Shard(
            file=str(file),
            nbytes=max(1, file.stat().st_size),
            columns=PICTURES if column is None else (column.lower(),),
            keep=names,
            content=content,
        )
        for file in files
    )
    if column is not None:
        _require_field(files, shards, column)
    kept = pa.schema([(PATH, pa.string()), *((name, pa.string()) for name in names)])
    return Source(pieces=shards, kept=kept, content=content, fingerprint=hashed)


def _require_field(files: Sequence[Path], shards: Sequence[Shard], column: str) -> None:
    """Look for a field in the first sample that there is."""
    for file, shard in zip(files, shards, strict=True):
        for sample, _ in shard.samples():
            if sample.problem is None:
                require_column(file, column.lower(), [*sample.read, *sample.others], "--column")
                return


def _members(archive: tarfile.TarFile, opened: Bounded) -> Iterator[tarfile.TarInfo]:
    """Yield members; tarfile itself takes a damaged header for the archive's end.

    Raises:
        tarfile.ReadError: there is such a header, or a member of a size that leads back.
    """
    while (member := archive.next()) is not None:
        if member.size < 0 or archive.offset <= member.offset:
            raise tarfile.ReadError(f"a member of a negative size at byte {member.offset}")
        yield member
        archive.members = []  # type: ignore[attr-defined]  # it remembers every one
        opened.left = HEADER_NBYTES
    opened.seek(archive.offset)
    rest = opened.read(BLOCK)
    if rest.strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {archive.offset}")


def _contents(archive: tarfile.TarFile, opened: Bounded, member: tarfile.TarInfo) -> bytes:
    opened.left = member.size
    file = archive.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _unzipped(raw: IO[bytes]) -> IO[bytes]:
    """Look at the first bytes, whatever the file is called."""
    magic = raw.read(2)
    raw.seek(0)
    return cast(IO[bytes], gzip.open(raw)) if magic == b"\x1f\x8b" else raw


def _placed(sample: Sample, shard: str, seen: Counter[str]) -> Sample:
    """Give a sample a key that no other row has, as ``path`` spells it."""
    path = first = f"{shard}/{path_text(sample.key)}"
    while path in seen:
        seen[first] += 1
        path = f"{first}#{seen[first]}"
    seen[path] = 1
    sample.key = path
    return sample


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "backslashreplace")
