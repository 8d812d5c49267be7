"""What somebody waits for who chats: the first token, the next ones, and all of several callers.

A caller looks at a picture of its own, asks, reads the answer to its end, and asks once more in the
same conversation; then the next one begins. Pictures, questions and seeds differ from caller to
caller and from conversation to conversation, so that what is reused is the conversation's own.

    time to first token   preprocess (decode, cut into tiles), vision (tower and projector), prefill
                          (what is new of the prompt, and the wait for others' steps)
    inter-token           from one token to the next, of one answer
    tokens/s              of all callers together, by the clock on the wall

Ids are drawn from the vocabulary, and no stop id ends an answer: speed does not depend on them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from internvl_edge.artifact import Artifact
from internvl_edge.artifact.components import CHAT_DECODER, DECODER, find_component
from internvl_edge.benchmark.load import MOST_CALLERS
from internvl_edge.benchmark.machine import environment
from internvl_edge.benchmark.table import environment_words, markdown_row
from internvl_edge.benchmark.timing import Distribution
from internvl_edge.errors import ContextLengthError, UsageError
from internvl_edge.files.memory import peak_rss_nbytes
from internvl_edge.runtime.generation.answers import AnswerOptions, Opening
from internvl_edge.runtime.model import Model
from internvl_edge.runtime.model import load as open_model
from internvl_edge.runtime.tasks import caption, chat_decoder
from internvl_edge.runtime.tasks.chat_images import ChatSeen, cut, see
from internvl_edge.runtime.text.chat_tokenizer import PLACE

__all__ = [
    "COLUMNS",
    "ChatBenchmark",
    "ChatFigures",
    "ChatLoad",
    "load_words",
    "markdown",
    "rows_of",
    "run_chats",
]

TURNS = 2  # of a conversation
STAGES = ("preprocess", "vision", "prefill")
COLUMNS: tuple[str, ...] = ("out", "callers", "slots", "first token p50", "of next turn")
COLUMNS += tuple(f"{stage} p50" for stage in STAGES)
COLUMNS += ("next token p50", "p99", "tokens/s", "reused", "peak RSS")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLoad:
    """What is asked, and by how many.

    Raises:
        UsageError: a number that cannot be.
    """

    tiles: int = 1  # of a picture, without its thumbnail; 0: no picture, of an InternVL-Chat
    prompt_tokens: int = 64  # of text, each turn
    answer_tokens: int = 64
    callers: tuple[int, ...] = (1, 4, 16)
    slots: int = 4  # at most, where callers can share a decoder
    seconds: float = 3.0  # in which conversations are begun; each caller has one at least

    def __post_init__(self) -> None:
        for name, value, low in (
            ("tiles", self.tiles, 0),
            ("prompt", self.prompt_tokens, 1),
            ("answer", self.answer_tokens, 2),
            ("callers", min(self.callers, default=0), 1),
            ("slots", self.slots, 1),
        ):
            if value < low:
                raise UsageError(f"--{name} {value}: expected at least {low}")
        if max(self.callers) > MOST_CALLERS:
            raise UsageError(f"--callers {max(self.callers)}: expected at most {MOST_CALLERS}")


@dataclass(slots=True)
class _Samples:
    """What callers measured, in milliseconds; they add to it from their threads."""

    stages: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in STAGES})
    first: list[float] = field(default_factory=list)  # tokens of a conversation's first turn
    again: list[float] = field(default_factory=list)  # of its next ones
    between: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self,
        stages: Mapping[str, float],
        between: list[float],
        read: int,
        reused: int,
        *,
        is_first: bool,
    ) -> None:
        with self.lock:
            for name, value in stages.items():
                self.stages[name].append(value)
            (self.first if is_first else self.again).append(sum(stages.values()))
            self.between += between
            self.prompt_tokens += read
            self.reused_tokens += reused
            self.tokens += 1 + len(between)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFigures:
    """Figures of one directory under one number of callers."""

    out: str
    callers: int
    slots: int  # in which answers shared the decoder; 0: each had its own calls
    answers: int
    first_token: Distribution  # of a conversation's first turn, a picture looked at
    next_first_token: Distribution  # of its next turn
    stages: Mapping[str, Distribution]  # those that ran
    inter_token: Distribution
    tokens_per_second: float
    reused: float  # share of all prompts' positions that were not read again
    peak_rss_nbytes: int | None  # of the process so far

    def to_json(self) -> dict[str, Any]:
        """Name the figures as AIPerf does."""
        return {
            "out": self.out,
            "callers": self.callers,
            "slots": self.slots,
            "answers": self.answers,
            "time_to_first_token": self.first_token.to_json(),
            "time_to_first_token_of_next_turn": self.next_first_token.to_json(),
            **{name: stage.to_json() for name, stage in self.stages.items()},
            "inter_token_latency": self.inter_token.to_json(),
            "output_token_throughput": {"unit": "tokens/s", "avg": self.tokens_per_second},
            "reused": self.reused,
            "peak_rss_bytes": self.peak_rss_nbytes,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatBenchmark:
    """Results, and what is needed to compare them with others."""

    load: ChatLoad
    environment: Mapping[str, Any]
    results: tuple[ChatFigures, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "task": "chat",
            "load": asdict(self.load),
            "environment": self.environment,
            "results": [figures.to_json() for figures in self.results],
        }


def run_chats(
    artifacts: Mapping[str, Artifact], load: ChatLoad, backend: str, device: str, options: Any
) -> ChatBenchmark:
    """Measure every directory under every number of callers.

    Args:
        artifacts: names and open directories.
        load: what is asked.
        backend: that runs them.
        device: where.
        options: of every session, see ``open_session``.

    Raises:
        UsageError: a directory has no decoder, or no room for what is asked.
    """
    results = []
    for name, artifact in artifacts.items():
        if not any(find_component(part).takes_cache for part in artifact.manifest.components):
            raise UsageError(f"{name}: --task chat asks a decoder, and it has none")
        for callers in load.callers:
            how = AnswerOptions(max_queued=max(load.callers))
            with open_model(artifact.path, backend, device, options=options, answers=how) as model:
                results.append(_measure(name, model, callers, load))
    return ChatBenchmark(load=load, environment=environment(), results=tuple(results))


def _measure(name: str, model: Model, callers: int, load: ChatLoad) -> ChatFigures:
    components = model.components
    is_chat = components.has(CHAT_DECODER)
    asked = _Chat(model, load) if is_chat else _Single(model, load)
    slots = components.answers.share(components.session(asked.decoder), min(load.slots, callers))
    try:
        asked.converse(_Samples(), seed=0)  # which opens everything
    except ContextLengthError as error:
        reason, _, _ = str(error).partition("; ")  # what to do follows, of a question in Python
        raise ContextLengthError(
            f"{name}, --prompt {load.prompt_tokens}: {reason}; lower --prompt or --answer, or take "
            "fewer --tiles"
        ) from error
    samples, begun = _Samples(), time.perf_counter()

    def call(caller: int) -> None:
        count = 0
        while count == 0 or time.perf_counter() - begun < load.seconds:
            asked.converse(samples, seed=1 + caller + callers * count)
            count += 1

    with ThreadPoolExecutor(callers) as pool:
        try:
            for done in as_completed([pool.submit(call, caller) for caller in range(callers)]):
                done.result()
        except BaseException:  # a caller's error, or a signal: the others need not go on
            model.close()
            raise
    seconds = time.perf_counter() - begun
    return ChatFigures(
        out=name,
        callers=callers,
        slots=slots,
        answers=len(samples.first) + len(samples.again),
        first_token=Distribution.of(samples.first),
        next_first_token=Distribution.of(samples.again),
        stages={name: Distribution.of(times) for name, times in samples.stages.items() if times},
        inter_token=Distribution.of(samples.between),
        tokens_per_second=samples.tokens / seconds,
        reused=samples.reused_tokens / samples.prompt_tokens,
        peak_rss_nbytes=peak_rss_nbytes(),
    )


# --- conversations -------------------------------------------------------------------------------


class _Conversations:
    """Conversations with an open directory."""

    decoder: str

    def __init__(self, model: Model, load: ChatLoad) -> None:
        components = self.components = model.components
        self.load = load
        self.how = replace(
            caption.generation(components, max_new_tokens=load.answer_tokens), stop_ids=()
        )
        llama = components.artifact.manifest.language_model or {}
        self.vocabulary = int(llama["vocab_size"])

    def ids(self, rng: np.random.Generator) -> list[int]:
        """Draw the ids of a question."""
        ids: list[int] = rng.integers(1, self.vocabulary, self.load.prompt_tokens).tolist()
        return ids

    def answer(
        self,
        samples: _Samples,
        stages: dict[str, float],
        opening: Opening,
        read: int,
        reused: int,
        begun: float,
        *,
        is_first: bool,
    ) -> list[int]:
        """Read an answer to its end, and note what it took; return its ids."""
        session, new, between = self.components.session(self.decoder), list[int](), list[float]()
        last = begun
        for tokens in self.components.answers.tokens(session, opening, self.how):
            now = time.perf_counter()
            if new:
                between.append(1e3 * (now - last))
            else:
                stages["prefill"] = 1e3 * (now - last)
            new.append(int(tokens[0]))
            last = now
        samples.add(stages, between, read, reused, is_first=is_first)
        return new

    def picture(self, rng: np.random.Generator) -> Image.Image:
        """Draw a picture of so many tiles next to each other."""
        size = self.components.preprocessing.size
        levels = rng.integers(0, 256, (size, size * max(1, self.load.tiles), 3), np.uint8)
        return Image.fromarray(levels)


class _Chat(_Conversations):
    """With an InternVL-Chat."""

    decoder = CHAT_DECODER

    def converse(self, samples: _Samples, seed: int) -> None:
        rng, load = np.random.default_rng(seed), self.load
        picture = self.picture(rng) if load.tiles else None
        seen, ids = ChatSeen(tokens=()), list[int]()
        for turn in range(TURNS):
            stages = dict[str, float]()
            if picture is not None and turn == 0:
                with _timed(stages, "preprocess"):
                    tiles = cut(self.components, picture, load.tiles)
                with _timed(stages, "vision"):
                    seen = see(self.components, tiles)
                ids += [PLACE] * sum(seen.places)
            ids += self.ids(rng)
            if turn == 0:  # before the first question is answered, there is room for the last one
                more = (TURNS - 1) * (load.prompt_tokens + load.answer_tokens)
                chat_decoder.require_chat_room(self.components, [len(ids) + more], self.how)
            begun = time.perf_counter()
            opening, reused = chat_decoder.opening_of(self.components, ids, seen)
            ids += self.answer(
                samples, stages, opening, len(ids), reused, begun, is_first=turn == 0
            )


class _Single(_Conversations):
    """With an InternVL-G, which is asked single questions about one picture."""

    decoder = DECODER

    def converse(self, samples: _Samples, seed: int) -> None:
        rng = np.random.default_rng(seed)
        picture, seen = self.picture(rng), None
        for turn in range(TURNS):
            stages = dict[str, float]()
            if seen is None:
                with _timed(stages, "vision"):  # preprocessing included: it has no tiles
                    seen = caption.see(self.components, picture)
            begun = time.perf_counter()
            ids = np.array([self.ids(rng)])
            opening = caption.opening_of(self.components, seen, ids, self.how)
            read = opening.prompt.past + ids.shape[1]
            self.answer(samples, stages, opening, read, 0, begun, is_first=turn == 0)


@contextmanager
def _timed(stages: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    stages[name] = 1e3 * (time.perf_counter() - begun)


# --- for people ----------------------------------------------------------------------------------


def rows_of(measured: ChatBenchmark) -> list[tuple[str, ...]]:
    """Return the cells of each result, under ``COLUMNS``."""
    rows = []
    for each in measured.results:
        peak = each.peak_rss_nbytes
        rows.append(
            (
                each.out,
                str(each.callers),
                str(each.slots or "–"),
                f"{each.first_token.p50:.1f} ms",
                f"{each.next_first_token.p50:.1f} ms",
                *(f"{each.stages[s].p50:.1f} ms" if s in each.stages else "–" for s in STAGES),
                f"{each.inter_token.p50:.2f} ms",
                f"{each.inter_token.p99:.2f} ms",
                f"{each.tokens_per_second:.1f}",
                f"{each.reused:.0%}",
                "–" if peak is None else f"{peak / 1e6:.0f} MB",
            )
        )
    return rows


def load_words(load: ChatLoad) -> str:
    """Say what was asked."""
    return (
        f"{load.tiles} tile(s), {load.prompt_tokens} tokens of text a turn, answers of "
        f"{load.answer_tokens} tokens, conversations of {TURNS} turns"
    )


def markdown(measured: ChatBenchmark) -> str:
    """Write the results as Markdown: a table, what was asked, the environment."""
    lines = [
        markdown_row(COLUMNS),
        markdown_row(["---"] + ["---:"] * (len(COLUMNS) - 1)),
        *map(markdown_row, rows_of(measured)),
        "",
        f"- {load_words(measured.load)}",
        *[f"- {key}: {value}" for key, value in environment_words(measured.environment).items()],
    ]
    return "\n".join(lines) + "\n"
