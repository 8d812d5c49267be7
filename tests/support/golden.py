"""Golden data: what the original implementation computed, in the repository and beside it."""

from __future__ import annotations

import tarfile
from pathlib import Path

from support.paths import ROOT, TESTS

PACKED = TESTS / "golden" / "tiny.tar.xz"
WHOLE = ROOT.parent / "shared" / "golden"  # larger; an extra for who has it
SETS = ["small", *(["whole"] if WHOLE.is_dir() else [])]


def unpack(folder: Path) -> Path:
    """Unpack the repository's set; README.md in its folder says what it is."""
    with tarfile.open(PACKED) as archive:
        archive.extractall(folder, filter="data")
    return folder
