"""What the server can be told; everything is checked before anything opens.

A host that other machines can reach is refused without a key. Keys come from a file or the
environment, never from the command line, which every process of the machine can read.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.errors import UsageError

__all__ = ["KEY_VARIABLE", "ServeOptions", "is_loopback", "read_keys", "served_names"]

KEY_VARIABLE = "INTERNVL_EDGE_API_KEY"
SHORTEST_KEY = 16  # characters
MAX_KEY_FILE_NBYTES = 1 << 16
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How requests are taken, and how much of everything.

    Raises:
        UsageError: a value that cannot be, or an open host without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    keys: tuple[str, ...] = ()  # any of them will do; none: everybody may
    no_auth: bool = False  # an open host without a key is meant
    max_batch: int = 8  # rows
    max_delay_ms: float = 2.0
    max_queued: int = 64  # requests of a model that wait
    max_chats: int = 4  # under way and waiting, of a model
    max_body: int = 20 << 20  # bytes
    max_images: int = 64  # of a request
    max_pixels: int = 20_000_000  # of a picture
    timeout_s: float = 60.0
    drain_s: float = 5.0
    grace_s: float = 30.0
    num_threads: int | None = None  # of ONNX Runtime; None: its own choice
    allow_slow: bool = False  # let ONNX Runtime run INT8 and FP8 on a GPU
    backend: str = "auto"
    device: str = "auto"
    page: bool = True
    gallery: Path | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("port", 0, 65535),
            ("max_batch", 1, 1024),
            ("max_delay_ms", 0, 10_000),
            ("max_queued", 1, 1_000_000),
            ("max_chats", 1, 10_000),
            ("max_body", 1024, 1 << 30),
            ("max_images", 1, 10_000),
            ("max_pixels", 1, 50_000_000),
            ("timeout_s", 0.001, 86_400),
            ("drain_s", 0, 3600),
            ("grace_s", 0, 3600),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                option = "--" + name.removesuffix("_s").replace("_", "-")
                raise UsageError(f"{option} {value}: expected {low} to {high}")
        if self.num_threads is not None and not 1 <= self.num_threads <= 1024:
            raise UsageError(f"--threads {self.num_threads}: expected 1 to 1024")
        if not is_loopback(self.host) and not self.keys and not self.no_auth:
            raise UsageError(
                f"--host {self.host}: other machines can reach it; give --api-key-file FILE (or "
                f"set {KEY_VARIABLE}), or say --no-auth where something in front asks for keys"
            )

    @property
    def is_private(self) -> bool:
        """True where only this machine can ask."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a host: ``localhost`` or a loopback address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def read_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Read the keys that clients may show: the lines of a file, or one of the environment.

    Raises:
        UsageError: no such file, none in it, or one that is no key.
    """
    if file is not None:
        try:
            with file.open("rb") as opened:
                text = opened.read(MAX_KEY_FILE_NBYTES).decode("ascii")
        except (OSError, UnicodeDecodeError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or "it is not ASCII text"
            raise UsageError(f"--api-key-file {file}: cannot be read: {reason}") from error
        where, keys = f"--api-key-file {file}", [line.strip() for line in text.splitlines()]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not keys:
            raise UsageError(f"{where}: expected a key on a line, found none")
    else:
        where, keys = KEY_VARIABLE, [environment.get(KEY_VARIABLE, "").strip()]
        keys = [key for key in keys if key]
    for i, key in enumerate(keys):
        if len(key) < SHORTEST_KEY or not re.fullmatch(r"[\x21-\x7e]+", key):
            raise UsageError(
                f"{where}: key {i + 1} has {len(key)} characters: expected {SHORTEST_KEY} or more "
                "of ASCII without spaces; make one with: openssl rand -hex 32"
            )
    return tuple(keys)


def served_names(given: tuple[str, ...]) -> dict[str, Path]:
    """Read what is served: directories, each alone or as ``NAME=OUT``; its folder's name else.

    Raises:
        UsageError: a name that cannot be, or two alike.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, place = text.partition("=")
        is_named = bool(equals) and "/" not in name and not os.path.isdir(text)
        path = Path(place if is_named else text)
        if not is_named:
            name = path.resolve().name
        if not NAME.fullmatch(name):
            raise UsageError(
                f"{text}: {name!r} cannot name a model: expected letters, digits, '.', '_' and "
                "'-', 64 at most; write NAME=OUT"
            )
        if name in found:
            raise UsageError(
                f"{name!r} would name both {found[name]} and {path}; write NAME=OUT for one"
            )
        found[name] = path
    return found
