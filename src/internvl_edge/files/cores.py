"""Cores: how many of the machine's this process may use.

    affinity      the cores that the scheduler may put it on (taskset, cpusets, SLURM)
    CPU quota     the share of time that its control groups have (Docker's --cpus, Kubernetes'
                  limits), in cores: cgroup v2's cpu.max, v1's cpu.cfs_quota_us and
                  cpu.cfs_period_us, of every group from its own up to the root
    OMP_NUM_THREADS    what the user says; for threads alone (``default_threads``)

More threads than the quota pays for are all stopped for the rest of each period.
"""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

from internvl_edge.files.cgroups import CGROUPS, OWN_CGROUPS, own_groups
from internvl_edge.files.reading import system_text

__all__ = ["MAX_THREADS", "default_threads", "quota_cores", "usable_cores"]

OMP_THREADS = "OMP_NUM_THREADS"
MAX_THREADS = 1024  # more are no number of threads, but a mistake


def usable_cores() -> int:
    """Count the cores that this process may use, by its affinity and its groups' quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _own_quota()
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def default_threads() -> int:
    """Count the threads to compute with where nobody asks for a number: OMP_NUM_THREADS or cores.

    OpenMP takes a list, a number for each level of nesting; the first counts.
    """
    first = os.environ.get(OMP_THREADS, "").split(",")[0].strip()
    if first.isascii() and first.isdigit() and 0 < int(first) <= MAX_THREADS:
        return int(first)
    return usable_cores()


@cache
def _own_quota() -> float | None:
    return quota_cores()


def quota_cores(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> float | None:
    """Read the CPU time that this process's control groups may take, in cores; None: no limit.

    Args:
        root: where control groups are mounted.
        own: the file that names this process's groups.
    """
    limits = [
        _limit_v2(folder) if version == 2 else _limit_v1(folder)
        for version, folder in own_groups("cpu", root, own)
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit_v2(folder: Path) -> float | None:
    quota, _, period = (system_text(folder / "cpu.max") or "max").partition(" ")
    return _cores(quota, period)


def _limit_v1(folder: Path) -> float | None:
    quota, period = (system_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return _cores(quota, period)


def _cores(quota: str, period: str) -> float | None:
    try:
        used, of = int(quota), int(period)
    except ValueError:  # "max", or no such file
        return None
    return used / of if used > 0 and of > 0 else None  # v1: -1 is no limit
