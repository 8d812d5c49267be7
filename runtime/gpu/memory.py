"""GPU memory for results that outlive their call: all outputs of a call in one block.

A decoder's step reads the cache that the last one left and writes a longer one. Two blocks take
turns: what a step has read is what the next one writes. A block that became too small is freed,
and the new one has room for a while, so that not every token allocates.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from internvl_edge.runtime.gpu.device import Device
from internvl_edge.runtime.gpu.device_array import DeviceArray
from internvl_edge.runtime.gpu.handles import Buffer, Event, Stream

__all__ = ["ALIGNMENT", "OutputBlock", "copy_rows", "find_overlap", "new_arrays"]

ALIGNMENT = 256  # of every address an engine is given
ROOM = 4  # a block for a growing cache is larger by 1/4

Shapes = Mapping[str, tuple[int, ...]]
Dtypes = Mapping[str, np.dtype[Any]]
Span = tuple[int, int, str]  # from an address up to another, and what is there


class OutputBlock(Buffer):
    """Memory of several arrays, freed with the last of them.

    Args:
        device: the GPU.
        nbytes: its size.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        super().__init__(device, nbytes)
        self.spare: OutputBlock | None = None  # what was read for what is here, to be written next


def new_arrays(
    device: Device, shapes: Shapes, dtypes: Dtypes, used_up: Sequence[DeviceArray]
) -> tuple[dict[str, DeviceArray], Event]:
    """Allocate uninitialised arrays in one block.

    Args:
        device: the GPU.
        shapes: of the arrays.
        dtypes: of them, and maybe of others.
        used_up: arrays of another block, which will be read for these and then not used again.

    Returns:
        The arrays, and the event to record once they are computed.

    Raises:
        ResourceError: the GPU has no room for them.
    """
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()}
    block = _next_block(device, sum(map(aligned, sizes.values())), used_up)
    ready = Event(device)
    arrays, pointer = {}, block.pointer
    for name, nbytes in sizes.items():
        arrays[name] = DeviceArray(
            pointer=pointer,
            shape=tuple(shapes[name]),
            dtype=dtypes[name],
            device=device.index,
            ready=ready,
            owner=block,
        )
        pointer += aligned(nbytes)
    return arrays, ready


def _next_block(device: Device, nbytes: int, used_up: Sequence[DeviceArray]) -> OutputBlock:
    read = used_up[0].owner if used_up else None
    if not isinstance(read, OutputBlock):
        return OutputBlock(device, nbytes)
    block, read.spare = read.spare, None
    if block is None or block.nbytes < nbytes:
        block = None  # freed before the new one is allocated
        block = OutputBlock(device, nbytes + nbytes // ROOM)
    block.spare = read
    return block


def aligned(nbytes: int) -> int:
    """Round up to a multiple of ``ALIGNMENT``."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def copy_rows(
    stream: Stream, source: DeviceArray, target: DeviceArray, rows: Sequence[int]
) -> None:
    """Copy these rows of an array into another, one after the other, in a stream."""
    nbytes = source.nbytes // source.shape[0]
    for place, row in enumerate(rows):
        stream.copy(target.pointer + place * nbytes, source.pointer + row * nbytes, nbytes)


def find_overlap(written: Sequence[Span], read: Sequence[Span]) -> tuple[str, str] | None:
    """Find something written and something else in the same memory; None if all is apart."""
    spans = sorted(written)
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            return first, second
    starts = [start for start, _, _ in spans]
    for start, end, name in read:
        last = bisect_left(starts, end) - 1  # the last that begins before this ends
        if start < end and last >= 0 and spans[last][1] > start:
            return spans[last][2], name
    return None
