"""A long prompt is read in pieces: the same logits, ids and cache, and as many tokens as fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import write_chat

from internvl_edge import compiler, load
from internvl_edge.compiler import ExportOptions
from internvl_edge.runtime.generation import cache as caches
from internvl_edge.runtime.generation.batch import Batch, Generation, Prompt, left_padded
from internvl_edge.runtime.generation.cache import empty_cache, start
from internvl_edge.runtime.generation.loop import generate
from internvl_edge.runtime.tasks.chat_decoder import opening_of
from internvl_edge.runtime.tasks.chat_images import ChatSeen
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.runtime.text.embeddings import Embedding
from internvl_edge.types import Array

pytestmark = pytest.mark.slow

PIECE = 5
ROWS = [[*range(3, 26)], [*range(40, 52)]]  # of other lengths: the second is padded
PLACES = [[7, *[PLACE] * 12, *range(3, 10)]]  # an image that pieces divide


@pytest.fixture(scope="module", params=[None, 60], ids=["growing", "in_place"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder: Path = tmp_path_factory.mktemp("pieces")
    write_chat(folder / "checkpoint", seed=3)
    options = ExportOptions(
        checkpoint=folder / "checkpoint",
        out=folder / "out",
        components=("chat_decoder",),
        cache_capacity=request.param,
        verify="none",
    )
    compiler.export(options)
    with load(folder / "out") as opened:
        yield opened


class Read:
    """A prompt that was read: its logits, the ids after it, and the calls that it took."""

    def __init__(self, model: Any, rows: list[list[int]], monkeypatch: Any) -> None:
        session, calls = model.components.session("chat_decoder"), list[int]()
        table, rng = model.components.token_table, np.random.default_rng(0)
        count = sum(row.count(PLACE) for row in rows)
        tokens = rng.standard_normal((count, table.shape[1]), np.float32)
        run = caches.DeviceDecoding._run

        def counted(self: Any, ids: Array, mask: Array, feeds: Any) -> Array:
            calls.append(ids.shape[1])
            return run(self, ids, mask, feeds)

        def decoding() -> Any:
            return start(session, empty_cache(session, len(rows)), Embedding(table, tokens))

        prompt, read = Prompt(rows=rows), decoding()
        with monkeypatch.context() as patch:
            patch.setattr(caches.DeviceDecoding, "_run", counted)
            self.logits = Batch(read, prompt, 8).read_prompt()
        self.calls, self.cache = calls, read._held()
        self.ids = generate(decoding(), prompt, Generation(max_new_tokens=8, stop_ids=()))


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], PLACES], ids=["padded", "one", "image"])
def test_pieces_give_what_the_whole_prompt_gives(
    model: Any, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Read(model, rows, monkeypatch)
    monkeypatch.setattr(caches, "PIECE", PIECE)
    monkeypatch.setattr(caches, "LEAST", 1)
    pieces = Read(model, rows, monkeypatch)
    length = max(map(len, rows))
    assert whole.calls == [length]
    assert pieces.calls == [PIECE] * (length // PIECE) + [length % PIECE] * (length % PIECE > 0)
    np.testing.assert_allclose(pieces.logits, whole.logits, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(pieces.ids, whole.ids)
    _, mask = left_padded(rows)
    for found, expected in zip(pieces.cache, whole.cache, strict=True):
        for row, kept in enumerate(mask > 0):  # what is padding is seen by nobody
            np.testing.assert_allclose(
                found[row][:, : len(kept)][:, kept],
                expected[row][:, : len(kept)][:, kept],
                atol=1e-5,
            )


@pytest.mark.parametrize(
    ("free", "expected"), [(1 << 40, 512), (8 * 12 * 2 * 4 * 1000 * 200, 192), (0, 64)]
)
def test_a_piece_is_as_long_as_memory_allows(
    free: int, expected: int, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 tokens of scores fit: 2 rows, 4 heads, 1000 positions, 12 bytes each, an eighth free."""
    session = model.components.session("chat_decoder")
    opening, _ = opening_of(model.components, ROWS[0], ChatSeen(tokens=()))
    heads = opening.num_heads
    assert heads == 4 > session.inputs["past_key_values.0.key"].shape[1]
    layout = caches._Layout(session, None, heads)
    monkeypatch.setattr(caches, "available_memory", lambda: free)
    assert layout.piece_size(2, 1000) == expected
