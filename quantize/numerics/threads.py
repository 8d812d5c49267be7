"""Many small pieces of work in parallel, each on one thread.

PyTorch splits every single operation over its threads and waits for the slowest of them: with
pieces that fit a core's cache, the waiting costs as much as the work, and far more where other
programs use the cores too. NumPy splits nothing but its matrix products. So each thread gets whole
pieces, and PyTorch computes each piece on one thread.
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
    """Call a function on every item, on as many threads as PyTorch has; return results in order.

    Inside such a thread PyTorch has one thread, so that nested calls start no more of them.

    Args:
        function: the function to call.
        items: pieces of work.
        most: the most threads at a time, where each piece takes memory.
    """
    threads = torch.get_num_threads()
    count = min(threads, threads if most is None else most)
    if count == 1 or len(items) < 2:
        return [function(item) for item in items]
    try:
        with ThreadPoolExecutor(count, "each", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)  # for this thread, and for those started later
