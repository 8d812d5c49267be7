"""Pictures, texts and labels that a command line names: files, folders and stdin.

One picture that cannot be read ends no folder: its error is told, and the others are answered. Of
several files and folders the command exits with the first error's code after its answer, or with 0
where ``--skip-errors`` asks for that. ``-`` is stdin.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from internvl_edge.cli.console import Output, error_line
from internvl_edge.errors import InputError, InternVLError, MediaError, ResourceError, UsageError
from internvl_edge.files.cores import usable_cores
from internvl_edge.runtime.images.folder import SUBFOLDERS, folder_pictures
from internvl_edge.runtime.images.formats import SUFFIXES

if TYPE_CHECKING:
    from internvl_edge.runtime.images.transform import Transform
    from internvl_edge.runtime.model import Model

__all__ = ["Pictures", "Readable", "expand", "one_picture", "read_labels", "read_texts"]

STDIN = Path("-")
MAX_TEXTS_NBYTES = 64 << 20
# The mark that a text file begins with → its encoding; of UTF-32 first, as UTF-16's begins it.
ENCODINGS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-32"),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16"),
    ((b"\xef\xbb\xbf",), "UTF-8-SIG"),
)
T = TypeVar("T")

recursive_option = click.option("-r", "--recursive", is_flag=True, help="Look into subfolders too.")
skip_option = click.option(
    "--skip-errors", is_flag=True, help="Exit with 0 though some of several files were not read."
)


# --- pictures ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Pictures:
    """The pictures that a command line names, and what was left out of its folders."""

    paths: list[Path]
    left_out: Counter[str] = field(default_factory=Counter)  # by suffix; "subfolders"


def expand(output: Output, paths: Sequence[Path], *, recursive: bool = False) -> Pictures:
    """Expand folders to their images, in order of name; files stay as given.

    What begins with a dot is hidden, macOS's ``._NAME`` among it. Other formats and subfolders are
    counted and told.

    Raises:
        MediaError: a folder without images, or one that cannot be read.
    """
    found = Pictures([])
    for path in paths:
        if path == STDIN or not path.is_dir():
            found.paths.append(path)
            continue
        inside, left_out = folder_pictures(path, recursive=recursive)
        told = ", ".join(f"{name} {count}" for name, count in sorted(left_out.items()))
        if not inside:
            hint = "; add --recursive" if SUBFOLDERS in left_out else ""
            raise MediaError(
                f"{path}: expected images ({', '.join(SUFFIXES)}) in it, found "
                f"{told or 'none'}{hint}"
            )
        if told:
            hint = "; --recursive looks into subfolders" if SUBFOLDERS in left_out else ""
            output.say(f"{path}: {len(inside)} images; left out: {told}{hint}")
        found.paths += inside
        found.left_out += left_out
    return found


def one_picture(path: Path) -> Any:
    """Return the source of the one image that a command looks at; a folder is refused."""
    if path != STDIN and path.is_dir():
        raise MediaError(f"{path}: expected one image, found a folder; name a file in it")
    return source_of(path)


def source_of(path: Path) -> Any:
    """Return what a path names as the library takes it: stdin as its bytes."""
    if path != STDIN:
        return path
    from internvl_edge.runtime.images.reading import MAX_NBYTES

    data = _stdin_bytes(MAX_NBYTES + 1)
    if not data:
        raise MediaError("-: expected an image on stdin, found nothing")
    return data


class Readable:
    """The inputs of a command that can be read, and the errors of those that cannot.

    Args:
        paths: what the command line names.
        skip: whether errors leave the exit code alone.
    """

    def __init__(self, paths: Sequence[Path], *, skip: bool = False) -> None:
        self.given = list(paths)
        self.paths: list[Path] = []  # those that were read, in order
        self.errors: list[tuple[Path, InternVLError]] = []
        self._skip = skip

    def pictures(self, model: Model, transform: Transform | None) -> Any:
        """Return what a task takes: the only picture as it is, of several those that decode.

        These are brought to the model's size at once, by the transform of the task, so that
        no more of them than there are threads is in memory whole.
        """
        if len(self.given) == 1:
            self.paths = list(self.given)
            return [source_of(self.given[0])]

        def decode(at: int, path: Path) -> Any:
            from internvl_edge.runtime.images.transform import pixel_levels

            levels = pixel_levels(
                [source_of(path)],
                model.preprocessing,
                transform,
                before=at,
                total=len(self.given),
                options=model.components.images,
            )
            return levels[0].transpose(1, 2, 0)

        return self._each(decode)

    def videos(self, frames: int | None) -> Any:
        """Return the frames of every video that can be read."""
        from internvl_edge.runtime.tasks.embed import frames_of

        if len(self.given) == 1:
            self.paths = list(self.given)
            return [str(self.given[0])]

        def decode(at: int, path: Path) -> Any:
            return list(frames_of(path, frames))

        return self._each(decode, at_once=1)

    def _each(self, decode: Callable[[int, Path], T], at_once: int | None = None) -> Iterator[T]:
        """Yield what is read of every path, a few of them ahead; note those that fail."""
        at_once = at_once or usable_cores()
        waiting: deque[tuple[Path, Future[T]]] = deque()
        left = enumerate(self.given)
        with ThreadPoolExecutor(at_once, "decode") as pool:
            while True:
                for at, path in islice(left, at_once - len(waiting)):
                    waiting.append((path, pool.submit(decode, at, path)))
                if not waiting:
                    break
                path, future = waiting.popleft()
                try:
                    read = future.result()
                except (InputError, UsageError, ResourceError) as error:
                    self.errors.append((path, error))
                    error_line(str(error))
                    continue
                self.paths.append(path)
                yield read
        if not self.paths:
            raise self.errors[0][1]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the errors for programs, by file."""
        return [
            {
                "file": path,
                "type": type(error).__name__,
                "message": str(error),
                "exit_code": error.exit_code,
            }
            for path, error in self.errors
        ]

    def finish(self) -> None:
        """End the command with the first error's code, unless errors are skipped."""
        if self.errors and not self._skip:
            raise click.exceptions.Exit(self.errors[0][1].exit_code)


# --- texts ---------------------------------------------------------------------------------------


def read_texts(texts: tuple[str, ...], file: Path | None) -> list[str]:
    """Read the texts of ``--text`` and ``--texts``."""
    given = list(texts)
    if file is not None:
        given += _read_lines(file, "--texts", "texts")
    if not given:
        raise UsageError("expected at least one --text, or a file of them as --texts")
    return given


def read_labels(labels: str | None, file: Path | None) -> list[str]:
    """Read the labels of ``--labels`` and ``--labels-file``."""
    given = [label.strip() for label in (labels or "").split(",") if label.strip()]
    if file is not None:
        given += _read_lines(file, "--labels-file", "labels")
    if labels is None and file is None:
        raise UsageError("expected --labels, or a file of them as --labels-file")
    if not given:
        raise MediaError("--labels: expected comma-separated labels, found none")
    if file is None and len(given) == 1 and Path(given[0].removeprefix("@")).is_file():
        raise UsageError(f"--labels {given[0]}: it is a file; pass it as --labels-file")
    return given


def _read_lines(file: Path, option: str, what: str) -> list[str]:
    """Read a file of texts, one a line; empty lines are none.

    Raises:
        MediaError: it cannot be read, is no text, or empty.
    """
    name = f"{option} {file}"
    if file != STDIN and file.is_dir():
        raise MediaError(f"{name}: expected a file, one text a line; it is a folder")
    try:
        if file == STDIN:
            data = _stdin_bytes(MAX_TEXTS_NBYTES + 1)
        else:
            with file.open("rb") as opened:  # a pipe too, as <(...) of a shell
                data = opened.read(MAX_TEXTS_NBYTES + 1)
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise MediaError(f"{name}: expected a text file: {reason}") from error
    if len(data) > MAX_TEXTS_NBYTES:
        raise MediaError(f"{name}: at most {MAX_TEXTS_NBYTES} bytes are accepted, found more")
    # and not at U+2028 and other marks, at which str.splitlines ends a line too
    lines = re.split(r"\r\n|\r|\n", decoded(data, name))
    kept = [line.strip() for line in lines if line.strip()]
    if not kept:
        raise MediaError(f"{name}: expected {what}, one a line, found none")
    return kept


def decoded(data: bytes, name: str) -> str:
    """Decode a text file: UTF-8, or what its byte order mark says.

    Raises:
        MediaError: another encoding; the message names what it may be.
    """
    encoding = next((found for marks, found in ENCODINGS if data.startswith(marks)), "UTF-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        hint = "" if encoding != "UTF-8" else ", or UTF-16 with its mark; save it as UTF-8"
        raise MediaError(
            f"{name}: expected text in {encoding.removesuffix('-SIG')}{hint}, found byte "
            f"{data[error.start]:#04x} at {error.start}"
        ) from error
    if "\0" in text:
        raise MediaError(
            f"{name}: expected text, found a NUL at {text.index(chr(0))}: UTF-16 without its mark, "
            "or no text; save it as UTF-8"
        )
    return text


def _stdin_bytes(most: int) -> bytes:
    """Read stdin; nothing where it is closed."""
    if sys.stdin is None:
        return b""
    try:
        data: bytes = sys.stdin.buffer.read(most)
    except (OSError, ValueError) as error:
        raise MediaError(f"stdin cannot be read: {error}") from error
    return data
