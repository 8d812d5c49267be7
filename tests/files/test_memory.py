"""Memory: what control groups of both versions leave of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from internvl_edge.files import memory
from internvl_edge.files.memory import available_memory, group_memory, total_memory

GB = 1_000_000_000
V2 = {"memory.max": "8000", "memory.current": "5000", "memory.stat": "anon 1000\nfile 4000\n"}
CASES: dict[str, tuple[str, dict[str, str], list[tuple[int, int]]]] = {
    "v2": ("0::/a\n", {f"a/{name}": text for name, text in V2.items()}, [(8000, 5000)]),
    "v2, files in the cache give way": (
        "0::/a\n",
        {
            "a/memory.max": "8000",
            "a/memory.current": "5000",
            "a/memory.stat": "anon 1000\nfile 4000\ninactive_file 3000\nactive_file 500",
        },
        [(8000, 1500)],
    ),
    "v2, and the group around it": (
        "0::/a/b\n",
        {
            "a/b/memory.max": "8000",
            "a/b/memory.current": "100",
            "a/memory.max": "4000",
            "a/memory.current": "3000",
        },
        [(8000, 100), (4000, 3000)],
    ),
    "v2 without a limit": ("0::/a\n", {"a/memory.max": "max", "a/memory.current": "5"}, []),
    "v2 in a container, with the path of the host": ("0::/docker/1234\n", V2, [(8000, 5000)]),
    "v1": (
        "4:memory:/a\n0::/\n",
        {
            "memory/a/memory.limit_in_bytes": "9000",
            "memory/a/memory.usage_in_bytes": "7000",
            "memory/a/memory.stat": "file 9\ntotal_inactive_file 20\ntotal_active_file 300",
        },
        [(9000, 6680)],
    ),
    "v1 without a limit": (
        "4:memory:/\n",
        {
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "memory/memory.usage_in_bytes": "7000",
        },
        [],
    ),
    "garbage": ("nonsense\n0::/\n", {"memory.max": "a lot", "memory.current": "5"}, []),
    "nothing mounted": ("0::/\n", {}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_the_memory_of_control_groups(tmp_path: Path, case: str) -> None:
    own, files, expected = CASES[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    assert group_memory(tmp_path, tmp_path / "own") == expected


def test_a_limit_that_changes_is_seen(tmp_path: Path) -> None:
    """So is one that had not been there, and the move to another group."""
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    for group in ("a/b", "c"):
        (tmp_path / group).mkdir(parents=True)
        (tmp_path / group / "memory.current").write_text("5\n")
    assert group_memory(tmp_path, own) == []
    (tmp_path / "a/b/memory.max").write_text("100\n")
    assert group_memory(tmp_path, own) == [(100, 5)]
    (tmp_path / "a/b/memory.max").write_text("50\n")
    (tmp_path / "a/b/memory.current").write_text("6\n")
    assert group_memory(tmp_path, own) == [(50, 6)]
    own.write_text("0::/c\n")
    (tmp_path / "c/memory.max").write_text("70\n")
    assert group_memory(tmp_path, own) == [(70, 5)]


def test_no_control_groups(tmp_path: Path) -> None:
    assert group_memory(tmp_path, tmp_path / "none") == []


@pytest.mark.parametrize(
    ("groups", "free"),
    [([], 3 * GB), ([(2 * GB, GB)], GB), ([(9 * GB, GB)], 3 * GB), ([(GB, 2 * GB)], 0)],
)
def test_the_smaller_of_machine_and_group_counts(
    monkeypatch: pytest.MonkeyPatch, groups: list[tuple[int, int]], free: int
) -> None:
    monkeypatch.setattr(memory, "group_memory", lambda: groups)
    monkeypatch.setattr(memory, "_proc_nbytes", lambda file, field: 3 * GB)
    assert available_memory() == free


def test_a_group_has_less_than_the_machine_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = total_memory()
    monkeypatch.setattr(memory, "group_memory", lambda: [(1234, 0)])
    assert machine is not None and machine > 1234
    assert total_memory() == 1234
