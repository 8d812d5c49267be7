"""Many answers in one decoder: each as it would be alone."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import write_chat, write_chat_tokenizer

from internvl_edge import compiler, load
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import InternVLError, MediaError, ResourceError, UsageError
from internvl_edge.runtime.components import AnswerOptions
from internvl_edge.runtime.generation import slots as module
from internvl_edge.runtime.generation.batch import Generation, Prompt
from internvl_edge.runtime.generation.slots import Slots
from internvl_edge.runtime.model import Model
from internvl_edge.types import Array

CAPACITY, TOKENS = 500, 10
ASKED: list[dict[str, Any]] = [
    {"question": "what is it"},
    {"question": "left of what?", "temperature": 1.0, "seed": 3},
    {"question": "why", "repetition_penalty": 1.5},
    {"question": "a" * 100, "min_new_tokens": 5},
    {"question": "how many", "temperature": 0.7, "top_k": 9, "seed": 1},
    {"question": "how many", "temperature": 3.0, "seed": 7},
    {"question": "and", "stop_ids": ()},
    {"question": "no beams are drawn", "num_beams": 2},
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slots")
    write_chat(folder / "checkpoint", seed=3)
    write_chat_tokenizer(folder / "checkpoint")
    for name, capacity in (("out", CAPACITY), ("growing", None)):
        options = ExportOptions(
            checkpoint=folder / "checkpoint", out=folder / name, cache_capacity=capacity
        )
        compiler.export(options)
    return folder / "out"


@pytest.fixture
def model(out: Path) -> Iterator[Model]:
    with load(out, answers=AnswerOptions(slots=3)) as opened:
        yield opened


@pytest.fixture
def alone(out: Path) -> Iterator[Model]:
    with load(out, answers=AnswerOptions(reuse_nbytes=0)) as opened:
        yield opened


def ask(model: Model, asked: dict[str, Any]) -> str:
    return model.chat(None, **{"max_new_tokens": TOKENS, **asked}).text


def slots_of(model: Model) -> Slots:
    slots = model.components.answers.slots(model.session("chat_decoder"))
    assert slots is not None
    return slots


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("piece", [4, 256])
def test_answers_are_those_alone(
    model: Model, alone: Model, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are read whole, or piece by piece while the others go on; rows come and go."""
    monkeypatch.setattr(module, "PIECE", piece)
    expected = [ask(alone, asked) for asked in ASKED]
    with ThreadPoolExecutor(len(ASKED)) as pool:
        for _ in range(3):
            assert list(pool.map(lambda asked: ask(model, asked), ASKED)) == expected
    assert slots_of(model).under_way == slots_of(model).queue_length == 0


def test_images_and_history_are_each_ones_own(model: Model, alone: Model) -> None:
    pictures = np.random.default_rng(0).standard_normal((4, 1, 3, 56, 56)).astype(np.float32)
    how: dict[str, Any] = {"max_new_tokens": TOKENS, "temperature": 1.0, "top_p": 0.9, "seed": 5}

    def talk(opened: Model, i: int) -> list[str]:
        first = opened.chat(pictures[i], "what is it", **how)
        return [first.text, opened.chat(pictures[i], "why", first.history, **how).text]

    expected = [talk(alone, i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: talk(model, i), range(4))) == expected
    assert len({texts[0] for texts in expected}) > 1


def test_answers_share_calls(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, rows = slots_of(model), list[int]()
    native = slots._rows.run
    monkeypatch.setattr(
        slots._rows, "run", lambda s, feeds: rows.append(s.stop - s.start) or native(s, feeds)
    )
    with ThreadPoolExecutor(3) as pool:
        asked = {"question": "why", "stop_ids": (), "max_new_tokens": 100}
        list(pool.map(lambda _: ask(model, asked), range(3)))
    assert max(rows) == 3
    assert len(rows) < 3 * 100


def test_a_short_answer_does_not_wait_for_a_long_one(model: Model) -> None:
    long = model.chat_stream(None, "why", max_new_tokens=200, stop_ids=())
    next(long)
    assert len(ask(model, {"question": "what"})) >= 0
    assert long.completion_tokens < 199
    long.close()


def test_who_waits_too_long_is_told_although_others_need_the_place(out: Path) -> None:
    with load(out, answers=AnswerOptions(slots=2, max_queued=1)) as model:
        slots = slots_of(model)
        streams = [model.chat_stream(None, "why", max_new_tokens=300, stop_ids=()) for _ in "ab"]
        for stream in streams:
            next(stream)
        late = model.chat_stream(None, "why", max_new_tokens=9, max_time=0.001)
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(list, late)
            time.sleep(0.01)
            another = model.chat_stream(None, "why", max_new_tokens=9)
            assert told.result(timeout=20) == []
        for stream in (*streams, another):
            stream.close()
        wait_until(lambda: slots.under_way == slots.queue_length == 0)


def test_a_row_is_clean_after_an_answer_that_failed(model: Model, alone: Model) -> None:
    expected, slots = ask(alone, ASKED[0]), slots_of(model)
    native = slots._rows.run

    def overflowing(rows: slice, feeds: Any) -> Array:
        for held in slots._rows.values.values():
            held[rows] = np.nan
        return np.full_like(native(rows, feeds), np.nan)

    slots._rows.run = overflowing  # type: ignore[method-assign]
    with pytest.raises(InternVLError):
        ask(model, ASKED[3])
    slots._rows.run = native  # type: ignore[method-assign]
    assert ask(model, ASKED[0]) == expected


def test_a_thread_that_ends_takes_nobody_along(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = slots_of(model)
    streams = [model.chat_stream(None, "why", max_new_tokens=300, stop_ids=()) for _ in range(5)]
    next(streams[0])
    monkeypatch.setattr(slots, "_drop_those_over", lambda: 1 // 0)
    for stream in streams:
        with pytest.raises(ZeroDivisionError):
            list(stream)
    with pytest.raises(UsageError, match="closed"):
        model.chat(None, "why")


def test_a_stream_that_is_closed_has_no_reason(model: Model) -> None:
    stream = model.chat_stream(None, "why", max_new_tokens=300, stop_ids=())
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(list, stream)
        stream.close()
        told.result(timeout=20)
    assert stream.finish_reason is None


def test_a_stream_that_is_dropped_ends_at_once(model: Model) -> None:
    slots = slots_of(model)
    gc.disable()
    try:
        stream = model.chat_stream(None, "why", max_new_tokens=300, stop_ids=())
        next(stream)
        assert slots.under_way == 1
        del stream
        wait_until(lambda: slots.under_way == 0)
    finally:
        gc.enable()


def test_who_leaves_frees_the_row(model: Model) -> None:
    slots = slots_of(model)
    streams = [model.chat_stream(None, "why", max_new_tokens=200, stop_ids=()) for _ in range(3)]
    for stream in streams:
        next(stream)
    assert slots.under_way == 3
    streams[0].close()
    wait_until(lambda: slots.under_way == 2)
    del streams[1], stream  # nobody reads on
    wait_until(lambda: slots.under_way <= 1)
    never_read = model.chat_stream(None, "why", max_new_tokens=200, stop_ids=())
    del never_read
    streams[-1].close()
    wait_until(lambda: slots.under_way == slots.queue_length == 0)


def test_the_queue_is_bounded_and_who_waits_may_leave(out: Path) -> None:
    with load(out, answers=AnswerOptions(slots=1, max_queued=1)) as model:
        first = model.chat_stream(None, "why", max_new_tokens=200, stop_ids=())
        next(first)
        second = model.chat_stream(None, "why", max_new_tokens=2)
        with pytest.raises(ResourceError, match="1 answers are waiting; try again later"):
            model.chat_stream(None, "why")
        waiting = threading.Thread(target=lambda: list(second))
        waiting.start()
        second.close()
        waiting.join(10)
        assert not waiting.is_alive()
        third = model.chat_stream(None, "why", max_new_tokens=2, stop_ids=())
        first.close()
        assert len(list(third)) > 0


def test_time_runs_while_an_answer_waits(out: Path) -> None:
    with load(out, answers=AnswerOptions(slots=1)) as model:
        first = model.chat_stream(None, "why", max_new_tokens=250, stop_ids=())
        next(first)
        reply = model.chat(None, "why", max_time=1e-3)
        assert (reply.text, reply.usage.finish_reason) == ("", "time")
        assert first.finish_reason is None
        first.close()


def test_cancelling_while_a_prompt_is_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1)
    slots = slots_of(model)
    stream = model.chat_stream(None, "a" * 200, max_new_tokens=5)
    wait_until(lambda: slots.under_way == 1)
    stream.close()
    wait_until(lambda: slots.under_way == 0)
    assert model.components.answers.prefixes.nbytes == 0


@pytest.mark.slow
def test_an_error_is_one_answers_own(
    model: Model, alone: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = Slots._choose

    def broken(self: Slots, answer: Any, logits: Array) -> None:
        if answer.choice._how.seed == 99 and len(answer.new) == 2:
            logits = np.full_like(logits, np.nan)
        choose(self, answer, logits)

    monkeypatch.setattr(Slots, "_choose", broken)
    asked = [{"question": "why", "seed": seed, "stop_ids": ()} for seed in (1, 99, 2)]
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(ask, model, one) for one in asked]
        with pytest.raises(InternVLError, match="gave NaN"):
            jobs[1].result()
        assert jobs[0].result() == jobs[2].result() == ask(alone, asked[0])


def test_broken_images_are_each_callers_own(model: Model, alone: Model) -> None:
    good = np.zeros((56, 56, 3), np.uint8)
    expected = alone.chat(good, "why", max_new_tokens=TOKENS).text

    def talk(i: int) -> str:
        image: Any = b"no picture" if i % 2 else good
        return model.chat(image, "why", max_new_tokens=TOKENS).text

    with ThreadPoolExecutor(16) as pool:
        for i, job in enumerate([pool.submit(talk, i) for i in range(16)]):
            if i % 2:
                with pytest.raises(MediaError):
                    job.result()
            else:
                assert job.result() == expected


def test_nobody_waits_for_a_cache_to_be_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    keeping, kept = threading.Event(), threading.Event()

    def keep(*_: Any) -> None:
        keeping.set()
        assert kept.wait(20)

    monkeypatch.setattr(model.components.answers.prefixes, "keep", keep)
    stream = model.chat_stream(None, "why", max_new_tokens=250, stop_ids=())
    next(stream)
    stream.close()
    assert keeping.wait(20)
    lock = slots_of(model)._changed
    try:
        assert lock.acquire(timeout=5)  # as whoever asks next does
        lock.release()
    finally:
        kept.set()


def test_closing_under_load_ends_every_answer(out: Path) -> None:
    model = load(out, answers=AnswerOptions(slots=2))
    streams = [model.chat_stream(None, "why", max_new_tokens=250, stop_ids=()) for _ in range(4)]
    next(streams[0])
    model.close()
    for stream in streams:
        with pytest.raises(UsageError, match="the model was closed before the answer ended"):
            list(stream)
    with pytest.raises(UsageError, match="is closed; load it again"):
        model.chat(None, "why")


def test_asyncio_reaches_it(model: Model, alone: Model) -> None:
    async def talk(question: str) -> str:
        stream = await asyncio.to_thread(model.chat_stream, None, question, max_new_tokens=TOKENS)
        return "".join([piece async for piece in stream])

    async def both() -> list[str]:
        return await asyncio.gather(talk("why"), talk("what is it"))

    expected = [ask(alone, {"question": question}) for question in ("why", "what is it")]
    assert asyncio.run(both()) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_child_is_told(model: Model) -> None:
    slots = slots_of(model)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            slots.stream({}, Prompt(rows=[[1]]), Generation())
        except UsageError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert b"before a fork" in os.read(read, 1000)


def test_a_cache_that_grows_has_no_slots(out: Path) -> None:
    with (
        load(out.parent / "growing", answers=AnswerOptions(slots=2)) as model,
        pytest.raises(UsageError, match="slots 2: expected a decoder whose cache has a fixed"),
    ):
        model.chat(None, "why")


def test_beams_are_no_stream(model: Model) -> None:
    with pytest.raises(UsageError, match="num_beams 2: only one beam"):
        slots_of(model).stream({}, Prompt(rows=[[1]]), Generation(num_beams=2))


@pytest.mark.slow
def test_many_callers_for_long(out: Path, alone: Model) -> None:
    """Of 400 requests of random length one in ten leaves; the others are answered as alone."""
    rng = np.random.default_rng(0)
    texts = ["why", "what is it", "left of what?", "how many are there", "a b c"]
    asked = [
        {"question": texts[rng.integers(5)], "max_new_tokens": int(rng.integers(1, 20))}
        for _ in range(400)
    ]
    expected = {str(one): ask(alone, one) for one in asked}
    with load(out, answers=AnswerOptions(slots=4)) as model:

        def talk(number: int) -> str | None:
            stream = model.chat_stream(None, **asked[number])
            if number % 10 == 0:
                next(stream, None)
                stream.close()
                return None
            return "".join(stream)

        with ThreadPoolExecutor(16) as pool:
            for one, text in zip(asked, pool.map(talk, range(400)), strict=True):
                assert text is None or text == expected[str(one)]
        assert slots_of(model).under_way == 0


def test_a_model_that_nobody_holds_ends_its_thread(out: Path) -> None:
    model = load(out, answers=AnswerOptions(slots=2))
    ask(model, ASKED[0])
    thread = slots_of(model)._thread
    del model
    wait_until(lambda: not thread.is_alive())
