"""A decoder's cache: handed through the host as arrays, or left on the device between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from internvl_edge.runtime.continuation import Decoding
from internvl_edge.runtime.session import Array, Session

PAST = "past_key_values."


class Device(Protocol):
    """A session that leaves what it computed where it computed it; see ``OrtSession``."""

    def run_device(self, feeds: Mapping[str, Any], *, check: bool) -> dict[str, Any]: ...
    def step(
        self, feeds: Mapping[str, Array], names: Sequence[str], cache: Sequence[Any]
    ) -> tuple[Array, list[Any]]: ...


def start(session: Session, cache: Mapping[str, Array]) -> Decoding:
    """A decoder's session on a cache.

    Args:
        session: of a ``decoder``.
        cache: what ``image_queries`` gave as ``present.{i}.key`` and ``.value``, [B,heads,P,d].
    """
    past = {name.replace("present.", PAST, 1): values for name, values in cache.items()}
    if hasattr(session, "run_device") and hasattr(session, "step"):
        return DeviceDecoding(cast(Device, session), past)
    return HostDecoding(session, past)


class HostDecoding:
    """Any session; the cache goes in and comes out as arrays."""

    def __init__(self, session: Session, past: Mapping[str, Array]) -> None:
        self._session, self._past = session, dict(past)

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **self._past}
        found = self._session.run(feeds, check=False)
        logits: Array = found.pop("logits")[:, -1]
        self._past = {name.replace("present.", PAST, 1): found[name] for name in found}
        return logits

    def select(self, rows: Array) -> None:
        self._past = {name: values[rows] for name, values in self._past.items()}


class DeviceDecoding:
    """A session whose outputs stay on its device; what a step leaves is what the next one reads.

    What comes from outside, or passed through the host, is checked as any feed is.
    """

    def __init__(self, session: Device, past: Mapping[str, Any]) -> None:
        self._session, self._names, self._cache = session, list(past), list(past.values())
        self._is_there = False  # on the device

    def run(self, ids: Array, mask: Array, positions: Array) -> Array:
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        if self._is_there:
            logits, self._cache = self._session.step(feeds, self._names, self._cache)
        else:
            past = dict(zip(self._names, self._cache, strict=True))
            found = self._session.run_device({**feeds, **past}, check=False)
            logits = found["logits"].numpy()
            self._names = [name.replace("present.", PAST, 1) for name in found if name != "logits"]
            self._cache = [value for name, value in found.items() if name != "logits"]
            self._is_there = True
        last: Array = logits[:, -1]
        return last

    def select(self, rows: Array) -> None:
        """Rows pass through the host, where they are others than before."""
        host = [v if isinstance(v, np.ndarray) else v.numpy() for v in self._cache]
        if len(rows) != len(host[0]) or (rows != np.arange(len(rows))).any():
            self._cache, self._is_there = [values[rows] for values in host], False
