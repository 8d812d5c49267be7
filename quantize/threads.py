"""Many small pieces of work at once, each on one thread.

PyTorch splits every single operation over its threads and waits for the slowest of them: at pieces
that fit a core's cache the waiting costs as much as the work, and far more where other programs
want the cores too. NumPy does not split at all. So pieces are handed out whole, and within one,
PyTorch computes on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call a function on every item, on as many threads as PyTorch has; the results in order.

    Within such a thread it has one, so that calls inside calls make no more of them.
    """
    count = torch.get_num_threads()
    if count == 1 or len(items) < 2:
        return [function(item) for item in items]
    try:
        with ThreadPoolExecutor(count, "each", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(count)  # of this thread, and of those to come
