"""Compiled directories to serve: an InternVL with everything, and an InternVL-Chat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import write_chat, write_chat_tokenizer, write_internvl, write_tokenizer
from support.web.serving import Served, inside

import internvl_edge
from internvl_edge.compiler import ExportOptions, export
from internvl_edge.runtime.model import Model


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    written = write_internvl(root / "checkpoint", seed=3)
    write_tokenizer(written.path)
    export(ExportOptions(checkpoint=written.path, out=root / "tiny", verify="none"))
    return root / "tiny"


@pytest.fixture(scope="session")
def compiled_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve-chat")
    write_chat(root / "checkpoint", seed=3)
    write_chat_tokenizer(root / "checkpoint")
    export(ExportOptions(checkpoint=root / "checkpoint", out=root / "talk", verify="none"))
    return root / "talk"


@pytest.fixture(scope="session")
def served(compiled: Path) -> Iterator[Served]:
    """One server for whatever leaves it as it was."""
    with inside({"tiny": compiled}, max_images=8) as running:
        yield running


@pytest.fixture(scope="session")
def model(compiled: Path) -> Iterator[Model]:
    """The same directory in this process."""
    options = internvl_edge.OrtOptions(num_threads=1)
    with internvl_edge.load(compiled, options=options) as opened:
        yield opened
