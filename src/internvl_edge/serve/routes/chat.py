"""``POST /v1/chat/completions``: text about images, whole or as it is made.

An InternVL-Chat reads the whole conversation. An InternVL-G answers single questions about one
image: the last one is asked, and what was said before is accepted and not read.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from internvl_edge.artifact.components import CHAT_DECODER, DECODER, IMAGE_QUERIES, VISION
from internvl_edge.runtime.generation.limits import num_positions
from internvl_edge.runtime.tasks.chat import ANSWER_TOKENS
from internvl_edge.serve.http.events import EventStream
from internvl_edge.serve.http.exchange import Call
from internvl_edge.serve.http.fields import Fields, require_text
from internvl_edge.serve.http.problems import Problem, bad_request
from internvl_edge.serve.models.chats import Answer, Question
from internvl_edge.serve.models.served import ServedModel, require_components
from internvl_edge.serve.routes.messages import Conversation, read_messages
from internvl_edge.serve.service import Service

__all__ = ["completions"]

MAX_STOPS, LONGEST_STOP = 4, 256
HOTTEST = 2.0
NEUTRAL: dict[str, tuple[Any, ...]] = {  # asked for nothing, they are accepted
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "ignore_eos": (False,),
    "min_p": (0, 0.0),
}
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)


async def completions(service: Service, call: Call) -> Any:
    """Answer the last question of a conversation."""
    fields = Fields(call.content)
    served = service.find(fields.take("model"))
    call.model = served.name
    most = service.options.max_images
    talk = read_messages(fields.need("messages"), most, has_places=served.is_chat)
    how, stops = _generation(served, fields), _stops(fields)
    streams, tells_usage = fields.flag("stream"), False
    if fields.has("stream_options"):
        options = Fields(fields.take("stream_options"), "stream_options")
        tells_usage = options.flag("include_usage")
        options.ignore("include_obfuscation")
        options.end()
    for name, values in NEUTRAL.items():
        fields.neutral(name, *values)
    fields.ignore(*IGNORED)
    fields.end()
    _require_answerable(served, talk)
    if served.is_chat and talk.system is not None:
        how["system"] = talk.system
    images = await served.picture_bytes(talk.urls, call.stages)
    question = Question(
        images=images,
        text=talk.turns[-1].question,
        history=talk.turns[:-1] if served.is_chat else (),
        options=how,
        stops=stops,
    )
    assert served.chats is not None
    answer = served.chats.ask(question, call.stages)
    try:
        if streams:
            first = await anext(answer, None)
            return _streamed(service, call, answer, first, tells_usage)
        text = "".join([piece async for piece in answer])
    except BaseException:
        answer.close()
        raise
    _count(service, answer)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **_thought(answer)},
        "logprobs": None,
        "finish_reason": answer.finish_reason,
    }
    return {**_head(call, "chat.completion"), "choices": [choice], "usage": _usage(answer)}


def _require_answerable(served: ServedModel, talk: Conversation) -> None:
    """Refuse a conversation that this model cannot go on with."""
    if served.is_chat:
        require_components(served, CHAT_DECODER)
        return
    require_components(served, VISION, IMAGE_QUERIES, DECODER)
    if len(talk.urls) != 1:
        text = f"messages: this model looks at exactly one image, found {len(talk.urls)}"
        raise bad_request("invalid_value", text, "messages")


def _generation(served: ServedModel, fields: Fields) -> dict[str, Any]:
    """Read how the answer is made, as options of ``Model.chat_stream``."""
    asked = fields.integer("max_completion_tokens", 1)
    older = fields.integer("max_tokens", 1)
    heat = fields.number("temperature", 0, HOTTEST)
    how: dict[str, Any] = {
        "temperature": heat or None,
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", -1),
        "seed": fields.integer("seed", -(1 << 63)),
        "min_new_tokens": fields.integer("min_tokens") or None,
        "repetition_penalty": fields.number("repetition_penalty", 0.01, 100),
    }
    if how["seed"] is not None:
        how["seed"] %= 1 << 64  # a client's may be negative
    if how["top_k"] in (-1, 0):  # vLLM's "all of them"
        how["top_k"] = None
    if how["top_p"] in (0, 1):  # only the likeliest, and all of them
        how["top_k"] = 1 if how["top_p"] == 0 else how["top_k"]
        how["top_p"] = None
    if heat == 0 or how["top_k"] == 1:
        how |= {"temperature": None, "top_p": None, "top_k": None}
    if fields.has("chat_template_kwargs"):  # vLLM's
        given = Fields(fields.take("chat_template_kwargs"), "chat_template_kwargs")
        thinks = given.flag("enable_thinking")
        given.end()
        if thinks and not served.is_chat:
            raise given.wrong("enable_thinking", "this model answers at once")
        if thinks:
            how["think"] = True
            how["num_beams"] = 1 if heat == 0 else None  # a thought is drawn, unless told otherwise
    most = asked or older
    if most is None and not served.is_chat:  # a chat model fills what room there is
        most = _usual_length(served)
    return {k: v for k, v in {**how, "max_new_tokens": most}.items() if v is not None}


def _usual_length(served: ServedModel) -> int:
    """Choose the most tokens of an InternVL-G's answer whose length was not asked for."""
    if not served.components.has(DECODER):
        return ANSWER_TOKENS  # it is refused for that
    return min(ANSWER_TOKENS, num_positions(served.components.artifact.manifest, DECODER) // 2)


def _stops(fields: Fields) -> tuple[str, ...]:
    raw = fields.take("stop")
    given = [raw] if isinstance(raw, str) else raw if raw is not None else []
    if not isinstance(given, list) or len(given) > MAX_STOPS:
        raise fields.wrong("stop", f"expected a text or at most {MAX_STOPS} of them")
    for i, one in enumerate(given):
        if isinstance(one, str) and len(one) > LONGEST_STOP:
            raise fields.wrong(f"stop[{i}]", f"expected at most {LONGEST_STOP} characters")
        if one in ("\n", " ", "\n\n", "\t"):
            continue  # white space ends an answer as well as a word does
        require_text(one, f"stop[{i}]")
    return tuple(given)


# --- how an answer is told -----------------------------------------------------------------------


def _streamed(
    service: Service, call: Call, answer: Answer, first: str | None, tells_usage: bool
) -> EventStream:
    service.meters.streams.inc()

    def ended() -> None:
        answer.close()
        service.meters.streams.dec()
        _count(service, answer)

    def failed(error: Exception) -> Problem:
        return service.told(error, call.id, call.route)

    return EventStream(_chunks(call, answer, first, tells_usage), failed, ended)


async def _chunks(
    call: Call, answer: Answer, first: str | None, tells_usage: bool
) -> AsyncIterator[Any]:
    """Yield the chunks of a streamed answer."""
    head = _head(call, "chat.completion.chunk")
    usage = {"usage": None} if tells_usage else {}

    def chunk(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**head, "choices": [choice], **usage}

    yield chunk({"role": "assistant", "content": ""})
    if thought := _thought(answer):
        yield chunk(thought)
    if first is not None:
        yield chunk({"content": first})
        async for piece in answer:
            yield chunk({"content": piece})
    yield chunk({}, answer.finish_reason)
    if tells_usage:
        yield {**head, "choices": [], "usage": _usage(answer)}


def _head(call: Call, kind: str) -> dict[str, Any]:
    now = int(time.time())
    return {"id": f"chatcmpl-{call.id}", "object": kind, "created": now, "model": call.model}


def _thought(answer: Answer) -> dict[str, str]:
    """Say what the model thought, as vLLM does; nothing where it did not."""
    return {} if answer.thought is None else {"reasoning_content": answer.thought}


def _usage(answer: Answer) -> dict[str, Any]:
    read, made = answer.prompt_tokens, answer.completion_tokens
    return {
        "prompt_tokens": read,
        "completion_tokens": made,
        "total_tokens": read + made,
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }


def _count(service: Service, answer: Answer) -> None:
    service.meters.tokens.labels(kind="prompt").inc(answer.prompt_tokens)
    service.meters.tokens.labels(kind="completion").inc(answer.completion_tokens)
