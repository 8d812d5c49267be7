"""Golden data: what the original implementation computed, in the repository and beside it."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from support.paths import ROOT, TESTS

PACKED = TESTS / "golden" / "tiny.tar.xz"
CHAT_PICTURES = TESTS / "golden" / "chat_pictures.json"
SHARED = Path(os.environ.get("INTERNVL_EDGE_SHARED", ROOT.parent / "shared"))
WHOLE = SHARED / "golden"  # larger; an extra for who has it
FAMILY = SHARED / "golden_family"  # tiny models of every kind of the chat family; the same
REAL_TOKENIZERS = SHARED / "data" / "real_tokenizers"
SETS = ["small", *(["whole"] if WHOLE.is_dir() else [])]


def unpack(folder: Path) -> Path:
    """Unpack the repository's set; README.md in its folder says what it is."""
    with tarfile.open(PACKED) as archive:
        archive.extractall(folder, filter="data")
    return folder
