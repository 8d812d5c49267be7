from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.runtime.generation.text import TextStream, split_thought
from internvl_edge.types import Array

HOW = Generation(stop_ids=(2,), max_new_tokens=9)


def rows(*ids: int) -> Iterator[Array]:
    return (np.array([i]) for i in ids)


def spelled(ids: list[int]) -> str:
    return " ".join(map(str, ids))


@pytest.mark.parametrize(
    ("ids", "text", "reason", "count"),
    [
        ((5, 6, 2), "5 6", "stop", 3),
        ((5, 6), "5 6", "length", 2),
        ((2,), "", "stop", 1),
        ((5, 2, 7), "5", "stop", 2),
    ],
)
def test_its_end_says_why_and_how_many(
    ids: tuple[int, ...], text: str, reason: str, count: int
) -> None:
    stream = TextStream(rows(*ids), HOW, spelled, 11)
    assert stream.finish_reason is None
    assert "".join(stream) == text
    assert (stream.finish_reason, stream.completion_tokens) == (reason, count)
    assert stream.prompt_tokens == 11


def test_a_closed_stream_computes_no_further_token() -> None:
    computed: list[int] = []

    def tokens() -> Iterator[Array]:
        for i in range(5, 50):
            computed.append(i)
            yield np.array([i])

    stream = TextStream(tokens(), HOW, spelled, 0)
    assert next(stream) == "5"
    stream.close()
    stream.close()
    assert list(stream) == []
    assert computed == [5]
    assert stream.finish_reason is None
    assert stream.completion_tokens == 1


def test_another_thread_closes_a_stream_that_computes() -> None:
    """The token under way is the last one, and its text is not told."""
    is_computing, may_go_on = threading.Event(), threading.Event()
    computed = 0

    def tokens() -> Iterator[Array]:
        nonlocal computed
        for i in range(5, 50):
            is_computing.set()
            assert may_go_on.wait(10)
            computed += 1
            yield np.array([i])

    stream, told = TextStream(tokens(), HOW, spelled, 0), list[str]()
    reader = threading.Thread(target=lambda: told.extend(stream))
    reader.start()
    assert is_computing.wait(10)
    stream.close()
    may_go_on.set()
    reader.join(10)
    assert not reader.is_alive()
    assert (told, computed, stream.finish_reason) == ([], 1, None)


# --- thoughts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("yes", None, "yes"),
        ("<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("<think>hm", "hm", ""),
        ("<think></think>yes", "", "yes"),
        ("<think>", "", ""),
        ("<thin", None, "<thin"),
        ("no <think>hm</think>", None, "no <think>hm</think>"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("<think>a</think>\n<b> <think>c", "a", "<b> <think>c"),
        ("", None, ""),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_thought_comes_apart_from_the_answer(
    text: str, thought: str | None, answer: str, size: int
) -> None:
    assert split_thought(text) == (thought, answer)
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    ids = range(10, 10 + len(parts))

    def decode(ids: list[int]) -> str:
        return "".join(parts[i - 10] for i in ids).strip()

    stream = TextStream(rows(*ids), Generation(stop_ids=(2,)), decode, 0)
    assert "".join(stream) == answer
    assert stream.thought == thought
    assert stream.finish_reason == "length"
