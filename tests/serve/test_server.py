"""The whole server, as its clients and its supervisor meet it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from support.web.serving import Served, data_url, inside, png, process, question

from internvl_edge.errors import ResourceError, SessionDead, UsageError
from internvl_edge.runtime.generation.batch import Generation
from internvl_edge.runtime.generation.text import TextStream
from internvl_edge.runtime.model import Model
from internvl_edge.serve.http import events
from internvl_edge.serve.models.served import ServedModel
from internvl_edge.serve.options import ServeOptions
from internvl_edge.serve.server import bound_socket

KEY = "a-key-of-the-tests"
URL = data_url(png())
CHAT = {"messages": question("what?", URL)}


CLIENTS: list[openai.OpenAI] = []


def client(served: Served, **options: Any) -> openai.OpenAI:
    given = {"api_key": KEY, "max_retries": 0, "timeout": 60} | options
    CLIENTS.append(openai.OpenAI(base_url=f"{served.url}/v1", **given))
    return CLIENTS[-1]


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while CLIENTS:
        CLIENTS.pop().close()


# --- the openai package --------------------------------------------------------------------------


def test_the_openai_client(served: Served, model: Model) -> None:
    asking = client(served)
    assert [one.id for one in asking.models.list()] == ["tiny"]
    assert asking.models.retrieve("tiny").owned_by == "internvl-edge"
    made = asking.embeddings.create(model="tiny", input=["two", "seven"])
    found = np.array([one.embedding for one in made.data], np.float32)
    np.testing.assert_array_equal(found, model.encode_text(["two", "seven"], normalize=True))
    images = asking.embeddings.create(model="tiny", input=[URL], extra_body={"modality": "image"})
    np.testing.assert_array_equal(
        np.array(images.data[0].embedding, np.float32), model.encode_image(png(), normalize=True)[0]
    )
    messages: Any = question("what?", URL)
    whole = asking.chat.completions.create(model="tiny", messages=messages, max_tokens=9)
    expected = model.chat(png(), "what?", max_new_tokens=9).text
    assert whole.choices[0].message.content == expected
    pieces = list(
        asking.chat.completions.create(
            model="tiny",
            messages=messages,
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    told = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert told == expected
    assert pieces[-1].usage == whole.usage


def test_its_errors_are_those_of_the_openai_client(served: Served) -> None:
    asking = client(served)
    with pytest.raises(openai.NotFoundError) as missing:
        asking.embeddings.create(model="other", input="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        asking.embeddings.create(model="tiny", input="a", dimensions=3)
    assert (bad.value.code, bad.value.param) == ("unsupported_parameter", "dimensions")


def test_langchain_and_llama_index(served: Served, model: Model) -> None:
    """As docs/howto/serve.md shows them; neither is among what is installed for development."""
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    llama = pytest.importorskip(
        "llama_index.embeddings.openai_like",
        reason="llama-index-embeddings-openai-like is not installed",
    )
    url, (expected,) = f"{served.url}/v1", model.encode_text(["two"], normalize=True).tolist()
    one = langchain.OpenAIEmbeddings(
        base_url=url, api_key=KEY, model="tiny", check_embedding_ctx_length=False
    )
    other = llama.OpenAILikeEmbedding(model_name="tiny", api_base=url, api_key=KEY)
    assert one.embed_query("two") == pytest.approx(expected, abs=1e-6)
    assert other.get_text_embedding("two") == pytest.approx(expected, abs=1e-6)


# --- keys ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(compiled: Path) -> Iterator[Served]:
    with inside({"tiny": compiled}, keys=("another-key-of-the-tests", KEY)) as running:
        yield running


@pytest.mark.parametrize(
    "shown",
    [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", KEY, "Bearer \xff\xfe"],
)
def test_a_wrong_key(locked: Served, shown: str | None) -> None:
    headers = {} if shown is None else {"Authorization": shown}
    for path, content in (("/v1/embeddings", {"input": "a"}), ("/v1/models", None), ("/no", None)):
        reply = locked.ask(path, content, headers=headers)
        assert reply.error == (401, "invalid_api_key", None)
        assert reply.headers["www-authenticate"] == "Bearer"


def test_the_right_key_and_what_needs_none(locked: Served) -> None:
    headers = {"Authorization": f"bearer  {KEY} "}
    assert locked.ask("/v1/embeddings", {"input": "a"}, headers=headers).status == 200
    assert len(list(client(locked).models.list())) == 1
    for path in ("/health", "/live", "/", "/page.js", "/page.css", "/openapi.json", "/metrics"):
        assert locked.ask(path).status == 200, path


# --- too much, too long, gone --------------------------------------------------------------------


class Slow:
    """Takes the place of ``Model.chat_stream``: a token for every permission."""

    def __init__(self) -> None:
        self.may_say = threading.Semaphore(0)
        self.said = 0
        self.begun = 0

    def __call__(self, seen: Any, text: str, history: Any, **how: Any) -> TextStream:
        self.begun += 1

        def tokens() -> Iterator[Any]:
            for i in range(how["max_new_tokens"]):
                assert self.may_say.acquire(timeout=30)
                self.said += 1
                yield np.array([i + 5])

        length = Generation(max_new_tokens=how["max_new_tokens"])
        return TextStream(tokens(), length, lambda ids: " ".join(map(str, ids)), 3)


@pytest.fixture
def slow(compiled: Path) -> Iterator[tuple[Served, Slow]]:
    with inside({"tiny": compiled}, timeout_s=20) as running:
        talker, served = Slow(), running.service.models["tiny"]
        served.model.chat_stream = talker
        try:
            yield running, talker
        finally:
            talker.may_say.release(1000)


def wait_until(condition: Any, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_six_chats_on_four_places(slow: tuple[Served, Slow]) -> None:
    """Two are refused at once; where they try again, all are answered."""
    served, talker = slow
    with ThreadPoolExecutor(6) as pool:
        chats = [pool.submit(served.ask, "/v1/chat/completions", CHAT) for _ in range(6)]
        wait_until(lambda: sum(chat.done() for chat in chats) == 2)
        refused = [chat.result() for chat in chats if chat.done()]
        assert [one.error for one in refused] == [(429, "queue_full", None)] * 2
        assert {one.headers["retry-after"] for one in refused} == {"1"}
        talker.may_say.release(10_000)
        assert sorted(chat.result().status for chat in chats) == [200] * 4 + [429] * 2
        asking, messages = client(served, max_retries=5), CHAT["messages"]
        again = pool.map(
            lambda _: asking.chat.completions.create(model="tiny", messages=messages, max_tokens=2),  # type: ignore[arg-type]
            range(6),
        )
        assert [one.choices[0].message.content for one in again] == ["5 6"] * 6


def test_a_stream_shows_a_sign_of_life(
    slow: tuple[Served, Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two pieces that are far apart; clients skip such lines."""
    monkeypatch.setattr(events, "PING_S", 0.05)
    served, talker = slow
    talker.may_say.release(1)
    later = threading.Timer(0.5, talker.may_say.release, (10,))
    later.start()
    asking, messages = client(served), CHAT["messages"]
    with asking.chat.completions.with_streaming_response.create(
        model="tiny",
        messages=messages,  # type: ignore[arg-type]
        max_tokens=3,
        stream=True,
    ) as reply:
        body = reply.read()
    later.join()
    assert body.count(b": ping\n\n") >= 2
    assert b'"content":"5"' in body
    assert body.endswith(b"data: [DONE]\n\n")


@pytest.mark.slow
@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_frees_its_place_within_a_token(
    slow: tuple[Served, Slow], streams: bool
) -> None:
    served, talker = slow
    talker.may_say.release(2 if streams else 1)
    asking = client(served, timeout=60 if streams else 1)
    messages: Any = CHAT["messages"]
    if streams:
        chunks = asking.chat.completions.create(
            model="tiny", messages=messages, max_tokens=50, stream=True
        )
        assert next(iter(chunks)).choices[0].delta.role == "assistant"
        chunks.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            asking.chat.completions.create(model="tiny", messages=messages, max_tokens=50)
    said = talker.said
    chats = served.service.models["tiny"].chats
    wait_until(lambda: all(answer.is_closed for answer in tuple(chats._running)))
    talker.may_say.release(1)
    wait_until(lambda: not chats._running)
    assert talker.said <= said + 2
    talker.may_say.release(1)
    assert served.ask("/v1/chat/completions", {**CHAT, "max_tokens": 1}).status == 200


def test_a_question_that_waits_when_its_client_leaves_is_never_asked(
    slow: tuple[Served, Slow],
) -> None:
    served, talker = slow
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.ask, "/v1/chat/completions", {**CHAT, "max_tokens": 2})
        wait_until(lambda: talker.begun == 1)
        with pytest.raises(openai.APITimeoutError):
            client(served, timeout=0.5).chat.completions.create(
                model="tiny",
                messages=CHAT["messages"],  # type: ignore[arg-type]
            )
        wait_until(lambda: served.service.models["tiny"].chats.waiting == 0)
        talker.may_say.release(100)
        assert first.result().status == 200
    assert talker.begun == 1


def test_what_is_not_done_in_time(compiled: Path) -> None:
    with inside({"tiny": compiled}, timeout_s=0.3) as served:
        talker = Slow()
        served.service.models["tiny"].model.chat_stream = talker
        for streams in (False, True):
            reply = served.ask("/v1/chat/completions", {**CHAT, "stream": streams})
            assert reply.error == (504, "timeout", None)
        talker.may_say.release(1000)
        assert served.ask("/v1/embeddings", {"input": "a"}).status == 200


def test_more_requests_than_places(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond the bound are refused at once, the others answered."""
    with inside({"tiny": compiled}, max_queued=2, max_batch=1) as served:
        gate = threading.Event()
        session = served.service.models["tiny"].components.session("text_embed")
        run = session.run

        def held(*args: Any, **kwargs: Any) -> Any:
            assert gate.wait(30)
            return run(*args, **kwargs)

        monkeypatch.setattr(session, "run", held)
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(served.ask, "/v1/embeddings", {"input": "a"}) for _ in range(6)]
            wait_until(lambda: sum(one.done() for one in asked) == 3)
            gate.set()
            replies = [one.result() for one in asked]
        assert sorted(reply.status for reply in replies) == [200] * 3 + [429] * 3
        assert {reply.error for reply in replies if reply.status == 429} == {
            (429, "queue_full", None)
        }


# --- faults --------------------------------------------------------------------------------------


def failing(served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    session = served.service.models["tiny"].components.session("text_embed")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(session, "run", fail)


def test_a_fault_of_ours_is_not_told_and_logged_under_its_id(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(served, monkeypatch, RuntimeError("secret /path"))
    reply = served.ask("/v1/embeddings", {"input": "a"})
    assert reply.error == (500, "internal_error", None)
    assert b"secret" not in reply.body
    assert reply.headers["x-should-retry"] == "false"
    assert reply.headers["x-request-id"] in caplog.text
    assert "secret" in caplog.text


def test_memory_that_runs_out_is_overload(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(served, monkeypatch, ResourceError("no memory at /path"))
    reply = served.ask("/v1/embeddings", {"input": "a"})
    assert reply.error == (429, "queue_full", None)
    assert b"/path" not in reply.body


def test_a_dead_device_ends_the_server(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with inside({"tiny": compiled}) as served:
        failing(served, monkeypatch, SessionDead("gone"))
        assert served.ask("/v1/embeddings", {"input": "a"}).error == (503, "session_dead", None)
        assert served.service.state == "dead"


def test_what_fails_after_the_first_piece_is_an_event(slow: tuple[Served, Slow]) -> None:
    served, _ = slow

    def stream(*args: Any, **how: Any) -> TextStream:
        def tokens() -> Iterator[Any]:
            yield np.array([5])
            raise RuntimeError("secret")

        return TextStream(tokens(), Generation(), lambda ids: " ".join(map(str, ids)), 3)

    served.service.models["tiny"].model.chat_stream = stream
    reply = served.ask("/v1/chat/completions", {**CHAT, "stream": True})
    assert reply.status == 200
    assert reply.body.endswith(b"data: [DONE]\n\n")
    assert b'"code":"internal_error"' in reply.body
    assert b"secret" not in reply.body


# --- the process ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_within_a_stream_and_under_load(compiled: Path) -> None:
    """Health says so at once; every request that was taken is answered; the exit code is 0."""
    with process(f"tiny={compiled}", "--drain", "1.5") as served, ThreadPoolExecutor(4) as pool:
        asking, messages = client(served), CHAT["messages"]
        chunks = asking.chat.completions.create(
            model="tiny",
            messages=messages,  # type: ignore[arg-type]
            max_tokens=60,
            stream=True,
        )
        first = next(iter(chunks))
        ended = threading.Event()

        def load() -> list[int]:
            statuses = []
            while not ended.is_set():
                try:
                    statuses.append(served.ask("/v1/embeddings", {"input": "a"}).status)
                except ConnectionError:  # not taken any more
                    break
            return statuses

        loads = [pool.submit(load) for _ in range(3)]
        time.sleep(0.3)
        served.process.send_signal(signal.SIGTERM)
        wait_until(lambda: served.ask("/health").status == 503, 1)
        assert served.ask("/live").status == 200
        text = [chunk.choices[0].finish_reason for chunk in [first, *chunks]]
        assert text[-1] in ("length", "stop")
        assert served.process.wait(20) == 0
        ended.set()
        for one in loads:
            statuses = one.result()
            assert statuses
            assert set(statuses) == {200}


@pytest.mark.slow
def test_a_grace_that_runs_out(compiled_chat: Path) -> None:
    arguments = (f"talk={compiled_chat}", "--drain", "0", "--grace", "0")
    with process(*arguments) as served:
        content = {"messages": question("what?"), "max_tokens": 400, "stream": True}
        with ThreadPoolExecutor(3) as pool:
            chats = [pool.submit(served.ask, "/v1/chat/completions", content) for _ in range(3)]
            time.sleep(0.2)
            served.process.send_signal(signal.SIGTERM)
            code = served.process.wait(20)
            done = [chat.exception() is None for chat in chats]
        assert code == (0 if all(done) else 143)


def serve_fails(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "internvl_edge", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_what_the_command_refuses(tmp_path: Path, compiled: Path) -> None:
    code, said = serve_fails(str(compiled), "--host", "0.0.0.0")
    assert code == 2
    assert "--no-auth" in said
    code, said = serve_fails(str(tmp_path / "none"))
    assert code == 3
    code, said = serve_fails(str(compiled), "--gallery", str(tmp_path))
    assert code == 2
    assert "--gallery" in said


def test_an_address_that_is_taken() -> None:
    with bound_socket(ServeOptions(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(UsageError, match="cannot be listened on: Address already in use"):
            bound_socket(ServeOptions(port=port))


def test_a_name_of_no_machine() -> None:
    with pytest.raises(UsageError, match="cannot be listened on"):
        bound_socket(ServeOptions(host="no.such.host.invalid", no_auth=True))


def test_a_model_that_cannot_be_opened_ends_the_server(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: ServedModel, meters: Any) -> None:
        raise ResourceError("no memory for it")

    monkeypatch.setattr(ServedModel, "open", fail)
    with pytest.raises(AssertionError), inside({"tiny": compiled}):
        pass
