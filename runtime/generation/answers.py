"""Answers to one prompt each: from caches that are kept, alone or many in one decoder.

An ``Opening`` is a prompt that can be answered. ``Answers`` belongs to an open directory; it keeps
the caches of recent prompts (``prefixes``) and, where the directory was opened with ``slots``, the
places in which answers go on together (``slots``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from threading import Lock
from typing import TypeGuard

from internvl_edge.errors import UsageError, shortened
from internvl_edge.files.forks import in_children
from internvl_edge.files.memory import available_memory
from internvl_edge.runtime.generation.batch import Generation, Prompt
from internvl_edge.runtime.generation.cache import DeviceDecoding, Embed, HostDecoding, start
from internvl_edge.runtime.generation.fixed_cache import position_nbytes
from internvl_edge.runtime.generation.loop import generate, stream
from internvl_edge.runtime.generation.prefixes import ImageTokens, Prefixes, extended
from internvl_edge.runtime.generation.slots import Slots
from internvl_edge.runtime.session import RowSession, Session
from internvl_edge.types import Array

__all__ = ["AnswerOptions", "Answers", "Opening"]

MOST_NBYTES = 1 << 30  # of kept caches, where nobody says
IMAGES_SHARE = 4  # one part in so many is for images
SHARE = 8  # and at most one part in so many of the memory that is free


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """How a model answers.

    Raises:
        UsageError: a value that cannot be.
    """

    # Bytes of host memory for caches of recent prompts, of which the next one reads no position
    # again that it begins with, a quarter of them for tokens of recent images; 0: none. None:
    # 1 GiB, or an eighth of what is free.
    reuse_nbytes: int | None = None
    # Answers that one decoder makes together; 0: each on its own. More needs a decoder whose cache
    # has a fixed capacity, on ONNX Runtime's CPU provider.
    slots: int = 0
    max_queued: int = 64  # answers that may wait for a slot

    def __post_init__(self) -> None:
        nbytes = 0 if self.reuse_nbytes is None else self.reuse_nbytes
        for name, value, low in (
            ("reuse_nbytes", nbytes, 0),
            ("slots", self.slots, 0),
            ("max_queued", self.max_queued, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                told = shortened(value)
                raise UsageError(f"{name} {told}: expected an integer of at least {low}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A prompt that can be answered: one row, after the positions of its cache."""

    cache: Mapping[str, Array]  # present.{i}.key and .value, [1,heads,P,d]
    prompt: Prompt
    embed: Embed | None = None  # of a decoder that takes embeddings
    num_heads: int | None = None  # of its queries; None: as many as its keys have
    marks: Array | None = None  # of all positions (``prefixes``); None: nothing is kept of it

    def start(self, session: Session) -> HostDecoding | DeviceDecoding:
        """Begin decoding after it."""
        return start(session, self.cache, self.embed, self.num_heads)


def can_share(session: Session) -> TypeGuard[RowSession]:
    """Tell whether answers may share the steps of a decoder."""
    return isinstance(session, RowSession) and session.has_rows


class Answers:
    """The caches and slots that the answers of an open directory share; thread-safe.

    Args:
        options: how it answers; None: the defaults.
    """

    def __init__(self, options: AnswerOptions | None = None) -> None:
        self.options = AnswerOptions() if options is None else options
        if not isinstance(self.options, AnswerOptions):
            raise UsageError(f"answers: expected AnswerOptions, found {shortened(options)}")
        budget = self.options.reuse_nbytes
        if budget is None:
            budget = min(MOST_NBYTES, available_memory() // SHARE)
        self.images = ImageTokens(budget // IMAGES_SHARE)
        self.prefixes = Prefixes(budget - self.images.budget_nbytes)
        self._slots: Slots | None = None
        self._is_closed = False
        self._lock = Lock()
        in_children(self, Answers._renew_lock)

    def tokens(self, session: Session, opening: Opening, how: Generation) -> Iterator[Array]:
        """Yield the tokens of an answer, int64 [1], as soon as they are known.

        Raises:
            ResourceError: too many answers wait.
            UsageError: beams, or the model is closed.
        """
        slots = self.slots(session) if how.num_beams == 1 else None
        if slots is None:
            return self._alone(session, opening, how)
        keep = None if opening.marks is None else self.prefixes.keep
        return slots.stream(opening.cache, opening.prompt, how, opening.embed, opening.marks, keep)

    def ids(self, session: Session, opening: Opening, how: Generation) -> list[int]:
        """Compute an answer to its end: its ids, a stop id included; by beams too.

        Raises:
            ResourceError: too many answers wait.
            UsageError: the model is closed.
        """
        if how.num_beams > 1:
            decoding = opening.start(session)
            ids: list[int] = generate(decoding, opening.prompt, how)[0].tolist()
            return ids
        return [int(token[0]) for token in self.tokens(session, opening, how)]

    def share(self, session: Session, slots: int) -> int:
        """Let answers share so many slots, if the session can and before the first one.

        Returns:
            How many they are; 0 where each answer is on its own.
        """
        count = slots if slots > 1 and can_share(session) else 0
        with self._lock:
            self.options = replace(self.options, slots=count)
        return count

    def slots(self, session: Session) -> Slots | None:
        """Return the slots that answers share, opened when first asked for; None: there are none.

        Raises:
            UsageError: they were asked for, and the session has none; or the model is closed.
        """
        count = self.options.slots
        if count == 0:
            return None
        with self._lock:
            if self._is_closed:
                raise UsageError("the model is closed; load it again")
            if self._slots is None:
                if not can_share(session):
                    raise UsageError(
                        f"slots {count}: expected a decoder whose cache has a fixed capacity, on "
                        "ONNX Runtime's CPU provider; export with --cache-capacity, and load on "
                        "device 'cpu'"
                    )
                self._slots = Slots(session.rows(count), self.options.max_queued)
            return self._slots

    def close(self) -> None:
        """End the answers under way in slots, and forget what was kept."""
        with self._lock:
            self._is_closed, slots, self._slots = True, self._slots, None
        if slots is not None:
            slots.close()
        self.prefixes.clear()
        self.images.clear()

    def __del__(self) -> None:
        slots = getattr(self, "_slots", None)
        if slots is not None:
            slots.close(wait=False)

    def _alone(self, session: Session, opening: Opening, how: Generation) -> Iterator[Array]:
        prompt = opening.prompt
        decoding, new = opening.start(session), list[int]()
        nbytes = position_nbytes(session.inputs)
        try:
            for tokens in stream(decoding, prompt, how):
                new.append(int(tokens[0]))
                yield tokens
        except GeneratorExit:  # whoever reads has left; what was read is worth keeping
            self._keep(decoding, opening, new, nbytes)
            raise
        self._keep(decoding, opening, new, nbytes)

    def _keep(
        self,
        decoding: HostDecoding | DeviceDecoding,
        opening: Opening,
        new: list[int],
        nbytes: int,
    ) -> None:
        if opening.marks is None or not new:
            return
        marks = extended(opening.marks, new[:-1])  # the last was not read
        if len(marks) * nbytes > self.prefixes.budget_nbytes:
            return
        try:
            self.prefixes.keep(marks, decoding.positions(len(marks)))
        except MemoryError:  # the answer is there all the same
            return

    def _renew_lock(self) -> None:
        self._lock = Lock()
