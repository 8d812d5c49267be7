from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_edge.errors import MediaError
from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.runtime.generation.text import TextStream
from internvl_edge.serve.http.meters import Stages
from internvl_edge.serve.http.problems import Problem
from internvl_edge.serve.models.chats import Answer, Chats, Question, StopCutter

WORDS = st.text("ab#", max_size=6)


@given(st.lists(WORDS), st.lists(st.text("ab#", min_size=1, max_size=4), max_size=4))
def test_text_is_cut_before_the_first_stop_however_it_comes(
    pieces: list[str], stops: list[str]
) -> None:
    cutter, told = StopCutter(stops), ""
    for piece in pieces:
        told += cutter.feed(piece)
        if cutter.is_over:
            break
    told += cutter.rest()
    whole = "".join(pieces)
    # As a reader meets them: the stop whose end comes first, the earliest of several.
    ends = [at + len(stop) for stop in stops if (at := whole.find(stop)) >= 0]
    assert cutter.is_over == bool(ends)
    assert whole.startswith(told)
    if ends:
        assert not any(stop in told for stop in stops)
        assert any(whole.startswith(told + stop) for stop in stops)
    else:
        assert told == whole


class Talker:
    """A model that says a word for every permission."""

    def __init__(self) -> None:
        self.may_say = threading.Semaphore(0)
        self.said = 0
        self.error: Exception | None = None

    def see(self, images: Any) -> Any:
        return images

    def chat_stream(self, seen: Any, text: str, history: Any, **how: Any) -> TextStream:
        if self.error is not None:
            raise self.error

        def tokens() -> Iterator[Any]:
            for i in range(5, 5 + int(text)):
                assert self.may_say.acquire(timeout=10)
                self.said += 1
                yield np.array([i])

        how_many = Generation(max_new_tokens=100)
        return TextStream(tokens(), how_many, lambda ids: " ".join(map(str, ids)), 7)


def ask(chats: Chats, count: int, **more: Any) -> Answer:
    return chats.ask(Question(images=(), text=str(count), **more), Stages())


def chats_of(talker: Talker, places: int) -> Chats:
    return Chats(talker, places)  # type: ignore[arg-type]


def test_answers_come_one_after_the_other_and_no_place_is_lost() -> None:
    async def run() -> None:
        talker = Talker()
        chats = chats_of(talker, 2)
        first, second = ask(chats, 2), ask(chats, 3)
        with pytest.raises(Problem) as caught:
            ask(chats, 1)
        assert (caught.value.status, caught.value.code) == (429, "queue_full")
        assert caught.value.headers == {"Retry-After": "1"}
        talker.may_say.release(5)
        assert "".join([piece async for piece in first]) == "5 6"
        assert "".join([piece async for piece in second]) == "5 6 7"
        assert (second.finish_reason, second.completion_tokens, second.prompt_tokens) == (
            "length",
            3,
            7,
        )
        await asyncio.to_thread(chats.close)

    asyncio.run(run())


def test_a_few_are_answered_at_once() -> None:
    async def run() -> None:
        talker = Talker()
        chats = Chats(talker, 3, 2)  # type: ignore[arg-type]
        answers = [ask(chats, 2) for _ in range(3)]
        while len(chats._running) < 2:
            await asyncio.sleep(0.001)
        assert chats.waiting == 1
        talker.may_say.release(6)
        for answer in answers:
            async for _ in answer:
                pass
            assert answer.completion_tokens == 2
        await asyncio.to_thread(chats.close)

    asyncio.run(run())


def test_who_leaves_frees_the_place_after_one_token() -> None:
    async def run() -> None:
        talker = Talker()
        chats = chats_of(talker, 2)
        first, waiting = ask(chats, 50), ask(chats, 50)
        talker.may_say.release(1)
        assert await anext(first) == "5"
        waiting.close()
        assert chats.waiting == 0
        first.close()
        talker.may_say.release(1)  # the token under way
        third = ask(chats, 1)
        talker.may_say.release(1)
        assert [piece async for piece in third] == ["5"]
        assert talker.said <= 3  # of 101
        await asyncio.to_thread(chats.close)

    asyncio.run(run())


def test_an_error_is_told_once_and_ends_the_answer() -> None:
    async def run() -> None:
        talker = Talker()
        talker.error = MediaError("no picture")
        chats = chats_of(talker, 1)
        answer = ask(chats, 1)
        with pytest.raises(MediaError):
            await anext(answer)
        assert [piece async for piece in answer] == []
        await asyncio.to_thread(chats.close)
        with pytest.raises(Problem, match="the server ends"):
            ask(chats, 1)

    asyncio.run(run())


def test_a_stop_ends_the_answer() -> None:
    async def run() -> None:
        talker = Talker()
        chats = chats_of(talker, 1)
        answer = ask(chats, 50, stops=("7",))
        talker.may_say.release(3)
        assert "".join([piece async for piece in answer]) == "5 6 "
        assert (answer.finish_reason, talker.said) == ("stop", 3)
        await asyncio.to_thread(chats.close)

    asyncio.run(run())
