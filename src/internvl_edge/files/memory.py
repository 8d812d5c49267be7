"""Memory that was freed, given back to the system.

glibc keeps it for the next allocation of its size. Where what comes next is of other sizes, such as
the next block's weights or the bytes of an engine, it is missed.
"""

from __future__ import annotations

import ctypes

__all__ = ["trim"]


def trim() -> None:
    """Give freed memory back to the system; glibc keeps it for later (malloc_trim(3))."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if malloc_trim is not None:
        malloc_trim(0)
