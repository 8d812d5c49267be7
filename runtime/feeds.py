"""The feeds that a session accepts, by the ``TensorSpec``s of its inputs.

A dimension of a spec is

    an int            exactly this size
    a name            any size, the same wherever the name stands in one call: ``batch``
    a sum of those    ``past+length``

and sizes are at least 1, but for ``past``, which is 0 when a decoder starts. Nothing is cast:
an array of another dtype or byte order is an error. A strided array is copied to a contiguous one
first and so gives the same result.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from internvl_edge.artifact import TensorSpec
from internvl_edge.errors import FeedError, MissingDependency, UsageError, did_you_mean
from internvl_edge.runtime.gpu.device_array import DeviceArray
from internvl_edge.types import Array

__all__ = ["check_feeds", "check_outputs", "numpy_dtype"]


# Of a decoder whose cache is written in place (``generation.fixed_cache``).
WRITE_INDICES, MASK, POSITIONS = "write_indices", "attention_mask", "position_ids"
# Of a decoder: from which position on there are logits (``export.graph.last_logits``).
LOGITS_FROM = "logits_from"
# Of a decoder's graph for the CPU: up to how many new tokens heads that share keys are rows of one
# (``export.graph.providers.cpu``). A session decides it, not a call.
ROWS_UP_TO = "rows_up_to"
MAY_BE_EMPTY = frozenset({"past"})
NO_SPECS: Mapping[str, TensorSpec] = {}


def check_feeds(
    specs: Mapping[str, TensorSpec],
    feeds: Mapping[str, Any],
    check_finite: bool = True,
    optional: Mapping[str, TensorSpec] = NO_SPECS,
) -> dict[str, Any]:
    """Refuse what a session cannot run; return the feeds, contiguous, in order of the specs.

    Args:
        specs: the session's inputs.
        feeds: one array per input; a ``DeviceArray`` too, whose values are not looked at.
        check_finite: refuse NaN and infinity too.
        optional: inputs that may be left out.

    Raises:
        FeedError: a missing or unknown name, not a plain array, another dtype, byte order, rank or
            dimension, dimensions that contradict each other, an empty batch, a non-finite value,
            new positions outside of a cache that is written in place, logits of no position.
    """
    if not isinstance(feeds, Mapping):
        raise FeedError(
            f"expected a mapping of the inputs {', '.join(specs)}, found {type(feeds).__name__}"
        )
    if optional:
        specs = {**specs, **{name: spec for name, spec in optional.items() if name in feeds}}
    if specs.keys() != feeds.keys():
        raise FeedError(_wrong_names(specs, feeds))
    sizes: dict[str, int] = {}
    sums: list[tuple[TensorSpec, int, str]] = []
    for name, spec in specs.items():
        array = feeds[name]
        _check_kind(spec, array)
        for axis, (expected, size) in enumerate(zip(spec.shape, array.shape, strict=True)):
            if isinstance(expected, int):
                if size != expected:
                    raise FeedError(_wrong_size(spec, array, axis, str(expected)))
            elif "+" in expected:
                sums.append((spec, axis, expected))
            elif sizes.setdefault(expected, size) != size:
                wanted = f"{expected}={sizes[expected]} as in the inputs before it"
                raise FeedError(_wrong_size(spec, array, axis, wanted))
            elif size == 0 and expected not in MAY_BE_EMPTY:
                raise FeedError(_wrong_size(spec, array, axis, "at least 1"))
    for spec, axis, expression in sums:
        _check_sum(spec, feeds[spec.name], axis, expression, sizes)
    if WRITE_INDICES in specs:
        _check_places(specs, feeds)
    if LOGITS_FROM in specs:
        first, length = int(feeds[LOGITS_FROM][0]), feeds[POSITIONS].shape[1]
        if first >= length:
            raise FeedError(
                f"input {LOGITS_FROM!r}: expected a position below {length}, or -1 for the last, "
                f"found {first}"
            )
    if check_finite:
        for name, array in feeds.items():
            _check_finite(name, array)
    return {name: _contiguous(feeds[name]) for name in specs}


def check_outputs(specs: Mapping[str, TensorSpec], names: Sequence[str]) -> list[str]:
    """Return the wanted outputs; refuse one that does not exist.

    Raises:
        UsageError: an unknown name, or none.
    """
    for name in names:
        if name not in specs:
            raise UsageError(
                f"output {name!r}: expected some of {', '.join(specs)}{did_you_mean(name, specs)}"
            )
    if not names:
        raise UsageError(f"no outputs asked for; expected some of {', '.join(specs)}")
    return list(names)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return a dtype by name; those that NumPy lacks, such as bfloat16, are of ml_dtypes."""
    try:
        return np.dtype(name)
    except TypeError:
        pass
    try:
        dtype: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
    except ModuleNotFoundError as error:
        raise MissingDependency.of("ml-dtypes", "export") from error
    return dtype


def _check_places(specs: Mapping[str, TensorSpec], feeds: Mapping[str, Any]) -> None:
    """Refuse new positions outside of a cache that is written in place; nothing else would."""
    first, tokens = feeds[WRITE_INDICES], feeds[POSITIONS]
    if not isinstance(first, np.ndarray):
        return
    capacity, length = int(specs[MASK].shape[1]), tokens.shape[1]
    if first.min() < 0 or first.max() + length > capacity:
        raise FeedError(
            f"input {WRITE_INDICES!r}: expected 0 to {capacity - length}, where {length} new "
            f"positions fit into a cache of {capacity}, found {first.tolist()}"
        )


def _wrong_names(specs: Mapping[str, TensorSpec], feeds: Mapping[str, Array]) -> str:
    missing = [name for name in specs if name not in feeds]
    unknown = [str(name) for name in feeds if name not in specs]
    hints = "".join(did_you_mean(name, missing) for name in unknown)
    wrong = [f"missing {', '.join(missing)}"] if missing else []
    wrong += [f"unknown {', '.join(unknown)}"] if unknown else []
    return f"expected the inputs {', '.join(specs)}; {'; '.join(wrong)}{hints}"


def _check_kind(spec: TensorSpec, array: object) -> None:
    if not isinstance(array, np.ndarray | DeviceArray):
        raise FeedError(
            f"input {spec.name!r}: expected a NumPy array of {_described(spec)}, "
            f"found {type(array).__name__}"
        )
    if isinstance(array, np.ma.MaskedArray):
        raise FeedError(
            f"input {spec.name!r}: a masked array, whose mask nothing here would see; "
            "use .filled(...)"
        )
    if array.dtype.name != spec.dtype or not array.dtype.isnative:
        order = "" if array.dtype.isnative else " of foreign byte order"
        raise FeedError(
            f"input {spec.name!r}: expected {_described(spec)}, found {array.dtype.name}{order} "
            f"{list(array.shape)}; nothing is cast silently, use .astype({spec.dtype!r})"
        )
    if array.ndim != len(spec.shape):
        raise FeedError(
            f"input {spec.name!r}: expected {len(spec.shape)} dimensions, {_described(spec)}, "
            f"found {array.ndim}: {list(array.shape)}"
        )


def _check_sum(
    spec: TensorSpec, array: Array, axis: int, expression: str, sizes: dict[str, int]
) -> None:
    terms = [term.strip() for term in expression.split("+")]
    if not all(term.isdigit() or term in sizes for term in terms):
        # A term that no input fixes leaves the sum free, though the same for all inputs.
        if sizes.setdefault(expression, array.shape[axis]) != array.shape[axis]:
            raise FeedError(_wrong_size(spec, array, axis, f"{expression}={sizes[expression]}"))
        return
    total = sum(int(term) if term.isdigit() else sizes[term] for term in terms)
    if array.shape[axis] != total:
        raise FeedError(_wrong_size(spec, array, axis, f"{expression}={total}"))


def _check_finite(name: str, array: Array | DeviceArray) -> None:
    if isinstance(array, DeviceArray) or array.dtype.kind in "iub" or np.isfinite(array).all():
        return
    count = array.size - int(np.isfinite(array).sum())
    raise FeedError(
        f"input {name!r}: expected finite values, found {count} of {array.size} that are NaN or "
        "infinite; check=False skips this check"
    )


def _contiguous(array: Array | DeviceArray) -> Array | DeviceArray:
    """Return the array as a plain block of memory: itself where it is one."""
    if isinstance(array, DeviceArray):
        return array
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy(order="C")


def _wrong_size(spec: TensorSpec, array: Array, axis: int, expected: str) -> str:
    return (
        f"input {spec.name!r}: expected {_described(spec)}, found {list(array.shape)}: "
        f"dimension {axis} must be {expected}"
    )


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"
