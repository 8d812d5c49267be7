"""Memory: what there is and what is free of it, what this process takes, and what is given back.

Figures come from /proc: ``MemAvailable`` counts the page cache, which the system gives up before
it swaps; ``VmHWM`` and ``VmRSS`` are the most and the present resident memory of this process.
A control group (Docker's --memory, Kubernetes' and SLURM's limits) may allow less than the machine
has, and ends what takes more: ``memory.max`` and ``memory.current`` of cgroup v2,
``memory.limit_in_bytes`` and ``memory.usage_in_bytes`` of v1, less the files in the page cache.

glibc keeps freed memory for the next allocation of its size. Where what comes next is of other
sizes, such as the next block's weights or the bytes of an engine, it is missed: ``trim``.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.files.cgroups import CGROUPS, OWN_CGROUPS, own_groups
from internvl_edge.files.reading import system_text

__all__ = [
    "available_memory",
    "group_memory",
    "peak_rss_nbytes",
    "rss_nbytes",
    "total_memory",
    "trim",
]

KIB = 1024
UNLIMITED = 1 << 62  # cgroup v1 says the largest number of whole pages, v2 "max"


@dataclass(frozen=True, slots=True)
class GroupFiles:
    """The files of a control group that say what memory it may take and has taken."""

    limit: str
    used: str
    cached: tuple[str, str]  # fields of memory.stat: files in the page cache


GROUP_FILES = {  # version → names; a file in the cache is given up before the limit is felt
    1: GroupFiles(
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
    2: GroupFiles("memory.max", "memory.current", ("inactive_file", "active_file")),
}


def available_memory() -> int:
    """Read how many bytes can be had without swapping, page cache included."""
    nbytes = _proc_nbytes("/proc/meminfo", "MemAvailable")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if nbytes is None else nbytes
    return min([free, *(max(limit - used, 0) for limit, used in group_memory())])


def total_memory() -> int | None:
    """Read how many bytes there are in all; None where the system does not say."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return min([machine, *(limit for limit, _ in group_memory())])


def group_memory(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[tuple[int, int]]:
    """Read what this process's control groups may take and have taken, in bytes.

    Args:
        root: where control groups are mounted.
        own: the file that names this process's groups.

    Returns:
        Limit and use of each that has a limit; files in the page cache do not count as used.
    """
    groups = []
    for version, folder in own_groups("memory", root, own):
        of = GROUP_FILES[version]
        limit = _number(folder / of.limit)
        if limit is None or limit >= UNLIMITED:
            continue
        if (used := _number(folder / of.used)) is not None:
            stat = system_text(folder / "memory.stat")
            cached = [re.search(rf"^{name} (\d+)$", stat, re.MULTILINE) for name in of.cached]
            groups.append((limit, used - sum(int(match[1]) for match in cached if match)))
    return groups


def peak_rss_nbytes() -> int | None:
    """Read the most bytes that this process ever had resident; None where the system is silent."""
    return _proc_nbytes("/proc/self/status", "VmHWM")


def rss_nbytes() -> int | None:
    """Read how many bytes this process has resident now; None where the system does not say."""
    return _proc_nbytes("/proc/self/status", "VmRSS")


def trim() -> None:
    """Give freed memory back to the system; glibc keeps it for later (malloc_trim(3))."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if malloc_trim is not None:
        malloc_trim(0)


def _proc_nbytes(file: str, field: str) -> int | None:
    match = re.search(rf"^{field}:\s*(\d+) kB", system_text(Path(file)), re.MULTILINE)
    return int(match[1]) * KIB if match else None


def _number(file: Path) -> int | None:
    text = system_text(file)
    return int(text) if text.isascii() and text.isdigit() else None  # "max": no limit
