from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from internvl_edge.errors import UsageError
from internvl_edge.serve.options import ServeOptions, is_loopback, read_keys, served_names

KEY = "0123456789abcdef"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_what_only_this_machine_reaches(host: str) -> None:
    assert is_loopback(host)
    assert ServeOptions(host=host).is_private


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "127.0.0.1.nip"])
def test_an_open_host_needs_a_key_or_a_word(host: str) -> None:
    with pytest.raises(UsageError, match="--no-auth"):
        ServeOptions(host=host)
    assert not ServeOptions(host=host, no_auth=True).is_private
    assert ServeOptions(host=host, keys=(KEY,)).keys


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": 70000}, "--port 70000: expected 0 to 65535"),
        ({"max_batch": 0}, "--max-batch 0"),
        ({"max_delay_ms": -1}, "--max-delay-ms -1"),
        ({"max_queued": 0}, "--max-queued 0"),
        ({"max_chats": 0}, "--max-chats 0"),
        ({"max_body": 5}, "--max-body 5"),
        ({"max_images": 0}, "--max-images 0"),
        ({"max_pixels": 0}, "--max-pixels 0"),
        ({"timeout_s": 0}, "--timeout 0"),
        ({"timeout_s": float("nan")}, "--timeout nan"),
        ({"drain_s": -1}, "--drain -1"),
        ({"grace_s": 1e9}, "--grace"),
        ({"num_threads": 0}, "--threads 0"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ServeOptions(**given)


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the tests\n{KEY}\n\n{KEY}2\n")
    assert read_keys(file, {}) == (KEY, f"{KEY}2")
    assert read_keys(None, {"INTERNVL_EDGE_API_KEY": f" {KEY} "}) == (KEY,)
    assert read_keys(None, {}) == ()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected a key on a line"),
        (b"short", "key 1 has 5 characters"),
        (b"a key with spaces in it", "ASCII without spaces"),
        ("schlüssel-schlüssel".encode(), "not ASCII"),
    ],
)
def test_keys_that_are_none(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_keys(file, {})


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_keys(tmp_path / "none", {})
    with pytest.raises(UsageError, match="key 1 has 3 characters"):
        read_keys(None, {"INTERNVL_EDGE_API_KEY": "abc"})


def test_names_of_what_is_served(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "a=b").mkdir()
    out = str(tmp_path / "out")
    assert served_names((out, f"int8={out}", "x=missing")) == {
        "out": Path(out),
        "int8": Path(out),
        "x": Path("missing"),
    }
    with pytest.raises(UsageError, match="'a=b' cannot name a model"):
        served_names((str(tmp_path / "a=b"),))
    with pytest.raises(UsageError, match="'Zoë' cannot name a model"):
        served_names((out, f"Zoë={out}"))
    with pytest.raises(UsageError, match="would name both"):
        served_names((out, f"{out}/../out"))
