"""A conversation keeps its cache: the same answers, and fewer positions to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.checkpoints import write_chat, write_chat_tokenizer

from internvl_edge import compiler, load
from internvl_edge.compiler import ExportOptions
from internvl_edge.errors import UsageError
from internvl_edge.runtime.components import AnswerOptions
from internvl_edge.runtime.generation import cache as caches
from internvl_edge.runtime.generation.batch import Batch
from internvl_edge.runtime.model import Model
from internvl_edge.runtime.session import RowSession
from internvl_edge.runtime.tasks.chat_decoder import opening_of
from internvl_edge.types import Array

TOKENS = 12


def picture(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8))


@pytest.fixture(scope="module", params=[None, 300], ids=["growing", "in_place"])
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reuse")
    write_chat(folder / "checkpoint", seed=3)
    write_chat_tokenizer(folder / "checkpoint")
    options = ExportOptions(
        checkpoint=folder / "checkpoint", out=folder / "out", cache_capacity=request.param
    )
    compiler.export(options)
    return folder / "out"


@pytest.fixture
def model(out: Path) -> Iterator[Model]:
    with load(out) as opened:
        yield opened


@pytest.fixture
def plain(out: Path) -> Iterator[Model]:
    with load(out, answers=AnswerOptions(reuse_nbytes=0)) as opened:
        yield opened


def turns(model: Model, **how: Any) -> list[Any]:
    seen, replies = model.see(picture()), list[Any]()
    history: Any = ()
    for question in ("what is it", "left of what?", "why"):
        reply = model.chat(seen, question, history, max_new_tokens=TOKENS, **how)
        history = reply.history
        replies.append(reply)
    return replies


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 1.0, "seed": 4}, {"repetition_penalty": 1.3}, {"num_beams": 2}],
    ids=["greedy", "drawn", "penalised", "beams"],
)
def test_answers_are_those_without_reuse(model: Model, plain: Model, how: Any) -> None:
    found, expected = turns(model, **how), turns(plain, **how)
    assert [reply.text for reply in found] == [reply.text for reply in expected]
    assert [replace(r.usage, reused_tokens=0) for r in found] == [r.usage for r in expected]
    assert all(reply.usage.reused_tokens == 0 for reply in expected)


def test_a_conversation_reads_what_is_new(model: Model) -> None:
    first, second, third = (reply.usage for reply in turns(model))
    assert first.reused_tokens == 0
    # all of the question; of the answer, where its tokens are spelled as they were drawn
    assert first.prompt_tokens - 1 <= second.reused_tokens < second.prompt_tokens
    assert second.prompt_tokens - 1 <= third.reused_tokens < third.prompt_tokens


def test_a_question_again_reads_one_position(model: Model) -> None:
    replies = [model.chat(picture(), "why", max_new_tokens=TOKENS) for _ in range(2)]
    assert replies[0].text == replies[1].text
    usage = replies[1].usage
    assert usage.reused_tokens == usage.prompt_tokens - 1


def test_another_image_shares_only_what_stands_before_it(model: Model) -> None:
    question = "<image> why"
    model.chat(picture(), question, max_new_tokens=TOKENS)
    _, ids = model.chat_prompt(picture(), question)
    place = model.artifact.manifest.model["chat"]["image_token_id"]
    other = model.chat(picture(1), question, max_new_tokens=TOKENS)
    assert other.usage.reused_tokens == ids.index(place)


def test_what_does_not_fit_is_read_anew(model: Model, plain: Model) -> None:
    model.chat(None, "what is it", max_new_tokens=TOKENS)
    history = [("never asked", "never said")]
    found = model.chat(None, "why", history, max_new_tokens=TOKENS)
    assert found.text == plain.chat(None, "why", history, max_new_tokens=TOKENS).text
    other = model.chat(None, "why", system="Be brief.", max_new_tokens=TOKENS)
    assert other.text == plain.chat(None, "why", system="Be brief.", max_new_tokens=TOKENS).text


def test_streams_say_the_same_at_their_end(model: Model) -> None:
    reply = model.chat(picture(), "why", max_new_tokens=TOKENS)
    stream = model.chat_stream(picture(), "why", max_new_tokens=TOKENS)
    assert stream.usage.completion_tokens == 0
    assert "".join(stream) == reply.text
    assert stream.usage == replace(reply.usage, reused_tokens=reply.usage.prompt_tokens - 1)


def test_a_stream_that_is_closed_leaves_what_it_read(model: Model) -> None:
    stream = model.chat_stream(picture(), "why", max_new_tokens=TOKENS, stop_ids=())
    next(stream)
    stream.close()
    assert stream.usage.finish_reason is None
    again = model.chat(picture(), "why", max_new_tokens=TOKENS)
    assert again.usage.reused_tokens == again.usage.prompt_tokens - 1


def test_the_vision_tower_runs_once_for_an_image(model: Model, plain: Model) -> None:
    tiles = list[int]()
    session, native = model.session("chat_vision"), model.session("chat_vision").run

    def watched(feeds: Any, **how: Any) -> Any:
        tiles.append(len(feeds["pixel_values"]))
        return native(feeds, **how)

    session.run = watched  # type: ignore[method-assign]
    first, other = picture(), picture(1)
    seen = [model.see(first), model.see([other, first, other])]
    assert tiles == [1, 1]
    expected = plain.see([first, other])
    for found, tokens in (
        (seen[0].tokens[0], expected.tokens[0]),
        (seen[1].tokens[1], expected.tokens[0]),
        (seen[1].tokens[0], expected.tokens[1]),
        (seen[1].tokens[2], expected.tokens[1]),
    ):
        np.testing.assert_allclose(found, tokens, rtol=0, atol=1e-5)
    assert model.components.answers.images.nbytes > 0
    model.close()
    assert model.components.answers.images.nbytes == 0


def test_levels_and_values_of_one_image_are_told_apart(model: Model) -> None:
    values = np.zeros((1, 3, 56, 56), np.float32)
    levels = np.zeros((56, 56, 3), np.uint8)
    one, two = model.see(values).tokens[0], model.see(levels).tokens[0]
    assert np.abs(one - two).max() > 1e-3


def test_a_failure_keeps_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, ids: Array, *_: Any) -> Array:
        return np.full((1, 320), np.nan, np.float32)

    with monkeypatch.context() as patch:
        patch.setattr(caches.DeviceDecoding, "run", broken)
        with pytest.raises(Exception, match="gave NaN"):
            model.chat(None, "why", max_new_tokens=TOKENS)
    assert model.components.answers.prefixes.nbytes == 0
    assert model.chat(None, "why", max_new_tokens=TOKENS).usage.reused_tokens == 0


@pytest.mark.slow
def test_closing_forgets(out: Path) -> None:
    model = load(out)
    model.chat(None, "why", max_new_tokens=2)
    prefixes = model.components.answers.prefixes
    assert prefixes.nbytes > 0
    model.close()
    assert prefixes.nbytes == 0


def test_an_answer_ends_when_its_time_is_over(model: Model) -> None:
    reply = model.chat(None, "why", max_new_tokens=TOKENS, max_time=1e-9)
    assert reply.usage.completion_tokens == 1
    assert reply.usage.finish_reason == "time"
    with pytest.raises(UsageError, match="max_time 0: expected a finite number of seconds"):
        model.chat(None, "why", max_time=0)


def test_logits_are_those_without_reuse(model: Model) -> None:
    """After the positions of one prompt, cut where the second leaves it."""
    seen = model.see(picture())
    _, ids = model.chat_prompt(picture(), "left of what?")
    place = model.artifact.manifest.model["chat"]["image_token_id"]
    ids = [-200 if i == place else i for i in ids]
    session, found = model.session("chat_decoder"), list[Array]()
    for _ in range(2):
        opening, reused = opening_of(model.components, ids, seen)
        decoding = caches.start(session, opening.cache, opening.embed)
        found.append(Batch(decoding, opening.prompt, 1).read_prompt())
        assert (reused > 0) == (len(found) == 2)
        model.chat(seen, "why", max_new_tokens=2)
    np.testing.assert_allclose(*found, rtol=0, atol=1e-4)
    assert isinstance(session, RowSession)
