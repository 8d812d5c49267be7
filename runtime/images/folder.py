"""The pictures of a folder, by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from internvl_edge.errors import MediaError
from internvl_edge.runtime.images.formats import SUFFIXES

__all__ = ["SUBFOLDERS", "folder_pictures"]

SUBFOLDERS = "subfolders"
NO_SUFFIX = "without a suffix"


def folder_pictures(folder: Path, *, recursive: bool = False) -> tuple[list[Path], Counter[str]]:
    """List the pictures of a folder in order of name, and count what is left out.

    What begins with a dot is hidden, macOS's ``._NAME`` among it.

    Args:
        folder: to look into.
        recursive: look into its subfolders too, but through no link to one.

    Returns:
        The pictures, and how many others there are by suffix; ``"subfolders"`` among them.

    Raises:
        MediaError: it cannot be read.
    """
    inside: list[Path] = []
    left_out: Counter[str] = Counter()
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise MediaError(f"{folder}: the folder cannot be read: {error.strerror}") from error
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if recursive and not path.is_symlink():  # a link may lead back
                images, others = folder_pictures(path, recursive=True)
                inside += images
                left_out += others
            else:
                left_out[SUBFOLDERS] += 1
        elif path.suffix.lower() in SUFFIXES:
            inside.append(path)
        else:
            left_out[path.suffix.lower() or NO_SUFFIX] += 1
    return inside, left_out
