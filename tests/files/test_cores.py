"""Cores: affinity, control groups of both versions, and OMP_NUM_THREADS."""

from __future__ import annotations

from pathlib import Path

import pytest

from internvl_edge.files import cores
from internvl_edge.files.cores import default_threads, quota_cores, usable_cores


def groups(root: Path, own: str, files: dict[str, str]) -> float | None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    (root / "own").write_text(own)
    return quota_cores(root, root / "own")


CASES: dict[str, tuple[str, dict[str, str], float | None]] = {
    "v2": ("0::/a/b\n", {"a/b/cpu.max": "150000 100000"}, 1.5),
    "v2, the group around it is tighter": (
        "0::/a/b\n",
        {"a/b/cpu.max": "400000 100000", "a/cpu.max": "50000 100000"},
        0.5,
    ),
    "v2 without a limit": ("0::/a\n", {"a/cpu.max": "max 100000"}, None),
    "v2 in a container, with the path of the host": (
        "0::/docker/1234\n",
        {"cpu.max": "200000 100000"},
        2.0,
    ),
    "v1": (
        "4:cpu,cpuacct:/a\n0::/\n",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "250000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        2.5,
    ),
    "v1 mounted alone": (
        "1:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"},
        2.0,
    ),
    "v1 without a limit": (
        "1:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        None,
    ),
    "garbage": ("nonsense\n0::/\n", {"cpu.max": "a lot"}, None),
    "a period of zero": ("0::/\n", {"cpu.max": "1000 0"}, None),
    "nothing mounted": ("0::/\n", {}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_quota_of_control_groups(tmp_path: Path, case: str) -> None:
    own, files, expected = CASES[case]
    assert groups(tmp_path, own, files) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert quota_cores(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(("quota", "count"), [(None, 4), (0.5, 1), (1.5, 2), (2.0, 2), (64.0, 4)])
def test_the_smaller_of_affinity_and_quota_counts(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, count: int
) -> None:
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "_own_quota", lambda: quota)
    assert usable_cores() == count


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("3", 3),
        ("2,1", 2),
        (" 8 ", 8),
        ("", 5),
        ("0", 5),
        ("-1", 5),
        ("x", 5),
        ("1024", 1024),
        ("99999999999", 5),
    ],
)
def test_omp_num_threads_decides_where_nobody_asks(
    monkeypatch: pytest.MonkeyPatch, said: str, count: int
) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 5)
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert default_threads() == count


def test_unset_omp_num_threads_is_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert default_threads() == 5
