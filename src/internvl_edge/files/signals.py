"""Ctrl-C and SIGTERM, held back where an exception in the middle would end the process.

Python raises ``KeyboardInterrupt`` between any two of its instructions, those of a callback from
C++ included. PyTorch's tracing dispatches through such callbacks, and the exception of one that
was interrupted meets code that may not throw: the process aborts instead of cleaning up. A builder
of engines drops such an exception and goes on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_held() -> Iterator[Sequence[int]]:
    """Deliver what comes in the meantime at the end; elsewhere than in the main thread, nothing.

    Yields:
        What has come, for work that can be told to stop.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def hold(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, hold) for number in HELD}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])
