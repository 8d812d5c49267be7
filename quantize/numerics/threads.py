"""Many small pieces of work at once, each on one thread.

PyTorch splits every single operation over its threads and waits for the slowest of them: at pieces
that fit a core's cache the waiting costs as much as the work, and far more where other programs
want the cores too. NumPy splits nothing but its matrix products. So pieces are handed out whole,
and within one, PyTorch computes on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    function: Callable[[Item], Result], items: Sequence[Item], most: int | None = None
) -> list[Result]:
    """Call a function on every item, on as many threads as PyTorch has; the results in order.

    Within such a thread it has one, so that calls inside calls make no more of them.

    Args:
        function: what is called.
        items: pieces of work.
        most: threads at once, where a piece takes memory.
    """
    threads = torch.get_num_threads()
    count = min(threads, threads if most is None else most)
    if count == 1 or len(items) < 2:
        return [function(item) for item in items]
    try:
        with ThreadPoolExecutor(count, "each", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)  # of this thread, and of those to come
