"""Drafts: the same tokens in fewer calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chat.generation import COMPONENTS, Compiled, on_host
from support.checkpoints import write_internvl

from internvl_edge import compiler
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import UsageError
from internvl_edge.runtime.generation.answers import AnswerOptions, Answers, Opening
from internvl_edge.runtime.generation.batch import Generation, Prompt
from internvl_edge.runtime.generation.cache import empty_cache, start
from internvl_edge.runtime.generation.drafts import SIZES, Lookup
from internvl_edge.runtime.generation.loop import generate
from internvl_edge.runtime.generation.prefixes import extended
from internvl_edge.types import Array


class Periodic:
    """A decoder that says a sentence again and again, with an error in every sixth round.

    What it has read is known by position, so that reading in place of what was forgotten counts.
    """

    def __init__(self, *, goes_back: bool) -> None:
        self.goes_back, self.takes_drafts = goes_back, True
        self.read: list[int] = []
        self.calls = 0

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        return self.run_all(ids, mask, positions)[:, -1]

    def run_all(self, ids: Array, mask: Array, positions: Array) -> Array:
        self.calls += 1
        before = mask.shape[1] - ids.shape[1]
        if self.goes_back:
            del self.read[before:]
        assert len(self.read) == before
        self.read += ids[0].tolist()
        kept = [token for token, is_kept in zip(self.read, mask[0], strict=True) if is_kept]
        assert positions[0].tolist() == list(range(len(kept) - ids.shape[1], len(kept)))
        logits = np.zeros((1, ids.shape[1], 20), np.float32)
        for i, place in enumerate(positions[0].tolist()):
            logits[0, i, self.after(kept[: place + 1])] = 1
        return logits

    def after(self, kept: list[int]) -> int:
        return 19 if len(kept) % 31 == 0 else 3 + (len(kept) * 7 + kept[-1]) % 5

    def select(self, rows: Array) -> None:
        raise AssertionError


@pytest.mark.parametrize("goes_back", [True, False])
@pytest.mark.parametrize("draft", [1, 2, 5, 64])
@pytest.mark.parametrize(
    "how", [{}, {"repetition_penalty": 1.2}, {"min_new_tokens": 40, "stop_ids": (5,)}]
)
def test_tokens_are_those_without(goes_back: bool, draft: int, how: dict[str, Any]) -> None:
    prompt = Prompt(rows=[[3, 4, 5, 6, 7, 3, 4, 5]])
    options: dict[str, Any] = {"max_new_tokens": 90, "stop_ids": (), **how}
    plain, drafted = Periodic(goes_back=goes_back), Periodic(goes_back=goes_back)
    expected = generate(plain, prompt, Generation(**options))
    found = generate(drafted, prompt, Generation(**options, draft_tokens=draft))
    np.testing.assert_array_equal(found, expected)
    assert drafted.calls < plain.calls


def test_samples_and_several_rows_are_left_alone() -> None:
    prompt, how = Prompt(rows=[[3, 4, 3, 4]]), {"max_new_tokens": 9, "stop_ids": ()}
    decoder = Periodic(goes_back=True)
    generate(decoder, prompt, Generation(**how, draft_tokens=4, temperature=1.0))  # type: ignore[arg-type]
    assert decoder.calls == 9


@given(st.lists(st.integers(-1, 3), max_size=20), st.integers(1, 5))
def test_a_proposal_is_what_followed_last(ids: list[int], most: int) -> None:
    expected: list[int] = []
    for size in SIZES:
        places = [at for at in range(len(ids) - size) if ids[at : at + size] == ids[-size:]]
        if len(ids) > size and places:
            expected = ids[places[-1] + size :][:most]
            break
    expected = expected[: next((i for i, token in enumerate(expected) if token < 0), most)]
    assert Lookup(ids).propose(most) == expected


def test_no_room_no_proposal() -> None:
    assert Lookup([1, 2, 1, 2]).propose(0) == []


@pytest.mark.parametrize("count", [-1, 65, 1.5])
def test_numbers_that_cannot_be(count: Any) -> None:
    with pytest.raises(UsageError, match="draft_tokens"):
        Generation(draft_tokens=count)


@pytest.fixture(scope="module", params=[None, 100], ids=["growing", "in_place"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder: Path = tmp_path_factory.mktemp("drafts")
    path = write_internvl(folder / "checkpoint", seed=9).path
    options = ExportOptions(
        checkpoint=path, out=folder / "out", components=COMPONENTS, cache_capacity=request.param
    )
    compiler.export(options)
    return Compiled(folder / "out")


@pytest.mark.parametrize("begin", [start, on_host])
def test_a_compiled_decoder_says_the_same(compiled: Compiled, begin: Any) -> None:
    prompt = Prompt(rows=[[1, 7, 9, 4, 1, 7, 9]])
    how: dict[str, Any] = {"max_new_tokens": 60, "stop_ids": ()}
    found = [
        generate(begin(compiled.decoder, empty_cache(compiled.decoder, 1)), prompt, one)
        for one in (Generation(**how), Generation(**how, draft_tokens=5))
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_what_is_kept_has_no_forgotten_positions(compiled: Compiled) -> None:
    prompt, session = Prompt(rows=[[1, 7, 9, 4, 1, 7, 9]]), compiled.decoder
    marks = extended(np.zeros((0, 2), np.int64), prompt.rows[0])
    caches = []
    for draft in (0, 5):
        answers = Answers(AnswerOptions())
        opening = Opening(cache=empty_cache(session, 1), prompt=prompt, marks=marks)
        how = Generation(max_new_tokens=40, stop_ids=(), draft_tokens=draft)
        ids = answers.ids(session, opening, how)
        count, cache = answers.prefixes.find(extended(marks, [*ids, 0]))
        assert count == len(marks) + len(ids) - 1
        caches.append(cache)
    for name, values in caches[0].items():
        np.testing.assert_allclose(caches[1][name], values, rtol=0, atol=1e-4)
