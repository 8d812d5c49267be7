"""Memory: what the machine has free, what this process takes, and what is given back.

Figures come from /proc: ``MemAvailable`` counts the page cache, which the system gives up before
it swaps; ``VmHWM`` and ``VmRSS`` are the most and the present resident memory of this process.

glibc keeps freed memory for the next allocation of its size. Where what comes next is of other
sizes, such as the next block's weights or the bytes of an engine, it is missed: ``trim``.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

__all__ = ["available_memory", "peak_rss_nbytes", "rss_nbytes", "total_memory", "trim"]

KIB = 1024


def available_memory() -> int:
    """Read how many bytes can be had without swapping, page cache included."""
    nbytes = _proc_nbytes("/proc/meminfo", "MemAvailable")
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if nbytes is None else nbytes


def total_memory() -> int | None:
    """Read how many bytes the machine has in all; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


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
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * KIB if match else None
