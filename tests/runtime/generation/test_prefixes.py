"""Caches of recent prompts: what is found, what is kept, and what is not."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_edge.errors import UsageError
from internvl_edge.runtime.generation.answers import AnswerOptions, Answers
from internvl_edge.runtime.generation.prefixes import ImageTokens, Prefixes, extended, marks_of
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.types import Array

PLENTY = 1 << 20
NONE = np.zeros((0, 2), np.int64)


def image(seed: int, tokens: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal((tokens, 4)).astype(np.float32)


def caches(count: int, seed: int = 0) -> dict[str, Array]:
    values = np.random.default_rng(seed).standard_normal((1, 2, count, 4)).astype(np.float32)
    return {"present.0.key": values}


def texts(*ids: int) -> Array:
    return extended(NONE, ids)


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=9),
    st.lists(st.integers(0, 2), min_size=1, max_size=9),
)
@settings(max_examples=200, deadline=None)
def test_the_longest_common_beginning_is_found(first: list[int], second: list[int]) -> None:
    prefixes, held = Prefixes(PLENTY), caches(len(first))
    prefixes.keep(texts(*first), held)
    expected = 0
    while expected < min(len(first), len(second) - 1) and first[expected] == second[expected]:
        expected += 1
    count, found = prefixes.find(texts(*second))
    assert count == expected
    if count:
        np.testing.assert_array_equal(
            found["present.0.key"], held["present.0.key"][:, :, :expected]
        )


def test_images_count_as_a_whole_or_not_at_all() -> None:
    ids = [1, PLACE, PLACE, PLACE, 7, 8]
    prefixes = Prefixes(PLENTY)
    prefixes.keep(marks_of(ids, [image(0)]), caches(6))
    assert prefixes.find(marks_of([*ids, 9], [image(0)]))[0] == 6
    assert prefixes.find(marks_of([*ids, 9], [image(1)]))[0] == 1  # other bytes
    # the last position is read again, and so is the image that it belongs to
    assert prefixes.find(marks_of(ids[:4], [image(0)]))[0] == 1
    bits = image(0)
    bits[2, 3] = np.nextafter(bits[2, 3], np.float32(np.inf))
    assert prefixes.find(marks_of([*ids, 9], [bits]))[0] == 1


def test_no_id_is_an_image() -> None:
    marks = marks_of([5, PLACE, 5], [image(0, 1)])
    assert (marks[[0, 2]] == [5, 0]).all()
    assert marks[1, 0] < 0
    assert marks[1, 1] % 2 == 1


def test_what_is_longer_takes_the_place_of_its_beginning() -> None:
    prefixes = Prefixes(PLENTY)
    prefixes.keep(texts(1, 2), caches(2))
    one = prefixes.nbytes
    prefixes.keep(texts(1, 2, 3), caches(3))
    assert prefixes.nbytes == one * 3 // 2
    prefixes.keep(texts(1, 2), caches(2))  # which is no beginning of anything kept before it
    assert prefixes.find(texts(1, 2, 3, 4))[0] == 3


def test_the_one_used_least_recently_goes_first() -> None:
    size = 2 * (16 + 2 * 4 * 4)
    prefixes = Prefixes(2 * size)
    for i in (1, 2):
        prefixes.keep(texts(i, i), caches(2, i))
    assert prefixes.find(texts(1, 1, 1))[0] == 2
    prefixes.keep(texts(3, 3), caches(2))
    assert prefixes.nbytes == 2 * size
    assert [prefixes.find(texts(i, i, i))[0] for i in (1, 2, 3)] == [2, 0, 2]


def test_a_budget_below_one_cache_keeps_nothing() -> None:
    prefixes = Prefixes(50)
    prefixes.keep(texts(1, 2), caches(2))
    assert prefixes.nbytes == 0
    assert prefixes.find(texts(1, 2, 3)) == (0, {})


def test_tokens_of_images_are_kept_by_their_use() -> None:
    kept = ImageTokens(2 * image(0).nbytes)
    for i in (0, 1):
        kept.keep(bytes([i]), image(i))
        kept.keep(bytes([i]), image(i))
    assert kept.nbytes == kept.budget_nbytes
    first = kept.find(b"\0")
    kept.keep(b"\2", image(2))
    kept.keep(b"\3", image(3, tokens=99))  # more than all of the budget
    found = [kept.find(bytes([i])) for i in range(4)]
    assert [one is not None for one in found] == [True, False, True, False]
    assert found[0] is first
    with pytest.raises(ValueError, match="read-only"):
        found[0][:] = 0  # type: ignore[index]
    kept.clear()
    assert kept.find(b"\0") is None


def test_no_memory_is_shared() -> None:
    prefixes, given_ = Prefixes(PLENTY), caches(2)
    before = given_["present.0.key"].copy()
    prefixes.keep(texts(1, 2), given_)
    given_["present.0.key"][:] = 0
    np.testing.assert_array_equal(prefixes.find(texts(1, 2, 3))[1]["present.0.key"], before)
    prefixes.clear()
    assert prefixes.nbytes == 0


def test_threads_find_their_own() -> None:
    prefixes, wrong = Prefixes(3000), list[int]()

    def work(number: int) -> None:
        held = caches(4, number)
        for _ in range(200):
            prefixes.keep(texts(number, 1, 2, 3), held)
            count, found = prefixes.find(texts(number, 1, 2, 3, 4))
            if count and (found["present.0.key"] != held["present.0.key"][:, :, :count]).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert prefixes.nbytes <= 3000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reuse_nbytes": -1}, "reuse_nbytes -1: expected an integer of at least 0"),
        ({"slots": 1.5}, "slots 1.5: expected an integer"),
        ({"slots": True}, "slots True: expected an integer"),
        ({"max_queued": 0}, "max_queued 0: expected an integer of at least 1"),
    ],
    ids=["reuse", "slots", "flag", "queue"],
)
def test_options_that_cannot_be(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AnswerOptions(**options)


def test_other_options_are_refused() -> None:
    with pytest.raises(UsageError, match="expected AnswerOptions, found 4"):
        Answers(4)  # type: ignore[arg-type]
